"""The share of a core that a stream of sound takes.

    python -m benchmarks.stream [FILE ...] [--seconds 10] [--every 1] [--json FILE]

Blocks of 20 ms come in real time: between two of them the process sleeps, so that caches and clock
of the CPU are those of a machine that listens and does little else. The share is the CPU time of
the whole process (`time.process_time`, system calls and sleeping included) over the time that went
by. Beside it stand the CPU time of a block when blocks come without a pause, and of its
two parts: the front end, and the network in the engine. The sound is noise; neither part depends on
what is heard.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from statistics import median
from time import perf_counter, process_time, sleep
from typing import Any

import numpy as np

import lutra
from benchmarks.machine import machine, write_json

ROOT = Path(__file__).parents[1]
FILES = ("dscnn_speech_commands.lutra", "resnet_speech_commands.lutra")
LEAD_IN = 2.0  # seconds of sound that do not count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="*", type=Path, default=[ROOT / "zoo" / f for f in FILES])
    parser.add_argument("--seconds", type=float, default=10.0, help="of sound; default: 10")
    parser.add_argument("--every", type=int, default=1, help="hops between answers; default: 1")
    parser.add_argument("--isa")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    records = []
    for file in options.files:
        record = measure(file, options.seconds, options.every, options.isa)
        records.append(record)
        print(
            f"{file.name}: {record['share_percent']:.2f} % of a core in real time "
            f"({record['answers_per_second']:.0f} answers a second), {record['block_us']:.0f} us a "
            f"block without pauses, of which {record['network_us']:.0f} us network"
        )
    write_json(options.json, {"records": records, "machine": machine()})


def measure(file: Path, seconds: float, every: int, isa: str | None) -> dict[str, Any]:
    """Measures one model."""
    session = lutra.Session(file, threads=1, isa=isa)
    stream = lutra.Stream(session, every=every)
    rate = stream.preprocess.rate
    size = rate // 50
    count = round(seconds * 50)
    rng = np.random.default_rng(0)
    noise = (3000 * rng.standard_normal((round(LEAD_IN * 50) + count) * size)).astype(np.int16)
    blocks = noise.reshape(-1, size)
    lead_in, blocks = blocks[:-count], blocks[-count:]

    def listen(pause: bool) -> tuple[float, float, int]:
        """CPU seconds, seconds and answers of all blocks."""
        stream.reset()
        for block in lead_in:
            stream(block)
        answers = 0
        begin, used = perf_counter(), process_time()
        for number, block in enumerate(blocks):
            if pause:
                sleep(max(0.0, begin + number * size / rate - perf_counter()))
            answers += stream(block) is not None
        return process_time() - used, perf_counter() - begin, answers

    used, took, answers = listen(pause=True)
    fast = [listen(pause=False)[0] / count for _ in range(5)]
    x = session.graph.golden[0][0][:1] if session.graph.golden else None
    if x is None:
        x = stream.preprocess.apply(blocks[: rate // size].reshape(1, -1))
    times = []
    for _ in range(300):
        start = perf_counter()
        session(x)
        times.append(perf_counter() - start)
    return {
        "file": file.name,
        "isa": session.isa,
        "block_ms": 1000 * size / rate,
        "every": every,
        "seconds": took,
        "answers_per_second": answers / took,
        "share_percent": 100 * used / took,
        "block_us": 1e6 * median(fast),
        "network_us": 1e6 * median(times) * answers / count,
    }


if __name__ == "__main__":
    main()
