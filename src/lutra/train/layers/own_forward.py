"""Convolutions and linear layers with a forward of their own that ends in one call of PyTorch's
operator: padding as TensorFlow pads, causal padding, standardised or equalised weights, adapters.

The call is found by running the module on random inputs. It becomes a dense layer, which can be
replaced, and the rest of the forward runs as it is.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lutra.errors import LutraError
from lutra.train.geometry import Geometry
from lutra.train.layers.forms import is_parametrized, runs_forward_of
from lutra.train.layers.wrapper import Wrapper

_LINE, _IMAGE, _ROW = torch.conv1d, torch.conv2d, F.linear
_KINDS: dict[type[nn.Module], Callable[..., Tensor]] = {
    nn.Conv1d: _LINE,
    nn.Conv2d: _IMAGE,
    nn.Linear: _ROW,
}
_TOLERANCE = 1e-5
#: Sizes of the images and lines that a module is tried on.
_SIZES = (16, 32, 64, 224)


def _kind(module: nn.Module) -> type[nn.Module] | None:
    return next((kind for kind in _KINDS if isinstance(module, kind)), None)


def has_own_forward(module: nn.Module) -> bool:
    """Whether a module is a convolution or linear layer that does more than the dense layer that
    families replace: by its own forward, or by a padding that is not the same zeros on both
    sides."""
    kind = _kind(module)
    if kind is None or isinstance(module, nn.LazyConv1d | nn.LazyConv2d | nn.LazyLinear):
        return False
    if not runs_forward_of(module, kind):
        return True
    if isinstance(module, nn.Linear):
        return False
    try:
        Geometry.of(module, grouped=True)
    except LutraError:
        return True
    return False


def split(module: nn.Module) -> OwnForward | str:
    """A module with its operator as a dense layer, or the reason why there is none.

    Args:
        module: a module that `has_own_forward`.
    """
    kind = _kind(module)
    assert kind is not None
    name = type(module).__name__
    what = f"{name} has a forward of its own, which"
    if is_parametrized(module):
        return f"{what} computes its weight by hooks or a parametrization"
    mode = module.training
    module.eval()
    try:
        return _split(module, kind, what)
    finally:
        module.train(mode)


def _split(module: nn.Module, kind: type[nn.Module], what: str) -> OwnForward | str:
    calls: list[_Call] = []
    inputs: list[Tensor] = []
    outputs: list[Any] = []
    failure = ""
    for size in (0,) if kind is nn.Linear else _SIZES:
        calls, inputs, outputs = [], [], []
        try:
            for seed in range(2):
                x = _random_input(module, size, seed)
                with torch.no_grad(), _Calls(module, _KINDS[kind]) as found:
                    outputs.append(module.forward(x))
                inputs.append(x)
                calls += found.calls
                if len(found.calls) != 1:
                    return f"{what} calls {kind.__name__}'s operator {len(found.calls)} times"
            break
        except Exception as error:  # whatever it raises, the module is kept
            failure = f"{what} takes no single tensor ({type(error).__name__})"
    else:
        return failure
    first, second = calls
    if not first.has_same_weights(second) or first.rest != second.rest:
        return f"{what} computes the weight from its input"
    made = OwnForward(module, kind, first)
    try:
        with torch.no_grad():
            got = [made(x) for x in inputs]
    except Exception as error:
        return f"{what} cannot run without its weight ({type(error).__name__})"
    for y, wanted in zip(got, outputs, strict=True):
        if not isinstance(wanted, Tensor) or not torch.allclose(y, wanted, _TOLERANCE, _TOLERANCE):
            return f"{what} uses its weight beside the call of {kind.__name__}'s operator"
    return made


class OwnForward(Wrapper):
    """Runs the forward of a module, whose operator is a call of `conv` or `linear`.

    Args:
        dense: the module.
        kind: `nn.Conv1d`, `nn.Conv2d` or `nn.Linear`.
        call: of the operator.
    """

    _shape: tuple[int, ...]  # of the weight that the operator gets

    def __init__(self, dense: nn.Module, kind: type[nn.Module], call: _Call) -> None:
        super().__init__(dense, "linear" if kind is nn.Linear else "conv", _layer(kind, call))
        self.operator = kind
        self.is_computed = call.weight is not dense.weight
        body = copy.copy(dense)
        body._parameters, body._buffers = dict(dense._parameters), dict(dense._buffers)
        body._modules = dict(dense._modules)
        body._forward_hooks, body._forward_pre_hooks = (
            type(dense._forward_hooks)(),
            type(dense._forward_pre_hooks)(),
        )
        body._non_persistent_buffers_set = set(dense._non_persistent_buffers_set)
        for role in ("weight", "bias"):
            old = body._parameters.pop(role, None)
            if old is None:
                body._parameters[role] = None
            else:  # it has the shape, dtype and device that a forward may ask for
                stand_in = torch.zeros(1, dtype=old.dtype, device=old.device).expand(old.shape)
                body.register_buffer(role, stand_in, persistent=False)
        self.body = body
        self._shape = tuple(call.weight.shape)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Arguments and results of the module.

        Raises:
            LutraError: it does not call its operator once.
        """
        with _Redirect(self.layer, _KINDS[self.operator], self._shape) as redirect:
            y = self.body.forward(*args, **kwargs)
        if redirect.count != 1:
            raise LutraError(
                f"the forward of a converted {type(self.body).__name__} calls its operator "
                f"{redirect.count} times for this input, and once for others; keep this layer"
            )
        return y


