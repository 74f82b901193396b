"""What every family of layers has to hold: a new family is tested by a line of FAMILIES.

The forward pass is the sum that the operator says, on every instruction set and in the exported
file, to the bit; bad input is refused in one sentence; copies and resumed runs are equal to the
bit.
"""

from __future__ import annotations

import copy
import functools
import io
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lutra import Session, load_graph, run_reference, runnable_isas
from lutra.errors import LutraError
from lutra.graph import Graph
from lutra.node import Array, Node
from lutra.ops.lookup import unpack_weights
from lutra.train import PQ, Int8, Lookup, LowBit, convert, export, finetune
from lutra.train.layers.base import KINDS, families


def pq_sums(rows: Array, tensors: dict[str, Array], node: Node) -> Array:
    """Reads of tables of products: the code of a sub-vector picks a row of its table."""
    tables = tensors["tables"].astype(np.int64)
    sums = np.zeros((len(rows), tables.shape[2]), np.int64)
    for codebook, table in enumerate(tables):
        for i, row in enumerate(rows):
            if "splits" in tensors:
                code = leaf(row[tensors["splits"][codebook]], tensors["thresholds"][codebook])
            else:
                code = nearest(row, tensors["centroids"][codebook].astype(np.int64), codebook)
            sums[i] += table[code]
    return sums


def leaf(taps: Array, thresholds: Array) -> int:
    """Of a tree whose every level looks at one entry of the row."""
    place = 0
    for tap in taps:
        place = 2 * place + 1 + int(tap >= thresholds[place])
    return place - len(thresholds)


