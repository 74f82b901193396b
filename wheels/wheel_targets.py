"""The platforms that wheels are built for, and the interfaces of Python.

A wheel is a pair of both. Every target has the same C++ compiler, Zig's clang, which brings the C
library's headers and stubs of each platform with it.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Target:
    """A platform.

    Attributes:
        tag: its name in the name of a wheel.
        zig: its name for Zig, with the oldest C library or system that is supported.
        system: ``CMAKE_SYSTEM_NAME``.
        machine: ``CMAKE_SYSTEM_PROCESSOR``.
        soabi: the end of the name of an extension for one version of Python, with ``{}`` for the
            version as in ``310``.
    """

    tag: str
    zig: str
    system: str
    machine: str
    soabi: str

    @property
    def windows(self) -> bool:
        return self.system == "Windows"

    @property
    def format(self) -> str:
        """Of its programs: ``"elf"``, ``"macho"`` or ``"pe"``."""
        return {"Linux": "elf", "Darwin": "macho", "Windows": "pe"}[self.system]


@dataclass(frozen=True)
class Interface:
    """An interface of CPython.

    Attributes:
        tag: of the wheel: interpreter and ABI.
        version: of the headers: the stable ABI is that of 3.12, and later ones only add to it.
        stable: whether it is the stable ABI.
        free_threaded: whether it is that of interpreters without the GIL.
    """

    tag: str
    version: tuple[int, int]
    stable: bool = False
    free_threaded: bool = False

    @property
    def number(self) -> str:
        """As in names of files: ``313t``."""
        return f"{self.version[0]}{self.version[1]}{'t' * self.free_threaded}"

    def suffix(self, target: Target) -> str:
        """The end of the name of an extension, behind ``_engine``."""
        if not self.stable:
            return target.soabi.format(self.number)
        return ".pyd" if target.windows else ".abi3.so"

    @property
    def library(self) -> str:
        """The DLL of Windows that has the functions."""
        return "python3.dll" if self.stable else self.versioned_library

    @property
    def versioned_library(self) -> str:
        """That of one version, which CMake looks for in any case."""
        return f"python{self.number}.dll"


# musl's suffix has changed between versions of Python; a plain .so is found by all of them.
TARGETS = (
    Target(
        "manylinux_2_28_x86_64",
        "x86_64-linux-gnu.2.28",
        "Linux",
        "x86_64",
        ".cpython-{}-x86_64-linux-gnu.so",
    ),
    Target(
        "manylinux_2_28_aarch64",
        "aarch64-linux-gnu.2.28",
        "Linux",
        "aarch64",
        ".cpython-{}-aarch64-linux-gnu.so",
    ),
    Target("musllinux_1_2_x86_64", "x86_64-linux-musl", "Linux", "x86_64", ".so"),
    Target("musllinux_1_2_aarch64", "aarch64-linux-musl", "Linux", "aarch64", ".so"),
    Target("macosx_11_0_arm64", "aarch64-macos.11.0", "Darwin", "arm64", ".cpython-{}-darwin.so"),
    Target(
        "macosx_10_15_x86_64", "x86_64-macos.10.15", "Darwin", "x86_64", ".cpython-{}-darwin.so"
    ),
    Target("win_amd64", "x86_64-windows-gnu", "Windows", "AMD64", ".cp{}-win_amd64.pyd"),
)
INTERFACES = (
    Interface("cp312-abi3", (3, 12), stable=True),
    Interface("cp311-cp311", (3, 11)),
    Interface("cp310-cp310", (3, 10)),
    Interface("cp313-cp313t", (3, 13), free_threaded=True),
)


def built(target: Target, interface: Interface) -> bool:
    """Whether there is a wheel of both. The import library of an interpreter without the GIL has
    names that others lack, and is made from those of an interpreter of this machine."""
    return not (target.windows and interface.free_threaded)
