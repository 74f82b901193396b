"""The command line: errors, doctor and inspect."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cli_support import Broken
from graphs import tiny_graph

import lutra
from lutra import cli
from lutra.errors import LutraError
from lutra.format import save_graph

pytest_plugins = ["cli_support"]

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


@pytest.mark.parametrize("buffered", [True, False])
def test_full_device(model: str, buffered: bool) -> None:
    if not os.path.exists("/dev/full"):
        pytest.skip("needs /dev/full")
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "lutra", "inspect", model],
            stdout=full,
            stderr=subprocess.PIPE,
            env={**os.environ, "PYTHONUNBUFFERED": "" if buffered else "1"},
        )
    assert done.returncode == 2
    assert done.stderr.decode().splitlines() == ["lutra: error: No space left on device"]


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


def test_a_warning_is_one_line(capture: Any, model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def warn(*_: Any, **__: Any) -> None:
        warnings.warn("a\n\x1b[2Jb", stacklevel=1)
        raise LutraError("enough")

    monkeypatch.setattr(lutra.Session, "run", warn)
    code, _, err = capture("bench", model)
    assert (code, err) == (2, "lutra: warning: a \\x1b[2Jb\nlutra: error: enough\n")
    with pytest.warns(UserWarning, match="a\n"):
        capture("bench", model, "--debug")


def test_a_bug_is_no_failed_check(
    capture: Any, model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise AssertionError("a\n\x1b[2Jb")

    monkeypatch.setattr(lutra.Session, "run", fail)
    code, out, err = capture("bench", model)
    assert (code, out) == (3, "")
    assert err == (
        "lutra: internal error: AssertionError: a \\x1b[2Jb; please report it with --debug\n"
    )


def test_compile_writes_what_the_function_gives(capture: Any, model: str) -> None:
    code, out, _ = capture("compile", model)
    assert code == 0
    made = Path(model).with_suffix(".lutrac")
    assert f"wrote {made}" in out
    assert made.read_bytes() == lutra.compile_plan(lutra.load_graph(model))


COMMANDS_WITH_FILE = [
    ["inspect", "bad.lutra"],
    ["run", "bad.lutra", "-i", "x.npy", "-o", "y.npy"],
    ["verify", "bad.lutra"],
    ["eval", "bad.lutra", "--images", "x.npy", "--labels", "y.npy"],
    ["bench", "bad.lutra", "--json", "b.json"],
    ["compile", "bad.lutra"],
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


def test_help_loads_next_to_nothing() -> None:
    code = (
        "import sys\n"
        "from lutra.cli import main\n"
        "try:\n    main(['--help'])\n"
        "except SystemExit:\n    pass\n"
        "heavy = {'numpy', 'torch', 'safetensors', 'importlib.metadata', 'lutra.graph'}\n"
        "print('loaded', sorted(heavy & set(sys.modules)))"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert said.stdout.splitlines()[-1] == "loaded []"
    assert "convert a PyTorch model" in said.stdout
