"""Resizing of images: by torch's interpolation where it is the same, by matrices otherwise."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, fx

from lutra.train.importing.builder import Builder, Refusal, Value
from lutra.train.importing.onnx_ops.registry import Op, axis_of, entries, onnx_op

_LINEAR = {1: "linear", 2: "bilinear", 3: "trilinear"}


@onnx_op("Upsample")
def _upsample(b: Builder, op: Op, x: Value, scales: Value | None = None) -> Any:
    given = op.get("scales") if scales is None else entries(scales, "scales")
    if given is None:
        raise Refusal("it has no scales")
    return _resized(b, op, x, [float(s) for s in given], None, list(range(b.ndim(x))), "asymmetric")


@onnx_op("Resize")
def _resize(b: Builder, op: Op, x: Value, *given: Value | None) -> Any:
    if op.opset < 11:
        return _upsample(b, op, x, *given)
    _, scales, sizes = [*given, None, None, None][:3]
    axes = [axis_of(int(a), b.ndim(x)) for a in op.get("axes", range(b.ndim(x)))]
    mode = str(op.get("coordinate_transformation_mode", "half_pixel"))
    if mode == "tf_crop_and_resize" or (op.get("exclude_outside", 0) and op.get("mode") != "cubic"):
        raise Refusal("it crops while it resizes; crop with a slice")
    if sizes is not None and not _is_empty(sizes):
        wanted = entries(sizes, "sizes")
        policy = str(op.get("keep_aspect_ratio_policy", "stretch"))
        if policy != "stretch":
            return _keeping_ratio(b, op, x, wanted, axes, mode, policy)
        return _resized(b, op, x, None, wanted, axes, mode)
    if scales is None or _is_empty(scales):
        raise Refusal("it has neither scales nor sizes")
    return _resized(b, op, x, entries(scales, "scales"), None, axes, mode)


def _is_empty(value: Value) -> bool:
    return isinstance(value, Tensor) and value.numel() == 0


def _keeping_ratio(b: Builder, op: Op, x: Value, wanted: list[Any], axes: list[int], mode: str,
                   policy: str) -> Any:  # fmt: skip
    own = [b.sizes(x)[axis] for axis in axes]
    if any(size is None for size in own) or any(isinstance(w, fx.Node) for w in wanted):
        raise Refusal("it keeps the ratio of sizes that are known at run time only")
    ratios = [w / o for w, o in zip(wanted, own, strict=True) if o]
    scale = min(ratios) if policy == "not_larger" else max(ratios)
    sizes = [math.floor(scale * o + 0.5) for o in own if o is not None]
    return _resized(b, op, x, [scale] * len(axes), sizes, axes, mode)


def _resized(b: Builder, op: Op, x: Value, scales: list[Any] | None, sizes: list[Any] | None,
             axes: list[int], mode: str) -> Any:  # fmt: skip
    """The image, resized along axes by scales or to sizes; both where sizes were rounded."""
    moved = [
        i for i, axis in enumerate(axes)
        if not _stays(b, x, axis, scales[i] if scales else None, sizes[i] if sizes else None)
    ]  # fmt: skip
    if not moved:
        return x
    axes = [axes[i] for i in moved]
    scales = None if scales is None else [scales[i] for i in moved]
    sizes = None if sizes is None else [sizes[i] for i in moved]
    kind = str(op.get("mode", "nearest"))
    rank = b.ndim(x) - 2
    name = _torch_mode(op, kind, mode, rank, scales, sizes, [b.sizes(x)[a] for a in axes])
    whole = 1 <= rank <= 3 and min(axes) >= 2
    if name is not None and whole and not (scales is not None and sizes is not None):
        aligned = {"align_corners": mode == "align_corners"} if "nearest" not in name else {}
        if sizes is not None:
            size = [
                sizes[axes.index(a)] if a in axes else b.size(x, a) for a in range(2, b.ndim(x))
            ]
            return b.call_like(_sketch, F.interpolate, x, size=size, mode=name, **aligned)
        assert scales is not None
        every = [float(scales[axes.index(a)]) if a in axes else 1.0 for a in range(2, b.ndim(x))]
        target = [
            math.floor(s * f) if s is not None else None
            for s, f in zip(b.sizes(x)[2:], every, strict=True)
        ]
        if None not in target and (name == "nearest" or _exact(b.sizes(x)[2:], target, every)):
            return b.call_like(_sketch, F.interpolate, x, size=target, mode=name, **aligned)
        if None in target and all(f.is_integer() for f in every):
            return b.call_like(_sketch, F.interpolate, x, scale_factor=every, mode=name, **aligned)
    for i, axis in enumerate(axes):
        x = _along(b, op, x, axis, None if scales is None else float(scales[i]),
                   None if sizes is None else sizes[i], kind, mode)  # fmt: skip
    return x


def _sketch(x: Tensor, size: Any = None, scale_factor: Any = None, **_: Any) -> Tensor:
    """An image of the size that is wanted."""
    if size is None:
        size = [int(f) * s for s, f in zip(x.shape[2:], scale_factor, strict=True)]
    return x.new_empty((*x.shape[:2], *size))


def _exact(sizes: Any, target: Any, scales: list[float]) -> bool:
    """Whether the ratio of the sizes is the scale."""
    return all(t == s * f for s, t, f in zip(sizes, target, scales, strict=True))


def _stays(b: Builder, x: Value, axis: int, scale: Any, size: Any) -> bool:
    if size is not None:
        own = b.size(x, axis)
        return own is size if isinstance(size, fx.Node) else bool(own == size)
    return not isinstance(scale, fx.Node) and float(scale) == 1.0


def _torch_mode(op: Op, kind: str, mode: str, rank: int, scales: Any, sizes: Any,
                own: Any) -> str | None:  # fmt: skip
    """The mode of `F.interpolate` that computes the same; None where there is none."""
    if op.get("antialias", 0):
        return None
    if kind == "nearest":
        default = "round_prefer_floor" if op.opset >= 11 and op.type == "Resize" else "floor"
        rounding = str(op.get("nearest_mode", default))
        if mode == "asymmetric" and rounding == "floor":
            return "nearest"
        whole = (
            all(float(s).is_integer() for s in scales if not isinstance(s, fx.Node))
            if scales is not None
            else all(
                isinstance(s, int) and o and s % o == 0 for s, o in zip(sizes, own, strict=True)
            )
        )
        odd = scales is not None and any(float(s) % 2 for s in scales)
        if whole and mode in ("half_pixel", "pytorch_half_pixel", "half_pixel_symmetric"):
            return (
                None
                if odd and rounding in ("floor", "ceil")
                else "nearest"
                if (rounding.startswith("round"))
                else None
            )
        return None
    if (
        mode == "pytorch_half_pixel"
        and sizes is not None
        and all(isinstance(s, int) and s > 1 for s in sizes)
    ):
        mode = "half_pixel"
    if mode == "pytorch_half_pixel" and scales is not None:
        mode = "half_pixel"
    if mode == "half_pixel_symmetric" and sizes is not None:
        mode = "half_pixel"
    if mode not in ("half_pixel", "align_corners"):
        return None
    if kind == "linear":
        return _LINEAR.get(rank)
    cubic = float(op.get("cubic_coeff_a", -0.75)) == -0.75 and not op.get("exclude_outside", 0)
    return "bicubic" if kind == "cubic" and rank == 2 and cubic else None


def _along(b: Builder, op: Op, x: Value, axis: int, scale: float | None, size: Any, kind: str,
           mode: str) -> Any:  # fmt: skip
    """One axis: entries by their numbers, or a product with a matrix."""
    own = b.sizes(x)[axis]
    if own is None or isinstance(size, fx.Node):
        raise Refusal(
            f"it resizes axis {axis}, whose size is known at run time only, in a way that PyTorch "
            "does not have; fix the size with shapes="
        )
    size = math.floor(own * (scale or 1.0)) if size is None else int(size)
    if size < 1:
        raise Refusal(f"it resizes axis {axis} to {size} entries")
    scale = size / own if scale is None else scale
    places = _places(mode, own, size, scale)
    if kind == "nearest":
        default = "round_prefer_floor" if op.opset >= 11 and op.type == "Resize" else "floor"
        chosen = _rounded(places, str(op.get("nearest_mode", default)))
        index = torch.from_numpy(np.clip(chosen, 0, own - 1).astype(np.int64))
        return b.call(torch.index_select, x, axis, index)
    matrix = _matrix(op, places, own, scale, kind)
    if axis == b.ndim(x) - 1:
        return b.call(torch.matmul, x, matrix.t().contiguous())
    if axis == b.ndim(x) - 2:
        return b.call(torch.matmul, matrix, x)
    turned = b.call(torch.transpose, x, axis, -1)
    made = b.call(torch.matmul, turned, matrix.t().contiguous())
    return b.call(torch.transpose, made, axis, -1)


def _places(mode: str, own: int, size: int, scale: float) -> Any:
    """Where in the input each entry of the output lies."""
    at = np.arange(size, dtype=np.float64)
    if mode == "asymmetric":
        return at / scale
    if mode == "align_corners":
        return at * (own - 1) / (own * scale - 1) if size > 1 else at * 0
    if mode == "pytorch_half_pixel" and size == 1:
        return at * 0
    if mode == "tf_half_pixel_for_nn":
        return (at + 0.5) / scale
    if mode == "half_pixel_symmetric":
        offset = own / 2 * (1 - size / (scale * own))
        return offset + (at + 0.5) / scale - 0.5
    if mode in ("half_pixel", "pytorch_half_pixel"):
        return (at + 0.5) / scale - 0.5
    raise Refusal(f"its coordinate_transformation_mode is {mode!r}")


def _rounded(places: Any, rounding: str) -> Any:
    if rounding == "floor":
        return np.floor(places)
    if rounding == "ceil":
        return np.ceil(places)
    if rounding == "round_prefer_ceil":
        return np.floor(places + 0.5)
    return np.ceil(places - 0.5)


def _matrix(op: Op, places: Any, own: int, scale: float, kind: str) -> Tensor:
    """(outputs, inputs): the share of each input in each output."""
    narrow = min(scale, 1.0) if op.get("antialias", 0) else 1.0
    reach = (2 if kind == "cubic" else 1) / narrow
    matrix = np.zeros((len(places), own))
    outside = bool(op.get("exclude_outside", 0))
    a = float(op.get("cubic_coeff_a", -0.75))
    for row, place in enumerate(places):
        first, last = math.floor(place - reach) + 1, math.ceil(place + reach) - 1
        inputs = np.arange(min(first, math.floor(place)), max(last, math.floor(place) + 1) + 1)
        distance = np.abs(inputs - place) * narrow
        share = _cubic(distance, a) if kind == "cubic" else np.maximum(0, 1 - distance)
        if outside or narrow < 1:
            if outside:
                share[(inputs < 0) | (inputs >= own)] = 0
            share = share / share.sum()
        np.add.at(matrix[row], np.clip(inputs, 0, own - 1), share)
    return torch.from_numpy(matrix).float()


def _cubic(x: Any, a: float) -> Any:
    near = ((a + 2) * x - (a + 3)) * x * x + 1
    far = ((a * x - 5 * a) * x + 8 * a) * x - 4 * a
    return np.where(x <= 1, near, np.where(x < 2, far, 0.0))
