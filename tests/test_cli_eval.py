"""``lutra eval``: PSNR, samples of any size and point clouds; what they refuse."""

from __future__ import annotations

import json
import math
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cli_support import save
from graphs import Builder

import lutra
from lutra.cli.common import read_arrays
from lutra.cli.metrics import MAX_PSNR, Psnr, Top1
from lutra.errors import InputError
from lutra.format import save_graph
from lutra.graph import Graph

pytest_plugins = ["cli_support"]


def image_to_image(
    channels: int = 1, size: tuple[int | None, int | None] = (None, None), **metadata: Any
) -> Graph:
    """A model (N, C, H, W) -> (N, C, H, W) that makes every value larger by 1/255."""
    b = Builder(("x", (None, channels, *size)))
    shift = np.full(channels, 1 / 255, np.float32)
    b.add("affine", "x", tensors={"scale": np.ones(channels, np.float32), "bias": shift})
    return b.graph(metadata=metadata)


def planes(*sizes: tuple[int, int], seed: int = 0) -> dict[str, Any]:
    """8-bit images by name."""
    rng = np.random.default_rng(seed)
    return {f"{i:04}": rng.integers(10, 240, size, dtype=np.uint8) for i, size in enumerate(sizes)}


def as_float(images: dict[str, Any]) -> dict[str, Any]:
    return {name: x.astype(np.float32) / 255 for name, x in images.items()}


def save_all(name: str, arrays: dict[str, Any]) -> str:
    np.savez(name, **arrays)
    return name


def decibels(error: float) -> float:
    return 10 * math.log10(255**2 / error)


# The metrics themselves


def test_psnr_by_hand() -> None:
    target = np.zeros((4, 5), np.uint8)
    target[1, 2] = 200
    output = np.zeros((1, 1, 4, 5), np.float32)
    output[0, 0, 1, 2] = (200 - 6) / 255
    metric = Psnr([target], ["t"])
    metric.add(output)
    assert metric.entries()["psnr"] == pytest.approx(10 * math.log10(255**2 / (36 / 20)))
    inner = Psnr([target], ["t"], border=1)
    inner.add(output)
    assert inner.entries()["psnr"] == pytest.approx(10 * math.log10(255**2 / (36 / 6)))
    outer = np.zeros((1, 1, 4, 5), np.float32)
    outer[0, 0, 1, 2], outer[0, 0, 0] = 200 / 255, 0.5  # wrong at the border only
    exact = Psnr([target], ["t"], border=1)
    exact.add(outer)
    assert exact.entries()["psnr"] == MAX_PSNR


def test_psnr_rounds_and_clips_as_the_targets_do() -> None:
    output = np.array([[[[0.4 / 255, 300 / 255], [-0.2, 100.4 / 255]]]], np.float32)
    exact = Psnr([np.array([[0, 255], [0, 100]], np.uint8)], ["t"])
    exact.add(output)
    assert exact.entries()["psnr"] == MAX_PSNR
    wanted = np.array([[0, 1], [0, 0.5]], np.float32)
    floats = Psnr([wanted], ["t"])
    floats.add(output)
    error = np.square(np.clip(output[0, 0].astype(np.float64), 0, 1) - wanted).mean()
    assert floats.entries()["psnr"] == pytest.approx(-10 * math.log10(error))
    doubled = Psnr([2 * wanted], ["t"], peak=2.0)
    doubled.add(2 * output)
    assert doubled.entries()["psnr"] == pytest.approx(-10 * math.log10(
        np.square(np.clip(2 * output[0, 0].astype(np.float64), 0, 2) - 2 * wanted).mean() / 4
    ))  # fmt: skip


def test_psnr_is_the_mean_of_the_images() -> None:
    targets = [np.full((3, 3), 100, np.uint8), np.full((3, 3), 50, np.uint8)]
    metric = Psnr(targets, ["a", "b"])
    metric.add(np.full((2, 1, 3, 3), 52 / 255, np.float32))
    values = [decibels(48**2), decibels(2**2)]
    assert metric.entries()["psnr_of"] == pytest.approx(values, abs=1e-4)
    assert metric.entries()["psnr"] == pytest.approx(sum(values) / 2)
    assert "mean of 2 images" in metric.text()


