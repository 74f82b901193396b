"""What the sub-vectors of a row are cut from: the row, its kernel rows or its pixels.

All parts of a row are encoded with the same codebooks, so that the code of a part serves every row
that it is in; see `lutra.ops.pq`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch.nn.functional as F
from torch import Tensor

from lutra.train.geometry import Geometry

Group = Literal["patch", "row", "pixel"]
#: How far a sub-vector is from a centroid, see `lutra.ops.pq`.
Distance = Literal["l2", "l1", "chebyshev"]


@dataclass(frozen=True)
class Parts:
    """The parts of the rows of a convolution: `count` of `depth` values each.

    Args:
        geometry: of the convolution.
        group: what a part is.
    """

    geometry: Geometry
    group: Group = "patch"

    @property
    def count(self) -> int:
        """T, the parts of a row."""
        rows, columns = self.geometry.kernel
        return {"patch": 1, "row": rows, "pixel": rows * columns}[self.group]

    @property
    def depth(self) -> int:
        """The values of a part."""
        return self.geometry.depth // self.count

    @property
    def window(self) -> Geometry:
        """The geometry of which a part is a row; it has no vertical padding."""
        g = self.geometry
        if self.group == "patch":
            return g
        if self.group == "pixel":
            return Geometry(g.channels)
        return Geometry(
            g.channels, (1, g.kernel[1]), (1, g.stride[1]), (0, g.padding[1]), (1, g.dilation[1])
        )

    def cut(self, rows: Tensor) -> Tensor:
        """Parts (n, T, D / T) of rows (n, D)."""
        if self.count == 1:
            return rows[:, None]
        split = rows.reshape(len(rows), self.geometry.channels, self.count, -1)
        return split.transpose(1, 2).flatten(2)

    def join(self, parts: Tensor) -> Tensor:
        """Rows (n, D) of parts (n, T, D / T)."""
        if self.count == 1:
            return parts[:, 0]
        split = parts.reshape(*parts.shape[:2], self.geometry.channels, -1)
        return split.transpose(1, 2).flatten(1)

    def sub_vectors(self, rows: Tensor, v: int) -> Tensor:
        """Sub-vectors (G, n * T, V) of rows (n, D), the last ones filled up with zeros."""
        parts = self.cut(rows).flatten(0, 1)
        return F.pad(parts, (0, -self.depth % v)).view(len(parts), -1, v).transpose(0, 1)

    def blocks(self, rows: Tensor, v: int) -> Tensor:
        """Weights (G * T, V, M) of rows (M, D) by table, zero where a sub-vector is short."""
        return self._by_codebook(rows, v).permute(2, 1, 3, 0).flatten(0, 1)

    def codebook_blocks(self, rows: Tensor, v: int) -> Tensor:
        """Weights (G, V, T * M) of rows (M, D): all that meet the sub-vectors of a codebook."""
        return self._by_codebook(rows, v).permute(2, 3, 1, 0).flatten(2)

    def rows_of(self, blocks: Tensor) -> Tensor:
        """Rows (M, D) of `blocks` (G * T, V, M)."""
        split = blocks.reshape(-1, self.count, *blocks.shape[1:]).permute(3, 1, 0, 2)  # M, T, G, V
        return self.join(split.flatten(2)[:, :, : self.depth])

    def spread(self, values: Tensor) -> Tensor:
        """What is of codebooks (G, ...), for every table (G * T, ...)."""
        return values if self.count == 1 else values.repeat_interleave(self.count, 0)

    def codes_of_rows(self, codes: Tensor) -> Tensor:
        """Codes (G * T, n) of rows from those of their parts (G, n * T)."""
        split = codes.reshape(codes.shape[0], -1, self.count)
        return split.transpose(1, 2).flatten(0, 1)

    def codes_of_patches(self, codes: Tensor, images: int, height: int, width: int) -> Tensor:
        """Codes (G * T, rows) from those of all windows (G, images * height * width).

        The windows are of padded images: height and width count them.
        """
        g = self.geometry
        kernel, stride, dilation = g.kernel, g.stride, g.dilation
        if self.group == "row":
            kernel, stride, dilation = (kernel[0], 1), (stride[0], 1), (dilation[0], 1)
        planes = codes.view(-1, images, height, width)
        for axis in (0, 1):
            span = dilation[axis] * (kernel[axis] - 1) + 1
            planes = planes.unfold(2 + axis, span, stride[axis])
        planes = planes[..., :: dilation[0], :: dilation[1]]  # (G, N, Ho, Wo, kh, kw)
        return planes.permute(0, 4, 5, 1, 2, 3).reshape(codes.shape[0] * self.count, -1)

    def padded_window(self) -> Geometry:
        """`window` for images that are padded already."""
        return replace(self.window, padding=(0, 0))

    def _by_codebook(self, rows: Tensor, v: int) -> Tensor:
        """Weights (M, T, G, V) of rows (M, D)."""
        return F.pad(self.cut(rows), (0, -self.depth % v)).view(len(rows), self.count, -1, v)
