"""Runs a .lutra file on test data in a process that cannot import PyTorch; prints JSON.

python examples/digits_engine.py digits.lutra test.npz
"""

import json
import sys
import time

import numpy as np

sys.modules["torch"] = None  # type: ignore[assignment]  # any import of torch now fails

import lutra  # noqa: E402


def main() -> None:
    session = lutra.Session(sys.argv[1], threads=1)
    with np.load(sys.argv[2], allow_pickle=False) as data:
        x, y = data["x"], data["y"]
    correct = int((session(x).argmax(1) == y).sum())
    times = []
    for i in range(min(200, len(x))):
        image = x[i : i + 1]
        start = time.perf_counter()
        session(image)
        times.append(time.perf_counter() - start)
    print(
        json.dumps(
            {
                "accuracy": 100.0 * correct / len(y),
                "milliseconds": 1e3 * float(np.median(times)),
                "session": repr(session),
            }
        )
    )


if __name__ == "__main__":
    main()