class _Call:
    """The arguments of one call of an operator."""

    def __init__(self, operator: Callable[..., Tensor], args: Any, kwargs: Any) -> None:
        names = ["input", "weight", "bias"]
        if operator is not _ROW:
            names += ["stride", "padding", "dilation", "groups"]
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        self.x: Tensor = given["input"]
        self.weight: Tensor = given["weight"]
        self.bias: Tensor | None = given.get("bias")
        axes = self.weight.dim() - 2
        self.rest: dict[str, Any] = {}
        for name in names[3:]:
            value = given.get(name, 0 if name == "padding" else 1)
            if name != "groups" and isinstance(value, int):
                value = (value,) * axes
            elif name != "groups" and not isinstance(value, str):
                value = tuple(value) * (axes if len(value) == 1 else 1)
            self.rest[name] = value

    def has_same_weights(self, other: _Call) -> bool:
        """Whether two calls have the same weight and bias."""
        if (self.bias is None) != (other.bias is None):
            return False
        if self.bias is not None and not torch.equal(self.bias, other.bias):  # type: ignore[arg-type]
            return False
        return torch.equal(self.weight, other.weight)


def _layer(kind: type[nn.Module], call: _Call) -> nn.Module:
    """The dense layer of a call."""
    made: Any
    weight, has_bias = call.weight, call.bias is not None
    if kind is nn.Linear:
        made = nn.Linear(weight.shape[1], weight.shape[0], has_bias, device="meta")
    else:
        rest = dict(call.rest)
        rest["padding"] = _symmetric(call)
        inputs, kernel = weight.shape[1] * rest["groups"], tuple(weight.shape[2:])
        make: Any = kind
        made = make(inputs, weight.shape[0], kernel, bias=has_bias, device="meta", **rest)
    made.weight = _parameter(weight)
    if call.bias is not None:
        made.bias = _parameter(call.bias)
    return made  # type: ignore[no-any-return]


def _parameter(value: Tensor) -> nn.Parameter:
    """A weight as it is, or a copy of one that was computed."""
    return value if isinstance(value, nn.Parameter) else nn.Parameter(value.detach().clone())


def _symmetric(call: _Call) -> tuple[int, ...]:
    """The padding that the dense layer gets; `_Redirect` adds what it lacks."""
    padding = call.rest["padding"]
    return tuple(padding) if not isinstance(padding, str) else (0,) * (call.weight.dim() - 2)


def _padded(call: _Call) -> Tensor:
    """The input of a call as the dense layer takes it."""
    if call.rest.get("padding") != "same":
        return call.x
    amounts: list[int] = []
    for size, dilation in zip(call.weight.shape[2:], call.rest["dilation"], strict=True):
        span = dilation * (size - 1)
        amounts = [span // 2, span - span // 2, *amounts]
    return F.pad(call.x, amounts) if any(amounts) else call.x


class _Calls(TorchFunctionMode):
    """Collects the calls of a module's operator."""

    def __init__(self, module: nn.Module, operator: Callable[..., Tensor]) -> None:
        super().__init__()
        weight: Any = module.weight
        self._shape, self._operator = tuple(weight.shape), operator
        self.calls: list[_Call] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is self._operator:
            call = _Call(func, args, kwargs or {})
            if tuple(call.weight.shape) == self._shape:
                self.calls.append(call)
        return func(*args, **(kwargs or {}))


class _Redirect(TorchFunctionMode):
    """Calls a layer in place of an operator with a weight of some shape."""

    def __init__(
        self, layer: nn.Module, operator: Callable[..., Tensor], shape: tuple[int, ...]
    ) -> None:
        super().__init__()
        self._layer, self._operator, self._shape = layer, operator, shape
        self.count = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is self._operator:
            call = _Call(func, args, kwargs or {})
            if tuple(call.weight.shape) == self._shape:
                self.count += 1
                return self._layer(_padded(call))
        return func(*args, **(kwargs or {}))


def _random_input(module: nn.Module, size: int, seed: int) -> Tensor:
    """Two samples of input for a module."""
    weight: Any = module.weight
    generator = torch.Generator().manual_seed(seed)
    shape: tuple[int, ...] = (2, getattr(module, "in_features", weight.shape[-1]))
    if not isinstance(module, nn.Linear):
        channels: Any = module.in_channels
        shape = (2, channels, *(size,) * (weight.dim() - 2))
    return torch.randn(shape, generator=generator).to(weight.device, weight.dtype)