def nearest(row: Array, centroids: Array, codebook: int) -> int:
    """The lowest of the best codes, with half of the norm rounded down."""
    width = centroids.shape[1]
    part = np.zeros(width, np.int64)
    entries = row[codebook * width : (codebook + 1) * width]
    part[: len(entries)] = entries
    return int(np.argmax(centroids @ part - np.square(centroids).sum(1) // 2))


def lookup_sums(rows: Array, tensors: dict[str, Array], node: Node) -> Array:
    """Reads of one table by activation index and weight index."""
    bits, table = node.attrs["weight_bits"], tensors["table"].astype(np.int64)
    index = unpack_weights(tensors["weight"], bits, rows.shape[1])
    return np.stack([table[rows, output].sum(1) for output in index], axis=1)


def int8_sums(rows: Array, tensors: dict[str, Array], node: Node) -> Array:
    """Integer products."""
    weight = tensors["weight"].astype(np.int64)
    return (rows - node.attrs["act_zero"]) @ weight.reshape(len(weight), -1).T


def lowbit_outputs(x: Array, tensors: dict[str, Array], node: Node) -> Array:
    """Levels times activations in int8, group by group; the scale of the row, and the bias."""
    count, group, depth = (node.attrs[name] for name in ("levels", "group", "in_features"))
    stored = tensors["weight"].astype(np.int64)
    if count == 3:
        codes = (stored[:, :, None] // 3 ** np.arange(5) % 3).reshape(len(stored), -1)
        levels = codes[:, :depth] - 1
    else:
        bits = int(np.log2(count))
        planes = stored.reshape(len(stored), bits, -1)[:, :, :, None] >> np.arange(8) & 1
        codes = (planes.reshape(len(stored), bits, -1) << np.arange(bits)[:, None]).sum(1)
        levels = 2 * codes[:, :depth] - (count - 1)
    most = np.abs(x).max(1, keepdims=True)
    q = np.rint(x * (np.float32(127) / most)).astype(np.int64)
    zero = tensors.get("zero", np.zeros_like(tensors["scale"], np.int8)).astype(np.int64)
    y = np.zeros((len(x), len(stored)), np.float32)
    for g in range(depth // group):
        part = slice(g * group, (g + 1) * group)
        sums = q[:, part] @ (levels[:, part] - zero[:, g, None]).T
        y = y + sums.astype(np.float32) * tensors["scale"][:, g]
    return y * (most / np.float32(127)) + tensors["bias"]


# name, recipe, sum of a row: all that a new family adds. Without an activation grid the function
# gives the outputs of rows of floats.
FAMILIES: list[tuple[str, Any, Callable[..., Array]]] = [
    ("pq-nearest", PQ(k=16), pq_sums),
    ("pq-average", PQ(k=8, centroids="average"), pq_sums),
    ("pq-soft", PQ(k=8, gradient="soft"), pq_sums),
    ("pq-tree", PQ(k=16, encoder="tree"), pq_sums),
    ("lookup", Lookup(), lookup_sums),
    ("lookup-free", Lookup(8, 7, table="free"), lookup_sums),
    ("int8", Int8(), int8_sums),
    ("lowbit", LowBit(), lowbit_outputs),
    ("lowbit-absmean", LowBit(rounding="absmean"), lowbit_outputs),
    ("lowbit-1", LowBit(1), lowbit_outputs),
    ("lowbit-2", LowBit(2, rounding="nearest"), lowbit_outputs),
    ("lowbit-3-zeros", LowBit(3, zero_points=True), lowbit_outputs),
    ("lowbit-4", LowBit(4), lowbit_outputs),
]
Shape = tuple[int, ...]
# of a kind of module: a dense layer, shape of one input, what the refusal of a shape says
DENSE: dict[type[nn.Module], tuple[Callable[[], nn.Module], Shape, dict[Shape, str]]] = {
    nn.Conv2d: (
        lambda: nn.Conv2d(5, 7, 3, stride=(2, 1), padding=(1, 0)),
        (5, 9, 8),
        {
            (2, 4, 9, 8): "5 input channels",
            (5, 9, 8): "5 input channels",
            (5,): "5 input channels",
            (2, 5, 0, 8): "smaller than the kernel",
            (2, 5, 9, 2): "smaller than the kernel",
        },
    ),
    nn.Linear: (
        lambda: nn.Linear(19, 6),
        (19,),
        dict.fromkeys([(2, 18), (2, 20), ()], "19 input features"),
    ),
}


@dataclass(frozen=True)
class Case:
    name: str
    recipe: Any
    sums: Callable[..., Array]
    dense: Callable[[], nn.Module]
    shape: Shape
    refused: dict[Shape, str]

    def inputs(self, count: int, seed: int) -> Tensor:
        """Values on both sides of zero, the largest beyond the calibrated range."""
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(count, *self.shape, generator=generator)


CASES = [
    Case(f"{name}-{KINDS[kind]}", recipe, sums, *DENSE[kind])
    for family in families()
    for name, recipe, sums in FAMILIES
    if type(recipe) is family.method
    for kind in family.layers
    if kind in DENSE
]
each_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


def test_every_family_is_here() -> None:
    tested = {type(recipe) for _, recipe, _ in FAMILIES}
    for family in families():
        if family.method.__module__.startswith("lutra."):  # and none of a test's own
            assert family.method in tested, f"{family.method.__name__}: add it to FAMILIES"
            assert any(type(case.recipe) is family.method for case in CASES)


def fresh(case: Case, seed: int = 0) -> nn.Sequential:
    """A converted layer and a dense one behind it, as after conversion."""
    torch.manual_seed(seed)
    layer = case.dense()
    width = layer(torch.zeros(1, *case.shape)).numel()
    model = nn.Sequential(layer, nn.Flatten(), nn.Linear(width, 3))
    converted, report = convert(model, {"0": case.recipe}, [case.inputs(64, 1)], progress=False)
    assert report["0"].replaced
    assert type(converted[0]) is not type(layer)
    return converted


def trained(model: nn.Module, case: Case, **settings: Any) -> Any:
    """Six steps of training on noise."""
    data = TensorDataset(case.inputs(24, 2), torch.arange(24) % 3)
    loader = DataLoader(data, batch_size=8, shuffle=True)
    return finetune(model, loader, steps=6, lr=1e-2, progress=False, **settings)


@functools.cache
def _learned(name: str) -> nn.Sequential:
    case = next(case for case in CASES if case.name == name)
    model = fresh(case)
    trained(model, case)
    return model.eval()


def learned(case: Case) -> nn.Sequential:
    """A copy of a model that was trained for a moment."""
    return copy.deepcopy(_learned(case.name))


def exported(layer: nn.Module, case: Case, folder: Path) -> tuple[Graph, Path]:
    """The graph of the layer alone, as the file has it."""
    path = folder / "layer.lutra"
    export(nn.Sequential(layer), path, case.inputs(2, 3))
    return load_graph(path), path


def by_hand(case: Case, graph: Graph, x: Array) -> Array:
    """The sums of all rows, one patch after the other, then scale and bias."""
    (node,) = graph.nodes
    attrs, tensors = node.attrs, graph.node_tensors(node)
    if "act_scale" not in attrs:
        return case.sums(x, tensors, node)
    zero, most = attrs["act_zero"], 2 ** attrs["act_bits"] - 1
    steps = np.rint(x / np.float32(attrs["act_scale"])).astype(np.int64) + zero
    grid = np.clip(steps, 0, most)
    finish = lambda sums: sums.astype(np.float32) * tensors["scale"] + tensors["bias"]  # noqa: E731
    if x.ndim == 2:
        return finish(case.sums(grid, tensors, node))
    (ph, pw), (sh, sw) = attrs["padding"], attrs["stride"]
    grid = np.pad(grid, ((0, 0), (0, 0), (ph, ph), (pw, pw)), constant_values=zero)
    columns = [
        [
            finish(case.sums(patch.reshape(len(x), -1), tensors, node))
            for left in range(0, grid.shape[3] - 2, sw)
            for patch in [grid[:, :, top : top + 3, left : left + 3]]
        ]
        for top in range(0, grid.shape[2] - 2, sh)
    ]
    return np.array(columns).transpose(2, 3, 0, 1)  # (N, M, Ho, Wo)


def modes(layer: nn.Module, x: Tensor) -> Iterator[tuple[str, Tensor]]:
    """The outputs of every way to evaluate a layer."""
    yield "with gradients", layer.eval()(x).detach()
    with torch.no_grad():
        yield "without gradients", layer(x)
        yield "frozen", layer.freeze()(x)
        if x.dim() == 4:
            yield "channels last", layer(x.contiguous(memory_format=torch.channels_last))
        yield "in parts", torch.cat([layer(part) for part in x.split(2)])
    with torch.inference_mode():
        yield "inference mode", layer(x).clone()


@each_case
def test_the_forward_pass_is_the_explicit_sum_everywhere(case: Case, tmp_path: Path) -> None:
    layer, x = learned(case)[0], case.inputs(5, 4)
    graph, path = exported(layer, case, tmp_path)
    want = by_hand(case, graph, x.numpy())
    assert len(np.unique(want)) > 20
    (reference,) = run_reference(graph, [x.numpy()]).values()
    np.testing.assert_array_equal(reference, want)
    for mode, y in modes(layer, x):
        assert y.dtype == torch.float32
        np.testing.assert_array_equal(y.numpy(), want, err_msg=mode)
    for isa in runnable_isas():
        np.testing.assert_array_equal(Session(path, isa=isa)(x.numpy()), want, err_msg=isa)


@each_case
@pytest.mark.parametrize("mode", ["training", "evaluation", "frozen"])
def test_bad_input_is_refused_in_one_sentence(case: Case, mode: str) -> None:
    layer = learned(case)[0].train(mode == "training")
    name = type(layer).__name__
    if mode == "frozen":
        layer = layer.freeze()
    for shape, reason in case.refused.items():
        with torch.set_grad_enabled(mode == "training"), pytest.raises(LutraError) as caught:
            layer(torch.zeros(shape))
        text = str(caught.value)
        assert text.startswith(f"{name}: the input has shape {shape}"), text
        assert reason in text
        assert "; give " in text
        assert "\n" not in text
        assert not text.endswith(".")


@each_case
def test_a_state_dict_brings_the_same_bits(case: Case) -> None:
    model, other, x = learned(case), fresh(case, seed=5).eval(), case.inputs(5, 4)
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    with torch.no_grad():
        want, before = model(x), other(x)
        assert not torch.equal(before, want)
        other.load_state_dict(torch.load(file, weights_only=True))
        assert torch.equal(other(x), want)
        assert torch.equal(other[0](x), model[0](x))


@each_case
def test_copies_and_pickles_have_the_same_bits_and_nothing_in_common(case: Case) -> None:
    layer, x = learned(case)[0], case.inputs(5, 4)
    with torch.no_grad():
        want = layer(x)  # and keeps what it derived from its tensors
        file = io.BytesIO()
        torch.save(layer, file)
        file.seek(0)
        for clone in (copy.deepcopy(layer), torch.load(file, weights_only=False)):
            assert torch.equal(clone(x), want)
            assert dict(clone.named_modules()).keys() == dict(layer.named_modules()).keys()
            clone.bias.add_(1.0)
            assert not torch.equal(clone(x), want)
            assert torch.equal(layer(x), want)
        assert "_frozen" not in dict(layer.named_modules())


@each_case
def test_a_resumed_run_equals_one_that_was_not_stopped(case: Case, tmp_path: Path) -> None:
    whole, parts, resumed = fresh(case), fresh(case), fresh(case)
    # in the middle of the second epoch
    settings: dict[str, Any] = {"checkpoint_every": 4, "evaluate_every": 5}

    def stop(_: nn.Module) -> float:
        raise KeyboardInterrupt

    want = trained(whole, case, checkpoint_dir=tmp_path / "whole", **settings)
    with pytest.raises(KeyboardInterrupt):
        trained(parts, case, checkpoint_dir=tmp_path / "parts", evaluate=stop, **settings)
    assert [folder.name for folder in (tmp_path / "parts").iterdir()] == ["step-000000004"]
    with torch.no_grad():
        for tensor in (*resumed.parameters(), *resumed.buffers()):
            tensor.zero_()  # everything comes from the checkpoint
    got = trained(resumed, case, checkpoint_dir=tmp_path / "parts", **settings)
    assert got.history == want.history
    for (name, a), b in zip(resumed.state_dict().items(), whole.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    assert not torch.equal(whole[0].weight, fresh(case)[0].weight)
