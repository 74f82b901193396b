"""Sequential calibration: each layer is fitted to the dense network behind the ones before it."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lutra.errors import LutraError
from lutra.train import PQ, Int8, Lookup, convert
from lutra.train.conversion.candidate import Candidate
from lutra.train.conversion.convert import Calibration
from lutra.train.conversion.replay import Replay
from lutra.train.conversion.sequential import Batches, Targets, output_rows
from lutra.train.conversion.spill import Spill
from lutra.train.geometry import Geometry

RECIPES: dict[str, Any] = {
    "nearest": PQ(v=9),
    "free": PQ(v=9, free_tables=True),
    "tree": PQ(v=9, encoder="tree"),
    "lookup": Lookup(4, 3),
    "int8": Int8(act_bits=3),
}


def network() -> nn.Module:
    """Four layers, so that errors of the first reach the last."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 12, 3, padding=1), nn.BatchNorm2d(12), nn.ReLU(),
        nn.Conv2d(12, 16, 3, stride=2, padding=1), nn.ReLU(),
        nn.Conv2d(16, 16, 1), nn.ReLU(), nn.Flatten(), nn.Linear(16 * 16, 10),
    )  # fmt: skip
    model[1].running_mean.normal_()
    model[1].running_var.uniform_(0.5, 2.0)
    return model.eval()