def test_psnr_of_luminance() -> None:
    target = np.zeros((2, 2, 3), np.uint8)
    output = np.zeros((1, 3, 2, 2), np.float32)
    output[0, 2] = 51 / 255  # blue alone
    metric = Psnr([target], ["t"], luminance=True)
    metric.add(output)
    assert metric.entries()["psnr"] == pytest.approx(decibels((24.966 * 0.2) ** 2), rel=1e-6)
    floats = Psnr([target.transpose(2, 0, 1).astype(np.float32)], ["t"], luminance=True)
    floats.add(output)
    assert floats.entries()["psnr"] == pytest.approx(metric.entries()["psnr"], rel=1e-6)


def test_metrics_refuse_targets() -> None:
    image = np.zeros((4, 4), np.uint8)
    for target, settings, match in (
        (image.astype(np.float64), {}, "float64"),
        (image[0], {}, "must be an image"),
        (image[:0], {}, "must be an image"),
        (image, {"border": 2}, "leaves none"),
        (image, {"luminance": True}, "no luminance"),
        (np.full((4, 4), np.nan, np.float32), {}, "NaN"),
    ):
        with pytest.raises(InputError, match=match):
            Psnr([target], ["t"], **settings)
    with pytest.raises(InputError, match=r"output has shape \(1, 5, 4\)"):
        Psnr([image], ["t"]).add(np.zeros((1, 1, 5, 4), np.float32))
    with pytest.raises(InputError, match=r"labels 0\.\.3"):
        Top1(np.arange(4), 3)


# The command


def test_images_of_several_sizes(capture: Any, folder: Path) -> None:
    save_graph(image_to_image(), "m.lutra")
    images = planes((6, 7), (9, 5), (6, 7))
    words = ["--images", save_all("x.npz", as_float(images))]
    words += ["--targets", save_all("y.npz", images), "--metric", "psnr"]
    code, out, err = capture("eval", "m.lutra", *words, "--json", "--border", "1")
    assert (code, err) == (0, "")
    report = json.loads(out)
    assert report["psnr"] == pytest.approx(decibels(1))  # all values are 1 too large
    assert len(report["psnr_of"]) == report["images"] == 3
    assert (report["metric"], report["border"], report["batch"]) == ("psnr", 1, 1)
    assert report["ms_per_image"] > 0
    text = capture("eval", "m.lutra", *words)[1]
    assert f"PSNR {decibels(1):.2f} dB (mean of 3 images)" in text
    assert (
        json.loads(capture("eval", "m.lutra", *words, "--json", "--limit", "2")[1])["images"] == 2
    )


def test_images_of_one_size(capture: Any, folder: Path) -> None:
    save_graph(image_to_image(3, (4, 6)), "m.lutra")
    target = np.random.default_rng(0).random((5, 3, 4, 6), np.float32) / 2
    words = ["--inputs", save("x.npy", target - np.float32(1 / 255)), "--metric", "psnr"]
    words += ["--targets", save("y.npy", target), "--json"]
    exact = json.loads(capture("eval", "m.lutra", *words, "--batch", "2")[1])
    assert exact["psnr"] > 90
    assert (exact["images"], exact["batch"]) == (5, 2)
    shifted = save("x.npy", target)
    assert shifted == words[1]
    small, large = (
        json.loads(capture("eval", "m.lutra", *words, *more)[1])["psnr"]
        for more in ((), ("--peak", "10"))
    )
    assert small == pytest.approx(decibels(1), abs=1e-3)
    assert large == pytest.approx(small + 20)


def test_uint8_inputs(capture: Any, folder: Path) -> None:
    entry = {"kind": "image", "layout": "NCHW", "range": [0, 1], "mean": [0.0], "std": [1.0]}
    save_graph(image_to_image(preprocess=entry), "m.lutra")
    images = planes((6, 7), (3, 5))
    images["0001"] = images["0001"][:, :, None]
    words = ["--images", save_all("x.npz", images), "--targets", "x.npz", "--metric", "psnr"]
    report = json.loads(capture("eval", "m.lutra", *words, "--json")[1])
    assert report["psnr"] == pytest.approx(decibels(1))


