"""What can be known of wheels without running them.

    python wheels/check_wheels.py dist/*.whl

For each: its files and their hashes, its size, the format and the machine of the engine, the
libraries and the symbols that it needs, what it shows, and for the stable ABI that it uses nothing
else. Needs the extra `wheels` of lutra.
"""

from __future__ import annotations

import hashlib
import io
import re
import subprocess
import sys
import tempfile
import zipfile
from base64 import urlsafe_b64encode
from dataclasses import dataclass, field
from pathlib import Path

from wheel_targets import INTERFACES, TARGETS, Interface, Target

LARGEST = 5_000_000  # bytes of a wheel
ENTRY = "PyInit__engine"
# Zig cannot hide operator new and delete on macOS. They call malloc and free, as those of the
# system do, which may take their place.
MEMORY = re.compile(r"_Z(n[aw]|d[al])[A-Za-z0-9_]*")
LINKERS = {"_init", "_fini", "__dso_handle", "_mh_dylib_header"}  # which linkers add
#: Libraries that every machine of a platform has.
LIBRARIES = {
    "manylinux": r"lib(c|m|dl|pthread|rt)\.so\.\d+|ld-linux-(x86-64|aarch64)\.so\.\d+",
    "musllinux": r"libc\.so|libc\.musl-(x86_64|aarch64)\.so\.1",
    "macosx": r"/usr/lib/libSystem\.B\.dylib",
    "win": r"kernel32\.dll|api-ms-win-crt-[a-z]+-l1-1-0\.dll|ucrtbase\.dll",
}
THREADS_OF_COMPILERS = re.compile(r"_?(omp_|GOMP_|__kmpc_|kmp_)")


@dataclass(frozen=True)
class Engine:
    """What an extension says of itself.

    Attributes:
        machine: ``"x86_64"`` or ``"arm64"``.
        libraries: that it is linked to.
        needs: symbols that it takes from elsewhere.
        shows: symbols that it has for others.
        oldest: macOS: the version of the system; glibc: the versions of symbols, the newest last.
        signed: macOS: whether it has a signature, without which nothing runs on ARM.
    """

    machine: str
    libraries: tuple[str, ...]
    needs: frozenset[str]
    shows: frozenset[str]
    oldest: tuple[int, ...] = ()
    signed: bool = field(default=True)


def read_elf(data: bytes) -> Engine:
    """The engine of a wheel for Linux."""
    from elftools.elf.elffile import ELFFile

    elf = ELFFile(io.BytesIO(data))
    symbols = list(elf.get_section_by_name(".dynsym").iter_symbols())
    dynamic = elf.get_section_by_name(".dynamic")
    versions: list[tuple[int, ...]] = [(0,)]
    if table := elf.get_section_by_name(".gnu.version_r"):
        for _, entries in table.iter_versions():
            for entry in entries:
                if match := re.fullmatch(r"GLIBC_([\d.]+)", entry.name):
                    versions.append(tuple(int(word) for word in match[1].split(".")))
    machine = {"EM_X86_64": "x86_64", "EM_AARCH64": "arm64"}[elf["e_machine"]]
    there = [s for s in symbols if s.name]
    return Engine(
        machine,
        tuple(tag.needed for tag in dynamic.iter_tags("DT_NEEDED")),
        frozenset(s.name for s in there if s["st_shndx"] == "SHN_UNDEF"),
        frozenset(s.name for s in there if s["st_shndx"] != "SHN_UNDEF"),
        max(versions),
    )


