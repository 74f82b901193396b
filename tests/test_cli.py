"""The command line: what it prints, what it refuses and what it leaves behind."""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from graphs import Builder, random_inputs, tiny_graph, with_golden

import lutra
from lutra import cli
from lutra.cli import verify
from lutra.format import save_graph
from lutra.graph import Graph
from lutra.reference import run_reference

PREPROCESS = {
    "kind": "image",
    "layout": "NCHW",
    "range": [0, 1],
    "mean": [0.5, 0.5, 0.5],
    "std": [0.25, 0.25, 0.25],
}


def image_graph(batch: int | None = None, **metadata: Any) -> Graph:
    """A small classifier (batch, 3, 8, 8) -> (batch, 10) with lookup and dense layers."""
    b = Builder(("x", (batch, 3, 8, 8)))
    stem = b.add("relu", b.conv2d("x", 3, 8, padding=(1, 1)))
    x = b.affine(b.pq_conv2d(stem, 8, 8, padding=(1, 1)), 8)
    x = b.add("relu", b.add("add", x, stem))
    x = b.add("max_pool2d", x, kernel=(2, 2), stride=(2, 2))
    x = b.add("mean", b.pq_conv2d(x, 8, 16, act_scale=0.2, width=4), axes=(2, 3))
    b.pq_linear(x, 16, 10)
    return b.graph(metadata=metadata)


def two_graph() -> Graph:
    """Two inputs and two outputs, one of them with an awkward name."""
    b = Builder(("a", (None, 4)), ("b", (None, 4)))
    total = b.add("add", "a", "b", name="total")
    b.add("relu", total, name="file")
    nodes = (b.nodes[0], replace(b.nodes[1], output="file"))
    return replace(b.graph(), nodes=nodes, outputs=("total.out", "file"))


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current folder, without settings of the engine."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("LUTRA_ISA", raising=False)
    monkeypatch.delenv("LUTRA_NUM_THREADS", raising=False)
    return tmp_path


@pytest.fixture
def model(folder: Path) -> str:
    save_graph(with_golden(image_graph(preprocess=PREPROCESS, classes=["c"] * 10)), "m.lutra")
    return "m.lutra"


@pytest.fixture
def capture(capsys: pytest.CaptureFixture[str]) -> Any:
    """Runs a command; returns the exit code, stdout and stderr."""

    def call(*words: str) -> tuple[int, str, str]:
        code = cli.main(list(words))
        return code, *capsys.readouterr()

    return call


@pytest.fixture
def refuse(capture: Any) -> Any:
    """Runs a command that must end with one sentence, exit code 2 and no new file."""

    def call(*words: str, match: str) -> None:
        before = sorted(os.listdir("."))
        code, out, err = capture(*words)
        assert (code, out) == (2, "")
        assert err.startswith("lutra: error: ")
        assert err.count("\n") == 1
        assert re.search(match, err), err
        assert sorted(os.listdir(".")) == before

    return call


def save(name: str, array: Any) -> str:
    np.save(name, array)
    return name


def images(count: int = 5) -> Any:
    return np.random.default_rng(3).integers(0, 256, (count, 8, 8, 3), dtype=np.uint8)


def floats(count: int = 5) -> Any:
    return random_inputs(image_graph(), count)["x"]


# The program itself


def program(*words: str, **settings: Any) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "lutra", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **settings,
    )


def test_module_runs_without_torch(model: str) -> None:
    words = ["verify", model, "--samples", "1"]
    code = (
        "import sys; from lutra.cli import main; code = main(sys.argv[1:]); "
        "assert 'torch' not in sys.modules; sys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_module_fails_with_one_sentence(folder: Path) -> None:
    process = program("inspect", "none.lutra")
    out, err = process.communicate()
    assert process.returncode == 2
    assert out == ""
    assert err == (
        "lutra: error: cannot read 'none.lutra': No such file or directory; check the path\n"
    )


def test_closed_pipe(model: str) -> None:
    process = program("inspect", model, "--json")
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    err = process.stderr.read()
    process.stderr.close()
    assert (process.wait(), err) == (141, "")


def test_full_device(model: str) -> None:
    if not os.path.exists("/dev/full"):
        pytest.skip("needs /dev/full")
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "lutra", "inspect", model], stdout=full, stderr=subprocess.PIPE
        )
    assert done.returncode == 2
    assert done.stderr.decode().splitlines()[0] == "lutra: error: No space left on device"


