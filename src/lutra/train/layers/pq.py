"""Product-quantised layers as ordinary modules: `PQConv2d` and `PQLinear`.

The forward pass is hard from the first step: it quantises the input to the activation grid, finds
the code of every sub-vector and adds up int8 tables, exactly as the engine does. Only the gradients
are approximations; `PQ.gradient` chooses which.
"""

from __future__ import annotations

import math
from collections.abc import Hashable
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lutra.errors import LutraError
from lutra.ops import op_spec
from lutra.ops.limits import INT8_MAX, MAX_CODEBOOKS, MAX_SUBVECTOR
from lutra.train import distributed
from lutra.train.encoder import Encoder, Nearest, Tree
from lutra.train.geometry import Geometry
from lutra.train.layers import pq_compact as compact
from lutra.train.layers import pq_reconstruction as reconstruction
from lutra.train.layers import pq_tree as trees
from lutra.train.layers.base import (
    Family,
    FrozenLayer,
    ImageLayer,
    QuantizedLayer,
    RowLayer,
    register,
)
from lutra.train.layers.goal import Goal
from lutra.train.layers.pq_gradient import StraightThroughLookup, TableSum, straight_through
from lutra.train.layers.pq_kmeans import kmeans
from lutra.train.layers.pq_projection import REFRESH, SAMPLE_ROWS, regression
from lutra.train.layers.pq_refit import fit_tables, fit_weight, sum_rows
from lutra.train.layers.pq_soft import SoftLookup
from lutra.train.operators import portable
from lutra.train.operators import pq as ops
from lutra.train.parts import Parts
from lutra.train.recipe import PQ

_TINY = torch.finfo(torch.float32).tiny


def table_scale(tables: Tensor) -> Tensor:
    """The step of int8 tables (B, K, M), float32 (M): one for each output channel."""
    return (tables.abs().amax((0, 1)) / INT8_MAX).clamp_min(_TINY)


def quantize_tables(tables: Tensor) -> tuple[Tensor, Tensor]:
    """int8 tables (B, K, M) and float32 scale (M): one scale per output channel."""
    scale = table_scale(tables)
    return (tables / scale).round().clamp(-INT8_MAX, INT8_MAX).to(torch.int8), scale


def _parts(geometry: Geometry, method: PQ) -> Parts:
    """What the sub-vectors of a layer are cut from; a kernel of one pixel has one part."""
    return Parts(geometry, method.group if geometry.taps > 1 else "patch")


def _subvector(geometry: Geometry, method: PQ) -> int:
    """Values in a sub-vector."""
    if method.v is not None:
        return method.v
    if geometry.taps == 1:
        return 4
    return {"patch": geometry.taps, "row": geometry.kernel[1], "pixel": 4}[method.group]