def read_macho(data: bytes) -> Engine:
    """The engine of a wheel for macOS."""
    from macholib import mach_o
    from macholib.MachO import MachO
    from macholib.SymbolTable import SymbolTable

    with tempfile.NamedTemporaryFile(suffix=".so") as file:
        file.write(data)
        file.flush()
        macho = MachO(file.name)
        (header,) = macho.headers
        table = SymbolTable(macho)
        libraries: list[str] = []
        oldest: tuple[int, ...] = ()
        signed = False
        for load, command, rest in header.commands:
            if load.cmd in (mach_o.LC_LOAD_DYLIB, mach_o.LC_LOAD_WEAK_DYLIB):
                libraries.append(rest.rstrip(b"\0").decode())
            elif load.cmd == mach_o.LC_CODE_SIGNATURE:
                signed = True
            elif load.cmd == mach_o.LC_BUILD_VERSION:
                number = int(command.minos)
                oldest = (number >> 16, number >> 8 & 255)
            elif load.cmd == mach_o.LC_VERSION_MIN_MACOSX:
                number = int(command.version)
                oldest = (number >> 16, number >> 8 & 255)
    external = [(n, name.decode()) for n, name in table.nlists if n.n_type & 1]  # N_EXT
    machine = {0x01000007: "x86_64", 0x0100000C: "arm64"}[int(header.header.cputype)]
    return Engine(
        machine,
        tuple(libraries),
        frozenset(name.removeprefix("_") for n, name in external if not n.n_type & 0xE),
        frozenset(name.removeprefix("_") for n, name in external if n.n_type & 0xE),
        oldest,
        signed,
    )


def read_pe(data: bytes) -> Engine:
    """The engine of a wheel for Windows."""
    import pefile

    pe = pefile.PE(data=data)
    machine = {0x8664: "x86_64", 0xAA64: "arm64"}[pe.FILE_HEADER.Machine]
    imports = getattr(pe, "DIRECTORY_ENTRY_IMPORT", [])
    exports = getattr(pe, "DIRECTORY_ENTRY_EXPORT", None)
    return Engine(
        machine,
        tuple(entry.dll.decode() for entry in imports),
        frozenset(s.name.decode() for entry in imports for s in entry.imports if s.name),
        frozenset(s.name.decode() for s in exports.symbols if s.name) if exports else frozenset(),
    )


READERS = {"elf": read_elf, "macho": read_macho, "pe": read_pe}


def engine_complaints(engine: Engine, target: Target, interface: Interface) -> list[str]:
    """What is wrong with an engine for a target and an interface."""
    found = []
    machine = "arm64" if target.machine in ("aarch64", "arm64") else "x86_64"
    if engine.machine != machine:
        found.append(f"its engine is for {engine.machine}")
    platform = re.match("[a-z]+", target.tag)[0]  # type: ignore[index]
    allowed = re.compile(LIBRARIES[platform], re.IGNORECASE)
    own = (interface.library,) if target.windows else ()
    if foreign := [n for n in engine.libraries if n not in own and not allowed.fullmatch(n)]:
        found.append(f"its engine is linked to {', '.join(foreign)}")
    if target.windows and interface.library not in engine.libraries:
        found.append(f"its engine is not linked to {interface.library}")
    if threads := sorted(n for n in engine.needs if THREADS_OF_COMPILERS.match(n)):
        found.append(f"its engine needs OpenMP: {threads[0]}")
    if ENTRY not in engine.shows:
        found.append(f"its engine has no {ENTRY}")
    shown = {name for name in engine.shows if "8nanobind" not in name}  # its type of exceptions
    if target.format == "macho":
        shown = {name for name in shown if not MEMORY.fullmatch(name)}
    if more := sorted(shown - {ENTRY} - LINKERS):
        found.append(f"its engine shows {len(more)} symbols more than {ENTRY}: {more[0]}")
    if numbers := re.match(r"(?:manylinux|macosx)_(\d+)_(\d+)_", target.tag):
        limit = tuple(map(int, numbers.groups()))
        if engine.oldest > limit or (platform == "macosx" and not engine.oldest):
            found.append(f"its engine needs version {'.'.join(map(str, engine.oldest))}")
    if not engine.signed and target.machine == "arm64":  # Intel runs what is not signed
        found.append("its engine is not signed")
    return found