def images(count: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(count, 3, 4, 4, generator=generator)
    return nn.functional.interpolate(coarse, scale_factor=2, mode="bilinear")


def error(model: nn.Module, dense: nn.Module, x: Tensor) -> float:
    with torch.no_grad():
        want = dense(x)
        return float((model.eval()(x) - want).square().mean() / want.var())


@pytest.mark.parametrize("name", RECIPES)
def test_layers_are_fitted_to_the_dense_network(name: str) -> None:
    dense, x = network(), images(160, 1)
    _, report = convert(dense, {"*": RECIPES[name]}, x.split(40), kmeans_steps=5)
    for layer in report.replaced:
        assert layer.error is not None
        assert layer.start_error is not None
        assert layer.error <= layer.start_error


@pytest.mark.parametrize("name", ["nearest", "lookup"])
def test_it_is_nearer_to_the_dense_network_on_other_data(name: str) -> None:
    dense, x = network(), images(160, 1)
    errors = {}
    for calibration in get_args(Calibration):
        recipe = {"*": RECIPES[name]}
        data = list(x.split(40))
        model, report = convert(dense, recipe, data, calibration=calibration, kmeans_steps=5)
        errors[calibration] = error(model, dense, images(64, 2))
        fitted = [layer.start_error is not None for layer in report.replaced]
        assert all(fitted) if calibration == "sequential" else not any(fitted)
    assert errors["sequential"] < 0.9 * errors["parallel"]


def test_rows_of_input_and_target_belong_together() -> None:
    dense, x = network(), images(24, 3)
    layers = {"3": dense[3], "8": dense[8]}
    targets = Targets(Batches(x.split(8), 40, 0), Spill(1 << 20), Replay(1 << 20))
    targets.collect(dense, layers)
    for name, layer in layers.items():
        rows, goal = targets.rows(dense, name, layer, Geometry.of(layer), [name])
        assert len(rows) == len(goal.want) <= 3 * 14
        got = rows @ layer.weight.flatten(1).t() + layer.bias
        torch.testing.assert_close(goal.of(got), goal.want, rtol=1e-4, atol=1e-4)


def test_what_memory_does_not_hold_goes_to_a_file(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same bits: the data come from a generator, in two layouts of memory."""
    dense, x = network(), images(400, 1)
    stores: list[Spill] = []

    def run(room: int) -> dict[str, Tensor]:
        def batches() -> Any:
            for i, part in enumerate(x.split(40)):
                layout = torch.channels_last if i % 2 else torch.contiguous_format
                yield {"input": part.contiguous(memory_format=layout)}

        def make(_: int) -> Spill:
            stores.append(Spill(room))
            return stores[-1]

        monkeypatch.setattr("lutra.train.conversion.convert.Spill", make)
        model, _ = convert(dense, {"*": Int8()}, batches(), rows=64, memory_bytes=110_000)
        return model.state_dict()

    states = [run(1 << 30), run(0)]
    assert stores[0].spilled == 0
    assert stores[1].spilled >= 4 * x.numel()
    assert all(torch.equal(value, states[1][key]) for key, value in states[0].items())


def test_a_spilled_tensor_is_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Spill(0)
    values = torch.arange(24_000.0).view(2, 30, 20, 20)
    for tensor in (values, values.permute(0, 3, 1, 2), values.bfloat16(), values.int()):
        kept = store.keep(tensor)
        assert kept is not tensor
        assert kept.stride() == tensor.stride()
        assert torch.equal(kept, tensor)
        kept.zero_()
    assert store.keep(values[:, :, ::2]).data_ptr() == values.data_ptr()  # with gaps
    assert store.spilled == 24_000 * (4 + 4 + 2 + 4)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "missing"))
    with pytest.raises(LutraError, match="cannot be written to a temporary file"):
        Spill(0).keep(values)


def test_a_layer_that_is_called_twice() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.last = nn.Linear(8, 8), nn.Linear(8, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.inner(torch.relu(self.inner(x))))

    torch.manual_seed(0)
    dense, x = Twice().eval(), torch.randn(200, 8)
    model, report = convert(dense, {"*": PQ(v=2)}, x.split(50), rows=120)
    assert len(report.replaced) == 2
    assert error(model, dense, torch.randn(50, 8)) < 0.5


def test_the_same_data_and_seed_give_the_same_layers() -> None:
    dense, x = network(), images(80, 1)
    states = []
    for _ in range(2):
        model, _ = convert(dense, {"*": PQ(v=3)}, iter(x.split(20)), rows=500, seed=7)
        states.append(model.state_dict())
    assert all(torch.equal(a, states[1][key]) for key, a in states[0].items())


def test_the_given_model_and_frozen_parameters_stay_as_they_are() -> None:
    dense, x = network(), images(40, 1)
    dense[3].requires_grad_(False)
    before = copy.deepcopy(dense.state_dict())
    model, _ = convert(dense, {"3": PQ(v=3)}, [x])
    assert all(torch.equal(before[key], value) for key, value in dense.state_dict().items())
    assert not model[3].weight.requires_grad
    assert not model[3].bias.requires_grad


def test_codes_that_are_shared_stay_shared() -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k = nn.Linear(12, 6), nn.Linear(12, 6)

        def forward(self, x: Tensor) -> Tensor:
            return self.q(x) * self.k(x)

    torch.manual_seed(0)
    model, report = convert(Attention().eval(), {"*": PQ(v=4)}, [torch.randn(300, 12)])
    assert model.q.centroids is model.k.centroids
    assert all(layer.error < layer.start_error for layer in report.replaced)


def test_output_rows_are_in_the_order_of_input_rows() -> None:
    y = torch.arange(2 * 3 * 2 * 2.0).view(2, 3, 2, 2)
    rows = output_rows(nn.Conv2d(1, 3, 1), y)
    np.testing.assert_array_equal(rows[1], y[0, :, 0, 1])


def test_other_calibrations_are_refused() -> None:
    with pytest.raises(LutraError, match=r"calibration='later' is not one of"):
        convert(network(), {"*": PQ()}, [images(40, 1)], calibration="later")  # type: ignore[arg-type]


class Stopped(Exception):
    """What stands for a kill."""


@pytest.mark.parametrize("name", RECIPES)
def test_a_conversion_that_was_stopped_goes_on(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dense, x = network(), images(80, 1)

    def run(folder: Path | None) -> tuple[nn.Module, Any]:
        return convert(dense, {"*": RECIPES[name]}, x.split(20), kmeans_steps=3, checkpoint=folder)

    whole, report = run(None)
    fits: list[str] = []
    fit = Candidate.fit

    def stopping(self: Candidate, *args: Any) -> Any:
        if len(fits) == 2:
            raise Stopped
        fits.append(self.name)
        return fit(self, *args)

    monkeypatch.setattr(Candidate, "fit", stopping)
    with pytest.raises(Stopped):
        run(tmp_path / "run")
    fits.clear()
    model, again = run(tmp_path / "run")
    assert fits == ["5", "8"]
    assert again.layers == report.layers
    states = model.state_dict()
    assert all(torch.equal(value, states[key]) for key, value in whole.state_dict().items())
    flags = [(n, p.requires_grad) for n, p in whole.named_parameters()]
    assert flags == [(n, p.requires_grad) for n, p in model.named_parameters()]


def test_checkpoints_of_another_conversion_are_refused(tmp_path: Path) -> None:
    dense, x = network(), images(40, 1)
    convert(dense, {"8": Int8()}, [x], checkpoint=tmp_path)
    with pytest.raises(LutraError, match="another recipe, seed"):
        convert(dense, {"8": Lookup()}, [x], checkpoint=tmp_path, seed=1)
    with pytest.raises(LutraError, match="another data"):
        convert(dense, {"8": Int8()}, [x + 1.0], checkpoint=tmp_path)
    with pytest.raises(LutraError, match="another model"):
        convert(network().half(), {"8": Int8()}, [x], checkpoint=tmp_path)
    for path in tmp_path.glob("*.pt"):
        path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(LutraError, match="layer '8' is damaged"):
        convert(dense, {"8": Int8()}, [x], checkpoint=tmp_path)
    with pytest.raises(LutraError, match="calibration='sequential'"):
        convert(dense, {"8": Int8()}, [x], checkpoint=tmp_path, calibration="parallel")
    file = tmp_path / "file"
    file.write_text("x")
    with pytest.raises(LutraError, match="cannot be used"):
        convert(dense, {"8": Int8()}, [x], checkpoint=file)
