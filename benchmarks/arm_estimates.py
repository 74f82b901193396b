"""Instructions and estimated cycles of the inner loops of the NEON kernels, from the compiled code.

    make kernels-arm
    python -m benchmarks.arm_estimates build/aarch64

Needs Debian's binutils-aarch64-linux-gnu and llvm. `llvm-mca` simulates the scheduler of a core
with all loads in the first cache: an estimate of what a loop is limited by, not a measurement.
"""

from __future__ import annotations

import argparse
import re
import subprocess
from pathlib import Path

CORES = ("cortex-a53", "cortex-a72", "cortex-a76", "neoverse-n1")
ITERATIONS = 300

#: Name of a loop: file, pattern of the function, instructions that the loop has, units of work of
#: an iteration, and what a unit is.
LOOPS = {
    "lookup, K = 8": ("neon", r"lookup_blockILb1ELi16ELi2E", "tbl", 256, "lookup"),
    "lookup, K = 16": ("neon", r"lookup_blockILb1ELi32ELi2E", "tbl", 256, "lookup"),
    "lookup, K = 32": ("neon", r"lookup_blockILb0ELi32ELi2E", "tbl", 128, "lookup"),
    "lookup, K = 64": ("neon", r"lookup_blockILb0ELi64ELi2E", "tbl", 128, "lookup"),
    "tree, K = 16": ("neon", r"encode_treeILi4E", "cmhs", 32, "code"),
    "response, 16 levels": ("neon", r"respond_outputsILi16ELi1ELi4ELi4E", "tbl", 512, "response"),
    "int8": ("neon", r"6dense8E", "smull", 256, "product"),
    "int8, dot products": ("neon_dot", r"6dense8E", "sdot", 256, "product"),
}


def functions(path: Path) -> dict[str, list[tuple[int, str]]]:
    """Address and text of each instruction, by function."""
    command = ["aarch64-linux-gnu-objdump", "-d", "--no-show-raw-insn", str(path)]
    text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    found = {}
    for part in re.split(r"\n(?=[0-9a-f]{16} <)", text):
        if name := re.match(r"[0-9a-f]{16} <(\S+)>:", part):
            lines = re.findall(r"^ +([0-9a-f]+):\s+(.+)$", part, re.M)
            found[name[1]] = [(int(at, 16), line.strip()) for at, line in lines]
    return found


def loops(code: list[tuple[int, str]]) -> list[list[str]]:
    """The loops of a function that have no other inside: from the target of a branch back to it."""
    spans = []
    for at, text in code:
        branch = re.match(r"(?:b\.\w+|cbn?z|tbn?z)\s+(?:.*, )?([0-9a-f]+) <", text)
        if branch and code[0][0] <= int(branch[1], 16) <= at:
            spans.append((int(branch[1], 16), at))
    inner = [
        (a, b) for a, b in spans if not any((c, d) != (a, b) and a <= c <= d <= b for c, d in spans)
    ]
    return [[text for at, text in code if a <= at <= b] for a, b in inner]


def assembly(body: list[str]) -> str:
    """A loop as the assembler takes it: branches go to a label, comments are left out."""
    lines = [re.sub(r"\s*(//.*|<.*>.*)$", "", text) for text in body]
    return "".join(
        re.sub(r"^((?:b\.\w+|cbn?z|tbn?z)\s+(?:.*, )?)[0-9a-f]+$", r"\1top", line) + "\n"
        for line in lines
    )


def cycles(body: list[str], core: str, mca: str) -> float:
    """Estimated cycles of an iteration."""
    command = [mca, "-mtriple=aarch64", f"-mcpu={core}", f"-iterations={ITERATIONS}"]
    command += ["-mattr=+dotprod"] if any("dot" in text for text in body) else []
    result = subprocess.run(
        command, check=True, capture_output=True, text=True, input="top:\n" + assembly(body)
    )
    total = re.search(r"^Total Cycles: +(\d+)", result.stdout, re.M)
    assert total is not None, result.stdout
    return int(total[1]) / ITERATIONS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("build", type=Path, help="folder that CMake built in")
    parser.add_argument("--mca", default="llvm-mca-19", help="the program llvm-mca")
    arguments = parser.parse_args()
    print("| loop | instructions | work |", " | ".join(CORES), "|")
    print("|---|---:|---|" + "---:|" * len(CORES))
    for name, (file, pattern, has, work, unit) in LOOPS.items():
        paths = list(arguments.build.glob(f"**/kernels/{file}.cc.o"))
        if not paths:
            raise SystemExit(f"{arguments.build} has no object file {file}.cc.o; build it first")
        found = [
            body
            for function, code in functions(paths[0]).items()
            if re.search(pattern, function)
            for body in loops(code)
            if any(text.split()[0] == has for text in body)
        ]
        body = min(found, key=len)  # the others handle what is rarer
        figures = []
        for core in CORES:
            if "dot" in name and core in ("cortex-a53", "cortex-a72"):
                figures.append("-")
                continue
            figures.append(f"{work / cycles(body, core, arguments.mca):.1f}")
        print(f"| {name} | {len(body)} | {work} {unit}s |", " | ".join(figures), "|")
    print("\nWork a cycle, by core.")


if __name__ == "__main__":
    main()