def test_interrupt(capture: Any, model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(lutra.Session, "run", stop)
    code, out, err = capture("bench", model, "--json", "out.json")
    assert (code, out, err) == (130, "", "lutra: interrupted\n")
    assert not os.path.exists("out.json")


def test_version_and_help(capture: Any, capsys: pytest.CaptureFixture[str]) -> None:
    for words, text in ((["--version"], lutra.__version__), (["bench", "--help"], "--warmup")):
        with pytest.raises(SystemExit) as stop:
            cli.main(words)
        assert stop.value.code == 0
        assert text in capsys.readouterr().out


def test_every_command_has_help(capsys: pytest.CaptureFixture[str]) -> None:
    for command in cli.COMMANDS:
        with pytest.raises(SystemExit):
            cli.main([command, "--help"])
        assert f"usage: lutra {command}" in capsys.readouterr().out


def test_refuses_arguments(refuse: Any, model: str) -> None:
    refuse(match="COMMAND; see lutra --help")
    refuse("frobnicate", match="invalid choice: 'frobnicate'")
    refuse("inspect", match="FILE; see lutra inspect --help")
    refuse("inspect", model, "--jsno", match="unrecognized arguments: --jsno")
    refuse("bench", model, "--threads", "0", match="'0' is not a whole number of at least 1")
    refuse("bench", model, "--threads", "1,x", match="'x' is not a whole number")
    refuse("bench", model, "--runs", "1", "--seconds", "1", match="not allowed with")
    refuse("bench", model, "--seconds", "nan", match="'nan' is not a number of seconds")
    refuse("bench", model, "--threads", "5000", "--runs", "1", match="threads=5000 is out of range")
    refuse("verify", model, "--isa", "sse9", match="isa='sse9' cannot run on this machine")


def test_refuses_environment(refuse: Any, model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LUTRA_ISA", "sse9")
    refuse("bench", model, "--runs", "1", match="LUTRA_ISA='sse9' cannot run")
    monkeypatch.delenv("LUTRA_ISA")
    monkeypatch.setenv("LUTRA_NUM_THREADS", "many")
    refuse("bench", model, "--runs", "1", match="LUTRA_NUM_THREADS='many' is not a number")


def test_debug_shows_the_traceback(capture: Any, folder: Path) -> None:
    for words in (["--debug", "inspect", "none"], ["inspect", "none", "--debug"]):
        code, _, err = capture(*words)
        assert code == 2
        assert "Traceback" in err
        assert err.splitlines()[-1].startswith("lutra: error: ")


COMMANDS_WITH_FILE = [
    ["inspect", "bad.lutra"],
    ["run", "bad.lutra", "-i", "x.npy", "-o", "y.npy"],
    ["verify", "bad.lutra"],
    ["eval", "bad.lutra", "--images", "x.npy", "--labels", "y.npy"],
    ["bench", "bad.lutra", "--json", "b.json"],
]


@pytest.mark.parametrize("words", COMMANDS_WITH_FILE, ids=lambda words: words[0])
def test_refuses_files(refuse: Any, model: str, words: list[str]) -> None:
    sound = Path(model).read_bytes()
    refuse(*words, match="No such file")
    bad = Path("bad.lutra")
    flipped = bytearray(sound)
    flipped[-100] ^= 4
    for data, message in (
        (b"", "is not a lutra file"),
        (b"hello, world", "is not a lutra file"),
        (sound[: len(sound) // 2], "damaged"),
        (bytes(flipped), "checksum"),
        (sound.replace(b'"version":"1"', b'"version":"7"'), r"newer lutra \(format version 7"),
    ):
        bad.write_bytes(data)
        refuse(*words, match=message)
    bad.unlink()
    bad.mkdir()
    refuse(*words, match="directory")


# doctor


def test_doctor(capture: Any, folder: Path) -> None:
    code, out, err = capture("doctor")
    assert (code, err) == (0, "")
    for isa in lutra.runnable_isas():
        assert f"{isa}: ok" in out
    code, out, _ = capture("doctor", "--json")
    report = json.loads(out)
    assert code == 0
    assert report["runnable"] == lutra.runnable_isas()
    assert report["chosen"] == lutra.runnable_isas()[-1]
    assert report["versions"]["numpy"] == np.__version__
    assert report["self_test_seconds"] < 5


def test_doctor_obeys_the_environment(capture: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LUTRA_ISA", "scalar")
    code, out, _ = capture("doctor")
    assert code == 0
    assert "scalar: LUTRA_ISA=scalar" in out
    monkeypatch.setenv("LUTRA_ISA", "sse9")
    code, out, _ = capture("doctor")
    assert code == 1
    assert "none: LUTRA_ISA='sse9' cannot run" in out


def test_doctor_finds_a_broken_kernel(capture: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from lutra.cli import doctor

    monkeypatch.setattr(doctor, "new_session", lambda graph, **_: Broken(graph, isa="scalar"))
    code, out, _ = capture("doctor")
    assert code == 1
    assert re.search(r"scalar: 1 of \d+ outputs are wrong", out)


# inspect


def test_inspect(capture: Any, model: str) -> None:
    code, out, err = capture("inspect", model)
    assert (code, err) == (0, "")
    assert "x (N, 3, 8, 8)" in out
    assert "3 of them lookup layers" in out
    assert re.search(r"pq_conv2d_2 +pq_conv2d +\(N, 8, 8, 8\) +9 +16 ", out)
    assert "preprocess" in out


def test_inspect_json(capture: Any, model: str) -> None:
    report = json.loads(capture("inspect", model, "--json")[1])
    graph = lutra.load_graph(model)
    assert report["inputs"] == [{"name": "x", "dtype": "float32", "shape": [None, 3, 8, 8]}]
    assert report["totals"]["lookups"] == graph.total_cost().lookups
    assert report["totals"]["multiplications"] == graph.total_cost().macs
    assert report["sizes"]["file_bytes"] == os.path.getsize(model)
    assert report["metadata"] == json.loads(json.dumps(graph.metadata))
    assert [layer["name"] for layer in report["layers"]] == [node.name for node in graph.nodes]
    assert report["golden_samples"] == 2


def test_inspect_keeps_the_terminal_safe(capture: Any, folder: Path) -> None:
    save_graph(replace(tiny_graph(), metadata={"note": "\x1b[2Jé", "\x1b]0;x": [1]}), "m.lutra")
    code, out, _ = capture("inspect", "m.lutra")
    assert code == 0
    assert out.isascii()
    assert "\x1b" not in out


# run


def test_run(capture: Any, model: str) -> None:
    x = floats()
    want = lutra.Session(model)(x)
    for words in (["-i", "x.npy", "-o", "y.npy"], ["-i", "x=x.npy", "-o", "pq_linear_9.out=y.npy"]):
        save("x.npy", x)
        assert capture("run", model, *words, "--threads", "1", "--isa", "scalar") == (0, "", "")
        np.testing.assert_array_equal(np.load("y.npy"), want)
        os.unlink("y.npy")
    assert sorted(os.listdir(".")) == ["m.lutra", "x.npy"]


def test_run_takes_images_and_other_layouts_of_memory(capture: Any, model: str) -> None:
    ready = (images().transpose(0, 3, 1, 2) / np.float32(255) - np.float32(0.5)) / np.float32(0.25)
    want = lutra.Session(model)(np.ascontiguousarray(ready))
    for array in (images(), np.asfortranarray(ready), ready.astype(">f4")):
        save("x.npy", array)
        assert capture("run", model, "-i", "x.npy", "-o", "y.npy")[0] == 0
        np.testing.assert_array_equal(np.load("y.npy"), want)


def test_run_several_inputs_and_outputs(capture: Any, folder: Path) -> None:
    graph = two_graph()
    save_graph(graph, "m.lutra")
    feeds = random_inputs(graph, 3)
    want = run_reference(graph, feeds)
    words = [f"{name}={save(f'{name}.npy', array)}" for name, array in feeds.items()]
    inputs = ["-i", words[1], "-i", words[0]]
    assert capture("run", "m.lutra", *inputs, "-o", "all.npz") == (0, "", "")
    with np.load("all.npz") as archive:
        assert {name: archive[name].tolist() for name in archive} == {
            name: array.tolist() for name, array in want.items()
        }
    assert capture("run", "m.lutra", *inputs, "-o", "file=f.npy") == (0, "", "")
    np.testing.assert_array_equal(np.load("f.npy"), want["file"])
    assert not os.path.exists("total.out")


def test_run_refuses_names(refuse: Any, folder: Path) -> None:
    save_graph(two_graph(), "m.lutra")
    run = ["run", "m.lutra"]
    both = ["-i", f"a={save('x.npy', np.ones((2, 4), np.float32))}", "-i", "b=x.npy"]
    refuse(*run, "-i", "a=x.npy", "-o", "y.npz", match="lacks b")
    refuse(*run, "-i", "x.npy", "-o", "y.npz", match="use NAME=FILE with a or b")
    refuse(*run, *both, "-i", "a=x.npy", "-o", "y.npz", match="'a' twice")
    refuse(*run, *both, "-i", "c=x.npy", "-o", "y.npz", match="'c=x.npy' names no input")
    refuse(*run, *both, "-o", "y.npy", match="the outputs total.out, file")
    refuse(*run, *both, "-o", "nope=y.npy", match="the outputs total.out, file")
    refuse(*run, *both, "-o", "file=y.npy", "-o", "total.out=./y.npy", match="the same --output")
    refuse(*run, "-i", "a=", "-i", "b=x.npy", "-o", "y.npz", match="names no file")


def test_run_refuses_arrays(refuse: Any, model: str) -> None:
    def bad(array: Any, match: str) -> None:
        np.save("x.npy", array)
        refuse("run", model, "-i", "x.npy", "-o", "y.npy", match=match)

    x = floats()
    bad(x.astype(np.float64), r"float64 values but the input 'x' takes float32")
    bad(x.astype(np.int8), "int8")
    bad(x.astype(np.complex64), "must hold numbers|float32")
    bad(np.array(["a", "b"]), "must hold numbers")
    bad(np.array([{}, []], dtype=object), "cannot read 'x.npy' as a .npy file")
    bad(x[0], "3 axes")
    bad(x[:, :2], r"\(5, 2, 8, 8\)")
    bad(x[:0], "")
    bad(images()[:, :4], "the model takes")
    bad(images()[0], "are needed")
    for value in (np.nan, np.inf):
        x[2, 1, 3, 3] = value
        bad(x, "'x.npy' holds 1 values that are NaN or infinite")


def test_run_refuses_files_that_hold_no_array(refuse: Any, model: str) -> None:
    np.save("good.npy", floats())
    good = Path("good.npy").read_bytes()
    np.savez("z.npz", x=floats())
    huge = io.BytesIO()
    header = {"descr": "<f4", "fortran_order": False, "shape": (2**40, 3, 8, 8)}
    np.lib.format.write_array_header_1_0(huge, header)
    for data, match in (
        (b"", "not a .npy file"),
        (b"0.5 0.5", "not a .npy file"),
        (good[:6], "cannot read 'x.npy' as a .npy file"),
        (good[:40], "cannot read 'x.npy' as a .npy file"),
        (good[:-1], "cannot read 'x.npy' as a .npy file"),
        (good[:10] + b"(" * (len(good) - 10), "cannot read 'x.npy' as a .npy file"),
        (huge.getvalue(), "cannot read 'x.npy' as a .npy file"),
        (Path("z.npz").read_bytes(), "is an archive"),
    ):
        Path("x.npy").write_bytes(data)
        refuse("run", model, "-i", "x.npy", "-o", "y.npy", match=match)
    refuse("run", model, "-i", "none.npy", "-o", "y.npy", match="No such file")
    refuse("run", model, "-i", ".", "-o", "y.npy", match="directory")


def test_run_refuses_uint8_without_preprocess(refuse: Any, folder: Path) -> None:
    save_graph(image_graph(), "m.lutra")
    save("x.npy", images())
    refuse("run", "m.lutra", "-i", "x.npy", "-o", "y.npy", match="does not say how to prepare")
    save_graph(image_graph(preprocess={"kind": "image"}), "m.lutra")
    refuse("run", "m.lutra", "-i", "x.npy", "-o", "y.npy", match="preprocess has the fields kind")


def test_run_refuses_places(refuse: Any, model: str) -> None:
    save("x.npy", floats())
    run = ["run", model, "-i", "x.npy", "-o"]
    refuse(*run, "none/y.npy", match="does not exist")
    refuse(*run, ".", match="not a regular file")
    refuse(*run, "/dev/null", match="not a regular file")
    refuse(*run, "x" * 300, match="too long")
    if os.getuid() != 0:
        os.mkdir("closed", 0o500)
        refuse(*run, "closed/y.npy", match="no permission")


def test_run_keeps_the_old_file_when_writing_fails(
    refuse: Any, model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    save("x.npy", floats())
    Path("y.npy").write_text("old")

    def fail(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    refuse("run", model, "-i", "x.npy", "-o", "y.npy", match="cannot write 'y.npy': No space left")
    assert Path("y.npy").read_text() == "old"


def test_run_may_replace_its_input(capture: Any, model: str) -> None:
    x = floats()
    save("x.npy", x)
    assert capture("run", model, "-i", "x.npy", "-o", "x.npy")[0] == 0
    np.testing.assert_array_equal(np.load("x.npy"), lutra.Session(model)(x))


# verify


class Broken(lutra.Session):
    """A session that gets the last bit of one value wrong."""

    victim = ""

    def run(self, output_names: Any, feeds: Any) -> list[Any]:
        results = super().run(output_names, feeds)
        names = list(self.graph.outputs)
        index = names.index(self.victim) if self.victim in names else len(names) - 1
        if not self.victim or self.victim in names:
            flat = results[index].reshape(-1)
            flat[0] = np.nextafter(flat[0], np.float32(np.inf))
        return results


def test_verify(capture: Any, model: str) -> None:
    code, out, err = capture("verify", model)
    assert (code, err) == (0, "")
    for isa in lutra.runnable_isas():
        assert re.search(rf"^{isa} +ok", out, re.MULTILINE)
    assert "2 golden and 4 random samples" in out
    code, out, _ = capture("verify", model, "--json", "--isa", "scalar", "--samples", "0")
    report = json.loads(out)
    assert code == 0
    assert report["ok"] is True
    assert [result["isa"] for result in report["results"]] == ["scalar"]


def test_verify_without_golden_data(capture: Any, refuse: Any, folder: Path) -> None:
    save_graph(image_graph(), "m.lutra")
    code, out, _ = capture("verify", "m.lutra")
    assert code == 0
    assert "holds no golden data" in out
    refuse("verify", "m.lutra", "--samples", "0", match="give --samples above 0")


def test_verify_a_fixed_batch_and_several_ends(capture: Any, folder: Path) -> None:
    for graph in (image_graph(batch=3), two_graph()):
        save_graph(with_golden(graph), "m.lutra")
        assert capture("verify", "m.lutra")[0] == 0


def test_verify_finds_wrong_golden_data(capture: Any, folder: Path) -> None:
    graph = with_golden(image_graph())
    assert graph.golden is not None
    inputs, (output,) = graph.golden
    save_graph(replace(graph, golden=(inputs, (output * np.float32(1.2),))), "m.lutra")
    code, out, _ = capture("verify", "m.lutra")
    assert code == 1
    assert "differs from the golden data in the file by 0.17" in out
    assert out.splitlines()[-1] == "FAILED"


@pytest.mark.parametrize(
    ("victim", "isa", "message"),
    [
        ("pq_conv2d_2.out", "scalar", r"lookup layer 'pq_conv2d_2' \(pq_conv2d\) gives 2 of"),
        ("pq_linear_9.out", "scalar", "lookup layer 'pq_linear_9'"),
        ("mean_8.out", "last", "'mean_8' .* gives other bits than with scalar"),
        ("pq_linear_9.out", "fused", "whole network differs from the same value fetched node by"),
    ],
)
def test_verify_finds_a_wrong_bit(
    capture: Any,
    model: str,
    monkeypatch: pytest.MonkeyPatch,
    victim: str,
    isa: str,
    message: str,
) -> None:
    isas = lutra.runnable_isas()
    if isa == "last" and len(isas) == 1:
        pytest.skip("needs two sets of kernels")

    def new_session(graph: Graph, isa: str) -> lutra.Session:
        fused = len(graph.outputs) == 1
        wrong = {"scalar": isa == "scalar", "last": isa == isas[-1], "fused": fused}[chosen]
        return (Broken if wrong else lutra.Session)(graph, isa=isa)

    chosen = isa
    monkeypatch.setattr(Broken, "victim", victim)
    monkeypatch.setattr(verify, "new_session", new_session)
    code, out, _ = capture("verify", model)
    assert code == 1
    assert re.search(message, out), out
    code, out, _ = capture("verify", model, "--json")
    assert code == 1
    assert json.loads(out)["ok"] is False


def test_verify_explains_moved_codes(
    capture: Any, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The dense layer gives 0.25, the border between two steps of the grid, and a reference that
    # rounds its bias up goes to the step above: another code, and an output that differs a lot.
    centroids = (60 + np.arange(16, dtype=np.uint8)).reshape(1, 16, 1).repeat(4, axis=0)
    tables = np.arange(-64, 64, dtype=np.int8).reshape(4, 16, 2)
    b = Builder(("x", (None, 4)))
    zeros, ones = np.zeros((4, 4), np.float32), np.ones(2, np.float32)
    y = b.add("linear", "x", tensors={"weight": zeros, "bias": np.full(4, 0.25, np.float32)})
    roles = {"centroids": centroids, "tables": tables, "scale": ones, "bias": ones}
    b.add("pq_linear", y, tensors=roles, in_features=4, act_scale=0.5, act_zero=64, act_bits=7)
    graph = b.graph()
    original = verify.run_reference
    save_graph(with_golden(graph), "m.lutra")

    def rounds_up(graph: Graph, feeds: Any, **options: Any) -> Any:
        bias = np.full(4, 0.25 + 1e-7, np.float32)
        return original(
            replace(graph, tensors={**graph.tensors, "linear_0.bias": bias}), feeds, **options
        )

    monkeypatch.setattr(verify, "run_reference", rounds_up)
    code, out, _ = capture("verify", "m.lutra")
    assert code == 0
    assert "note: moved codes" in out
    result = json.loads(capture("verify", "m.lutra", "--json")[1])["results"][0]
    assert result["moved"] > 0
    assert result["reference_difference"] > 0.01
    assert result["golden_difference"] == 0


# eval


def labelled(model: str, x: Any) -> Any:
    return lutra.Session(model)(x).argmax(axis=1)


def test_eval(capture: Any, model: str) -> None:
    x = floats(70)
    labels = labelled(model, x)
    labels[:7] = (labels[:7] + 1) % 10
    words = ["--images", save("x.npy", x), "--labels", save("y.npy", labels)]
    code, out, err = capture("eval", model, *words)
    assert (code, err) == (0, "")
    assert "top-1 90.00% (63 of 70 images)" in out
    code, out, _ = capture("eval", model, *words, "--json", "--limit", "14", "--batch", "4")
    report = json.loads(out)
    assert (report["images"], report["correct"], report["top1"]) == (14, 7, 0.5)
    assert report["batch"] == 4
    assert report["ms_per_image"] > 0


def test_eval_prepares_images(capture: Any, model: str) -> None:
    ready = (images(9).transpose(0, 3, 1, 2) / np.float32(255) - np.float32(0.5)) / np.float32(0.25)
    labels = labelled(model, np.ascontiguousarray(ready)).astype(np.uint8)
    words = ["--images", save("x.npy", images(9)), "--labels", save("y.npy", labels)]
    assert "top-1 100.00%" in capture("eval", model, *words, "--batch", "2")[1]


def test_eval_with_a_fixed_batch(capture: Any, folder: Path) -> None:
    save_graph(image_graph(), "free.lutra")
    save_graph(image_graph(batch=4), "fixed.lutra")
    x = floats(10)
    words = ["--images", save("x.npy", x), "--labels", save("y.npy", labelled("free.lutra", x))]
    assert "10 of 10 images" in capture("eval", "fixed.lutra", *words)[1]


def test_eval_refuses(refuse: Any, folder: Path) -> None:
    save_graph(image_graph(), "m.lutra")
    x, y = save("x.npy", floats()), save("y.npy", np.arange(5))

    def bad(images: str, labels: str, match: str, model: str = "m.lutra") -> None:
        refuse("eval", model, "--images", images, "--labels", labels, match=match)

    bad("none.npy", y, "cannot read 'none.npy'")
    bad(x, save("l.npy", np.arange(4)), "one label for each image")
    bad(x, save("l.npy", np.arange(5.0)), "whole numbers")
    bad(x, save("l.npy", np.arange(5)[:, None]), "whole numbers")
    bad(x, save("l.npy", np.arange(6, 11)), "labels 6..10, but the model has 10 classes")
    bad(x, save("l.npy", np.arange(5) - 1), "labels -1..3")
    bad(save("i.npy", images()), y, "does not say how to prepare them")
    bad(save("i.npy", floats().astype(np.float64)), y, "holds float64 values")
    bad(save("i.npy", floats()[:, :, :4]), y, r"\(5, 3, 4, 8\)")
    bad(save("i.npy", floats()[:0]), save("l.npy", np.arange(0)), "")
    bad(save("i.npy", np.full((5, 3, 8, 8), np.nan, np.float32)), y, "NaN")
    save_graph(two_graph(), "two.lutra")
    bad(x, y, "one input and one output", "two.lutra")
    save_graph(image_graph(preprocess=PREPROCESS), "m.lutra")
    bad(save("i.npy", images().transpose(0, 3, 1, 2)), y, r"uint8 images \(N, H, W, C\)")
    save_graph(image_graph(preprocess=[1]), "m.lutra")
    bad(x, y, "preprocess is a list")


# bench


def test_bench(capture: Any, model: str) -> None:
    words = ["--runs", "7", "--threads", "1,2", "--batch", "1,3", "--isa", "scalar"]
    code, out, err = capture("bench", model, *words, "--json", "b.json")
    assert (code, err) == (0, "")
    assert "median ms" in out
    assert len(out.splitlines()) == 2 + 4
    report = json.loads(Path("b.json").read_text())
    settings = [(r["threads"], r["batch"], r["runs"], r["isa"]) for r in report["results"]]
    assert settings == [(t, b, 7, "scalar") for t in (1, 2) for b in (1, 3)]
    for result in report["results"]:
        times = [result[key] for key in ("min_ms", "median_ms", "p95_ms", "max_ms")]
        assert times == sorted(times)
        assert result["images_per_second"] == pytest.approx(1000 * result["batch"] / times[1])


def test_bench_prints_json(capture: Any, model: str) -> None:
    code, out, _ = capture("bench", model, "--seconds", "0.05", "--warmup", "0", "--json", "-")
    assert code == 0
    assert json.loads(out)["results"][0]["runs"] >= 5


def test_bench_inputs_change(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from lutra.cli import bench

    seen: list[bytes] = []

    class Spy(lutra.Session):
        def run(self, output_names: Any, feeds: Any) -> list[Any]:
            seen.append(feeds["x"].tobytes())
            return super().run(output_names, feeds)

    monkeypatch.setattr(bench, "new_session", lambda graph, *_: Spy(graph))
    bench.measure(lutra.load_graph(model), runs=4, warmup=0)
    assert len(set(seen)) == 4


def test_bench_refuses(refuse: Any, folder: Path) -> None:
    save_graph(image_graph(batch=4), "m.lutra")
    refuse("bench", "m.lutra", "--batch", "3", match="fixed batch of 4; give --batch 4")
    refuse("bench", "m.lutra", "--json", "none/b.json", match="does not exist")


# convert

BUILD = """
import torch

def build():
    return torch.nn.Sequential(
        torch.nn.Conv2d(3, 8, 3, padding=1), torch.nn.ReLU(), torch.nn.Conv2d(8, 8, 3),
        torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(288, 5),
    )

def number():
    return 1

def broken():
    raise KeyError("weights")
"""


def test_convert_without_torch(refuse: Any, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    np.savez("d.npz", x=floats())
    monkeypatch.setitem(sys.modules, "torch", None)
    words = ["convert", "net.py:build", "--data", "d.npz", "-o", "m.lutra"]
    refuse(*words, match=r"needs torch, which is not installed; .*pip install 'lutra\[train\]'")


def test_convert(capture: Any, refuse: Any, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torch")
    monkeypatch.setattr(sys, "path", sys.path[:])
    monkeypatch.delitem(sys.modules, "net", raising=False)
    Path("net.py").write_text(BUILD)
    np.savez("d.npz", x=floats(100), y=np.arange(100))
    words = ["--data", "d.npz", "-o", "m.lutra", "--keep", "0", "--keep", "5"]
    code, out, err = capture("convert", "net.py:build", *words)
    assert (code, err) == (0, "")
    assert "1 of 3 layers replaced" in out
    graph = lutra.load_graph("m.lutra")
    assert [node.op for node in graph.nodes].count("pq_conv2d") == 1
    assert graph.metadata["seed"] == 0
    assert graph.metadata["recipe"]["keep"] == ["0", "5"]
    first = Path("m.lutra").read_bytes()
    assert capture("convert", "net:build", *words, "--seed", "0")[0] == 0
    assert Path("m.lutra").read_bytes() == first
    assert capture("verify", "m.lutra")[0] == 0
    os.unlink("m.lutra")

    def bad(target: str, match: str, *more: str) -> None:
        refuse("convert", target, "--data", "d.npz", "-o", "m.lutra", *more, match=match)

    bad("net.py", "names no function")
    bad("net.py:", "names no function")
    bad("none.py:build", "no such file")
    bad("no_such_package.net:build", "no module 'no_such_package'")
    bad("net.py:missing", "has no function 'missing'")
    bad("net.py:number", "gave a int")
    bad("net.py:broken", "failed: KeyError: 'weights'")
    bad("net.py:build", "invalid choice", "--k", "7")
    bad("net.py:build", "v=100", "--v", "100")
    bad("net.py:build", "leaves no layer", "--keep", "*")
    refuse("convert", "net.py:build", "--data", "d.npz", "-o", "no/m.lutra", match="does not exist")
    refuse("convert", "net.py:build", "--data", "none.npz", "-o", "m", match="No such file")
    for array, match in (
        ({"z": floats()}, "has no array 'x'"),
        ({"x": floats().astype(np.float64)}, "dtype float64"),
        ({"x": floats()[:0]}, "not empty"),
        ({"x": np.full((4, 3, 8, 8), np.nan, np.float32)}, "NaN"),
        ({"x": np.array([{}], dtype=object)}, "allow_pickle"),
        ({"x": floats()[:, :2]}, "cannot be converted: RuntimeError"),
    ):
        np.savez("d.npz", **array)
        bad("net.py:build", match)
    save("d.npz.npy", floats())
    os.replace("d.npz.npy", "d.npz")
    bad("net.py:build", "not an archive")
