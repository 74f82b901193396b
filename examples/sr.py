"""Super-resolution for the examples: T91 and Set5, luminance, bicubic resizing, patches, PSNR.

Networks see the luminance of ITU-R BT.601 as MATLAB's rgb2ycbcr computes it, 16..235, over 255.
Resizing is Pillow's bicubic, which smooths when it shrinks, as MATLAB's imresize does.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from packed import undo_median
from PIL import Image
from torch import Tensor

_WEIGHTS = np.array([65.481, 128.553, 24.966], np.float32) / 255


class Pair(NamedTuple):
    """An input (H, W) and its target (H * factor, W * factor), float32, 8-bit values over 255."""

    input: np.ndarray
    target: np.ndarray


def luminance(rgb: np.ndarray) -> np.ndarray:
    """float32 (H, W), 16..235, of uint8 (H, W, 3)."""
    if rgb.dtype != np.uint8 or rgb.ndim != 3 or rgb.shape[2] != 3:
        raise ValueError(f"the image is {rgb.dtype} {rgb.shape}; give uint8 (H, W, 3)")
    return np.float32(16) + rgb.astype(np.float32) @ _WEIGHTS


def resize(plane: np.ndarray, height: int, width: int) -> np.ndarray:
    """A float32 plane (H, W) in another size, bicubic."""
    image = Image.fromarray(np.ascontiguousarray(plane, np.float32))
    return np.asarray(image.resize((width, height), Image.Resampling.BICUBIC))


def shrink(rgb: np.ndarray, scale: int) -> np.ndarray:
    """The low-resolution image of uint8 (H, W, 3), whose sizes are multiples of `scale`."""
    height, width = rgb.shape[:2]
    small = (width // scale, height // scale)
    return np.asarray(Image.fromarray(rgb).resize(small, Image.Resampling.BICUBIC))


def pair(low: np.ndarray, high: np.ndarray, *, enlarge: bool) -> Pair:
    """What a network takes and what it should give.

    Args:
        low: the low-resolution image, uint8 (h, w, 3).
        high: the image, uint8 (h * scale, w * scale, 3).
        enlarge: whether the network takes the enlarged image.
    """
    x, y = luminance(low), luminance(high)
    if enlarge:
        x = resize(x, *y.shape)
    return Pair(x / 255, y / 255)


def make_pairs(images: Sequence[np.ndarray], scales: Sequence[int], *, enlarge: bool) -> list[Pair]:
    """Pairs of images uint8 (H, W, 3), which are cut to multiples of the scale and shrunk."""
    pairs = []
    for scale in scales:
        for image in images:
            height, width = (size // scale * scale for size in image.shape[:2])
            high = np.ascontiguousarray(image[:height, :width])
            pairs.append(pair(shrink(high, scale), high, enlarge=enlarge))
    return pairs


def _read_folder(folder: Path) -> list[np.ndarray]:
    files = [f for f in sorted(folder.iterdir()) if f.suffix.lower() in (".png", ".bmp", ".jpg")]
    if not files:
        raise SystemExit(f"{folder}: no .png, .bmp or .jpg files")
    return [np.asarray(Image.open(file).convert("RGB")) for file in files]


def load_t91(data: Path) -> list[np.ndarray]:
    """The training images, uint8 (H, W, 3) of several sizes.

    Args:
        data: holds t91_rgb.npy.xz and t91_sizes.npz, or a folder T91 with image files.
    """
    if not (data / "t91_rgb.npy.xz").exists():
        return _read_folder(data / "T91")
    with np.load(data / "t91_sizes.npz", allow_pickle=False) as sizes:
        hw = sizes["hw"]
    stack = undo_median(data / "t91_rgb.npy.xz")
    return [np.ascontiguousarray(stack[i, :h, :w]) for i, (h, w) in enumerate(hw)]


def load_set5(data: Path, scale: int, *, enlarge: bool) -> list[Pair]:
    """The five test images.

    Args:
        data: holds set5_hr.npy.xz, set5_lr_x2.npy.xz (made with MATLAB) and so on and
            set5_sizes.npz; or a folder Set5 with image files, which are shrunk here.
        scale: 2, 3 or 4.
        enlarge: whether the network takes the enlarged image.
    """
    if not (data / "set5_hr.npy.xz").exists():
        return make_pairs(_read_folder(data / "Set5"), [scale], enlarge=enlarge)
    high, low = undo_median(data / "set5_hr.npy.xz"), undo_median(data / f"set5_lr_x{scale}.npy.xz")
    with np.load(data / "set5_sizes.npz", allow_pickle=False) as sizes:
        high_hw, low_hw = sizes[f"hr_x{scale}"], sizes[f"lr_x{scale}"]
    return [
        pair(low[i, :h, :w], high[i, :H, :W], enlarge=enlarge)
        for i, ((h, w), (H, W)) in enumerate(zip(low_hw, high_hw, strict=True))
    ]


def psnr(output: np.ndarray, target: np.ndarray, border: int) -> float:
    """Decibels, of 8-bit images: both are rounded to 8 bits, and the border is left out.

    Args:
        output: float (H, W), about 0..1.
        target: float (H, W), 0..1.
        border: pixels at each side that do not count, usually the scale.
    """
    if output.shape != target.shape or output.ndim != 2 or min(output.shape) <= 2 * border:
        raise ValueError(
            f"output {output.shape} and target {target.shape} must be planes of one size, larger "
            f"than twice the border of {border}"
        )
    ours, theirs = (np.rint(np.clip(plane * 255.0, 0, 255)) for plane in (output, target))
    window = (slice(border, -border or None),) * 2
    error = float(np.square(ours[window] - theirs[window]).mean())
    return float("inf") if error == 0.0 else 10 * float(np.log10(255.0**2 / error))


class Patches(torch.utils.data.Dataset[tuple[Tensor, Tensor]]):
    """Random patches, every position of every image alike, turned and mirrored at random.

    Fetches whole batches at once: inputs (N, 1, size, size), targets (N, 1, size * factor, ...).

    Args:
        pairs: all with one factor between the sizes of input and target.
        size: of a patch of the input.
        count: patches in an epoch.

    Raises:
        ValueError: the factors differ, or no image is as large as a patch.
    """

    def __init__(self, pairs: Sequence[Pair], size: int, count: int) -> None:
        factors = {y.shape[0] / x.shape[0] for x, y in pairs}
        factors |= {y.shape[1] / x.shape[1] for x, y in pairs}
        if len(factors) != 1 or not (factor := factors.pop()).is_integer():
            raise ValueError(f"the pairs have the factors {sorted(factors)}; give one whole number")
        pairs = [p for p in pairs if min(p.input.shape) >= size]
        if not pairs:
            raise ValueError(f"no image is as large as a patch of {size} pixels")
        self.factor, self.size, self.count = int(factor), size, count
        self.hw = torch.tensor([p.input.shape for p in pairs])
        area = self.hw.prod(1)
        self.first = torch.cat([torch.zeros(1, dtype=torch.int64), area.cumsum(0)[:-1]])
        self.chances = (self.hw - size + 1).prod(1).float()
        self.inputs = torch.from_numpy(np.concatenate([p.input.reshape(-1) for p in pairs]))
        self.targets = torch.from_numpy(np.concatenate([p.target.reshape(-1) for p in pairs]))

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        x, y = self.__getitems__([i])
        return x[0], y[0]

    def __getitems__(self, indices: list[int]) -> tuple[Tensor, Tensor]:
        count = len(indices)
        image = torch.multinomial(self.chances, count, replacement=True)
        free = self.hw[image] - self.size + 1
        # rand < 1, but its product with the positions may be rounded up to their number
        corner = torch.minimum((torch.rand(count, 2) * free).long(), free - 1)
        x = self._cut(self.inputs, image, corner, 1)
        y = self._cut(self.targets, image, corner, self.factor)
        for kind, chosen in enumerate(torch.randint(8, (count,)) == torch.arange(8)[:, None]):
            x[chosen], y[chosen] = _turned(x[chosen], kind), _turned(y[chosen], kind)
        return x.unsqueeze(1), y.unsqueeze(1)

    def _cut(self, flat: Tensor, image: Tensor, corner: Tensor, factor: int) -> Tensor:
        steps = torch.arange(self.size * factor)
        top, left = (corner * factor).unbind(1)
        width = self.hw[image, 1] * factor
        rows = (top[:, None] + steps) * width[:, None] + left[:, None]
        start = self.first[image] * factor**2
        return flat[start[:, None, None] + rows[:, :, None] + steps]


def _turned(patches: Tensor, kind: int) -> Tensor:
    """One of the eight symmetries of a square, of (N, size, size)."""
    patches = patches.flip(2) if kind & 1 else patches
    patches = patches.flip(1) if kind & 2 else patches
    return patches.transpose(1, 2) if kind & 4 else patches