class _PQLayer(QuantizedLayer):
    """What `PQConv2d` and `PQLinear` share. Build them with `from_float`.

    A layer has G codebooks and B = G * T tables, where T counts the parts of a row that are encoded
    alike (`parts`); with group="patch" there is one part.

    State: `weight` and `bias` of the dense layer; `centroids` (G, K, V) in real units;
    `act_scale`, the step of the activation grid; `inverse_temperature_logit` (soft gradient only);
    `cluster_counts` (moving average only); `projection` (G, V, V) and `projection_age` (projected
    gradient only). With encoder="tree" also `splits` (G, L) int32, `thresholds` (G, K - 1), moving
    averages on the activation grid, `tree_age`, and `table_residual` (B, K, M), what tables have
    beyond centroids times weights; `projection` is then (G, K, V). All of it is in `state_dict`.
    """

    method: PQ
    cluster_counts: Tensor
    projection: Tensor
    projection_age: Tensor
    splits: Tensor
    thresholds: Tensor
    tree_age: Tensor

    def __init__(self, weight: Tensor, bias: Tensor | None, geometry: Geometry, method: PQ) -> None:
        super().__init__(weight, bias, geometry, method)
        self.v = _subvector(geometry, method)
        self.parts = _parts(geometry, method)
        self.codebooks = -(-self.parts.depth // self.v)
        centroids = torch.zeros((self.codebooks, method.k, self.v), device=weight.device)
        self.centroids = nn.Parameter(centroids, requires_grad=method.centroids == "gradient")
        if method.encoder == "tree":
            levels = trees.levels_of(method.k)
            # first entries of the sub-vectors, until `grow` chooses
            first = torch.arange(self.codebooks, dtype=torch.int32)[:, None] * self.v
            self.register_buffer("splits", first.repeat(1, levels).to(weight.device))
            middle = torch.full((self.codebooks, method.k - 1), float(1 << (method.act_bits - 1)))
            self.register_buffer("thresholds", middle.to(weight.device))
            self.register_buffer("tree_age", torch.zeros((), dtype=torch.int64))
        if method.has_free_tables:
            shape = (self.codebooks * self.parts.count, method.k, self.outputs)
            self.table_residual = nn.Parameter(torch.zeros(shape, device=weight.device))
        if method.centroids == "average":
            self.register_buffer(
                "cluster_counts", torch.zeros((self.codebooks, method.k), device=weight.device)
            )
        if method.gradient == "projected":
            start = torch.eye(self.v, device=weight.device).repeat(self.codebooks, 1, 1)
            if method.has_free_tables:
                start = torch.zeros((self.codebooks, method.k, self.v), device=weight.device)
            self.register_buffer("projection", start)
            self.register_buffer("projection_age", torch.zeros((), dtype=torch.int64))
        self.follows = False  # the codebooks are another layer's, which moves them
        self.held = False  # the codebooks stay where they are
        if method.gradient == "soft":
            # 1 / t = softplus(logit) + 1, as in LUT-NN's code
            inverse = 1.0 / method.temperature
            logit = math.log(math.expm1(inverse - 1.0)) if inverse - 1.0 < 30 else inverse - 1.0
            self.inverse_temperature_logit = nn.Parameter(torch.tensor(logit, device=weight.device))

    @classmethod
    def check(cls, geometry: Geometry, method: PQ) -> None:
        """Refuses sub-vectors that are too long and rows that have too many of them."""
        v, parts = _subvector(geometry, method), _parts(geometry, method)
        if v > MAX_SUBVECTOR:
            raise LutraError(
                f"a {geometry.kernel[0]}x{geometry.kernel[1]} kernel has {v} entries, more "
                f"than a sub-vector may hold ({MAX_SUBVECTOR}); set v, for example "
                f"PQ(v={min(geometry.kernel[1], MAX_SUBVECTOR)})"
            )
        if -(-parts.depth // v) * parts.count > MAX_CODEBOOKS:
            raise LutraError(
                f"a layer of {geometry.depth} values for each output has more than "
                f"{MAX_CODEBOOKS} sub-vectors of {v}; set a larger v, or give it Int8()"
            )

    def share(self, leader: _PQLayer) -> None:
        """Takes the codebooks and the grid of a layer that reads the same input (nearest only).

        Both then hold the same parameter; what moves it beside the optimiser is the leader.
        """
        self.centroids = leader.centroids
        self.act_scale.copy_(leader.act_scale)
        self.signed.copy_(leader.signed)
        if self.method.centroids == "average":
            self.cluster_counts.copy_(leader.cluster_counts)
        self.follows = True

    def _table_rows(self) -> Tensor:
        """The weights (M, D) that the tables are products of; gradients go straight through the
        rounding of `PQ.weight_bits`."""
        rows = self.kernel_weight.reshape(self.outputs, -1)
        if self.method.weight_bits is None:
            return rows
        rounded, step = compact.round_rows(rows)
        return straight_through(rows.float(), rounded.float() * step[:, None])

    def weight_blocks(self) -> Tensor:
        """Weights by table: (B, V, M), zero where the last sub-vector is short."""
        return self.parts.blocks(self._table_rows(), self.v)

    def _output_metric(self) -> Tensor:
        """What a change of the sub-vectors of each codebook is to the outputs, (G, V, V)."""
        rows = self.kernel_weight.float().reshape(self.outputs, -1)
        return trees.output_metric(self.parts.codebook_blocks(rows, self.v))

    def grid_centroids(self) -> Tensor:
        """Centroids on the activation grid: (G, K, V) uint8; missing entries are 0."""
        grid = self.grid()
        q = portable.quantize(self.centroids.detach(), grid).to(torch.uint8)
        short = self.codebooks * self.v - self.parts.depth
        if short:
            q[-1, :, self.v - short :] = 0
        return q

    def encoder(self) -> Encoder:
        """What makes codes, in the integers of the engine."""
        if self.method.encoder == "tree":
            rounded = self.thresholds.round().clamp(0, self.grid().qmax + 1)
            return Tree(self.splits, rounded.to(torch.uint8), self.parts.group)
        return Nearest(self.grid_centroids(), self.parts.group, self.method.distance)

    def tables(self, encoder: Encoder) -> Tensor:
        """Float tables (B, K, M), with gradients to weights and centroids.

        The gradient goes straight through the rounding of the centroids to the grid.
        """
        values = straight_through(self.centroids.float(), self._values(encoder))
        product = torch.bmm(self.parts.spread(values), self.weight_blocks().float())
        return product + self.table_residual.float() if self.method.has_free_tables else product

    def quantized_tables(self, encoder: Encoder, tables: Tensor) -> tuple[Tensor, Tensor]:
        """int8 tables (B, K, M) and float32 scale (M) of what `tables` returned."""
        if self.method.weight_bits is None:
            return quantize_tables(tables)
        scale = table_scale(tables)
        weight, step = compact.round_rows(self.kernel_weight.reshape(self.outputs, -1))
        grid = self.grid()
        offsets = self.parts.spread(self._on_grid(encoder).float() - grid.zero)
        blocks = self.parts.blocks(weight.float(), self.v)
        factor = compact.factors(step, grid.scale, scale)
        return compact.build_tables(offsets, blocks, factor), scale

    def _on_grid(self, encoder: Encoder) -> Tensor:
        """The centroids (G, K, V) uint8 that the tables are products of."""
        return encoder.centroids if isinstance(encoder, Nearest) else self.grid_centroids()

    def _values(self, encoder: Encoder) -> Tensor:
        """Real values (G, K, V) whose products with the weights the tables are; missing entries
        are 0. A tree looks at no centroids, and with free tables no file needs them on the grid."""
        if not isinstance(encoder, Nearest) and self.method.has_free_tables:
            return self.centroids.detach().float()
        grid = self.grid()
        values = (self._on_grid(encoder).float() - grid.zero) * grid.scale
        short = self.codebooks * self.v - self.parts.depth
        if short and grid.zero:
            values[-1, :, self.v - short :] = 0.0
        return values

    def _run(self, x: Tensor) -> Tensor:
        """y (N, M, H', W') of x (N, C, H, W), in float32."""
        self.forget_frozen()  # fused optimizers do not count their writes
        device = x.device.type
        mixed = torch.is_autocast_enabled(device)
        dtype = torch.get_autocast_dtype(device) if mixed else torch.float32  # of x's gradient
        codes: list[Tensor] = []
        with torch.autocast(device, enabled=False):
            grid, geometry = self.grid(), self.geometry
            x = x.float()
            if self.method.encoder == "tree" and self.training and not self.held:
                self._refit_tree(x.detach())
            encoder = self.encoder()
            tables = self.tables(encoder)
            with torch.no_grad():
                int8_tables, scale = self.quantized_tables(encoder, tables)
                rounded = int8_tables.float() * scale
            tables = straight_through(tables, rounded)
            call = (geometry, grid, encoder, int8_tables, scale, codes)
            averaged = self.training and self.method.centroids == "average"
            averaged = averaged and not self.follows and not self.held
            if self.method.gradient == "dense":
                y = self._dense_gradient(x, tables, call)
            elif self.method.gradient == "soft":
                inverse = F.softplus(self.inverse_temperature_logit.float()) + 1.0
                centroids = self.centroids.float()
                if averaged:  # they move below, before the backward pass
                    centroids = centroids.clone()
                y = SoftLookup.apply(x, centroids, tables, inverse, call)  # type: ignore[no-untyped-call]
            else:
                if self.method.gradient == "projected" and self.training:
                    self._refresh_projection(x.detach(), encoder, int8_tables, scale)
                weight = self._gradient_weight(tables)
                y = StraightThroughLookup.apply(x, tables, weight, (*call, dtype))  # type: ignore[no-untyped-call]
            if averaged:
                self._follow_clusters(x.detach(), codes[0])
            self._reconstruct(x, y, tables, codes[0])
            return y if self.bias is None else y + self.bias.float().view(1, -1, 1, 1)

    def _dense_gradient(self, x: Tensor, tables: Tensor, call: tuple[Any, ...]) -> Tensor:
        """Sum of table rows, with the gradients of the dense layer for x and the weights."""
        geometry, grid, encoder, int8_tables, scale, keep = call
        with torch.no_grad():
            y, codes = ops.forward(x, geometry, grid, encoder, int8_tables, scale)
        keep.append(codes)
        return straight_through(reconstruction.dense_product(x, self.kernel_weight, geometry), y)

    def _reconstruct(self, x: Tensor, y: Tensor, tables: Tensor, codes: Tensor) -> None:
        """Keeps the loss of y (without bias) against the dense product."""
        share = self.method.reconstruction
        if share == 0.0 or not self.training or not torch.is_grad_enabled():
            return
        if self.method.gradient == "dense":  # y does not lead to the tables
            y = TableSum.apply(y.detach(), tables, codes)  # type: ignore[no-untyped-call]
        dense = reconstruction.dense_product(x, self.kernel_weight, self.geometry)
        reconstruction.keep(self, share * reconstruction.two_sided(y, dense))

    @torch.no_grad()
    def _gradient_weight(self, tables: Tensor) -> Tensor:
        """Weights (M, C, kh, kw) of the input gradient."""
        geometry = self.geometry
        rows = self.kernel_weight.float().reshape(self.outputs, -1)
        if self.method.gradient == "projected":
            projection = self.parts.spread(self.projection.float().transpose(1, 2))
            # of free tables: codes from sub-vectors, which the tables turn into outputs
            free = self.method.has_free_tables
            blocks = torch.bmm(projection, tables if free else self.weight_blocks().float())
            rows = self.parts.rows_of(blocks)
        return rows.view(self.outputs, geometry.channels, *geometry.kernel)

    @torch.no_grad()
    def _refresh_projection(
        self, x: Tensor, encoder: Encoder, int8_tables: Tensor, scale: Tensor
    ) -> None:
        """Estimates `projection` anew from the first images of a batch, when its time has come."""
        if not x.numel():
            return
        due = int(self.projection_age) % REFRESH == 0
        self.projection_age += 1
        if not due:
            return
        window, grid, part = self.parts.window, self.grid(), self._sample(x)
        if self.parts.count == 1:
            _, codes = ops.forward(part, window, grid, encoder, int8_tables, scale)
        else:
            codes = portable.encode(part, window, grid, replace(encoder, group="patch"))
        if self.method.has_free_tables:
            kinds = torch.arange(self.method.k, dtype=torch.uint8, device=codes.device)[:, None]
            quantized = (codes[:, None] == kinds).float()  # (G, K, rows)
        else:
            index = codes.long()[:, :, None].expand(-1, -1, self.v)
            quantized = torch.gather(self._values(encoder), 1, index).transpose(1, 2)
        self.projection.copy_(regression(portable.unfold(part, window, self.v, 0.0), quantized))

    @torch.no_grad()
    def _refit_tree(self, x: Tensor) -> None:
        """Moves the thresholds towards those that suit the centroids and the batch at hand."""
        if not x.numel():
            return
        due = int(self.tree_age) % trees.REFIT == 0
        self.tree_age += 1
        if not due:
            return
        encoder = self.encoder()
        assert isinstance(encoder, Tree)
        grid = self.grid()
        sub = portable.unfold(
            portable.quantize(self._sample(x), grid), self.parts.window, self.v, float(grid.zero)
        )
        taps = sub.reshape(-1, sub.shape[2])[self.splits.long()].long()
        factor = self._output_metric()
        real = (sub.transpose(1, 2) - grid.zero) * grid.scale
        distances = trees.squared_distances(
            torch.bmm(real, factor), torch.bmm(self.centroids.float(), factor)
        )
        new = trees.refit(taps, encoder.thresholds.long(), distances, grid.qmax + 1)
        self.thresholds.lerp_(new.float(), trees.REFIT_RATE)

    def _sample(self, x: Tensor) -> Tensor:
        """The first images of a batch, about SAMPLE_ROWS rows of them."""
        height, width = self.geometry.out_size(x.shape[2], x.shape[3])
        return x[: max(1, SAMPLE_ROWS // (height * width))]

    @torch.no_grad()
    def _follow_clusters(self, x: Tensor, codes: Tensor) -> None:
        """Moves every centroid towards the mean of the sub-vectors that chose it."""
        grid = self.grid()
        sums, counts = ops.cluster_sums(self.geometry, grid, x, codes, self.method.k, self.v)
        distributed.all_reduce(sums)  # every process then moves its centroids alike
        distributed.all_reduce(counts)
        weight = counts.float()
        mean = (sums.float() / weight.clamp_min(1.0)[:, :, None] - grid.zero) * grid.scale
        keep = self.method.decay
        total = keep * self.cluster_counts + (1.0 - keep) * weight
        step = ((1.0 - keep) * weight / total.clamp_min(1e-6))[:, :, None]
        self.centroids.add_(step * (mean - self.centroids))
        self.cluster_counts.copy_(total)

    def freeze(self) -> FrozenPQ:
        """The layer as the engine runs it: codebooks and int8 tables in place of the weights."""
        # Not in inference mode, whose tensors the kernels would have to pack at every call.
        device = self.weight.device.type
        with (
            torch.inference_mode(False),
            torch.no_grad(),
            torch.autocast(device, enabled=False),
        ):
            encoder = self.encoder()
            tables, scale = self.quantized_tables(encoder, self.tables(encoder))
            codes = {role: tensor.clone() for role, tensor in encoder.tensors.items()}
            tensors = {**codes, "tables": tables, "scale": scale}
            known = op_spec(self.op).attrs
            attrs = {n: a for n, a in encoder.attrs.items() if n in known}
            return self._freeze(FrozenPQ, tensors, attrs)

    # ---- what conversion asks -------------------------------------------------------------------

    @classmethod
    def sharing_key(cls, method: PQ) -> Hashable | None:
        """Trees suit the weights of their layer, so they stay alone."""
        return method if method.encoder == "nearest" else None

    @torch.no_grad()
    def learn(self, rows: Tensor, *, steps: int, seed: int) -> None:
        """Sets the codebooks, and what the tables of trees have beyond them."""
        grid = self.grid()
        low, high = -grid.zero * grid.scale, (grid.qmax - grid.zero) * grid.scale
        sub = self.parts.sub_vectors(rows.clamp(low, high), self.v).contiguous()  # (G, n * T, V)
        if self.method.encoder == "tree":
            self._grow(rows, sub)
        else:
            # Clusters are those of squares whatever the distance is: the table of a centroid stands
            # for all its samples, and the error that counts is that of the outputs.
            centroids, _ = kmeans(sub, self.method.k, steps=steps, seed=seed)
            self.centroids.copy_(centroids)

    def _grow(self, rows: Tensor, sub: Tensor) -> None:
        """Sets trees, centroids and what the tables have beyond them.

        Args:
            rows: samples (n, D). sub: their clipped sub-vectors (G, n * T, V).
        """
        grid, device = self.grid(), rows.device
        entries = torch.arange(self.codebooks * self.v, device=device).view(self.codebooks, self.v)
        samples = trees.Samples(
            values=sub,
            grid=portable.quantize(sub, grid).long().transpose(1, 2).contiguous(),
            metric=self._output_metric(),
            allowed=entries < self.parts.depth,
            bins=grid.qmax + 1,
        )
        taps, thresholds, centroids = trees.fit(samples, self.method.k)
        self.centroids.copy_(centroids)
        self.splits.copy_(entries.gather(1, taps))
        self.thresholds.copy_(thresholds)
        if not self.method.has_free_tables:
            return
        codes, tables = self._codes(rows), self.tables(self.encoder())
        want = rows @ self.kernel_weight.float().reshape(self.outputs, -1).t()
        fit = fit_tables(codes, tables, sum_rows(codes, tables), Goal(want))
        self.table_residual.add_(fit.change)
        self.table_residual[0] += fit.shift

    @torch.no_grad()
    def refit(self, rows: Tensor, goal: Goal, *, keep_weight: bool = False) -> None:
        """The weights on the quantised input, then free tables, by ridge regression."""
        codes = self._codes(rows)
        if not keep_weight:
            index, values = codes.long(), self.parts.spread(self._values(self.encoder()))
            picked = torch.stack([v[c] for v, c in zip(values, index, strict=True)], 1)
            x = self.parts.rows_of(picked.permute(1, 2, 0))
            fit = fit_weight(x, self._float_outputs(codes), goal)
            weight = self._table_rows().float() + fit.change
            fitted = self.form.kernel(weight).view_as(self.weight).to(self.weight.dtype)
            self.weight = nn.Parameter(fitted, requires_grad=self.weight.requires_grad)
            self.shift_bias(fit.shift)
        if self.method.has_free_tables:
            tables = self.tables(self.encoder())
            fit = fit_tables(codes, tables, self._float_outputs(codes), goal)
            self.table_residual.add_(fit.change)
            self.shift_bias(fit.shift)
        self._center(rows, goal)

    def _float_outputs(self, codes: Tensor) -> Tensor:
        """Outputs (n, M) for codes (B, n), with tables that are not rounded."""
        y = sum_rows(codes, self.tables(self.encoder()))
        return y if self.bias is None else y + self.bias.float()

    @torch.no_grad()
    def settle(self, rows: Tensor) -> dict[str, Any]:
        """Fields of the report; starts the moving averages."""
        error, codes = self._output_error(rows)
        tables = len(codes)
        counts = torch.zeros((tables, self.method.k), device=codes.device)
        counts.scatter_add_(1, codes.long(), torch.ones(codes.shape, device=codes.device))
        distributed.all_reduce(counts)
        if self.method.centroids == "average":
            # As if the moving average had run on batches of this many rows.
            self.cluster_counts.copy_(counts)
        encoder, table_bytes = self.method.encoder, tables * self.method.k * self.outputs
        group = self.parts.group
        distance = self.method.distance
        label = ["pq", *[encoder] * (encoder != "nearest"), *[distance] * (distance != "l2")]
        label += [group] * (group != "patch")
        return {
            "label": ", ".join(label),
            "encoder": encoder,
            "v": self.v,
            "k": self.method.k,
            "codebooks": self.codebooks,
            "table_bytes": table_bytes,
            "stored": (("tables", table_bytes),),
            "lookups_per_row": tables * self.outputs,
            "multiplies_per_row": self.geometry.depth * self.outputs,
            "error": error,
            "used": float((counts > 0).float().mean()),
        }

    def _codes(self, rows: Tensor) -> Tensor:
        """Codes (B, n) of samples (n, D)."""
        each = self.parts.cut(rows).flatten(0, 1)[:, :, None, None]
        encoder = replace(self.encoder(), group="patch")
        codes = portable.encode(each, Geometry(self.parts.depth), self.grid(), encoder)
        return self.parts.codes_of_rows(codes)

    def _output_error(self, rows: Tensor) -> tuple[float, Tensor]:
        """Relative squared error of the output, and codes (B, n), with the grid and the int8 tables
        that the engine will have."""
        codes = self._codes(rows)
        encoder = self.encoder()
        tables, scale = self.quantized_tables(encoder, self.tables(encoder))
        got = portable.lookup(codes, tables).float() * scale
        want = rows @ self.kernel_weight.float().reshape(self.outputs, -1).t()
        variance = want.var(correction=0).clamp_min(1e-12)
        return distributed.mean(float((got - want).square().mean() / variance)), codes

    @torch.no_grad()
    def randomize(self) -> None:
        """Random codebooks on a grid around zero: the codes must not be the same in all rows."""
        super().randomize()
        generator = torch.Generator().manual_seed(0)
        self.centroids.copy_(2.0 * torch.rand(self.centroids.shape, generator=generator) - 1.0)
        if self.method.encoder == "tree":
            first = torch.arange(self.codebooks)[:, None] * self.v
            entry = torch.randint(self.v, self.splits.shape, generator=generator)
            self.splits.copy_((first + entry).clamp_max(self.parts.depth - 1))
            thresholds = torch.rand(self.thresholds.shape, generator=generator)
            self.thresholds.copy_(thresholds * self.grid().qmax)

    def codebook_parameters(self) -> list[nn.Parameter]:
        """The centroids, where a gradient moves them."""
        return [self.centroids] if self.centroids.requires_grad else []

    def hold_codebooks(self, held: bool) -> None:
        """Whether moving averages and thresholds of trees stay where they are."""
        self.held = held

    def temperature_parameters(self) -> list[nn.Parameter]:
        """The temperature of the soft gradient."""
        return [self.inverse_temperature_logit] if self.method.gradient == "soft" else []

    def compact_weight(self) -> Tensor | str:
        """The weights of the dense layer; free tables are more than their products."""
        if self.method.has_free_tables:
            kind = "free_tables=True" if self.method.free_tables else "encoder 'tree'"
            return f"{kind}: its tables are more than products of centroids and weights"
        return self.kernel_weight.detach().float().reshape(self.outputs, -1)

    def compact_centroids(self) -> Tensor | None:
        """Those of a tree, which has none when it is frozen."""
        return self.grid_centroids() if self.method.encoder == "tree" else None

    def extra_repr(self) -> str:
        g, m = self.geometry, self.method
        return (
            f"{g.channels} -> {self.outputs}, kernel={g.kernel}, stride={g.stride}, "
            f"V={self.v}, K={m.k}, gradient={m.gradient}, centroids={m.centroids}"
        )


class PQConv2d(ImageLayer, _PQLayer):
    """A product-quantised 2-D convolution (groups = 1)."""

    op = "pq_conv2d"


class PQLinear(RowLayer, _PQLayer):
    """A product-quantised linear layer."""

    op = "pq_linear"


class FrozenPQ(FrozenLayer):
    """A frozen layer of codebooks and int8 tables."""

    centroids: Tensor | None
    splits: Tensor | None
    thresholds: Tensor | None
    tables: Tensor
    scale: Tensor
    bias: Tensor

    @property
    def encoder(self) -> str:
        """What makes codes: "nearest" or "tree"."""
        return str(self.node.attrs["encoder"])


register(Family(PQ, {nn.Conv2d: PQConv2d, nn.Linear: PQLinear}))
