"""Layers of response tables in PyTorch: exact outputs in every mode, gradients, conversion."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sweeps import sweep
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lutra import Session, load_graph, run_reference, runnable_isas
from lutra.errors import LutraError
from lutra.train import (
    PQ,
    Int8,
    Lookup,
    LookupConv2d,
    LookupLinear,
    convert,
    export,
    finetune,
    recipe_from_json,
    recipe_to_json,
)
from lutra.train.layers import lookup
from lutra.train.layers.lookup_table import activation_steps, weight_steps
from lutra.train.operators import lookup as lookup_ops

SIZES = [(4, 3), (8, 7), (16, 15), (32, 33), (64, 33), (16, 3), (4, 15)]
KINDS: list[dict[str, Any]] = [
    {"table": "linear"},
    {"table": "learned"},
    {"table": "learned", "rank": 2},
    {"table": "learned", "rank": 3},
    {"table": "free"},
]


def disturb(layer: Any, seed: int = 5) -> Any:
    """Moves table and scales away from their start."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in layer.response.parameters():
            p.add_(torch.randn(p.shape, generator=generator) * 0.3)
        layer.log_act_scale.add_(0.07)
    return layer


def make_conv(
    *args: Any, method: Lookup | None = None, signed: bool = False, **kwargs: Any
) -> LookupConv2d:
    torch.manual_seed(3)
    layer = LookupConv2d.from_float(nn.Conv2d(*args, **kwargs), method or Lookup())
    layer.set_activation_range(-2.0 if signed else 0.0, 2.0)
    return disturb(layer)


def make_linear(
    features: int, outputs: int, method: Lookup | None = None, signed: bool = True
) -> LookupLinear:
    torch.manual_seed(4)
    layer = LookupLinear.from_float(nn.Linear(features, outputs), method or Lookup())
    layer.set_activation_range(-2.0 if signed else 0.0, 2.0)
    return disturb(layer)


def noise(*shape: int, seed: int = 0) -> Tensor:
    """Values that go beyond the grid on both sides."""
    return torch.empty(shape).uniform_(-2.5, 2.5, generator=torch.Generator().manual_seed(seed))


def by_hand(layer: Any, x: Tensor) -> np.ndarray[Any, Any]:
    """The sum of table reads, one after the other."""
    frozen, g, grid = layer.freeze(), layer.geometry, layer.grid()
    index = lookup_ops.unpack(frozen.weight, frozen.weight_bits, g.depth).numpy()
    table, (n, c, h, w) = frozen.table.numpy().astype(int), x.shape
    steps = (x.numpy() / np.float32(grid.scale)).astype(np.float64)
    indices = np.clip(np.rint(steps) + grid.zero, 0, grid.qmax).astype(int)
    (kh, kw), (sh, sw), (ph, pw), (dh, dw) = g.kernel, g.stride, g.padding, g.dilation
    high, wide = g.out_size(h, w)
    out = np.zeros((n, layer.outputs, high, wide), np.int32)
    for image, m, oy, ox in np.ndindex(*out.shape):
        total = 0
        for entry, (channel, ky, kx) in enumerate(np.ndindex(c, kh, kw)):
            y, column = oy * sh + ky * dh - ph, ox * sw + kx * dw - pw
            inside = 0 <= y < h and 0 <= column < w
            i = indices[image, channel, y, column] if inside else grid.zero
            total += table[i, index[m, entry]]
        out[image, m, oy, ox] = total
    scaled = out.astype(np.float32) * frozen.scale.numpy()[:, None, None]
    return scaled + frozen.bias.numpy()[:, None, None]