def test_point_clouds(capture: Any, folder: Path) -> None:
    b = Builder(("points", (None, 3, None, 1)))
    b.add("mean", b.add("relu", b.conv2d("points", 3, 4, kernel=(1, 1))), axes=(2, 3))
    save_graph(b.graph(), "m.lutra")
    session = lutra.Session("m.lutra")
    clouds = np.random.default_rng(0).standard_normal((7, 3, 20, 1)).astype(np.float32)
    labels = session(clouds).argmax(axis=1)
    labels[0] = (labels[0] + 1) % 4
    words = ["--inputs", save("x.npy", clouds), "--labels", save("y.npy", labels)]
    assert "(6 of 7 images)" in capture("eval", "m.lutra", *words)[1]
    sizes = {f"{i:04}": clouds[i, :, : 20 - i] for i in range(7)}
    labels = np.array([session(x[None]).argmax() for x in sizes.values()])
    save("y.npy", labels)
    words[1] = save_all("x.npz", sizes)
    report = json.loads(capture("eval", "m.lutra", *words, "--json")[1])
    assert (report["correct"], report["images"], report["batch"]) == (7, 7, 1)


def test_a_fixed_batch_is_filled_up(capture: Any, folder: Path) -> None:
    b = Builder(("x", (4, 1, 3, 3)))
    b.add("relu", "x")
    save_graph(b.graph(), "m.lutra")
    target = np.random.default_rng(0).random((6, 3, 3)).astype(np.float32)
    words = ["--images", save("x.npy", target[:, None]), "--targets", save("y.npy", target)]
    report = json.loads(capture("eval", "m.lutra", *words, "--metric", "psnr", "--json")[1])
    assert (report["psnr"], report["images"], report["batch"]) == (MAX_PSNR, 6, 4)


def chooser() -> Graph:
    """Scores (N, 3) of ids and a mask, and their rows, of which the mask takes all but the last."""
    rng = np.random.default_rng(0)
    b = Builder(("ids", (None, 5), "int32"), ("mask", (None, 5), "int32"))
    rows = b.add(
        "embedding", "ids", tensors={"weight": rng.standard_normal((9, 3)).astype(np.float32)}
    )
    scores = b.add("masked_mean", rows, "mask")
    return replace(b.graph(scores, rows), outputs=(scores, rows))


def test_integers_and_several_inputs_and_outputs(capture: Any, refuse: Any, folder: Path) -> None:
    graph = chooser()
    save_graph(graph, "m.lutra")
    session = lutra.Session("m.lutra")
    rng = np.random.default_rng(1)
    ids, mask = rng.integers(0, 9, (11, 5)), rng.integers(0, 2, (11, 5)).astype(bool)
    mask[:, 0] = True
    labels = session.run([graph.outputs[0]], {"ids": ids, "mask": mask})[0].argmax(axis=1)
    labels[3] = (labels[3] + 1) % 3
    files = [f"ids={save('i.npy', ids)}", f"mask={save('m.npy', mask)}"]
    words = ["eval", "m.lutra", "--inputs", files[0], "--inputs", files[1]]
    words += ["--labels", save("y.npy", labels)]
    chosen = ["--output", graph.outputs[0]]
    code, out, err = capture(*words, *chosen, "--batch", "4", "--json")
    assert (code, err) == (0, "")
    report = json.loads(out)
    assert (report["correct"], report["images"], report["batch"]) == (10, 11, 4)
    report = json.loads(capture(*words, *chosen, "--limit", "3", "--json")[1])
    assert (report["correct"], report["images"]) == (3, 3)

    np.savez("in.npz", ids=ids, mask=mask)
    again = ["eval", "m.lutra", "--inputs", "in.npz", "--labels", "y.npy", *chosen, "--json"]
    assert json.loads(capture(*again)[1])["correct"] == 10
    refuse(*again, "--inputs", files[0], match="'ids' twice")
    np.savez("in.npz", ids=ids, mask=mask[:4])
    refuse(*again, match=r"'in.npz: mask' has shape \(4, 5\) and 'y.npy' 11 entries")

    refuse(*words, match=f"the model has the outputs {', '.join(graph.outputs)}; say which")
    refuse(*words, "--output", graph.outputs[0] + "_", match=f"did you mean '{graph.outputs[0]}'")
    refuse(*words, "--output", graph.outputs[1], match=r"an output \(N, classes\); the output")
    refuse(*words[:4], *words[-2:], *chosen, match="--inputs lacks mask; give")
    refuse(*words, "--inputs", files[0], *chosen, match="'ids' twice")
    save("i.npy", ids[:5])
    refuse(*words, *chosen, match=r"'i.npy' has shape \(5, 5\) and 'y.npy' 11 entries")
    save("i.npy", ids.astype(np.float32))
    refuse(*words, *chosen, match="has dtype float32; the model takes int32")
    save("i.npy", ids + 9)
    refuse(*words, *chosen, match=r"ids must be in 0\.\.8")

    b = Builder(("ids", (4, 5), "int32"))
    rows = b.add("embedding", "ids", tensors={"weight": np.eye(9, 3, dtype=np.float32)})
    b.add("mean", rows, axes=(1,))
    save_graph(b.graph(), "one.lutra")
    labels = np.concatenate([lutra.Session("one.lutra")(x) for x in (ids[:4], ids[4:8], ids[7:])])
    labels = np.delete(labels, 8, axis=0).argmax(axis=1)
    more = ["--inputs", save("i.npy", ids), "--labels", save("y.npy", labels)]
    report = json.loads(capture("eval", "one.lutra", *more, "--json")[1])
    assert (report["correct"], report["images"], report["batch"]) == (11, 11, 4)


