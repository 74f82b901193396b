"""The same functions as `native`, in plain PyTorch, for every device; exact for integers.

Memory is bounded: rows are taken in blocks, and no tensor of rows x codebooks x K x outputs exists.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from lutra.train.encoder import Encoder, Tree, descend
from lutra.train.geometry import Geometry, Grid
from lutra.train.parts import Parts

_EXACT = 1 << 24  # up to here float32 holds every integer
#: Powers of the norms of the distances without products.
POWERS = {"l1": 1.0, "chebyshev": float("inf")}
BLOCK = 1 << 20  # elements of the largest temporary on the CPU: it should stay in the cache


def block_size(x: Tensor) -> int:
    """Elements that a temporary may have on the device of x."""
    return BLOCK if x.device.type == "cpu" else 16 * BLOCK


def quantize(x: Tensor, grid: Grid) -> Tensor:
    """Grid values 0..qmax of x, as float32 (small integers are exact)."""
    low, high = float(-grid.zero), float(grid.qmax - grid.zero)
    scale = torch.tensor(grid.scale, dtype=torch.float32, device=x.device)
    q = (x.float() / scale).clamp(low, high)
    return torch.nan_to_num(q, nan=low).round() + grid.zero


def unfold(x: Tensor, geometry: Geometry, dim: int, padding: float) -> Tensor:
    """Sub-vectors (B, V, rows) of x (N, C, H, W); missing entries of the last one are zero."""
    ph, pw = geometry.padding
    if ph or pw:
        x = F.pad(x, (pw, pw, ph, ph), value=padding)
    if geometry.kernel == (1, 1) and geometry.stride == (1, 1):
        rows = x.transpose(0, 1).reshape(geometry.depth, -1)
    else:
        patches = F.unfold(x, geometry.kernel, geometry.dilation, 0, geometry.stride)
        rows = patches.transpose(0, 1).reshape(geometry.depth, -1)
    missing = -geometry.depth % dim
    return F.pad(rows, (0, 0, 0, missing)).view(-1, dim, rows.shape[1])


def encode(x: Tensor, geometry: Geometry, grid: Grid, encoder: Encoder) -> Tensor:
    """Codes (B, rows) uint8 of x (N, C, H, W)."""
    if encoder.group != "patch":
        return _encode_parts(x, Parts(geometry, encoder.group), grid, encoder)
    if isinstance(encoder, Tree):
        return _encode_tree(x, geometry, grid, encoder)
    centroids = encoder.centroids
    codebooks, k, dim = centroids.shape
    c = centroids.float()
    half = torch.floor(c.square().sum(2) / 2)[:, :, None]
    power = POWERS.get(encoder.distance)  # None: l2
    images = max(1, block_size(x) // max(1, geometry.depth * x.shape[2] * x.shape[3]))
    codes = []
    with torch.autocast(x.device.type, enabled=False):  # bfloat16 scores would not be exact
        for part in torch.split(x, images):
            sub = unfold(quantize(part, grid), geometry, dim, float(grid.zero))
            for block in torch.split(sub, max(1, block_size(x) // (codebooks * k)), dim=2):
                # exact: every score is an integer below 2**24; of equal ones the lowest index
                if power is None:
                    scores = torch.bmm(c, block) - half
                else:
                    scores = -torch.cdist(c, block.transpose(1, 2).contiguous(), p=power)
                codes.append(scores.argmax(1).to(torch.uint8))
    return torch.cat(codes, 1)


def _encode_parts(x: Tensor, parts: Parts, grid: Grid, encoder: Encoder) -> Tensor:
    """Codes (B, rows) of patches whose parts are encoded alike: each part of an image once."""
    (ph, pw), window = parts.geometry.padding, parts.padded_window()
    x = F.pad(x, (pw, pw, ph, ph))
    codes = encode(x, window, grid, replace(encoder, group="patch"))
    return parts.codes_of_patches(codes, len(x), *window.out_size(*x.shape[2:]))


def _encode_tree(x: Tensor, geometry: Geometry, grid: Grid, tree: Tree) -> Tensor:
    """Codes (B, rows) uint8 of x (N, C, H, W)."""
    splits = tree.splits.long()
    width = max(geometry.depth, splits.numel())
    images = max(1, block_size(x) // max(1, width * x.shape[2] * x.shape[3]))
    codes = []
    for part in torch.split(x, images):
        rows = unfold(quantize(part, grid), geometry, 1, float(grid.zero))[:, 0]  # (D, rows)
        codes.append(descend(rows.long()[splits], tree.thresholds).to(torch.uint8))
    return torch.cat(codes, 1)


def lookup(codes: Tensor, tables: Tensor) -> Tensor:
    """Sums (rows, M) int32 of tables (B, K, M) int8 by codes (B, rows)."""
    codebooks, k, outputs = tables.shape
    flat = tables.reshape(codebooks * k, outputs)
    offset = torch.arange(codebooks, device=codes.device)[:, None] * k
    parts = []
    for block in torch.split(codes, max(1, block_size(codes) // (codebooks * outputs)), dim=1):
        index = (block.long() + offset).t()
        parts.append(flat[index].sum(1, dtype=torch.int32))
    return torch.cat(parts)


def forward(
    x: Tensor,
    geometry: Geometry,
    grid: Grid,
    encoder: Encoder,
    tables: Tensor,
    scale: Tensor,
    bias: Tensor,
) -> tuple[Tensor, Tensor]:
    """y (N, M, H', W') and codes (B, N*H'*W') of x (N, C, H, W)."""
    height, width = geometry.out_size(x.shape[2], x.shape[3])
    codes = encode(x, geometry, grid, encoder)
    y = lookup(codes, tables).float() * scale + bias
    return y.view(x.shape[0], height, width, -1).permute(0, 3, 1, 2), codes


def table_gradient(codes: Tensor, gradient: Tensor, centroids: int) -> Tensor:
    """grad (B, K, M): the output gradient (N, M, H', W') added up by code."""
    codebooks, outputs = codes.shape[0], gradient.shape[1]
    rows = gradient.permute(0, 2, 3, 1).reshape(-1, outputs).float()
    total = torch.zeros((codebooks * centroids, outputs), device=rows.device)
    clusters = torch.arange(centroids, dtype=torch.uint8, device=codes.device)[:, None]
    size = max(1, block_size(codes) // (codebooks * centroids))
    # One-hot products: unlike scatter-add, they give the same bits in every run on a GPU.
    with torch.autocast(rows.device.type, enabled=False):
        for block, part in zip(torch.split(codes, size, 1), torch.split(rows, size), strict=True):
            member = (block[:, None] == clusters).to(rows.dtype)  # (B, K, rows)
            total.addmm_(member.view(codebooks * centroids, -1), part)
    return total.view(codebooks, centroids, outputs)


def code_pairs(codes: Tensor, centroids: int) -> Tensor:
    """How often two codes of (B, n) meet in a row: int32 (B K, B K)."""
    size = codes.shape[0] * centroids
    offset = torch.arange(codes.shape[0], device=codes.device)[:, None] * centroids
    counts = torch.zeros((size, size), dtype=torch.int32, device=codes.device)
    for block in torch.split(codes.long(), max(1, block_size(codes) // size), 1):
        member = torch.zeros((block.shape[1], size), device=codes.device)
        member.scatter_(1, (block + offset).t(), 1.0)
        counts += (member.t() @ member).int()  # whole numbers below 2^24: exact
    return counts


def cluster_sums(
    geometry: Geometry, grid: Grid, x: Tensor, codes: Tensor, centroids: int, dim: int
) -> tuple[Tensor, Tensor]:
    """Sums (B, K, V) of the quantised sub-vectors of each code, and their counts (B, K), int64."""
    codebooks = codes.shape[0]
    counts = torch.zeros((codebooks, centroids), dtype=torch.int64, device=x.device)
    sums = torch.zeros((codebooks, centroids, dim), dtype=torch.int64, device=x.device)
    height, width = geometry.out_size(x.shape[2], x.shape[3])
    images = max(1, block_size(x) // max(1, geometry.depth * height * width))
    blocks = torch.split(codes, images * height * width, 1)
    for part, block in zip(torch.split(x, images), blocks, strict=True):
        sub = unfold(quantize(part, grid), geometry, dim, float(grid.zero)).long()
        index = block.long()
        counts.scatter_add_(1, index, torch.ones_like(index))
        wide = index[:, :, None].expand(-1, -1, dim)
        sums.scatter_add_(1, wide, sub.transpose(1, 2))
    return sums, counts


def exact_products(matrices: Tensor, rows: Tensor, largest: int) -> Tensor:
    """Integer matrices (G, M, D) times (G, D, R), in float32: exact sums, rounded once.

    Args:
        largest: that a product of two entries can be. So many are added at a time that every sum
            on the way is exact in float32, in whatever order it is formed.
    """
    depth = _EXACT // largest
    if rows.shape[1] <= depth:
        return torch.bmm(matrices, rows)
    total = torch.zeros((), dtype=torch.int32, device=rows.device)
    parts = zip(torch.split(matrices, depth, 2), torch.split(rows, depth, 1), strict=True)
    for some, others in parts:
        total = total + torch.bmm(some, others).to(torch.int32)
    return total.float()