def every_mode(layer: Any, x: Tensor) -> dict[str, Tensor]:
    layer.train()
    outputs = {"training": layer(x).detach()}
    layer.eval()
    outputs["eval with gradients"] = layer(x).detach()
    with torch.no_grad():
        outputs["eval"] = layer(x)
        outputs["frozen"] = layer.freeze()(x)
        if x.dim() == 4:
            outputs["channels last"] = layer(x.contiguous(memory_format=torch.channels_last))
    return outputs


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
@sweep("signed", [False, True])
def test_every_mode_is_the_explicit_sum_of_table_reads(
    size: tuple[int, int], kind: dict[str, Any], signed: bool
) -> None:
    layer = make_conv(3, 5, (3, 2), padding=1, method=Lookup(*size, **kind), signed=signed)
    x = noise(2, 3, 5, 4)
    want = by_hand(layer, x)
    for mode, y in every_mode(layer, x).items():
        assert np.array_equal(y.numpy(), want), mode


@pytest.mark.parametrize(
    "conv",
    [
        {"stride": 2},
        {"stride": (1, 3), "padding": (0, 2)},
        {"dilation": 2, "padding": 2},
        {"bias": False},
    ],
    ids=str,
)
def test_every_geometry_is_the_explicit_sum(conv: dict[str, Any]) -> None:
    layer = make_conv(2, 3, 3, signed=True, **conv)
    x = noise(2, 2, 9, 8)
    want = by_hand(layer, x)
    for mode, y in every_mode(layer, x).items():
        assert np.array_equal(y.numpy(), want), mode


@pytest.mark.parametrize("shape", [(7, 12), (2, 3, 12), (12,), (0, 12)])
def test_linear_is_the_explicit_sum(shape: tuple[int, ...]) -> None:
    layer = make_linear(12, 9)
    x = noise(*shape)
    want = by_hand(layer, x.reshape(-1, 12)[:, :, None, None]).reshape(*shape[:-1], 9)
    for mode, y in every_mode(layer, x).items():
        assert np.array_equal(y.numpy(), want), mode


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_other_devices_compute_the_same_sums(size: tuple[int, int]) -> None:
    layer = make_conv(3, 6, 3, padding=1, stride=2, method=Lookup(*size), signed=True)
    x, frozen = noise(3, 3, 7, 6), layer.freeze()
    index = lookup_ops.unpack(frozen.weight, frozen.weight_bits, layer.geometry.depth)
    sums, indices = lookup_ops.portable_sums(x, layer.geometry, layer.grid(), index, frozen.table)
    ones = torch.ones(6)
    y, native_indices = lookup_ops.forward(
        x, layer.geometry, layer.grid(), index, frozen.table, ones
    )
    assert torch.equal(sums, y)
    assert torch.equal(indices, native_indices)