def test_eval_refuses(refuse: Any, folder: Path) -> None:
    save_graph(image_to_image(), "m.lutra")
    images = planes((6, 7), (9, 5))
    floats = as_float(images)
    good_x, good_y = save_all("x.npz", floats), save_all("y.npz", images)

    def bad(x: str, y: str, match: str, *more: str, metric: str = "psnr") -> None:
        words = ["--images", x, "--targets", y, "--metric", metric, *more]
        refuse("eval", "m.lutra", *words, match=match)

    bad(good_x, good_y, "leaves none", "--border", "3")
    bad(good_x, good_y, "no luminance", "--luminance")
    bad(good_x, good_y, "--peak is for float targets", "--peak", "1")
    bad(good_x, good_y, "not a number above 0", "--peak", "0")
    bad(good_x, good_y, "at least 0", "--border", "-1")
    bad(good_x, good_y, "an output .N, classes.; the output", metric="top1")
    bad(good_x, good_y, "invalid choice", metric="ssim")
    bad(good_x, save_all("z.npz", planes((6, 7))), "2 and 1 images, or images of other names")
    bad(good_x, save_all("z.npz", {"a": images["0000"], "b": images["0001"]}), "other names")
    bad(good_x, save_all("z.npz", planes((6, 7), (9, 6))), "'z.npz' .0001.: .* output's size")
    bad(good_x, save_all("z.npz", floats | {"0000": floats["0000"].astype(np.float64)}), "float64")
    bad(save_all("z.npz", images), good_y, "does not say how to prepare")
    bad(save_all("z.npz", floats | {"0001": np.full((9, 5), np.nan, np.float32)}), good_y, "NaN")
    bad(save_all("z.npz", floats | {"0001": np.zeros((1, 0, 5), np.float32)}), good_y, "empty")
    bad(save_all("z.npz", {}), save_all("w.npz", {}), "holds no samples")
    bad(save_all("z.npz", {"0000": np.array(["a"])}), good_y, "must hold numbers")
    bad("none.npz", good_y, "No such file")
    Path("z.npz").write_bytes(Path(good_x).read_bytes()[:-40])
    bad("z.npz", good_y, "cannot read 'z.npz' as a .npz file")
    Path("z.npz").write_text("not an archive")
    bad("z.npz", good_y, "cannot read 'z.npz' as a .npz file")
    objects = np.empty(1, object)
    with zipfile.ZipFile("z.npz", "w") as archive, archive.open("0000.npy", "w") as file:
        np.lib.format.write_array(file, objects, allow_pickle=True)
    bad("z.npz", good_y, "cannot read 'z.npz' as a .npz file")
    bad(save("z.npy", np.float32(1)), good_y, "one number")

    b = Builder(("x", (None, 4)))
    b.add("relu", "x")
    save_graph(b.graph(), "m.lutra")
    bad(good_x, good_y, "--metric psnr needs a model")
    x, y = save("x.npy", np.zeros((2, 4), np.float32)), save("l.npy", np.zeros(2, np.int64))
    for flag in (["--border", "2"], ["--luminance"], ["--peak", "2"]):
        bad(x, y, f"{flag[0]} is for --metric psnr", *flag, metric="top1")
    bad(good_x, save("l.npy", np.zeros(3, np.int64)), "2 arrays .* one label", metric="top1")


def test_read_arrays_takes_other_byte_orders(folder: Path) -> None:
    np.savez("x.npz", a=np.arange(3, dtype=">f4"), b=np.arange(2, dtype=np.uint8))
    arrays = read_arrays("x.npz")
    assert arrays["a"].dtype == np.float32
    assert arrays["a"].tolist() == [0, 1, 2]
    assert arrays["b"].dtype == np.uint8