def file_complaints(archive: zipfile.ZipFile) -> list[str]:
    """Whether RECORD has every file with its hash and size, and nothing else."""
    names = archive.namelist()
    (record,) = [name for name in names if name.endswith(".dist-info/RECORD")]
    rows = [line.rsplit(",", 2) for line in archive.read(record).decode().splitlines()]
    lines = {name: (digest, size) for name, digest, size in rows}
    found = [f"RECORD and files differ: {name}" for name in sorted(set(lines) ^ set(names))]
    for name in sorted(set(lines) & set(names) - {record}):
        data = archive.read(name)
        digest = urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()
        if lines[name] != (f"sha256={digest}", str(len(data))):
            found.append(f"RECORD has another hash of {name}")
    return found


def parts_of(wheel: Path) -> tuple[Target, Interface]:
    """The target and the interface that a wheel is named for."""
    for target in TARGETS:
        for interface in INTERFACES:
            if wheel.name.endswith(f"-{interface.tag}-{target.tag}.whl"):
                return target, interface
    raise SystemExit(f"{wheel.name} is not the name of a wheel that wheels/wheel_targets.py has")


def complaints(wheel: Path) -> list[str]:
    """What is wrong with a wheel."""
    target, interface = parts_of(wheel)
    found = []
    if (size := wheel.stat().st_size) >= LARGEST:
        found.append(f"it has {size} bytes; the limit is {LARGEST}")
    with zipfile.ZipFile(wheel) as archive:
        found += file_complaints(archive)
        engines = [n for n in archive.namelist() if re.match(r"lutra/_engine\.(?!pyi$)", n)]
        name = f"lutra/_engine{interface.suffix(target)}"
        if engines != [name]:
            return [*found, f"it has the engines {engines}, not {name}"]
        data = archive.read(name)
    return found + engine_complaints(READERS[target.format](data), target, interface)


def outside_complaints(wheel: Path) -> list[str]:
    """What `auditwheel` and `abi3audit` say, where they apply."""
    target, interface = parts_of(wheel)
    found = []
    if target.tag.startswith("manylinux"):
        said = _said("auditwheel", "show", wheel)
        if not re.search('following platform tag: "manylinux', said):
            found.append(f"auditwheel says: {said}")
    elif target.system == "Linux":
        # Zig calls musl `libc.so`, which musl's loader takes for itself under any name of that
        # kind; auditwheel knows only Alpine's name. It must complain of nothing else, and not read
        # the file of that name that this machine has for its linker.
        said = _said("auditwheel", "show", "--ldpaths", "", wheel)
        if 'required by the wheel: { "libc.so": null }' not in said:
            found.append(f"auditwheel says: {said}")
    if interface.stable:
        said = _said("abi3audit", "--strict", "--report", "--summary", wheel)
        good = r'"is_abi3": true, "is_abi3_baseline_compatible": true, "baseline": "3\.12"'
        if len(re.findall(good, said)) != 1:
            found.append(f"abi3audit says: {said}")
    return found


def _said(module: str, *words: str | Path) -> str:
    """What a program says, on one line."""
    command = [sys.executable, "-m", module, *map(str, words)]
    answer = subprocess.run(command, capture_output=True, text=True, check=False)
    return re.sub(r"\s+", " ", answer.stdout + answer.stderr).strip()


def main(wheels: list[Path]) -> None:
    """Checks wheels; raises where anything is wrong."""
    wrong = 0
    for wheel in wheels:
        found = complaints(wheel) or outside_complaints(wheel)
        print(f"{wheel.name}: {'; '.join(found) or f'{wheel.stat().st_size:,} bytes, good'}")
        wrong += bool(found)
    if wrong or not wheels:
        raise SystemExit(f"{wrong} of {len(wheels)} wheels are not good")


if __name__ == "__main__":
    main([Path(word) for word in sys.argv[1:]])