def test_pack_and_unpack() -> None:
    for bits, depth in itertools.product((2, 4, 8), (1, 4, 5, 7, 16)):
        index = torch.randint(0, 1 << bits, (3, depth), dtype=torch.uint8)
        packed = lookup_ops.pack(index, bits)
        assert packed.shape == (3, -(-depth * bits // 8))
        assert torch.equal(lookup_ops.unpack(packed, bits, depth), index)


# --- the table ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS, ids=str)
@sweep("signed", [False, True])
@sweep("size", SIZES)
def test_the_first_table_is_that_of_products(
    size: tuple[int, int], kind: dict[str, Any], signed: bool
) -> None:
    layer = LookupConv2d.from_float(nn.Conv2d(2, 3, 3), Lookup(*size, **kind))
    layer.set_activation_range(-1.0 if signed else 0.0, 1.0)
    zero = layer.grid().zero
    levels = layer.response(zero)
    want = torch.outer(activation_steps(size[0], zero), weight_steps(size[1]))
    assert torch.allclose(levels.table, want, atol=1e-6)
    if size in ((4, 3), (8, 7), (16, 15)):  # small enough to be exact in int8
        exact = torch.outer(torch.arange(size[0]) - zero, torch.arange(size[1]) - size[1] // 2)
        table = layer.freeze().table.int()
        assert torch.equal(table * int(exact[-1, -1]), exact * int(table[-1, -1]))


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("kind", KINDS[:4], ids=str)
def test_learned_tables_stay_monotone(kind: dict[str, Any], signed: bool) -> None:
    layer = make_conv(2, 3, 3, method=Lookup(16, 15, **kind), signed=signed)
    zero = layer.grid().zero
    table = layer.response(zero).table.detach()
    assert torch.equal(table[zero], torch.zeros(15))
    assert torch.equal(table[:, 7], torch.zeros(16))
    rising = table.diff(dim=0)
    assert (rising[:, 8:] >= 0).all()
    assert (rising[:, :7] <= 0).all()
    assert (table[zero + 1 :].diff(dim=1) >= 0).all()
    assert float(table.abs().max()) <= (1.0 if not signed else 8 / 7) + 1e-6


def test_a_free_table_can_be_more_than_a_product() -> None:
    layer = make_conv(2, 3, 3, method=Lookup(table="free"))
    table = layer.freeze().table.double()
    assert torch.linalg.matrix_rank(table) > 1
    assert torch.equal(table[0], torch.zeros(15, dtype=torch.float64))


def test_temperature_sharpens() -> None:
    layer = make_conv(2, 3, 3, method=Lookup(temperature=(1.0, 0.1)))
    start = layer.response(0).activation.diff().max()
    layer.response.anneal(0.5)
    assert float(layer.response.temperature) == pytest.approx(0.1**0.5)
    layer.response.anneal(1.0)
    assert float(layer.response.temperature) == pytest.approx(0.1)
    assert layer.response(0).activation.diff().max() > start


@pytest.mark.parametrize(
    ("method", "signed", "entries"),
    [
        (Lookup(), False, 105),
        (Lookup(), True, 49),
        (Lookup(8, 7), False, 63),
        (Lookup(4, 3), False, 15),
        (Lookup(64, 33), False, 127),
        (Lookup(entries=63), False, 63),
        (Lookup(entries=127), True, 111),
    ],
)
def test_entries(method: Lookup, signed: bool, entries: int) -> None:
    layer = LookupConv2d.from_float(nn.Conv2d(2, 3, 3), method)
    layer.set_activation_range(-1.0 if signed else 0.0, 1.0)
    assert layer.entries == entries
    assert int(layer.freeze().table[-1, -1]) == entries


# --- gradients ----------------------------------------------------------------------------------


def surrogate(layer: Any, x: Tensor) -> Tensor:
    """What the gradients are those of: a convolution of looked-up operands, whose indices are
    constants but for a straight path inside the clipping range."""
    g, grid, half = layer.geometry, layer.grid(), layer.method.weights // 2
    levels = layer.response(grid.zero)
    with torch.no_grad():
        indices = ((x / grid.scale).round() + grid.zero).clamp(0, grid.qmax).long()
        rows = layer.weight.flatten(1)
        index = lookup.weight_index(rows, layer.log_weight_scale.exp(), 2 * half + 1).long()
    top = layer.log_act_scale.exp() * (grid.qmax - grid.zero)
    low, high = -grid.zero * grid.scale, (grid.qmax - grid.zero) * grid.scale
    inside = ((x > low) & (x < high)).float()
    ratio = inside * x / top
    f = (levels.activation[indices] + ratio - ratio.detach()) * top
    scale = layer.log_weight_scale.exp()[:, None]
    unit = layer.weight.flatten(1) / scale
    unit = unit * (unit.abs() <= 1)
    w = (levels.weight[index] + unit - unit.detach()) * scale
    return F.conv2d(f, w.view_as(layer.weight), layer.bias, g.stride, g.padding, g.dilation)


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("kind", KINDS[:2], ids=str)
def test_gradients_are_those_of_looked_up_operands(kind: dict[str, Any], signed: bool) -> None:
    layer = make_conv(3, 5, 3, padding=1, method=Lookup(rescale=False, **kind), signed=signed)
    with torch.no_grad():
        layer.log_weight_scale.sub_(0.3)  # so that some weights are clipped
    x = noise(3, 3, 8, 7).requires_grad_()
    probe = noise(3, 5, 8, 7, seed=9)
    parameters = [x, *layer.parameters()]
    got = torch.autograd.grad((layer(x) * probe).sum(), parameters)
    want = torch.autograd.grad((surrogate(layer, x) * probe).sum(), parameters)
    names = ["x", *(name for name, _ in layer.named_parameters())]
    for name, a, b in zip(names, got, want, strict=True):
        assert float(b.abs().max()) > 0, name
        assert torch.allclose(a, b, rtol=1e-3, atol=1e-3 * float(b.abs().max())), name


def test_the_surrogate_is_the_layer_but_for_the_rounding_of_the_table() -> None:
    layer = make_conv(3, 5, 3, padding=1)
    x = noise(3, 3, 8, 7)
    y, other = layer(x), surrogate(layer, x)
    assert float(((y - other).square().mean() / y.var()).detach()) < 1e-3


def test_gradients_do_not_depend_on_the_memory_layout() -> None:
    layer = make_conv(4, 5, 3, padding=1)
    probe = noise(2, 5, 6, 6, seed=9)
    grads = []
    for layout in (torch.contiguous_format, torch.channels_last):
        x = noise(2, 4, 6, 6).contiguous(memory_format=layout).requires_grad_()
        parameters = [x, *layer.parameters()]
        grads.append(torch.autograd.grad((layer(x) * probe).sum(), parameters))
    for a, b in zip(*grads, strict=True):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", [KINDS[2], KINDS[4]], ids=str)
def test_the_gradient_of_every_cell_is_exact_on_all_images(
    kind: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lookup, "TABLE_SHARE", 1)
    layer = make_conv(2, 3, 3, padding=1, stride=2, method=Lookup(8, 7, **kind), signed=True)
    x, probe = noise(2, 2, 6, 5), noise(2, 3, 3, 3, seed=9)
    tables = list(layer.response.parameters())
    got = torch.autograd.grad((layer(x) * probe).sum(), tables)
    grid, g = layer.grid(), layer.geometry
    indices = ((x / grid.scale).round() + grid.zero).clamp(0, grid.qmax)
    patches = F.unfold(F.pad(indices, (1, 1, 1, 1), value=grid.zero), 3, stride=g.stride).long()
    index = layer._weight_index().long()  # (M, D)
    table = layer.response(grid.zero).table
    reads = table[patches[:, None], index[None, :, :, None]].sum(2)  # (N, M, rows)
    scale = layer.log_weight_scale.exp() * layer.log_act_scale.exp() * (grid.qmax - grid.zero)
    y = (reads * scale[:, None]).view(probe.shape)
    want = torch.autograd.grad((y * probe).sum(), tables)
    for a, b in zip(got, want, strict=True):
        assert torch.allclose(a, b, rtol=1e-3, atol=1e-4 * float(b.abs().max()))


def test_the_gradient_of_cells_is_estimated_from_some_images() -> None:
    layer = make_conv(2, 3, 3, padding=1, method=Lookup(table="free"))
    x = noise(4 * lookup.TABLE_SHARE, 2, 6, 6)
    x[:] = x[:1]  # so that every share has the same gradient
    (layer(x) * 1.0).sum().backward()
    some = layer.response.residual.grad.clone()
    layer.zero_grad()
    (layer(x[:1]) * len(x)).sum().backward()
    assert torch.allclose(some, layer.response.residual.grad, rtol=1e-4, atol=1e-3)


def test_rescaling_favours_rare_cells() -> None:
    counts = torch.tensor([100, 4, 0, 400])
    factor = lookup.cell_factor(counts)
    assert float(factor[1] / factor[3]) == pytest.approx(10.0, rel=1e-4)
    assert torch.isfinite(factor).all()
    assert torch.allclose(lookup.cell_factor(torch.full((16,), 9)), torch.ones(16), atol=1e-4)


@pytest.mark.slow
def test_learning_fits_a_function_that_is_no_product() -> None:
    """y = sum of w * min(x, 0.5): a learned table can bend, a linear one cannot."""
    torch.manual_seed(0)
    target = nn.Linear(16, 8)
    errors = {}
    for table in ("linear", "learned"):
        layer = LookupLinear.from_float(target, Lookup(table=table))  # type: ignore[arg-type]
        layer.set_activation_range(0.0, 1.0)
        for p in (layer.weight, layer.bias, layer.log_weight_scale, layer.log_act_scale):
            p.requires_grad_(False)  # only the table may learn
        parameters = [p for p in layer.parameters() if p.requires_grad]
        for step in range(150):
            x = torch.rand(256, 16, generator=torch.Generator().manual_seed(step))
            loss = (layer(x) - target(x.clamp(max=0.5))).square().mean()
            if step == 0:
                first = float(loss.detach())
            if parameters:
                grads = torch.autograd.grad(loss, parameters)
                with torch.no_grad():
                    for p, g in zip(parameters, grads, strict=True):
                        p.sub_(0.1 * g.sign())
        errors[table] = float(loss.detach()) / first
    assert errors["learned"] < 0.5 * errors["linear"]


# --- recipes, conversion, export ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"levels": 15}, "levels=15 is not one of"),
        ({"weights": 16}, "weights=16 is not an odd number"),
        ({"weights": 1}, "weights=1 is not an odd number"),
        ({"weights": 35}, "weights=35 is not an odd number"),
        ({"levels": 16.0}, "levels=16.0 is not an integer"),
        ({"table": "round"}, "table='round' is not one of"),
        ({"rank": 0}, "rank=0 is not in"),
        ({"rank": 2, "table": "free"}, "rank=2 is of table='learned'"),
        ({"entries": 128}, "entries=128 is not an integer in"),
        ({"temperature": 1.0}, "temperature=1.0 is not a pair"),
        ({"temperature": (0.0, 1.0)}, "is not a pair of numbers"),
    ],
)
def test_bad_settings(settings: dict[str, Any], text: str) -> None:
    with pytest.raises(LutraError, match=text):
        Lookup(**settings)


def test_recipe_round_trip() -> None:
    recipe = {"a": Lookup(8, 7, rank=2, temperature=(1.0, 0.5)), "*": Lookup(table="free")}
    assert recipe_from_json(json.loads(json.dumps(recipe_to_json(recipe)))) == recipe


def test_grouped_convolutions_are_refused() -> None:
    model = nn.Sequential(nn.Conv2d(4, 4, 3, groups=2))
    with pytest.raises(LutraError, match=r"groups=2 cannot be looked up"):
        convert(model, {"0": Lookup()}, [torch.rand(2, 4, 8, 8)], progress=False)


class Mixed(nn.Module):
    """One layer of every family."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(8)
        self.second = nn.Conv2d(8, 12, 3, padding=1, stride=2, bias=False)
        self.norm2 = nn.BatchNorm2d(12)
        self.third = nn.Conv2d(12, 12, 3, padding=1)
        self.fourth = nn.Linear(12, 10)
        self.last = nn.Linear(10, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm1(self.first(x)).relu()
        x = self.norm2(self.second(x)).relu()
        x = (self.third(x) + x).relu()
        return self.last(self.fourth(x.mean((2, 3))))


RECIPE = {
    "first": Int8(),
    "second": Lookup(),
    "third": PQ(),
    "fourth": Lookup(8, 7),
    "last": Int8(),
}


def training_data() -> TensorDataset:
    torch.manual_seed(1)
    y = torch.arange(64) % 4
    x = torch.randn(64, 3, 8, 8) * 0.3
    for i in range(4):
        x[y == i, :, 2 * i : 2 * i + 2] += 1.0
    return TensorDataset(x, y)


def converted() -> tuple[nn.Module, TensorDataset, Any]:
    data = training_data()
    torch.manual_seed(2)
    model = Mixed()
    with torch.no_grad():  # running statistics
        for _ in range(20):
            model(data.tensors[0])
    new, report = convert(model, RECIPE, [data.tensors[0]], progress=False)
    return new, data, report


@pytest.mark.slow
def test_families_mix_from_conversion_to_the_engine(tmp_path: Path) -> None:
    model, data, report = converted()
    assert isinstance(model.second, LookupConv2d)
    assert isinstance(model.fourth, LookupLinear)
    entry = report["second"]
    assert (entry.method, entry.levels, entry.weights) == ("lookup", 16, 15)
    assert entry.index_bytes == 12 * 8 * 9 // 2
    assert entry.lookups_per_row == 8 * 9 * 12
    assert 0.0 < entry.error < 0.2
    assert "lookup 16x15" in str(report)
    before = float(F.cross_entropy(model.eval()(data.tensors[0]), data.tensors[1]).detach())
    finetune(model, DataLoader(data, 16, shuffle=True), epochs=15, lr=2e-2, progress=False)
    after = float(F.cross_entropy(model.eval()(data.tensors[0]), data.tensors[1]).detach())
    assert after < 0.9 * before
    model.eval()
    path = tmp_path / "mixed.lutra"
    export(model, path, data.tensors[0][:2])
    graph = load_graph(path)
    assert {"int8_conv2d", "lookup_conv2d", "pq_conv2d", "lookup_linear", "int8_linear"} <= {
        node.op for node in graph.nodes
    }
    x = data.tensors[0][:7]
    with torch.no_grad():
        want = model(x).numpy()
    (reference,) = run_reference(graph, {graph.inputs[0].name: x.numpy()}).values()
    for isa in runnable_isas():
        y = Session(path, isa=isa, threads=1)(x.numpy())
        assert np.array_equal(y, reference), isa
        assert np.allclose(y, want, rtol=1e-4, atol=1e-4), isa


def test_weight_decay_spares_tables_and_scales() -> None:
    model, data, _ = converted()
    layer = model.second
    for p in model.parameters():
        p.requires_grad_(p in set(layer.table_parameters()) or p is layer.weight)
    before = {name: p.detach().clone() for name, p in layer.named_parameters()}
    zero = lambda outputs, targets: (outputs * 0.0).sum()  # noqa: E731
    finetune(
        model, DataLoader(data, 16), steps=3, lr=1e-2, weight_decay=0.5, loss=zero, progress=False
    )
    for name, p in layer.named_parameters():
        assert torch.equal(p, before[name]) == (name != "weight"), name


def test_finetuning_anneals_and_resumes() -> None:
    model, data, _ = converted()
    model.second.response.method = Lookup(temperature=(1.0, 0.25))
    finetune(model, DataLoader(data, 16), steps=3, lr=1e-4, progress=False)
    assert float(model.second.response.temperature) == pytest.approx(0.25)


def test_nan_is_the_lowest_index() -> None:
    conv = make_conv(3, 4, 3)
    x = torch.zeros(1, 3, 3, 3)
    x[0, 0, 0, 0] = float("nan")
    assert torch.isfinite(conv(x)).all()  # the grid's lowest index, as in the engine


@pytest.mark.parametrize(("outputs", "depth", "weights"), [(40, 100, 15), (7, 9, 3), (3, 1, 33)])
def test_weight_scales_have_the_least_error_of_all_candidates(
    outputs: int, depth: int, weights: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lookup, "_BLOCK", 16 * depth)  # several blocks
    rows = torch.randn(outputs, depth, generator=torch.Generator().manual_seed(0))
    rows[0] = 0.0
    rows[1, 0] = 30.0
    peak = rows.abs().amax(1).clamp_min(1e-8)
    scales = torch.linspace(0.1, 1.0, 64)[:, None] * peak
    made = [
        weight_steps(weights)[lookup.weight_index(rows, scale, weights).int()] * scale[:, None]
        for scale in scales
    ]
    errors = torch.stack([(values - rows).double().square().sum(1) for values in made])
    want = scales.gather(0, errors.argmin(0)[None])[0]
    assert torch.equal(lookup._weight_scale(rows, weights), want)
