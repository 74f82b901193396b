"""Image preprocessing as the metadata of a file describe it."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from lutra.errors import FormatError, InputError
from lutra.preprocess.image import ImagePreprocess

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
ENTRY = {"kind": "image", "layout": "NCHW", "range": [0, 1], "mean": [0.5], "std": [0.25]}


def images(*shape: int) -> Any:
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def test_survives_json() -> None:
    pre = ImagePreprocess(range=(-1, 1), mean=MEAN, std=STD)
    assert ImagePreprocess.from_dict(json.loads(json.dumps(pre.to_dict()))) == pre
    assert pre.to_dict()["kind"] == "image"


def test_metadata() -> None:
    assert ImagePreprocess.from_metadata({"classes": []}) is None
    assert ImagePreprocess.from_metadata({"preprocess": ENTRY}) == ImagePreprocess(
        mean=(0.5,), std=(0.25,)
    )


@pytest.mark.parametrize("ends", [(0, 1), (-1, 1), (0, 255)])
def test_formula(ends: tuple[float, float]) -> None:
    x = images(2, 5, 4, 3)
    made = ImagePreprocess(range=ends, mean=MEAN, std=STD).apply(x, (None, 3, 5, 4))
    assert made.dtype == np.float32
    assert made.shape == (2, 3, 5, 4)
    assert made.flags.c_contiguous
    low, high = ends
    exact = (x.astype(np.float64) / 255 * (high - low) + low - MEAN) / STD
    np.testing.assert_allclose(made, exact.transpose(0, 3, 1, 2), rtol=2e-6, atol=2e-6)


def test_same_bits_as_float32_arithmetic() -> None:
    # What the usual transforms compute: divide by 255, subtract, divide, each rounded to float32.
    x = images(2, 5, 4, 3)
    want = (x.astype(np.float32) / np.float32(255) - np.float32(MEAN)) / np.float32(STD)
    made = ImagePreprocess(mean=MEAN, std=STD).apply(x)
    np.testing.assert_array_equal(made, want.transpose(0, 3, 1, 2))


def test_one_mean_for_all_channels() -> None:
    made = ImagePreprocess(mean=(0.5,), std=(0.5,)).apply(np.full((1, 2, 2, 3), 255, np.uint8))
    np.testing.assert_array_equal(made, np.ones((1, 3, 2, 2), np.float32))


def test_float32_stays_as_it_is() -> None:
    x = np.random.default_rng(0).normal(size=(2, 3, 4, 5)).astype(np.float32)
    pre = ImagePreprocess(mean=MEAN, std=STD)
    np.testing.assert_array_equal(pre.apply(x, (None, 3, 4, 5)), x)
    strided = pre.apply(x[:, :, :, ::-1])
    assert strided.flags.c_contiguous
    np.testing.assert_array_equal(strided, x[:, :, :, ::-1])
    np.testing.assert_array_equal(pre.apply(x.astype(">f4")), x)


@pytest.mark.parametrize(
    ("x", "shape", "message"),
    [
        ([[1]], None, "is a list|are a list"),
        (np.zeros((1, 4, 4, 3)), None, "dtype float64"),
        (np.zeros((1, 4, 4, 3), np.int64), None, "dtype int64"),
        (images(4, 4, 3), None, r"shape \(4, 4, 3\)"),
        (images(1, 3, 4, 4), None, r"\(N, H, W, C\) are needed with C = 3"),
        (np.zeros((1, 4, 4, 3), np.float32), None, r"\(N, C, H, W\) are needed with C = 3"),
        (images(1, 4, 5, 3), (None, 3, 4, 4), r"the model takes \(N, 3, 4, 4\)"),
        (images(2, 4, 4, 3), (1, 3, 4, 4), r"the model takes \(1, 3, 4, 4\)"),
        (images(2, 4, 4, 3), (None, 48), r"the model takes \(N, 48\)"),
    ],
)
def test_refuses_images(x: Any, shape: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        ImagePreprocess(mean=MEAN, std=STD).apply(x, shape)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layout": "NHWC"}, "layout is 'NHWC'"),
        ({"layout": None}, "layout"),
        ({"range": [0]}, "two numbers"),
        ({"range": [1, 0]}, "the lower first"),
        ({"range": "01"}, "list of finite numbers"),
        ({"range": [0, float("inf")]}, "finite"),
        ({"mean": [float("nan")]}, "finite"),
        ({"mean": [True]}, "finite numbers"),
        ({"mean": ["0.5"]}, "finite numbers"),
        ({"mean": 0.5}, "list of finite numbers"),
        ({"mean": []}, "0 and std has 1"),
        ({"mean": [0.5, 0.5]}, "2 and std has 1"),
        ({"mean": [10**400]}, "finite numbers"),
        ({"std": [0]}, "above 0"),
        ({"std": [-1.0]}, "above 0"),
        ({"std": [1e-45], "range": [0, 1e30]}, "overflow"),
        ({"kind": "audio"}, "'audio'"),
        ({"extra": 1}, "fields"),
    ],
)
def test_refuses_nonsense(change: dict[str, Any], message: str) -> None:
    with pytest.raises(FormatError, match=message):
        ImagePreprocess.from_dict({**ENTRY, **change})
    if not set(change) & {"kind", "extra"}:
        fields = {k: v for k, v in {**ENTRY, **change}.items() if k != "kind"}
        with pytest.raises(InputError, match=message):
            ImagePreprocess(**fields)


@pytest.mark.parametrize("entry", [1, "image", ["image"], {}, {"kind": "image"}])
def test_refuses_what_is_no_entry(entry: object) -> None:
    with pytest.raises(FormatError, match="preprocess"):
        ImagePreprocess.from_metadata({"preprocess": entry})
