"""Operators on volumes (N, C, D, H, W), written in torch on images.

Where they are convolved the slices stand below each other in one image, with rows of zeros between
them; what a kernel sees of several slices is beside each other in its channels. They are channels
where they stay apart, and rows of H * W columns where they are pooled.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor

_aten = torch.ops.aten


def _triple(value: Any) -> list[Any]:
    values = list(value) if isinstance(value, (list, tuple)) else [value]
    return values * 3 if len(values) == 1 else values


def _pad(x: Tensor, pads: Sequence[int]) -> Tensor:
    return F.pad(x, pads) if any(not isinstance(pad, int) or pad for pad in pads) else x


def _rows(x: Tensor) -> Tensor:
    """Volumes as images (N, C, D, H * W)."""
    return x.reshape(*x.shape[:3], x.shape[3] * x.shape[4])


def _along_depth_and_images(
    x: Tensor, depth: Callable[[Tensor], Tensor] | None, images: Callable[[Tensor], Tensor] | None
) -> Tensor:
    """What works along each axis by itself: first on rows, then on slices beside each other."""
    batch, channels, _, height, width = x.shape
    if depth is not None:
        x = depth(_rows(x)).reshape(batch, channels, -1, height, width)
    if images is None:
        return x
    made = images(x.reshape(batch, channels * x.shape[2], height, width))
    return made.reshape(batch, channels, -1, made.shape[2], made.shape[3])


# ---- convolutions -------------------------------------------------------------------------------


def _conv3d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Tensor:
    """The slices under a kernel are channels of one slice of the image."""
    steps, pads, spread = _triple(stride), _triple(padding), _triple(dilation)
    taps, rows = weight.shape[2:4]
    reach = [spread[0] * (taps - 1) + 1, spread[1] * (rows - 1) + 1]
    x = _pad(input, (0, 0, pads[1], pads[1], pads[0], pads[0]))
    count, valid = ((x.shape[i + 2] - reach[i]) // steps[i] + 1 for i in (0, 1))
    if steps[1] > 1:
        x = _pad(x, (0, 0, 0, -x.shape[3] % steps[1]))
    last = steps[0] * (count - 1) + 1
    seen = [x[:, :, k * spread[0] : k * spread[0] + last : steps[0]] for k in range(taps)]
    x = torch.stack(seen, 2) if taps > 1 else seen[0]
    high, width = x.shape[-2:]
    x = x.reshape(-1, input.shape[1] * taps, count * high, width)
    x = _pad(x, (0, 0, 0, max(0, reach[1] - steps[1])))  # as many rows as the last slice needs
    kernel = weight.reshape(weight.shape[0], -1, *weight.shape[3:])
    y = F.conv2d(x, kernel, bias, steps[1:], (0, pads[2]), spread[1:], groups)
    y = y.reshape(-1, weight.shape[0], count, high // steps[1], y.shape[3])
    return y[:, :, :, :valid]


def _conv3d_padding(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: str = "valid",
    dilation: Any = 1,
    groups: int = 1,
) -> Tensor:
    if padding == "same":
        pads: list[int] = []
        for size, spread in zip(weight.shape[2:], _triple(dilation), strict=True):
            total = spread * (size - 1)  # of an even kernel torch puts the odd slice behind
            pads = [total // 2, total - total // 2, *pads]
        input = _pad(input, pads)
    return _conv3d(input, weight, bias, stride, 0, dilation, groups)


def _conv_transpose3d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    output_padding: Any = 0,
    groups: int = 1,
    dilation: Any = 1,
) -> Tensor:
    """First the images of every tap of the depth, then these are laid over each other."""
    steps, pads, more = _triple(stride), _triple(padding), _triple(output_padding)
    spread, (taps, rows) = _triple(dilation), weight.shape[2:4]
    depth, height = input.shape[2:4]
    reach, step = spread[1] * (rows - 1) + 1, steps[1]
    whole = (height - 1) * step + reach
    wanted = whole - 2 * pads[1] + more[1]
    high = -(-max(whole, pads[1] + wanted) // step)  # rows of a slice with its zeros
    x = _pad(input, (0, 0, 0, high - height)).reshape(*input.shape[:2], depth * high, -1)
    kernel = weight.reshape(weight.shape[0], -1, *weight.shape[3:])  # taps are the last of channels
    x = F.conv_transpose2d(
        x, kernel, None, steps[1:], (0, pads[2]), (0, more[2]), groups, (spread[1], spread[2])
    )
    x = _pad(x, (0, 0, 0, step - reach))  # fewer rows where it is negative
    outputs, width = weight.shape[1] * groups, x.shape[3]
    x = x.reshape(-1, outputs * taps, depth, high * step, width)
    x = x[:, :, :, pads[1] : pads[1] + wanted].reshape(-1, outputs * taps, depth, wanted * width)
    one = torch.eye(taps).reshape(taps, 1, taps, 1).repeat(outputs, 1, 1, 1)
    y = F.conv_transpose2d(
        x, one, bias, (steps[0], 1), (pads[0], 0), (more[0], 0), outputs, (spread[0], 1)
    )
    return y.reshape(-1, outputs, y.shape[2], wanted, width)


# ---- pools --------------------------------------------------------------------------------------


def _max_pool3d(
    self: Tensor,
    kernel_size: Any,
    stride: Any = (),
    padding: Any = 0,
    dilation: Any = 1,
    ceil_mode: bool = False,
) -> Tensor:
    size, steps = _triple(kernel_size), _triple(stride or kernel_size)
    pads, spread = _triple(padding), _triple(dilation)

    def deep(rows: Tensor) -> Tensor:
        window = (size[0], 1), (steps[0], 1), (pads[0], 0), (spread[0], 1)
        return F.max_pool2d(rows, *window, ceil_mode=ceil_mode)

    def flat(image: Tensor) -> Tensor:
        return F.max_pool2d(image, size[1:], steps[1:], pads[1:], spread[1:], ceil_mode=ceil_mode)

    return _along_depth_and_images(self, *_needed(deep, flat, size, steps, pads))


def _needed(
    deep: Callable[[Tensor], Tensor],
    flat: Callable[[Tensor], Tensor],
    size: Sequence[int],
    steps: Sequence[int],
    pads: Sequence[int],
) -> tuple[Callable[[Tensor], Tensor] | None, Callable[[Tensor], Tensor] | None]:
    """The parts of a pool whose window is more than one entry."""
    windows = [(k, s, p) != (1, 1, 0) for k, s, p in zip(size, steps, pads, strict=True)]
    return deep if windows[0] else None, flat if any(windows[1:]) else None


def _avg_pool3d(
    self: Tensor,
    kernel_size: Any,
    stride: Any = (),
    padding: Any = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> Any:
    size, steps = _triple(kernel_size), _triple(stride or kernel_size)
    pads = _triple(padding)
    if divisor_override is not None and ceil_mode:
        return NotImplemented  # sums of windows that are cut off at the end
    counts = count_include_pad or divisor_override is not None

    def deep(rows: Tensor) -> Tensor:
        return F.avg_pool2d(rows, (size[0], 1), (steps[0], 1), (pads[0], 0), ceil_mode, counts)

    def flat(image: Tensor) -> Tensor:
        return F.avg_pool2d(image, size[1:], steps[1:], pads[1:], ceil_mode, counts)

    scale = 1.0 if divisor_override is None else size[0] * size[1] * size[2] / divisor_override
    lines = (size[1:], steps[1:], pads[1:]) == ([1, 1], [1, 1], [0, 0])
    height: Any = self.shape[3]
    if self.shape[1] == 1 and lines and not isinstance(height, int):
        return _band(self, size[0], steps[0], pads[0], ceil_mode, counts) * scale
    made = _along_depth_and_images(self, *_needed(deep, flat, size, steps, pads))
    return made if scale == 1.0 else made * scale


def _band(x: Tensor, size: int, step: int, pad: int, ceil_mode: bool, counts: bool) -> Tensor:
    """Means of neighbours among slices of any height and width, as products with a band of a
    matrix (`nn.LocalResponseNorm`)."""
    eye = torch.eye(x.shape[2])[:, None]
    band = F.avg_pool1d(eye, size, step, pad, ceil_mode, counts)[:, 0].t()
    return F.conv2d(x.squeeze(1), band[:, :, None, None]).unsqueeze(1)


def _adaptive_avg_pool3d(self: Tensor, output_size: Any) -> Tensor:
    sizes = _triple(output_size)
    if sizes == [1, 1, 1]:
        return self.mean((2, 3, 4), keepdim=True)
    return _adaptive(self, sizes, F.adaptive_avg_pool2d)


def _adaptive_max_pool3d(self: Tensor, output_size: Any) -> Any:
    sizes = _triple(output_size)
    made = _adaptive(self, sizes, lambda x, size: _aten.adaptive_max_pool2d(x, size)[0])
    return made, torch.zeros_like(made, dtype=torch.int64)  # places, which nobody may read


def _adaptive(x: Tensor, sizes: list[int], pool: Callable[..., Tensor]) -> Tensor:
    columns = x.shape[3] * x.shape[4]
    deep = None if x.shape[2] == sizes[0] else lambda rows: pool(rows, [sizes[0], columns])
    flat = None if [*x.shape[3:]] == sizes[1:] else lambda image: pool(image, sizes[1:])
    return _along_depth_and_images(x, deep, flat)


def _upsample_trilinear3d(
    input: Tensor, output_size: Any, align_corners: bool, scale_factors: Any
) -> Tensor:
    """Images first; slices are mixed by a matrix, which is what a line of unit vectors becomes."""

    def part(which: slice) -> tuple[Any, bool, Any]:
        size = None if output_size is None else list(output_size)[which]
        scale = None if scale_factors is None else list(scale_factors)[which]
        return size, align_corners, scale

    batch, channels, depth, height, width = input.shape
    flat = input.reshape(batch, channels * depth, height, width)
    image = _aten.upsample_bilinear2d.vec(flat, *part(slice(1, None)))
    mix = _aten.upsample_linear1d.vec(torch.eye(depth)[None], *part(slice(0, 1)))[0].t()
    made = torch.matmul(mix, image.reshape(batch, channels, depth, -1))
    return made.reshape(batch, channels, -1, image.shape[2], image.shape[3])


#: What is written for each operator; NotImplemented leaves it as it is.
WRITTEN: Final[dict[Any, Callable[..., Any]]] = {
    _aten.conv3d.default: _conv3d,
    _aten.conv3d.padding: _conv3d_padding,
    _aten.conv_transpose3d.input: _conv_transpose3d,
    _aten.max_pool3d.default: _max_pool3d,
    _aten.avg_pool3d.default: _avg_pool3d,
    _aten.adaptive_avg_pool3d.default: _adaptive_avg_pool3d,
    _aten.adaptive_max_pool3d.default: _adaptive_max_pool3d,
    _aten.upsample_trilinear3d.vec: _upsample_trilinear3d,
}
