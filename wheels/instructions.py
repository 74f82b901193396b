"""Which instructions object files have: code for every CPU must not hold those of newer ones.

    python wheels/instructions.py build/wheels/win_amd64/cmake

Object files of an instruction set may use it: the engine calls them only where it runs. All others
may use what every CPU of the architecture has, which for x86-64 is SSE2, and for AArch64 Armv8.0.
On macOS for ARM, where the oldest CPU is an M1, the compiler may use what that has. Every Mac with
an Intel CPU has SSSE3, and Apple's compilers use it by default.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

#: Object files that may use newer instructions, by the name of their source.
FREE = ("avx2.cc", "avx512.cc", "neon_dot.cc")

_SSSE3 = (
    r"p(shufb|alignr|abs[bwd]|sign[bwd]|maddubsw|mulhrsw|hadd\w+|hsub\w+)"
    r"|(addsub|hadd|hsub)p[sd]|mov(ddup|shdup|sldup)|lddqu|fisttp\w*|monitor|mwait"  # SSE3
)
# tzcnt and pause are hints to older CPUs, and xgetbv is asked for with a check.
_NEWER = (
    r"v(?!er[rw]\b)[a-z0-9]+"  # VEX and EVEX
    r"|k(mov|and|or|xor|not|shift|unpck|test|add)\w*"  # masks
    r"|p(blend(vb|w)|muld?q?ll?d|muldq|minsb|minud|minsd|minuw|maxsb|maxud|maxsd|maxuw)"  # SSE4.1
    r"|pmov[sz]x\w+|p(extr|insr)[bdq]|extractps|insertps|blendv?p[sd]|round[ps][sd]|dpp[sd]"
    r"|mpsadbw|packusdw|ptest|pcmpeqq|phminposuw|movntdqa"
    r"|crc32\w*|pcmp([ei]str[im]|gtq)|popcnt\w*"  # SSE4.2
    r"|lzcnt\w*|andn[lq]?|bextr\w*|bls(i|r|msk)\w*|bzhi\w*|mulx\w*|pdep\w*|pext[lq]?|rorx\w*"
    r"|(sar|shl|shr)x[lq]?|adcx\w*|adox\w*|movbe\w*|aes\w+|pclmul\w*|sha(1|256)\w+|gf2p8\w+"
    r"|rdrand\w*|rdseed\w*"
)
NEWER_X86, NEWER_MAC = re.compile(f"{_SSSE3}|{_NEWER}"), re.compile(_NEWER)
NEWER_ARM64 = re.compile(
    r"[su]dot|usdot|sudot|[su]mmla|usmmla|bf\w*dot|bfmmla|sqrdml[as]h|fmlal2?|fmlsl2?|fcmla|fcadd"
    r"|(cas|swp|ld(add|clr|eor|set|[su]max|[su]min)|st(add|clr|eor|set|[su]max|[su]min))a?l?[bhp]?"
    r"|crc32c?[bhwx]|aes\w+|sha\w+|pmull2?\.1q|ldapr\w*|sm[34]\w+|eor3|rax1|xar|bcax"
    r"|whilel\w+|ptrue|cnt[bhwd]"
)


def disassembler() -> str:
    """A program that reads object files: LLVM's of every platform, GNU's of this one."""
    for name in ("llvm-objdump", *(f"llvm-objdump-{n}" for n in range(22, 13, -1)), "objdump"):
        if found := shutil.which(name):
            return found
    raise SystemExit("llvm-objdump is missing: apt-get install llvm")


def newer(program: str, path: Path, pattern: re.Pattern[str]) -> list[str]:
    """The instructions of an object file that a pattern matches whole, with their function."""
    command = [program, "-d", "--no-show-raw-insn", str(path)]
    text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    found, function, seen = [], "?", 0
    for line in text.splitlines():
        if name := re.fullmatch(r"[0-9a-f]+ <(.*)>:", line):
            function = name[1]
        elif instruction := re.match(r"\s*[0-9a-f]+:\s+([a-z][a-z0-9.]*)", line):
            seen += 1
            if pattern.fullmatch(instruction[1].split(".")[0]):
                found.append(f"{path.name}: {instruction[1]} in {function}")
    if not seen and path.stat().st_size > 4096:
        found.append(f"{path.name}: nothing in it could be read")
    return found


def check_folder(folder: Path, machine: str, *, mac: bool = False) -> tuple[int, list[str]]:
    """How many object files of a build folder were read, and what is wrong with them."""
    arm = machine in ("aarch64", "arm64")
    pattern = NEWER_ARM64 if arm else NEWER_MAC if mac else NEWER_X86
    files = [path for path in sorted(folder.rglob("*")) if path.suffix in (".o", ".obj")]
    files = [path for path in files if "CMakeScratch" not in path.parts]
    read = [path for path in files if path.stem not in FREE]
    program = disassembler()
    return len(read), [line for path in read for line in newer(program, path, pattern)]


if __name__ == "__main__":
    from wheel_targets import TARGETS

    for word in sys.argv[1:]:
        (target,) = [t for t in TARGETS if t.tag in Path(word).parts]
        mac = target.tag.startswith("macosx")
        if mac and target.machine == "arm64":
            print(f"{word}: every CPU is an M1 or newer")
            continue
        count, wrong = check_folder(Path(word), target.machine, mac=mac)
        if wrong or not count:
            raise SystemExit("\n".join([f"{word}: {count} object files", *wrong[:20]]))
        print(f"{word}: {count} object files have no instruction that some CPUs lack")
