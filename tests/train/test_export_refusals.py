"""Models that cannot be exported: the error names every operator and says what to do."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from exported import (
    IMAGE,
    Fn,
)
from torch import Tensor, nn

from lutra.errors import InputError, UnsupportedModelError
from lutra.train.exporting.export import export


class Zeta(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.special.zeta(x.abs() + 2.0, 1.0)


class Unsupported(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)
        self.act = nn.Sequential(Zeta(), nn.ReLU(), Zeta())

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.conv(x))
        y = torch.special.bessel_j0(torch.linalg.svdvals(x[:, :, :8]).mean((1, 2))[:, None, None])
        return y * x.mean(1) + x.mean((0, 1))


def test_all_unsupported_operators_are_listed(tmp_path: Path) -> None:
    path = tmp_path / "m.lutra"
    with pytest.raises(UnsupportedModelError) as caught:
        export(Unsupported(), path, torch.randn(2, 3, 9, 8))
    items = caught.value.items
    for part in (
        "aten.special_zeta.other_scalar in act.0: compute it outside",
        "aten.special_zeta.other_scalar in act.2",
        "aten.linalg_svdvals.default in the model itself",
    ):
        assert any(part in item for item in items), (part, items)
        assert part in str(caught.value)
    assert not path.exists()


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda m, x: x.mean(0, keepdim=True), "batch"),
        (lambda m, x: x[:1], "batch"),
        (lambda m, x: x.flatten(0, 1), "batch"),
        (lambda m, x: torch.cat([x, x], 0), "batch"),
        (lambda m, x: x.softmax(0), "batch"),
        (lambda m, x: x.flatten(1) @ x.flatten(1).t(), "axis 0 is not the batch"),
        (lambda m, x: x.transpose(0, 1).contiguous().view(3, -1), "batch"),
        (lambda m, x: F.avg_pool2d(x, 2, 2, 0, True, True, 3), "leave one of the two"),
        (lambda m, x: F.max_pool2d(x, 2, return_indices=True)[1], "first one"),
        (lambda m, x: F.dropout(x), "eval mode"),
        (lambda m, x: x.clamp(float("nan"), 1), "use numbers"),
        (lambda m, x: x.half().float(), "float16"),
        (lambda m, x: x.masked_select(x > 0), "values decide how many entries"),
        (lambda m, x: torch.fft.fft(x), "return torch.view_as_real"),
        (lambda m, x: (x, torch.ones(2)), "does not depend on the inputs"),
        (lambda m, x: x.reshape(2, -1), "one batch size only"),
        (lambda m, x: x if x.sum() > 0 else -x, "could not trace"),
        (lambda m, x: x.permute(1, 0, 2, 3), r"batch in axis 1.*return x.transpose\(0, 1\)"),
        (
            lambda m, x: F.conv_transpose2d(x, x.mean(0, keepdim=True).transpose(0, 1)),
            "batch",
        ),
        (lambda m, x: F.conv2d(x, x.mean(0, keepdim=True)), "batch"),
        (lambda m, x: x / x.size(0), "computes with the batch size"),
        (lambda m, x: x + x.shape[0], "computes with the batch size"),
        (lambda m, x: F.avg_pool2d(x.flatten(2), 2), "4 axes"),
        (lambda m, x: x.sort(0)[0], "compares the samples of the batch"),
        (lambda m, x: x.scatter(0, x[:1].argmax(1, keepdim=True) * 0, 1.0), "batch"),
        (lambda m, x: F.pad(x, (1, 1), value=float("inf")), "pads with inf; pad with a finite"),
        (lambda m, x: x.cumsum(0), "over the batch"),
        (lambda m, x: x.flip(0), "turns over the batch"),
        (lambda m, x: torch.einsum("nchw,mchw->nm", x, x), "keep samples apart"),
    ],
)
def test_unsupported_uses_say_what_to_do(
    tmp_path: Path, function: Callable[..., Any], message: str
) -> None:
    with pytest.raises(UnsupportedModelError, match=message):
        export(Fn(function), tmp_path / "m.lutra", torch.randn(2, *IMAGE))


def test_a_model_for_batch_one_only(tmp_path: Path) -> None:
    model = Fn(lambda m, x: x.reshape(1, 216))
    with pytest.raises(UnsupportedModelError, match=r"one batch size only \(1 in the example\)"):
        export(model, tmp_path / "m.lutra", torch.randn(1, *IMAGE))


def test_batch_norm_without_statistics(tmp_path: Path) -> None:
    model = nn.BatchNorm2d(3, track_running_stats=False)
    with pytest.raises(UnsupportedModelError, match="track_running_stats=True"):
        export(model, tmp_path / "m.lutra", torch.randn(2, *IMAGE))


def test_inputs_of_other_dtypes_are_refused(tmp_path: Path) -> None:
    model = Fn(lambda m, x: x.float())
    with pytest.raises(UnsupportedModelError, match=r"'x' is torch\.int16"):
        export(model, tmp_path / "m.lutra", torch.zeros(2, 4, dtype=torch.int16))


@pytest.mark.parametrize(
    ("example", "message"),
    [
        ((), "empty"),
        ((np.zeros((2, 4), np.float32),), "must be a torch.Tensor"),
        (torch.zeros(4), "batch axis"),
        (torch.zeros(0, 4), "at least one sample"),
        ((torch.zeros(2, 4), torch.zeros(3, 4)), "share one"),
        ((torch.zeros(2, 4), torch.zeros(2, 4)), "does not take"),
        (torch.zeros(2, 5), r"fails on example_input of shapes \[\(2, 5\)\]"),
    ],
)
def test_bad_examples(tmp_path: Path, example: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        export(nn.Linear(4, 2), tmp_path / "m.lutra", example)
