"""Which kernels run, who decides it, and what an import costs."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from graphs import Builder, tree_tensors
from layers import random_layer, same_bits

import lutra
from lutra import Session, UnsupportedCpuError, cpu_info, runnable_isas
from lutra.runtime.cpu import cgroup_quota, choose_threads, usable_cores

ROOT = Path(__file__).parents[1]
ISAS = runnable_isas()


def python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs code in another process, with the tests' modules at hand."""
    env = {**os.environ, "PYTHONPATH": str(ROOT / "tests"), **environment}
    return subprocess.run(
        [sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=60
    )


@pytest.fixture(scope="module")
def graph() -> lutra.Graph:
    return random_layer(1, size=(1, 8, 8), channels=4, kernel=(3, 3), padding=(1, 1)).graph()


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LUTRA_ISA", raising=False)
    monkeypatch.delenv("LUTRA_NUM_THREADS", raising=False)


def test_best_is_the_highest_that_runs(graph: lutra.Graph) -> None:
    info = cpu_info()
    assert info["runnable"] == ISAS
    assert ISAS[0] == "scalar"
    assert [isa for isa in info["compiled"] if isa in ISAS] == ISAS
    assert info["best"] == ISAS[-1] == Session(graph).isa == Session(graph, isa="auto").isa
    features = set(info["features"])
    for isa, needs in (("avx2", {"avx2", "fma"}), ("neon", {"neon"}), ("neon_dot", {"dotprod"})):
        assert (isa in ISAS) == (isa in info["compiled"] and needs <= features)
    assert 1 <= info["cores"] <= (os.cpu_count() or 1)


@pytest.mark.parametrize("isa", ISAS)
def test_argument_and_environment_choose(
    graph: lutra.Graph, isa: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert Session(graph, isa=isa).isa == isa
    code = (
        "import layers, lutra\n"
        "graph = layers.random_layer(1, channels=9).graph()\n"
        "print(lutra.Session(graph).isa, lutra.Session(graph, isa='scalar').isa)"
    )
    result = python(code, LUTRA_ISA=isa)
    assert result.stdout.split() == [isa, "scalar"], result.stderr
    monkeypatch.setenv("LUTRA_ISA", "")
    assert Session(graph).isa == ISAS[-1]


def test_an_unknown_isa_is_an_error_that_lists_the_others(
    graph: lutra.Graph, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UnsupportedCpuError, match=f"isa='mmx'.*auto, {', '.join(ISAS)}$"):
        Session(graph, isa="mmx")
    monkeypatch.setenv("LUTRA_ISA", "neon512")
    with pytest.raises(UnsupportedCpuError, match="LUTRA_ISA='neon512'"):
        Session(graph)
    assert Session(graph, isa="scalar").isa == "scalar"


def test_sessions_name_their_own_kernels(graph: lutra.Graph) -> None:
    texts = [repr(Session(graph, isa=isa, threads=2)) for isa in ISAS]
    assert texts[0] == "Session(graph, 4x8x8 -> 5x8x8, 1 lookup layer, scalar, 2 threads, 0.94 kB)"
    assert texts == [texts[0].replace("scalar", isa) for isa in ISAS]


def kernels() -> list[str]:
    """The functions of an instruction set, in the order of their table."""
    header = (ROOT / "cpp" / "kernels" / "kernels.h").read_text()
    table = re.search(r"^struct Kernels \{$(.*?)^\};$", header, re.M | re.S)
    assert table is not None
    return re.findall(r"\(\*(\w+)\)\(", table[1])


MACHINES = {"x86_64": 62, "aarch64": 183}  # e_machine of ELF


def builds() -> list[Path]:
    """The folders of optimised builds for this machine."""
    found = []
    for cache in ROOT.glob("build/**/CMakeCache.txt"):
        settings = cache.read_text().splitlines()
        if "CMAKE_BUILD_TYPE:STRING=Release" not in settings:
            continue
        if "LUTRA_SANITIZE:BOOL=ON" in settings:
            continue
        if "wheels" in cache.parts:  # of another compiler; wheels/instructions.py checks them
            continue
        scalar = next(cache.parent.glob("**/kernels/scalar.cc.o"), None)
        if scalar and scalar.read_bytes()[18] == MACHINES.get(platform.machine()):
            found.append(cache.parent)
    return found


def objects() -> dict[str, Path]:
    """The newest object file of every instruction set."""
    found: dict[str, Path] = {}
    for folder in builds():
        for isa in cpu_info()["compiled"]:
            for path in folder.glob(f"**/kernels/{isa}.cc.o"):
                newest = found.get(isa)
                if newest is None or path.stat().st_mtime > newest.stat().st_mtime:
                    found[isa] = path
    if not found:
        pytest.skip("there is no build folder with optimised object files of the kernels")
    return found


@pytest.mark.skipif(not shutil.which("nm"), reason="nm is not installed")
@pytest.mark.skipif(not shutil.which("objdump"), reason="objdump is not installed")
def test_object_files_export_their_table_and_nothing_else() -> None:
    for isa, path in objects().items():
        symbols = subprocess.check_output(["nm", "-C", path], text=True).splitlines()
        kinds = [re.split(r" ([A-Za-z]) ", line, maxsplit=1) for line in symbols]
        shared = [name for _, kind, name in kinds if kind in "TDBRVWuvw"]
        assert shared == [f"lutra::k{isa.title().replace('_', '')}"], path
        # nothing of the others is called
        assert not [name for _, kind, name in kinds if kind == "U" and "lutra" in name], path
        sections = subprocess.check_output(["objdump", "-h", path], text=True)
        assert ".init_array" not in sections, path
        assert ".ctors" not in sections, path


#: Instructions that not every CPU of a machine has, in what objdump prints: AVX and later, what
#: came between SSE2 and AVX, BMI; the optional parts of Armv8.
NEWER = {
    "x86_64": r"%[yz]mm|\tv[a-z]|\t(popcnt|pshufb|palignr|pmaddubsw|pmulhrsw|ph(add|sub)\w+|"
    r"pabs[bwd]|pblend\w+|blendv?p[sd]|round[ps][sd]|pmulld|ptest|pinsr[bdq]|pextr[bdq]|"
    r"pm(ax|in)(sb|sd|uw|ud)|pmov[sz]x\w+|crc32|andn|bextr|s[ah][lr]x|rorx|mulx|tzcnt|lzcnt)\b",
    "aarch64": r"\t(s|u|us|su)dot\b|\t(cas|swp|ldadd|ldset|ldclr|ldeor)(a|l|al)?[bh]?\b|"
    r"\tsqrdml[as]h\b|\tcrc32|\t[su]mmla\b",
}


@pytest.mark.skipif(not shutil.which("objdump"), reason="objdump is not installed")
def test_code_outside_the_kernels_runs_on_every_cpu() -> None:
    """No other file has newer instructions, and the kernels' files show that they would be seen."""
    newer = re.compile(NEWER.get(platform.machine(), "(?!)"))
    special = {isa for isa in objects() if isa not in ("scalar", "neon")}
    paths = [path for folder in builds() for path in folder.glob("**/cpp/**/*.cc.o")]
    names = {path: path.name.removesuffix(".cc.o") for path in paths}
    assert {"scalar", "dispatch", "plan", *special} <= set(names.values())
    for path, name in names.items():
        text = subprocess.check_output(["objdump", "-d", "--no-show-raw-insn", path], text=True)
        if name in special:
            assert newer.search(text), path
        else:
            found = newer.search(text)
            assert found is None, (path, text[max(0, found.start() - 80) : found.end() + 80])


#: Kernels that NEON does without: its convolutions in int8 gather their activations.
OF_QUADS = {"conv8_bytes", "pack_conv8", "conv8_copy_bytes", "copy_conv8", "conv8"}


@pytest.mark.skipif(not shutil.which("objdump"), reason="objdump is not installed")
def test_every_instruction_set_has_every_kernel() -> None:
    """An entry that is missing, or another kernel's, is found in the table as it was compiled."""
    wanted = kernels()
    assert {"quantize", "encode", "lookup_row", "dense8", "gemm", "table_grad"} <= set(wanted)
    assert set(wanted) >= OF_QUADS
    for isa, path in objects().items():
        lacking = OF_QUADS if isa.startswith("neon") else set()
        text = subprocess.check_output(["objdump", "-tC", path], text=True)
        names: dict[tuple[str, int], set[str]] = {}  # of the functions in each place
        for at, section, name in re.findall(
            r"^([0-9a-f]+) .{6}F (\S+)\t[0-9a-f]+ +(?:\.\w+ )?(.*)$", text, re.M
        ):
            found = re.search(r"\(anonymous namespace\)::(\w+)\(", name)
            names.setdefault((section, int(at, 16)), set()).add(found[1] if found else name)
        # what the linker fills in: the name of the instruction set, then its functions
        text = subprocess.check_output(["objdump", "-rC", path], text=True)
        table = re.search(r"FOR \[\.data\.rel\.ro[.\w]*\]:\n.*\n((?:[0-9a-f]{8,} .*\n)+)", text)
        assert table is not None, path
        filled = [line.split(maxsplit=2) for line in table[1].splitlines()]
        offsets = [int(offset, 16) for offset, _, _ in filled]
        first = offsets[-1] - 8 * (len(wanted) - 1)
        present = {k: first + 8 * i for i, k in enumerate(wanted) if k not in lacking}
        assert offsets[1:] == list(present.values()), (path, wanted)
        for kernel, (_, _, value) in zip(present, filled[1:], strict=True):
            section, _, offset = value.partition("+")
            own = names.get((section, int(offset or "0", 16)), {value})
            assert any(re.search(rf"\b{kernel}\b", name) for name in own), (kernel, own, path)


def test_sessions_of_all_isas_in_many_threads_agree() -> None:
    b = Builder(("x", (None, 6, 10, 10)), seed=3)
    y = b.add("relu", b.pq_conv2d("x", 6, 12, padding=(1, 1), act_zero=64))
    trees = tree_tensors(b.rng, 108, 9, codebooks=10)
    grid = {"act_scale": 0.05, "act_zero": 0, "act_bits": 7}
    y = b.add("pq_conv2d", y, tensors=trees, in_channels=12, kernel=(3, 3), encoder="tree", **grid)
    y = b.add("mean", b.conv2d(b.int8_conv2d(y, 9, 11), 11, 7), axes=(2, 3))
    y = b.linear(b.pq_linear(b.int8_linear(y, 7, 70), 70, 12), 12, 5)
    graph = b.graph(y)
    x = b.rng.normal(size=(9, 6, 10, 10)).astype(np.float32)
    sessions = [Session(graph, isa=isa, threads=2) for isa in ISAS]
    expected = sessions[0](x)
    different: list[str] = []

    def work(first: int) -> None:
        for turn in range(6):
            session = sessions[(first + turn) % len(sessions)]
            if not same_bits(session(x), expected):
                different.append(session.isa)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not different


def test_import_needs_no_torch() -> None:
    code = (
        "import sys, lutra\n"
        "assert not {'torch', 'accelerate', 'sklearn', 'rich'} & set(sys.modules)\n"
        "assert not hasattr(lutra, 'nonsense')\n"
        "assert {'convert', 'export', 'Session'} <= set(dir(lutra))\n"
        "from lutra import *\n"
        "assert 'torch' not in sys.modules\n"
        "print(Session.__name__, lutra.__version__)"
    )
    result = python(code)
    assert result.stdout.split()[:1] == ["Session"], result.stderr


def test_training_without_torch_says_what_to_install() -> None:
    code = (
        "import sys, lutra\n"
        "sys.modules['torch'] = None\n"
        "try:\n    lutra.convert\n"
        "except ImportError as error:\n    print(error)\n"
        "try:\n    lutra.nonsense\n"
        "except AttributeError as error:\n    print(error)\n"
    )
    result = python(code)
    assert result.stdout.splitlines() == [
        "lutra.convert needs PyTorch; install it with: pip install 'lutra[train]'",
        "module 'lutra' has no attribute 'nonsense'",
    ], result.stderr


def test_lazy_names_are_those_of_train() -> None:
    pytest.importorskip("torch")
    from lutra import train

    assert set(lutra._TRAIN) == set(train.__all__)
    for name in lutra._TRAIN:
        assert getattr(lutra, name) is getattr(train, name)


def test_only_train_imports_torch() -> None:
    package = Path(lutra.__file__).parent
    for path in package.rglob("*.py"):
        if path.relative_to(package).parts[0] != "train":
            text = path.read_text(encoding="utf-8")
            assert not re.search(r"^\s*(import|from)\s+(torch|accelerate)\b", text, re.M), path


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs /proc")
def test_one_thread_starts_none() -> None:
    code = (
        "import os, numpy as np, layers, lutra\n"
        "layer = layers.random_layer(1, size=(40, 8, 8), channels=9)\n"
        "count = lambda: len(os.listdir('/proc/self/task'))\n"
        "before = count()\n"
        "one = lutra.Session(layer.graph(), threads=1); one(layer.x)\n"
        "after = count()\n"
        "three = lutra.Session(layer.graph(), threads=3); three(layer.x)\n"
        "print(after - before, count() - before)"
    )
    result = python(code)
    assert result.stdout.split() == ["0", "2"], result.stderr


@pytest.mark.skipif(sys.platform != "linux", reason="needs a limit on memory")
def test_threads_that_do_not_start_are_an_error() -> None:
    code = (
        "import resource, layers, lutra\n"
        "graph = layers.random_layer(1, channels=9).graph()\n"
        "used = int(open('/proc/self/statm').read().split()[0]) * resource.getpagesize()\n"
        "resource.setrlimit(resource.RLIMIT_AS, (used + 2**28,) * 2)\n"
        "try:\n    lutra.Session(graph, threads=1000)\n"
        "except lutra.EngineError as error:\n    print(error)\n"
        "print(lutra.Session(graph, threads=2).threads)"
    )
    result = python(code)
    lines = result.stdout.splitlines()
    assert lines[0].startswith("cannot start 1000 threads"), result.stderr
    assert lines[1:] == ["2"]


def test_threads_come_from_argument_environment_or_cores(
    graph: lutra.Graph, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert Session(graph).threads == choose_threads() == usable_cores()
    monkeypatch.setenv("LUTRA_NUM_THREADS", "3")
    assert Session(graph).threads == 3
    assert Session(graph, threads=1).threads == 1
    for text in ("0", "two", "-1", "99999999"):
        monkeypatch.setenv("LUTRA_NUM_THREADS", text)
        with pytest.raises(ValueError, match=f"LUTRA_NUM_THREADS='?{text}"):
            Session(graph)
    for threads in (0, -1, 2.5, True, 10**9):
        with pytest.raises(ValueError, match=f"threads={threads}"):
            Session(graph, threads=threads)  # type: ignore[arg-type]


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def test_cgroup_quota_of_version_2(tmp_path: Path) -> None:
    groups, root = tmp_path / "cgroup", tmp_path / "fs"
    assert cgroup_quota(groups, root) is None
    write(groups, "0::/a/b\n")
    assert cgroup_quota(groups, root) is None
    write(root / "a/b/cpu.max", "max 100000\n")
    assert cgroup_quota(groups, root) is None
    write(root / "a/cpu.max", "250000 100000\n")  # binds what is below it
    assert cgroup_quota(groups, root) == 2.5
    write(root / "a/b/cpu.max", "50000 100000\n")
    assert cgroup_quota(groups, root) == 0.5
    write(root / "a/b/cpu.max", "nonsense")
    assert cgroup_quota(groups, root) == 2.5


def test_cgroup_quota_of_version_1(tmp_path: Path) -> None:
    groups, root = tmp_path / "cgroup", tmp_path / "fs"
    write(groups, "5:memory:/m\n4:cpu,cpuacct:/docker/x\n0::/\n")
    write(root / "cpu,cpuacct/cpu.cfs_quota_us", "-1\n")
    write(root / "cpu,cpuacct/cpu.cfs_period_us", "100000\n")
    assert cgroup_quota(groups, root) is None
    # the path of the host, seen from inside a container: its own group is the root
    write(root / "cpu,cpuacct/cpu.cfs_quota_us", "300000\n")
    assert cgroup_quota(groups, root) == 3
    write(root / "cpu,cpuacct/docker/x/cpu.cfs_quota_us", "150000\n")
    write(root / "cpu,cpuacct/docker/x/cpu.cfs_period_us", "100000\n")
    assert cgroup_quota(groups, root) == 1.5
