"""``lutra run``, ``eval`` and ``bench``: what they give and what they refuse."""

from __future__ import annotations

import io
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cli_support import PREPROCESS, floats, image_graph, images, save, two_graph
from graphs import random_inputs

import lutra
from lutra.format import save_graph
from lutra.reference import run_reference

pytest_plugins = ["cli_support"]

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


def test_run_takes_archives(capture: Any, refuse: Any, folder: Path) -> None:
    graph = two_graph()
    save_graph(graph, "m.lutra")
    feeds = random_inputs(graph, 3)
    want = run_reference(graph, feeds)["file"]
    np.savez("in.npz", **feeds)
    run, out = ["run", "m.lutra"], ["-o", "file=f.npy"]
    assert capture(*run, "-i", "in.npz", *out) == (0, "", "")
    np.testing.assert_array_equal(np.load("f.npy"), want)
    np.savez("a.npz", a=feeds["a"])
    (folder / "f.npy").unlink()
    given = ["-i", f"b={save('b.npy', feeds['b'])}"]
    assert capture(*run, *given, "-i", "a.npz", *out) == (0, "", "")
    np.testing.assert_array_equal(np.load("f.npy"), want)
    refuse(*run, "-i", "a.npz", *out, match="lacks b; give NAME=FILE")
    refuse(*run, "-i", "in.npz", *given, *out, match="'b' twice")
    refuse(*run, "-i", "in.npz", "-i", "a.npz", *out, match="'a' twice")
    refuse(*run, "-i", "in.npz", "-i", "x.npy", *out, match="'x.npy' is one more than")
    np.savez("more.npz", **feeds, c=feeds["a"])
    refuse(*run, "-i", "more.npz", *out, match="an array 'c', which is no input of the model; name")
    np.savez("ids.npz", a=feeds["a"].astype(np.int64), b=feeds["b"])
    refuse(*run, "-i", "ids.npz", *out, match="'ids.npz: a' holds int64 values")
    refuse(*run, "-i", "none.npz", *out, match="cannot read 'none.npz'")


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
    bad(x.astype(np.float64) * 1e39, r"'x.npy' holds .*e\+3\d, which is beyond float32")
    bad(x.astype(np.int64), r"int64 values but the input 'x' takes float32")
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
    bad(save("i.npy", floats().astype(np.int32)), y, "holds int32 values")
    bad(save("i.npy", floats()[:, :, :4]), y, r"\(5, 3, 4, 8\)")
    bad(save("i.npy", floats()[:0]), save("l.npy", np.arange(0)), "")
    bad(save("i.npy", np.full((5, 3, 8, 8), np.nan, np.float32)), y, "NaN")
    save_graph(two_graph(), "two.lutra")
    bad(x, y, "the outputs total.out, file; say which one", "two.lutra")
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
