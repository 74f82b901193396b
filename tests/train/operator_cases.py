"""Single operators as small models: what `test_operator_sweep` exports."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ROW = (6,)
TOKENS = (5, 6)
SIGNAL = (4, 9)
IMAGE = (4, 8, 6)


class Call(nn.Module):
    """A function of the inputs, with constants beside it."""

    def __init__(self, function: Callable[..., Any], **constants: Tensor) -> None:
        super().__init__()
        self.function = function
        for name, value in constants.items():
            self.register_buffer(name, value)

    def forward(self, *inputs: Tensor) -> Any:
        return self.function(self, *inputs)


@dataclass(frozen=True)
class Case:
    """A model of one operator.

    Attributes:
        make: Makes the model.
        shapes: Of its inputs, without the batch.
        refused: What the refusal says; None where it works.
        positive: Whether the inputs are above 0.
    """

    make: Callable[[], nn.Module]
    shapes: tuple[tuple[int, ...], ...] = (IMAGE,)
    refused: str | None = None
    positive: bool = False


def call(
    function: Callable[..., Any],
    *shapes: tuple[int, ...],
    refused: str | None = None,
    positive: bool = False,
    **constants: Tensor,
) -> Case:
    return Case(lambda: Call(function, **constants), shapes or (IMAGE,), refused, positive)


def module(make: Callable[[], nn.Module], *shapes: tuple[int, ...], refused: str = "") -> Case:
    return Case(make, shapes or (IMAGE,), refused or None)


def _numbers(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(5))


def _written(x: Tensor, number: float | None) -> Tensor:
    y = x.clone()
    if number is None:
        y[:, :2] = y[:, :2] * 2
    else:
        y[:, 0] = number
    return y


ACTIVATIONS = {
    "relu": module(nn.ReLU),
    "relu6": module(nn.ReLU6),
    "leaky_relu": module(lambda: nn.LeakyReLU(0.2)),
    "leaky_relu_inplace": module(lambda: nn.LeakyReLU(0.1, inplace=True)),
    "prelu_channels": module(lambda: nn.PReLU(4, init=0.3)),
    "prelu_one": module(nn.PReLU, TOKENS),
    "rrelu": module(nn.RReLU),
    "hardswish": module(nn.Hardswish),
    "hardsigmoid": module(nn.Hardsigmoid),
    "hardtanh": module(lambda: nn.Hardtanh(-0.5, 2.0)),
    "elu": module(nn.ELU),
    "elu_alpha": module(lambda: nn.ELU(0.3)),
    "selu": module(nn.SELU),
    "celu": module(lambda: nn.CELU(0.7)),
    "gelu": module(nn.GELU, TOKENS),
    "gelu_tanh": module(lambda: nn.GELU("tanh"), TOKENS),
    "silu": module(nn.SiLU),
    "mish": module(nn.Mish),
    "softplus": module(nn.Softplus),
    "softplus_beta": module(lambda: nn.Softplus(2.0, 10.0)),
    "softsign": module(nn.Softsign),
    "softmin": module(lambda: nn.Softmin(-1), TOKENS),
    "logsigmoid": module(nn.LogSigmoid),
    "tanhshrink": module(nn.Tanhshrink),
    "softshrink": module(nn.Softshrink),
    "hardshrink": module(nn.Hardshrink),
    "threshold": module(lambda: nn.Threshold(0.1, -2.0)),
    "tanh": module(nn.Tanh),
    "sigmoid": module(nn.Sigmoid),
    "glu": module(lambda: nn.GLU(1)),
    "glu_last": module(lambda: nn.GLU(-1), TOKENS),
    "softmax": module(lambda: nn.Softmax(-1), TOKENS),
    "softmax_channels": module(lambda: nn.Softmax(1)),
    "softmax_2d": module(nn.Softmax2d),
    "log_softmax": module(lambda: nn.LogSoftmax(-1), ROW),
    "log_softmax_channels": module(lambda: nn.LogSoftmax(1)),
    "reglu": call(lambda m, x: torch.relu(x[..., :3]) * x[..., 3:], TOKENS),
}
FUNCTIONS = {
    "exp": call(lambda m, x: x.exp()),
    "exp2": call(lambda m, x: torch.exp2(x)),
    "expm1": call(lambda m, x: torch.expm1(x)),
    "log": call(lambda m, x: x.log(), positive=True),
    "log2": call(lambda m, x: x.log2(), positive=True),
    "log10": call(lambda m, x: x.log10(), positive=True),
    "log1p": call(lambda m, x: x.log1p(), positive=True),
    "erf": call(lambda m, x: x.erf()),
    "erfc": call(lambda m, x: x.erfc()),
    "sqrt": call(lambda m, x: x.sqrt(), positive=True),
    "rsqrt": call(lambda m, x: x.rsqrt(), positive=True),
    "reciprocal": call(lambda m, x: x.reciprocal(), positive=True),
    "square": call(lambda m, x: x.square()),
    "pow_3": call(lambda m, x: x.pow(3)),
    "pow_5": call(lambda m, x: x**5),
    "pow_minus_2": call(lambda m, x: x.pow(-2), positive=True),
    "pow_half": call(lambda m, x: x**0.5, positive=True),
    "pow_fraction": call(lambda m, x: x.pow(1.7), positive=True),
    "pow_of_number": call(lambda m, x: torch.pow(2.0, x)),
    "pow_of_two": call(lambda m, x, y: x**y, ROW, ROW, positive=True),
    "abs": call(lambda m, x: x.abs()),
    "neg": call(lambda m, x: -x),
    "sign": call(lambda m, x: x.sign()),
    "floor": call(lambda m, x: x.mul(3).floor()),
    "ceil": call(lambda m, x: x.mul(3).ceil()),
    "round": call(lambda m, x: x.mul(3).round()),
    "trunc": call(lambda m, x: x.mul(3).trunc()),
    "frac": call(lambda m, x: x.frac()),
    "clamp": call(lambda m, x: x.clamp(-0.3, 0.8)),
    "clamp_tensors": call(
        lambda m, x: x.clamp(m.low, m.high), ROW, low=-_numbers(6).abs(), high=_numbers(6).abs()
    ),
    "nan_to_num": call(lambda m, x: x.nan_to_num()),
    "sin": call(lambda m, x: x.sin()),
}
PAIRS = {
    "add": call(lambda m, x, y: x + y, IMAGE, IMAGE),
    "add_alpha": call(lambda m, x, y: torch.add(x, y, alpha=0.5), ROW, ROW),
    "sub": call(lambda m, x, y: x - y, IMAGE, IMAGE),
    "rsub": call(lambda m, x: 1 - x),
    "mul_gate": call(lambda m, x, y: x * y, IMAGE, (4, 1, 1)),
    "div": call(lambda m, x, y: x / y, ROW, ROW, positive=True),
    "div_number": call(lambda m, x: x / 3),
    "maximum": call(lambda m, x, y: torch.maximum(x, y), IMAGE, IMAGE),
    "minimum": call(lambda m, x, y: torch.minimum(x, y), IMAGE, (4, 1, 1)),
    "maximum_constant": call(lambda m, x: torch.maximum(x, m.c), TOKENS, c=_numbers(6)),
    "max_other": call(lambda m, x, y: torch.max(x, y), ROW, ROW),
    "addcmul": call(lambda m, x, y, z: torch.addcmul(x, y, z, value=0.3), ROW, ROW, ROW),
    "addcdiv": call(lambda m, x, y, z: torch.addcdiv(x, y, z), ROW, ROW, ROW, positive=True),
    "lerp": call(lambda m, x, y: torch.lerp(x, y, 0.3), ROW, ROW),
    "lerp_tensor": call(lambda m, x, y, w: torch.lerp(x, y, w), ROW, ROW, ROW),
    "outer": call(lambda m, x, y: x[:, :, None] * y[:, None, :], ROW, (4,)),
    "add_constant_rows": call(lambda m, x: x[:, None] + m.c, ROW, c=_numbers(3, 6)),
    "squared_distance": call(
        lambda m, x: (x[:, None] - m.c).square().sum(-1), ROW, c=_numbers(3, 6)
    ),
    "remainder": call(lambda m, x: (x * 5).remainder(2)),
    "fmod": call(lambda m, x: torch.fmod(x * 5, 2)),
    "div_floor": call(lambda m, x: torch.div(x * 5, 2, rounding_mode="floor")),
    "floor_divide": call(lambda m, x, y: x // y, ROW, ROW, positive=True),
    "hypot": call(lambda m, x, y: torch.hypot(x, y), ROW, ROW),
}
MASKS = {
    "gt_number": call(lambda m, x: x * (x > 0.2)),
    "lt_tensor": call(lambda m, x, y: x * (x < y), ROW, ROW),
    "ge_float": call(lambda m, x: (x >= 0).float()),
    "le_constant": call(lambda m, x: (x <= m.c).float(), TOKENS, c=_numbers(6)),
    "eq": call(lambda m, x: (x.round() == 1).float()),
    "ne": call(lambda m, x: (x.round() != 0).to(torch.float32)),
    "where_computed": call(lambda m, x, y: torch.where(x > y, x, y * 2), IMAGE, IMAGE),
    "where_number": call(lambda m, x: torch.where(x > 0, x, -0.5)),
    "where_numbers": call(lambda m, x: torch.where(x > 0, 1.0, -1.0)),
    "where_constant": call(lambda m, x: torch.where(m.c, x, 0.0), TOKENS, c=_numbers(5, 6) > 0),
    "where_two": call(
        lambda m, x, y: torch.where(m.c, x, y), TOKENS, TOKENS, c=_numbers(1, 5, 1) > 0
    ),
    "masked_fill": call(lambda m, x: x.masked_fill(x < 0, -3.0)),
    "masked_fill_constant": call(
        lambda m, x: x.masked_fill(m.c, -1e4), TOKENS, c=_numbers(5, 6) > 0
    ),
    "masked_fill_infinity": call(lambda m, x: x.masked_fill(x < 0, float("-inf")).exp()),
    "logical": call(lambda m, x: (~(x > 1) & (x > -1) | (x < -2)).float()),
    "logical_functions": call(
        lambda m, x: torch.logical_xor(x > 0, torch.logical_not(x > 1)).float()
    ),
    "relu_by_mask": call(lambda m, x: x * (x > 0).to(x.dtype)),
    "count": call(lambda m, x: (x > 0).float().sum(1)),
    "any": call(lambda m, x: (x > 1).any(1).float()),
    "tril": call(lambda m, x: x.tril(), TOKENS),
    "zeros_like": call(lambda m, x: torch.cat([x, torch.zeros_like(x)], 1)),
    "new_full": call(lambda m, x: torch.cat([x, x.new_full((x.shape[0], 2), 0.5)], 1), ROW),
    "bool_output": call(lambda m, x: x > 0),
}
SHAPES = {
    "class_token": call(
        lambda m, x: torch.cat([m.c.expand(x.shape[0], -1, -1), x], 1), TOKENS, c=_numbers(1, 1, 6)
    ),
    "cat_repeated_constant": call(
        lambda m, x: torch.cat([x, m.c.repeat(x.shape[0], 1, 1)], 1), TOKENS, c=_numbers(1, 2, 6)
    ),
    "cat_activations": call(lambda m, x, y: torch.cat([x, y], -1), TOKENS, (5, 2)),
    "cat_coordinates": call(
        lambda m, x: torch.cat([x, m.c.expand(x.shape[0], 2, 8, 6)], 1), c=_numbers(1, 2, 8, 6)
    ),
    "stack": call(lambda m, x, y: torch.stack([x, y], 1), ROW, ROW),
    "stack_last": call(lambda m, x, y: torch.stack([x, y], -1), TOKENS, TOKENS),
    "stack_first_mean": call(lambda m, x, y: torch.stack([x, y]).mean(0), IMAGE, IMAGE),
    "stack_constant": call(
        lambda m, x: torch.stack([x, m.c.expand(x.shape[0], -1)], 1), ROW, c=_numbers(1, 6)
    ),
    "repeat": call(lambda m, x: x.repeat(1, 2, 3), TOKENS),
    "repeat_images": call(lambda m, x: x.repeat(1, 3, 1, 1)),
    "tile": call(lambda m, x: torch.tile(x, (1, 2)), ROW),
    "repeat_interleave": call(lambda m, x: x.repeat_interleave(2, 1)),
    "expand": call(lambda m, x: x.unsqueeze(1).expand(-1, 3, -1), ROW),
    "expand_as": call(lambda m, x, y: x.expand_as(y) * y, (4, 1, 1), IMAGE),
    "flip": call(lambda m, x: x.flip(-1)),
    "flip_two": call(lambda m, x: torch.flip(x, (2, 3))),
    "roll": call(lambda m, x: x.roll((1, -2), (2, 3))),
    "narrow": call(lambda m, x: x.narrow(2, 1, 4)),
    "select_channel": call(lambda m, x: x[:, 1]),
    "select": call(lambda m, x: x.select(2, -1)),
    "unflatten": call(lambda m, x: x.unflatten(1, (2, 2))),
    "slice_strided": call(lambda m, x: x[:, :, ::2, 1::3]),
    "slice_negative": call(lambda m, x: x[:, -3:, :-1]),
    "slice_ellipsis": call(lambda m, x: x[..., -2]),
    "index_list": call(lambda m, x: x[:, [2, 0, 1]]),
    "index_mask": call(lambda m, x: x[:, m.c], ROW, c=_numbers(6) > 0, refused="indices as a list"),
    "permute": call(lambda m, x: x.permute(0, 2, 3, 1)),
    "channel_shuffle": module(lambda: nn.ChannelShuffle(2)),
    "channel_shuffle_views": call(
        lambda m, x: x.view(x.shape[0], 2, 2, 8, 6).transpose(1, 2).reshape(x.shape[0], 4, 8, 6)
    ),
    "pixel_shuffle": module(lambda: nn.PixelShuffle(2)),
    "pixel_unshuffle": module(lambda: nn.PixelUnshuffle(2)),
    "unfold_axis": call(lambda m, x: x.unfold(2, 4, 2), SIGNAL),
    "chunk": call(lambda m, x: x.chunk(2, 1)[1]),
    "split": call(lambda m, x: torch.cat(x.split([1, 3], 1)[::-1], 1)),
    "unbind": call(lambda m, x: sum(x.unbind(1))),
    "meshgrid": call(
        lambda m, x: x + torch.meshgrid(m.c, m.c[:6], indexing="ij")[0], c=_numbers(8)
    ),
}
PADS = {
    "zeros": module(lambda: nn.ZeroPad2d(1)),
    "constant": module(lambda: nn.ConstantPad1d((2, 1), 0.5), SIGNAL),
    "reflect_1d": module(lambda: nn.ReflectionPad1d(3), SIGNAL),
    "reflect_2d": module(lambda: nn.ReflectionPad2d((1, 2, 3, 0))),
    "replicate_1d": module(lambda: nn.ReplicationPad1d((2, 3)), SIGNAL),
    "replicate_2d": module(lambda: nn.ReplicationPad2d(2)),
    "circular_2d": module(lambda: nn.CircularPad2d(2)),
    "conv_reflect": module(lambda: nn.Conv2d(4, 3, 3, padding=1, padding_mode="reflect")),
    "conv_replicate_1d": module(
        lambda: nn.Conv1d(4, 3, 3, padding=1, padding_mode="replicate"), SIGNAL
    ),
    "max_pool_behind_infinity": call(
        lambda m, x: F.max_pool2d(F.pad(x, (0, 1, 0, 1), value=float("-inf")), 3, 2)
    ),
    "infinity_alone": call(
        lambda m, x: F.pad(x, (0, 1), value=float("-inf")), refused="finite number"
    ),
}
REDUCTIONS = {
    "mean": call(lambda m, x: x.mean((2, 3))),
    "mean_keepdim": call(lambda m, x: x.mean(1, keepdim=True)),
    "sum": call(lambda m, x: x.sum(-1)),
    "amax": call(lambda m, x: x.amax((2, 3))),
    "amin": call(lambda m, x: x.amin(1, keepdim=True)),
    "max_values": call(lambda m, x: x.max(1)[0]),
    "min_values": call(lambda m, x: x.min(-1).values),
    "max_indices": call(lambda m, x: x.max(1)[1].float()),
    "argmax": call(lambda m, x: x.argmax(1).float()),
    "std": call(lambda m, x: x.std(1)),
    "std_population": call(lambda m, x: x.std((2, 3), unbiased=False, keepdim=True)),
    "var": call(lambda m, x: x.var(-1)),
    "var_correction_0": call(lambda m, x: torch.var(x, 1, correction=0)),
    "var_mean": call(lambda m, x: sum(torch.var_mean(x, (2, 3)))),
    "logsumexp": call(lambda m, x: x.logsumexp(1)),
    "norm_1": call(lambda m, x: x.norm(1, -1), TOKENS),
    "norm_2": call(lambda m, x: torch.linalg.vector_norm(x, dim=-1), TOKENS),
    "normalize": call(lambda m, x: F.normalize(x, dim=1)),
    "normalize_1": call(lambda m, x: F.normalize(x, p=1.0, dim=-1), TOKENS),
    "cosine_similarity": call(lambda m, x, y: F.cosine_similarity(x, y, dim=-1), TOKENS, TOKENS),
    "pairwise_distance": call(lambda m, x, y: F.pairwise_distance(x, y), ROW, ROW),
    "cumsum": call(lambda m, x: x.cumsum(-1), TOKENS),
    "cumsum_channels": call(lambda m, x: x.cumsum(1)),
    "standardised": call(
        lambda m, x: (x - x.mean(-1, keepdim=True)) / x.std(-1, keepdim=True), TOKENS
    ),
    "batch_first_axis": call(lambda m, x: x.transpose(0, 1).mean(0), TOKENS),
    "over_the_batch": call(lambda m, x: x.sum(0, keepdim=True), refused="over the batch"),
}
PRODUCTS = {
    "linear": module(lambda: nn.Linear(6, 3), TOKENS),
    "bilinear_form": call(lambda m, x, y: (x @ m.c * y).sum(-1), ROW, ROW, c=_numbers(6, 6)),
    "matmul": call(lambda m, x, y: x @ y.transpose(1, 2), TOKENS, TOKENS),
    "matmul_vector": call(lambda m, x: x @ m.c, TOKENS, c=_numbers(6)),
    "matmul_many": call(lambda m, x: x @ m.c, (3, 5, 6), c=_numbers(3, 6, 2)),
    "bmm": call(lambda m, x, y: torch.bmm(x, y), TOKENS, (6, 3)),
    "baddbmm": call(lambda m, x, y, z: torch.baddbmm(x, y, z, beta=0.5), (5, 3), TOKENS, (6, 3)),
    "einsum_bmm": call(lambda m, x, y: torch.einsum("bij,bjk->bik", x, y), TOKENS, (6, 3)),
    "einsum_scores": call(
        lambda m, x, y: torch.einsum("bthd,bshd->bhts", x, y), (5, 2, 3), (7, 2, 3)
    ),
    "einsum_linear": call(
        lambda m, x: torch.einsum("btd,od->bto", x, m.c), TOKENS, c=_numbers(4, 6)
    ),
    "einsum_channels": call(lambda m, x: torch.einsum("nchw,oc->nohw", x, m.c), c=_numbers(3, 4)),
    "einsum_heads": call(
        lambda m, x: torch.einsum("bthd,hde->bthe", x, m.c), (5, 2, 3), c=_numbers(2, 3, 4)
    ),
    "einsum_dots": call(lambda m, x, y: torch.einsum("...ij,...jk->...ik", x, y), TOKENS, (6, 3)),
    "einsum_sum": call(lambda m, x: torch.einsum("bij->bj", x), TOKENS),
    "einsum_outer": call(lambda m, x, y: torch.einsum("bi,bj->bij", x, y), ROW, (4,)),
    "einsum_dot": call(lambda m, x, y: torch.einsum("bi,bi->b", x, y), ROW, ROW),
    "einsum_diagonal": call(lambda m, x: torch.einsum("bii->bi", x), (4, 4)),
    "attention": call(lambda m, x: F.scaled_dot_product_attention(x, x, x), (2, 5, 6)),
}
#: The batch in axis 1, as nn.MultiheadAttention has it.
TURNED = {
    name: call(
        lambda m, x, f=function: f(m, x.transpose(0, 1)).transpose(0, 1), TOKENS, c=_numbers(6)
    )
    for name, function in {
        "where": lambda m, x: torch.where(x > 0, x, 0.5),
        "maximum": lambda m, x: torch.maximum(x, m.c),
        "cat": lambda m, x: torch.cat([x, x * 2], 0),
        "cat_constant": lambda m, x: torch.cat([m.c.expand(1, x.shape[1], -1), x], 0),
        "flip": lambda m, x: x.flip(0),
        "cumsum": lambda m, x: x.cumsum(0),
        "chunk": lambda m, x: x.chunk(2, -1)[0],
        "glu": lambda m, x: F.glu(x, -1),
        "pad": lambda m, x: F.pad(x, (1, 0)),
        "reflect": lambda m, x: F.pad(x, (1, 2), mode="reflect"),
        "index": lambda m, x: x[:, :, [0, 2]],
        "slice": lambda m, x: x[1::2],
        "std": lambda m, x: x.std(0, keepdim=True),
    }.items()
}
MORE = {
    "sinh": call(lambda m, x: torch.sinh(x) + torch.cosh(x)),
    "logaddexp": call(lambda m, x, y: torch.logaddexp(x, y), ROW, ROW),
    "logit": call(lambda m, x: torch.logit(x.sigmoid())),
    "prod": call(lambda m, x: x.prod(1)),
    "lp_pool": call(lambda m, x: F.lp_pool2d(x, 2, 2), positive=True),
    "local_response_norm": module(lambda: nn.LocalResponseNorm(3)),
    "unfold_windows": call(lambda m, x: F.unfold(x, 3, padding=1, stride=2)),
    "interpolate_1d": call(lambda m, x: F.interpolate(x, scale_factor=2), SIGNAL),
    "interpolate_1d_linear": call(lambda m, x: F.interpolate(x, size=13, mode="linear"), SIGNAL),
    "layer_norm_image": module(lambda: nn.LayerNorm(IMAGE)),
    "hstack": call(lambda m, x, y: torch.hstack([x, y]), ROW, ROW),
    "rot90": call(lambda m, x: torch.rot90(x, 1, (2, 3))),
    "tensordot": call(
        lambda m, x: torch.tensordot(x, m.c, dims=([2], [0])), TOKENS, c=_numbers(6, 3)
    ),
    "diff": call(lambda m, x: torch.diff(x, dim=-1)),
    "tensor_split": call(lambda m, x: torch.tensor_split(x, 2, 1)[1]),
    "learnt_queries": call(
        lambda m, x: F.scaled_dot_product_attention(m.c.expand(x.shape[0], -1, -1, -1), x, x),
        (2, 5, 6),
        c=_numbers(1, 2, 3, 6),
    ),
    "masked_softmax": call(
        lambda m, x: x.masked_fill(m.c, float("-inf")).softmax(-1),
        (5, 5),
        c=torch.ones(5, 5).triu(1) > 0,
    ),
    "masked_mean": call(lambda m, x: (x * (x > 0)).sum(-1) / (x > 0).sum(-1).clamp(min=1), TOKENS),
    "whole_numbers": call(lambda m, x: (x * 3).int().float() + (x > 0).long()),
    "index_two": call(lambda m, x: x[:, m.c, m.c], c=torch.tensor([3, 0])),
    "index_matrix": call(lambda m, x: x[:, m.c], c=torch.tensor([[3, 0], [1, 2]])),
    "diagonal": call(lambda m, x: x.diagonal(dim1=-2, dim2=-1), (5, 5)),
    "write_zero": call(lambda m, x: _written(x, 0)),
    "write_half": call(lambda m, x: _written(x, None)),
    "aminmax": call(lambda m, x: torch.aminmax(x, dim=1)[0]),
    "gem": call(
        lambda m, x: x.clamp(min=1e-6).pow(m.c).mean((-2, -1)).pow(1 / m.c), c=torch.tensor([3.0])
    ),
    "rotary": call(
        lambda m, x: x * m.c + torch.cat([-x[..., 3:], x[..., :3]], -1) * m.d,
        TOKENS,
        c=_numbers(5, 6),
        d=_numbers(5, 6),
    ),
    "focus": call(lambda m, x: torch.cat([x[..., ::2, ::2], x[..., 1::2, 1::2]], 1)),
    "float64": call(lambda m, x: x.double().softmax(1).float()),
}
LAYERS = {
    "conv1d": module(lambda: nn.Conv1d(4, 6, 3), SIGNAL),
    "conv2d": module(lambda: nn.Conv2d(4, 6, 3, 2, 1)),
    "batch_norm": module(lambda: nn.BatchNorm2d(4)),
    "layer_norm": module(lambda: nn.LayerNorm(6), TOKENS),
    "rms_norm": module(lambda: nn.RMSNorm(6), TOKENS),
    "dropout": module(nn.Dropout),
    "max_pool2d": module(lambda: nn.MaxPool2d(2)),
    "avg_pool2d": module(lambda: nn.AvgPool2d(2)),
    "max_pool1d": module(lambda: nn.MaxPool1d(3), SIGNAL),
    "avg_pool1d": module(lambda: nn.AvgPool1d(3), SIGNAL),
    "adaptive_avg_pool2d": module(lambda: nn.AdaptiveAvgPool2d(1)),
    "interpolate_nearest": call(lambda m, x: F.interpolate(x, scale_factor=2)),
    "interpolate_bilinear": call(
        lambda m, x: F.interpolate(x, size=(5, 9), mode="bilinear", align_corners=False)
    ),
}


class Recurrent(nn.Module):
    """The sequence of a recurrent layer."""

    def __init__(self, kind: type[nn.RNNBase]) -> None:
        super().__init__()
        self.layer = kind(6, 4, batch_first=True)  # type: ignore[call-arg]

    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = self.layer(x)[0]
        return made


RESAMPLING = {
    "group_norm": module(lambda: nn.GroupNorm(2, 4)),
    "instance_norm": module(lambda: nn.InstanceNorm2d(4)),
    "conv_transpose2d": module(lambda: nn.ConvTranspose2d(4, 3, 2, 2)),
    "conv_transpose1d": module(lambda: nn.ConvTranspose1d(4, 3, 2, 2), SIGNAL),
    "bicubic": call(lambda m, x: F.interpolate(x, scale_factor=2, mode="bicubic")),
    "bicubic_antialiased": call(
        lambda m, x: F.interpolate(x, scale_factor=0.6, mode="bicubic", antialias=True)
    ),
    "nearest_1d": call(lambda m, x: F.interpolate(x, scale_factor=2), SIGNAL),
    "linear_1d": call(lambda m, x: F.interpolate(x, size=14, mode="linear"), SIGNAL),
    "grid_sample": call(lambda m, x, g: F.grid_sample(x, g, align_corners=False), IMAGE, (5, 5, 2)),
    "lstm": module(lambda: Recurrent(nn.LSTM), TOKENS),
    "gru": module(lambda: Recurrent(nn.GRU), TOKENS),
    "adaptive_max_pool2d": module(lambda: nn.AdaptiveMaxPool2d((3, 5))),
    "adaptive_avg_pool1d": module(lambda: nn.AdaptiveAvgPool1d(4), SIGNAL),
    "gather_topk": call(lambda m, x: x.gather(1, x.topk(2, 1)[1])),
    "gather_argmax": call(lambda m, x: x.gather(1, x.argmax(1, keepdim=True))),
    "topk": call(lambda m, x: x.topk(2, 1)[0]),
    "rnn": module(lambda: Recurrent(nn.RNN), TOKENS),
}
FAMILIES = {
    "activations": ACTIVATIONS,
    "functions": FUNCTIONS,
    "pairs": PAIRS,
    "masks": MASKS,
    "shapes": SHAPES,
    "pads": PADS,
    "reductions": REDUCTIONS,
    "products": PRODUCTS,
    "turned": TURNED,
    "more": MORE,
    "layers": LAYERS,
    "resampling": RESAMPLING,
}
CASES = {
    f"{family}-{name}": case for family, cases in FAMILIES.items() for name, case in cases.items()
}
