"""What builds, checks and releases wheels (`wheels/`) finds what is wrong."""

from __future__ import annotations

import shutil
import subprocess
import zipfile
from dataclasses import replace
from pathlib import Path

import build_wheels
import check_wheels
import instructions
import pytest
import release
import run_wheels
from check_wheels import Engine
from wheel_targets import INTERFACES, TARGETS, Interface, Target, built
from zig_cxx import translated

STABLE, CP311 = INTERFACES[0], INTERFACES[1]
LINUX, MACOS, WINDOWS = TARGETS[0], TARGETS[4], TARGETS[6]
GOOD = {
    "elf": Engine(
        "x86_64",
        ("libc.so.6", "libm.so.6"),
        frozenset({"PyLong_FromLong", "memcpy"}),
        frozenset({"PyInit__engine"}),
        (2, 17),
    ),
    "macho": Engine(
        "arm64",
        ("/usr/lib/libSystem.B.dylib",),
        frozenset({"PyLong_FromLong"}),
        frozenset({"PyInit__engine"}),
        (11, 0),
    ),
    "pe": Engine(
        "x86_64",
        ("python3.dll", "KERNEL32.dll", "api-ms-win-crt-heap-l1-1-0.dll"),
        frozenset({"PyLong_FromLong"}),
        frozenset({"PyInit__engine"}),
    ),
}


def test_targets_and_interfaces() -> None:
    assert len({t.tag for t in TARGETS}) == len({t.zig for t in TARGETS}) == len(TARGETS)
    assert [STABLE.suffix(t) for t in (LINUX, MACOS, WINDOWS)] == [".abi3.so", ".abi3.so", ".pyd"]
    assert CP311.suffix(LINUX) == ".cpython-311-x86_64-linux-gnu.so"
    assert CP311.suffix(WINDOWS) == ".cp311-win_amd64.pyd"
    assert (STABLE.library, CP311.library) == ("python3.dll", "python311.dll")
    lacking = [(t.tag, i.tag) for t in TARGETS for i in INTERFACES if not built(t, i)]
    assert lacking == [("win_amd64", "cp313-cp313t")]


def test_options_for_zig() -> None:
    linux = translated(
        "aarch64-linux-musl", ["-O3", "-march=armv8.2-a+dotprod", "-mavx2", "-Wl,-s"]
    )
    assert linux[:4] == ["-O3", "-mcpu=generic+v8_2a+dotprod", "-mavx2", "-Wl,-s"]
    assert translated("aarch64-linux-musl", ["-march=armv8-a"])[0] == "-mcpu=generic+v8a"
    macos = translated("aarch64-macos.11.0", ["-bundle", "-Wl,@x/darwin-ld-cpython.sym", "-Wl,-x"])
    assert macos[:3] == ["-shared", "-undefined", "dynamic_lookup"]
    assert "-Wl,-x" not in macos
    # to know the compiler takes no C++ library; what is compiled anyway stays as it is
    assert translated("x86_64-linux-musl", ["CMakeCXXCompilerId.cpp"])[:2] == [
        "-c",
        "CMakeCXXCompilerId.cpp",
    ]
    assert translated("x86_64-linux-musl", ["-c", "CMakeCXXCompilerId.cpp"]).count("-c") == 1


