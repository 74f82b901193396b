"""Batch norms behind integer layers evaluate as in the file, to the bit."""

from __future__ import annotations

import copy
import io
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from lutra import Session
from lutra.train import PQ, Int8, Lookup, convert, export
from lutra.train.layers.folded_norm import FoldedNorm


class Inverted(nn.Module):
    """A block of MobileNetV2."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        wide = 4 * channels
        self.expand, self.norm1 = nn.Conv2d(channels, wide, 1, bias=False), nn.BatchNorm2d(wide)
        self.depthwise = nn.Conv2d(wide, wide, 3, padding=1, groups=wide, bias=False)
        self.norm2 = nn.BatchNorm2d(wide)
        self.project, self.norm3 = nn.Conv2d(wide, channels, 1), nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        y = nn.functional.relu6(self.norm1(self.expand(x)))
        y = nn.functional.relu6(self.norm2(self.depthwise(y)))
        return x + self.norm3(self.project(y))


def network() -> nn.Module:
    """Twenty-six layers: a step that one of them takes elsewhere moves all behind it."""
    torch.manual_seed(0)
    blocks = [Inverted(8) for _ in range(8)]
    ends = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.Linear(8 * 36, 12)
    model = nn.Sequential(*ends[:2], *blocks, nn.Flatten(), ends[2], nn.BatchNorm1d(12))
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                nn.init.normal_(module.weight, 1.0, 0.3)
                nn.init.normal_(module.bias, 0.0, 0.3)
        model.train()(images(64, 0))
    return model.eval()


def images(count: int, seed: int) -> Tensor:
    return torch.randn(count, 3, 6, 6, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("method", [Int8(), Lookup(otherwise=Int8()), PQ(v=4, otherwise=Int8())])
def test_the_module_gives_the_bits_of_the_file(method: object, tmp_path: Path) -> None:
    dense = network()
    settings = {"rows": 128, "kmeans_steps": 3, "calibration": "parallel"}
    model, _ = convert(dense, {"*": method}, [images(32, 1)], **settings)  # type: ignore[dict-item, arg-type]
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    assert len(norms) == 26
    assert all(isinstance(norm, FoldedNorm) for norm in norms)
    assert list(model.state_dict()).count("1.running_mean") == 1
    export(model, tmp_path / "m.lutra", images(2, 2))
    x, session = images(16, 3), Session(tmp_path / "m.lutra")
    want = torch.from_numpy(session(x.numpy()))
    assert torch.equal(model(x), want)  # with gradients
    with torch.no_grad():
        assert torch.equal(model(x), want)
        assert torch.equal(copy.deepcopy(model)(x), want)
        buffer = io.BytesIO()
        torch.save(model, buffer)
        buffer.seek(0)
        assert torch.equal(torch.load(buffer, weights_only=False)(x), want)


def test_it_is_a_batch_norm_everywhere_else() -> None:
    torch.manual_seed(0)
    dense = nn.Sequential(nn.Conv2d(3, 5, 1), nn.BatchNorm2d(5))
    dense.train()(images(64, 0))
    calls: list[str] = []
    dense[1].register_forward_hook(lambda *_: calls.append("hook"))
    model, _ = convert(dense.eval(), {"*": Int8()}, [images(32, 1)])
    calls.clear()
    x = torch.randn(4, 5, 6, 6)
    assert torch.equal(model[1](x), dense[1](x))  # not of the layer
    assert len(calls) == 2
    y = model(images(4, 2).requires_grad_())
    y.square().sum().backward()
    assert model[1].weight.grad is not None
    gradient, y = model[1].weight.grad.clone(), model[0](images(4, 2)).detach()
    plain = copy.deepcopy(dense[1])
    plain(y).square().sum().backward()
    torch.testing.assert_close(gradient, plain.weight.grad, rtol=1e-4, atol=1e-4)
    before = model[1].running_mean.clone()
    model.train()(images(64, 3))
    assert not torch.equal(before, model[1].running_mean)
