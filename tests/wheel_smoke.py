"""Whether a wheel works by itself: what is in it, and a model run in an empty environment.

    python tests/wheel_smoke.py dist/lutra-0.1.0-cp311-cp311-linux_x86_64.whl zoo/MODEL.lutra

The environment is made by the Python that runs this script, in a temporary folder; the pip of that
Python (22.3 or newer) installs the wheel there and what the wheel requires.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
import time
import venv
import zipfile
from pathlib import Path

LARGEST = 5_000_000  # bytes of a wheel
NEEDED = (
    "lutra/py.typed",
    "lutra/_engine.pyi",
    "lutra/train/__init__.py",
    "lutra/include/engine/core/op_registry.h",  # for plugins
)
#: Runs in the new environment: the golden data of the model, and nothing of PyTorch.
RUN = """
import importlib.util, sys
import lutra
from lutra.format import load_graph

assert lutra.__file__.startswith(sys.prefix), lutra.__file__
assert importlib.util.find_spec("torch") is None, "the environment has PyTorch"
graph, session = load_graph(sys.argv[1]), lutra.Session(sys.argv[1])
inputs, outputs = graph.golden
feeds = {value.name: array for value, array in zip(graph.inputs, inputs, strict=True)}
for got, want in zip(session.run(None, feeds), outputs, strict=True):
    assert got.tobytes() == want.tobytes(), "the outputs are not the golden ones of the file"
print("lutra", lutra.__version__, "on Python", sys.version.split()[0], session)
"""


def complaints(wheel: Path) -> list[str]:
    """What is wrong with the contents of a wheel."""
    found = []
    size = wheel.stat().st_size
    if size >= LARGEST:
        found.append(f"it has {size} bytes; the limit is {LARGEST}")
    names = zipfile.ZipFile(wheel).namelist()
    if foreign := [n for n in names if not re.match(r"lutra(-[^/]+\.dist-info)?/", n)]:
        found.append(f"it holds files outside the package: {foreign}")
    if tests := [n for n in names if re.search(r"(^|[/_])(tests?|conftest)([/_.]|$)", n)]:
        found.append(f"it holds files of the tests: {tests}")
    engines = [n for n in names if re.fullmatch(r"lutra/_engine\.[^/]*so", n)]
    if len(engines) != 1:
        found.append(f"it holds {len(engines)} engines: {engines}")
    stable = sys.version_info >= (3, 12)
    if stable != ("-cp312-abi3-" in wheel.name and all(".abi3." in n for n in engines)):
        kind = "for the stable ABI" if stable else f"for Python {sys.version_info[1]} of 3"
        found.append(f"its tags are not those of a wheel {kind}")
    found += [f"it lacks {name}" for name in NEEDED if name not in names]
    return found


def main(wheel: Path, model: Path) -> None:
    """Checks a wheel; raises where anything is wrong."""
    if found := complaints(wheel):
        raise SystemExit(f"{wheel}: {'; '.join(found)}")
    begin = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        venv.create(folder)
        python, lutra = Path(folder, "bin", "python"), Path(folder, "bin", "lutra")
        pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", python]
        for command in (
            [*pip, "install", "--quiet", wheel],
            [python, "-I", "-c", RUN, model],
            [lutra, "verify", model, "--samples", "0"],
        ):
            subprocess.run([str(word) for word in command], cwd=folder, check=True)
    size, seconds = wheel.stat().st_size, time.perf_counter() - begin
    print(f"{wheel.name}: {size:,} bytes; works in an empty environment ({seconds:.1f} s)")


if __name__ == "__main__":
    main(*(Path(word).resolve() for word in sys.argv[1:]))