@pytest.mark.parametrize(
    ("target", "changes", "complaint"),
    [
        (LINUX, {}, ""),
        (MACOS, {}, ""),
        (WINDOWS, {}, ""),
        (LINUX, {"machine": "arm64"}, "is for arm64"),
        (LINUX, {"libraries": ("libgomp.so.1",)}, "linked to libgomp.so.1"),
        (LINUX, {"libraries": ("libstdc++.so.6",)}, "linked to libstdc"),
        (LINUX, {"oldest": (2, 34)}, "needs version 2.34"),
        (LINUX, {"needs": frozenset({"GOMP_parallel"})}, "needs OpenMP: GOMP_parallel"),
        (LINUX, {"shows": frozenset()}, "has no PyInit__engine"),
        (LINUX, {"shows": frozenset({"PyInit__engine", "leak"})}, "1 symbols more"),
        (MACOS, {"oldest": (13, 0)}, "needs version 13.0"),
        (MACOS, {"oldest": ()}, "needs version"),
        (MACOS, {"signed": False}, "not signed"),
        (MACOS, {"libraries": ("/usr/local/lib/libomp.dylib",)}, "linked to /usr/local"),
        (WINDOWS, {"libraries": ("python3.dll", "libc++.dll")}, "linked to libc"),
        (WINDOWS, {"libraries": ("KERNEL32.dll",)}, "not linked to python3.dll"),
    ],
)
def test_an_engine(target: Target, changes: dict[str, object], complaint: str) -> None:
    engine = replace(GOOD[target.format], **changes)  # type: ignore[arg-type]
    found = check_wheels.engine_complaints(engine, target, STABLE)
    assert (not found) if not complaint else (len(found) == 1 and complaint in found[0]), found


def test_an_engine_for_another_python() -> None:
    found = check_wheels.engine_complaints(GOOD["pe"], WINDOWS, CP311)
    assert any("not linked to python311.dll" in line for line in found)


@pytest.fixture
def wheel(tmp_path: Path) -> Path:
    """A packed wheel whose engine is five bytes."""
    pure = tmp_path / "lutra-9.9.9-py3-none-any.whl"
    info = "lutra-9.9.9.dist-info"
    with zipfile.ZipFile(pure, "w") as archive:
        for name in ("lutra/__init__.py", f"{info}/METADATA", f"{info}/WHEEL", f"{info}/RECORD"):
            archive.writestr(name, f"of {name}")
    engine = tmp_path / "installed" / "lutra" / "_engine.abi3.so"
    engine.parent.mkdir(parents=True)
    engine.write_bytes(b"five!")
    tag = f"{STABLE.tag}-{LINUX.tag}"
    return build_wheels.pack(pure, tmp_path / "installed", tag, tmp_path)


def test_a_packed_wheel(wheel: Path) -> None:
    assert wheel.name == "lutra-9.9.9-cp312-abi3-manylinux_2_28_x86_64.whl"
    assert check_wheels.parts_of(wheel) == (LINUX, STABLE)
    with zipfile.ZipFile(wheel) as archive:
        assert check_wheels.file_complaints(archive) == []
        assert archive.namelist()[-1] == "lutra-9.9.9.dist-info/RECORD"
        described = archive.read("lutra-9.9.9.dist-info/WHEEL").decode()
        assert "Tag: cp312-abi3-manylinux_2_28_x86_64\n" in described
        assert archive.read("lutra/_engine.abi3.so") == b"five!"


def test_equal_wheels_are_equal_files(wheel: Path, tmp_path: Path) -> None:
    before, pure = wheel.read_bytes(), next(tmp_path.glob("*-none-any.whl"))
    again = build_wheels.pack(pure, tmp_path / "installed", f"{STABLE.tag}-{LINUX.tag}", tmp_path)
    assert again == wheel
    assert again.read_bytes() == before


def test_a_changed_wheel(wheel: Path, tmp_path: Path) -> None:
    changed = tmp_path / "changed.whl"
    with zipfile.ZipFile(wheel) as old, zipfile.ZipFile(changed, "w") as new:
        for name in old.namelist():
            new.writestr(name, b"other" if name.endswith("__init__.py") else old.read(name))
        new.writestr("lutra/more.py", b"")
    with zipfile.ZipFile(changed) as archive:
        found = check_wheels.file_complaints(archive)
    assert found == [
        "RECORD and files differ: lutra/more.py",
        "RECORD has another hash of lutra/__init__.py",
    ]


def test_a_large_wheel(wheel: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(check_wheels.READERS, "elf", lambda data: GOOD["elf"])
    assert check_wheels.complaints(wheel) == []
    size = wheel.stat().st_size
    monkeypatch.setattr(check_wheels, "LARGEST", size)
    assert check_wheels.complaints(wheel) == [f"it has {size} bytes; the limit is {size}"]


def test_a_wheel_of_another_name(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"wheel_targets\.py"):
        check_wheels.parts_of(tmp_path / "lutra-1.0.0-cp39-cp39-any.whl")


@pytest.mark.skipif(not shutil.which("g++"), reason="g++ is not installed")
@pytest.mark.skipif(not shutil.which("objdump"), reason="objdump is not installed")
def test_newer_instructions(tmp_path: Path) -> None:
    source = tmp_path / "sums.cc"
    source.write_text("void f(float* x) { for (int i = 0; i < 64; ++i) x[i] += 1.0f; }\n")
    folder = tmp_path / "build"
    folder.mkdir()
    compiler = subprocess.run(["g++", "-dumpmachine"], capture_output=True, text=True, check=True)
    arm = compiler.stdout.startswith("aarch64")
    flags, machine = ("-march=armv8.1-a", "aarch64") if arm else ("-mavx2", "x86_64")
    if arm:
        source.write_text("int f(int* x) { return __atomic_fetch_add(x, 1, 0); }\n")
    base = ["g++", "-O3", "-c", str(source), "-o"]
    subprocess.run([*base, str(folder / "avx2.cc.o"), flags], check=True)
    plain = [*base, str(folder / "sums.cc.o"), *(["-mno-outline-atomics"] if arm else [])]
    subprocess.run(plain, check=True)
    assert instructions.check_folder(folder, machine) == (1, [])
    subprocess.run([*base, str(folder / "sums.cc.o"), flags], check=True)
    count, found = instructions.check_folder(folder, machine)
    assert count == 1
    assert found[0].startswith("sums.cc.o: ")


@pytest.mark.parametrize(
    ("instruction", "newer"),
    [
        ("vaddps", True),
        ("pshufb", True),
        ("popcntq", True),
        ("kmovq", True),
        ("blsrq", True),
        ("shlxq", True),
        ("pmulld", True),
        ("paddd", False),
        ("verr", False),
        ("tzcntl", False),
        ("shlq", False),
        ("pmuludq", False),
        ("pextrw", False),
        ("cmpxchgq", False),
        ("xgetbv", False),
    ],
)
def test_instructions_of_x86(instruction: str, newer: bool) -> None:
    assert bool(instructions.NEWER_X86.fullmatch(instruction)) == newer


@pytest.mark.parametrize(
    ("instruction", "newer"),
    [("pshufb", False), ("movddup", False), ("pmulld", True), ("popcntq", True), ("vaddps", True)],
)
def test_instructions_of_intel_macs(instruction: str, newer: bool) -> None:
    """Each of them has SSSE3."""
    assert bool(instructions.NEWER_MAC.fullmatch(instruction)) == newer


@pytest.mark.parametrize(
    ("instruction", "newer"),
    [
        ("sdot", True),
        ("ldaddal", True),
        ("casa", True),
        ("swpl", True),
        ("crc32cx", True),
        ("tbl", False),
        ("smlal2", False),
        ("fmla", False),
        ("ldaxr", False),
        ("cas_", False),
        ("sqrdmulh", False),
    ],
)
def test_instructions_of_arm(instruction: str, newer: bool) -> None:
    assert bool(instructions.NEWER_ARM64.fullmatch(instruction)) == newer


CHANGES = "# Changelog\n\n## Unreleased\n\nNew\n\n* One thing.\n\n## 0.1.0\n\n* First.\n"


def test_a_release_of_the_changelog() -> None:
    changed = release.with_release(CHANGES, "0.2.0")
    assert "## Unreleased\n\n## 0.2.0\n\nNew\n\n* One thing.\n\n## 0.1.0" in changed
    with pytest.raises(SystemExit, match=r"has version 0\.1\.0 already"):
        release.with_release(CHANGES, "0.1.0")
    with pytest.raises(SystemExit, match="no changes under"):
        release.with_release(changed, "0.3.0")
    with pytest.raises(SystemExit, match="no changes under"):
        release.with_release("# Changelog\n", "0.3.0")


def test_a_release_of_the_version() -> None:
    project = '[project]\nname = "lutra"\nversion = "0.2.0rc1"\n'
    assert 'version = "0.2.0"\n' in release.with_version(project, "0.2.0")
    with pytest.raises(SystemExit, match=r"0\.1\.9 is below 0\.2\.0rc1"):
        release.with_version(project, "0.1.9")
    with pytest.raises(SystemExit, match="not a version like"):
        release.with_version(project, "v0.3")
    with pytest.raises(SystemExit, match="no line"):
        release.with_version("[project]\n", "0.3.0")


def test_a_failed_release_leaves_the_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
    monkeypatch.setattr(release, "ROOT", tmp_path)
    files = {"pyproject.toml": 'version = "0.1.0"\n', "CHANGELOG.md": CHANGES}
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(SystemExit, match="not committed"):
        release.release("0.2.0")
    (tmp_path / ".git" / "info").mkdir(exist_ok=True)
    (tmp_path / ".git" / "info" / "exclude").write_text("*\n")
    seen: list[str] = []

    def build(dist: Path) -> None:
        seen.append((tmp_path / "pyproject.toml").read_text())
        raise subprocess.CalledProcessError(1, ["cmake"])

    monkeypatch.setattr(release, "build", build)
    with pytest.raises(subprocess.CalledProcessError):
        release.release("0.2.0")
    assert seen == ['version = "0.2.0"\n']
    assert {name: (tmp_path / name).read_text() for name in files} == files


def test_which_wheels_run_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_wheels.platform, "system", lambda: "Linux")
    monkeypatch.setattr(run_wheels.platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(run_wheels, "libc", lambda: "manylinux")
    reasons = {t.tag: run_wheels.reason_against(t, STABLE) for t in TARGETS}
    assert [tag for tag, reason in reasons.items() if not reason] == ["manylinux_2_28_x86_64"]
    assert reasons["win_amd64"] == "this machine runs Linux"
    assert reasons["musllinux_1_2_x86_64"] == "the Python of this machine takes manylinux wheels"
    assert run_wheels.reason_against(LINUX, Interface("cp313-cp313t", (3, 13), False, True))
    assert run_wheels.versions(STABLE)[0] == (3, 12)
    assert run_wheels.versions(CP311) == [(3, 11)]


@pytest.mark.parametrize(
    ("tag", "said", "good"),
    [
        ("manylinux_2_28_x86_64", 'the following platform tag: "manylinux_2_17_x86_64".', True),
        ("manylinux_2_28_x86_64", 'the following platform tag: "linux_x86_64".', False),
        ("musllinux_1_2_x86_64", 'required by the wheel: { "libc.so": null } In order', True),
        ("musllinux_1_2_x86_64", 'by the wheel: { "libc.so": null, "libz.so.1": null }', False),
        ("musllinux_1_2_x86_64", "ELFError: Magic number does not match", False),
    ],
)
def test_what_auditwheel_says(
    monkeypatch: pytest.MonkeyPatch, tag: str, said: str, good: bool
) -> None:
    asked: list[str] = []

    def answer(module: str, *words: str | Path) -> str:
        asked.append(" ".join([module, *map(str, words[:-1])]))
        return said

    monkeypatch.setattr(check_wheels, "_said", answer)
    found = check_wheels.outside_complaints(Path(f"lutra-0.1.0-cp311-cp311-{tag}.whl"))
    assert found == ([] if good else [f"auditwheel says: {said}"])
    # musl's libc.so has the name of a script for this machine's linker, which is not read
    assert asked == ["auditwheel show" + " --ldpaths " * tag.startswith("musl")]
