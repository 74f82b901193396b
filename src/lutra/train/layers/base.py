"""The frame of every family of layers: the activation grid, the frozen form, the registry.

A family is a method of recipes (`lutra.train.recipe.Method`) and the layers that it makes. Its file
registers it with `register`; conversion, the speed gate, fine-tuning, export and the report ask the
registry and the methods of `QuantizedLayer`, and name no family.
"""

from __future__ import annotations

import copy
from collections.abc import Hashable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lutra.errors import LutraError
from lutra.node import Array
from lutra.ops import op_spec
from lutra.train import distributed
from lutra.train.geometry import Geometry, Grid
from lutra.train.layers.dropin import adopt_attributes
from lutra.train.layers.forms import CONV2D, LINEAR, Form, form_of, why_kept
from lutra.train.layers.goal import Goal
from lutra.train.operators.frozen import FrozenNode, frozen
from lutra.train.recipe import Method
from lutra.train.watch import Watch

if TYPE_CHECKING:
    from typing_extensions import Self

#: What layers keep and can make again: it is neither copied nor pickled.
_DERIVED = ("_frozen", "_grid", "_reconstruction")
_CENTERED = 4  # steps of the bias towards a goal that is cut off


@dataclass(frozen=True)
class Family:
    """A method of recipes and its layers.

    Attributes:
        method: the dataclass of recipes.
        layers: the layer that takes the place of each kind of module. A layer has
            `from_float(module, method)`; those that are a `QuantizedLayer` are calibrated.
        is_rival: whether the speed gate may choose the layers where lookups lose, with
            `method()`: they are as exact as the dense layer, or nearly.
        takes_recurrent: whether the layer that takes the place of `nn.Linear` may be the matrices
            of an `nn.GRU` or `nn.LSTM`, see `lutra.train.layers.recurrent`.
    """

    method: type[Method]
    layers: Mapping[type[nn.Module], Any]
    is_rival: bool = False
    takes_recurrent: bool = False


_FAMILIES: dict[str, Family] = {}
#: The dense layers that can be replaced, and how reports call them. Other modules are seen as one
#: of them, see `lutra.train.layers.forms`.
KINDS: Mapping[type[nn.Module], str] = {
    nn.Conv2d: "conv2d",
    nn.Linear: "linear",
    nn.Embedding: "embedding",
}


def register(family: Family) -> Family:
    """Makes a family known to recipes, conversion and everything behind them.

    Raises:
        LutraError: a layer is for a kind of module that nothing replaces.
    """
    for module in family.layers:
        if module not in KINDS:
            raise LutraError(
                f"register: {module.__name__} is no kind of module that can be replaced; choose "
                f"from {', '.join(kind.__name__ for kind in KINDS)}"
            )
    _FAMILIES[family.method.name] = family
    return family


def families() -> tuple[Family, ...]:
    """All families, in the order in which they were registered."""
    return tuple(_FAMILIES.values())


def family_of(method: Method) -> Family | None:
    """The family of a method; None for methods that make no layers."""
    return _FAMILIES.get(method.name)


def check_input(
    x: Tensor, geometry: Geometry, linear: bool, name: str, form: Form = CONV2D
) -> None:
    """Refuses inputs that a layer does not take.

    Args:
        name: of the layer's class.
        form: of the module that it replaces.

    Raises:
        LutraError: wrong rank, channels or features, or an image smaller than the kernel.
    """
    shape, channels = tuple(x.shape), geometry.channels
    if linear:
        if not shape or shape[-1] != channels:
            raise LutraError(
                f"{name}: the input has shape {shape}; give (..., {channels}), as the "
                f"layer has {channels} input features"
            )
        return
    sizes = "L" if form.line else "H, W"
    if len(shape) != (3 if form.line else 4) or shape[1] != channels:
        raise LutraError(
            f"{name}: the input has shape {shape}; give (N, {channels}, {sizes}), as the "
            f"layer has {channels} input channels"
        )
    if min(geometry.out_size(*form.enter(x).shape[2:])) < 1:
        raise LutraError(
            f"{name}: the input has shape {shape}, smaller than the kernel "
            f"{geometry.kernel} with dilation {geometry.dilation} and padding {geometry.padding}; "
            "give larger images"
        )


def clip_gradient(gradient: Tensor, x: Tensor, grid: Grid) -> Tensor:
    """The gradient of x, zero where x was clipped: it does not move the output there."""
    low = -(grid.zero + 0.5) * grid.scale
    high = (grid.qmax - grid.zero + 0.5) * grid.scale
    return cast(Tensor, torch.ops.aten.hardtanh_backward(gradient, x, low, high))


class FrozenLayer(nn.Module):
    """A layer without float weights: the form that is exported. Buffers are the file's tensors.

    Args:
        name: class of the layer that was frozen, for errors.
        op: operator of the graph.
        geometry: of the layer.
        grid: of the layer, if it has one.
        tensors: by role; they become buffers.
        attrs: attributes of the operator beside those of geometry and grid.
    """

    form = CONV2D  # of the dense layer

    def __init__(
        self,
        name: str,
        op: str,
        geometry: Geometry,
        grid: Grid | None,
        tensors: Mapping[str, Tensor],
        attrs: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        spec = op_spec(op)
        steps = {} if grid is None else grid.attrs
        own = {**geometry.attrs(spec.attrs), **steps, **(attrs or {})}
        self.name, self.geometry, self.grid = name, geometry, grid
        for role in spec.tensors:
            if role in tensors:
                self.register_buffer(role, tensors[role])
            else:
                setattr(self, role, None)
        self.node = FrozenNode(op, spec.complete(own), tuple(tensors))
        self._text = self.node.to_json()

    @property
    def linear(self) -> bool:
        """Whether it works along the last axis of its input, and not on images."""
        return self.node.is_linear

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The buffers by role, in the order of the node."""
        buffers: dict[str, Any] = self._buffers  # an attribute may hide one
        return {role: buffers[role] for role in self.node.roles}

    def show_weight(self, weight: Tensor) -> None:
        """Lets `weight` be the float weight of the dense layer, for code that reads its dtype or
        device; the tensors of the layer stay what they are."""
        self.__dict__["weight"] = weight.detach()

    def with_geometry(self, geometry: Geometry) -> FrozenLayer:
        """The same layer with another stride, padding or dilation."""
        attrs = {name: self.node.attrs[name] for name in self.node.attrs}
        own = {**attrs, **geometry.attrs(attrs)}
        return FrozenLayer(self.name, self.node.op, geometry, self.grid, self.tensors, own)

    def arrays(self) -> dict[str, Array]:
        """The buffers as arrays."""
        return {role: tensor.cpu().numpy() for role, tensor in self.tensors.items()}

    def forward(self, x: Tensor) -> Tensor:
        """Same shapes as the layer that was frozen."""
        check_input(x, self.geometry, self.linear, self.name, self.form)
        y = frozen(self.form.enter(x), list(self.tensors.values()), self._text)
        return self.form.leave(cast(Tensor, y))

    def extra_repr(self) -> str:
        return self.node.op


_F = TypeVar("_F", bound=FrozenLayer)


class QuantizedLayer(nn.Module):
    """A layer with the weights of a dense one, whose forward pass is that of the engine.

    State: `weight` and `bias` of the dense layer, and `act_scale` and `signed`, which make the
    activation grid of layers that have one. Other attributes of the dense layer, such as
    `kernel_size`, are kept too.
    """

    op: ClassVar[str]  # operator of the graph
    takes_groups: ClassVar[bool] = False  # whether a grouped convolution will do
    has_grid: ClassVar[bool] = True  # or activations are rounded in another way
    output_tensors: ClassVar[tuple[str, ...]] = ("weight", "bias")  # with a value for each output
    form: Form = CONV2D  # of the module that it replaces
    geometry: Geometry
    method: Any  # the method of the family
    weight: nn.Parameter
    bias: nn.Parameter | None
    act_scale: Tensor
    signed: Tensor
    #: What the features of the input (D) are divided by before they are rounded; None for nothing.
    smoothing: Tensor | None

    def __init__(
        self, weight: Tensor, bias: Tensor | None, geometry: Geometry, method: Method
    ) -> None:
        super().__init__()
        self.check(geometry, method)
        self.geometry = geometry
        self.method = method
        self.weight = nn.Parameter(weight.detach().clone())
        self.bias = None if bias is None else nn.Parameter(bias.detach().clone())
        self.register_buffer("smoothing", None)
        if self.has_grid:
            self._hold_grid(weight.device)

    @classmethod
    def from_float(cls, layer: Any, method: Any) -> Self:
        """Copies the weights of a dense layer; the grid, and tables that are learned, must still be
        set (`lutra.convert` does both).

        Raises:
            LutraError: the family has no form of this layer.
        """
        form = form_of(layer)
        if form is None:
            raise LutraError(f"{cls.__name__}: {why_kept(layer)}; keep it")
        new = cls(form.kernel(layer.weight), layer.bias, cls.geometry_of(layer), method)
        if form.transposed:
            new.weight = nn.Parameter(layer.weight.detach().clone())
        new.form = form
        adopt_attributes(new, layer)
        return new

    @classmethod
    def geometry_of(cls, layer: nn.Module) -> Geometry:
        """The geometry of a dense layer that this one can replace.

        Raises:
            LutraError: it cannot replace it.
        """
        return Geometry.of(layer, grouped=cls.takes_groups)

    @classmethod
    def check(cls, geometry: Geometry, method: Any) -> None:
        """Refuses what the family cannot compute.

        Raises:
            LutraError: a layer of this geometry cannot have this method.
        """

    # ---- what conversion, training and export ask -----------------------------------------------

    def learn(self, rows: Tensor, *, steps: int, seed: int) -> None:
        """Sets what is learned from samples of the input, once the grid is there.

        Args:
            rows: samples (n, D).
            steps: of the search for centroids.
            seed: of everything random.
        """

    def refit(self, rows: Tensor, goal: Goal, *, keep_weight: bool = False) -> None:
        """Fits the layer to values of the dense network; by default the bias alone.

        Args:
            rows: samples (n, D) of the input in the converted network.
            goal: what the outputs for them should be.
            keep_weight: whether the weights are another module's as well, and must stay.
        """
        self._center(rows, goal)

    @torch.no_grad()
    def _center(self, rows: Tensor, goal: Goal) -> None:
        """Moves the bias so that the mean of the outputs is the mean of the targets."""
        y = self.of_rows(rows)
        total = best = torch.zeros_like(y[0])
        least = goal.error(y)
        for _ in range(_CENTERED if goal.is_cut else 1):
            mean = distributed.mean_row(goal.targets(y) - y)
            total, y = total + mean, y + mean
            error = goal.error(y)
            if error < least:
                best, least = total, error
        self.shift_bias(best)

    @torch.no_grad()
    def shift_bias(self, shift: Tensor) -> None:
        """Adds (M) to the bias, which the layer then has."""
        if self.bias is not None:
            shift = shift + self.bias.float()
        trained = self.weight.requires_grad if self.bias is None else self.bias.requires_grad
        self.bias = nn.Parameter(shift.to(self.weight.dtype), requires_grad=trained)

    def of_outputs(self, outputs: slice) -> Self:
        """A layer of some of the outputs, of a layer of one group. What is no tensor with a value
        for each output is shared with this layer."""
        some = copy.copy(self)
        some.form = LINEAR if self.form.transposed else self.form
        some._parameters = dict(self._parameters)
        for name in self.output_tensors:
            tensor = self.kernel_weight if name == "weight" else getattr(self, name)
            if tensor is not None:
                some._parameters[name] = nn.Parameter(tensor[outputs], tensor.requires_grad)
        return some

    @torch.no_grad()
    def of_rows(self, rows: Tensor) -> Tensor:
        """The outputs (n, M) for rows (n, D) of the input, as the engine computes them."""
        geometry, frozen = self.geometry, cast(FrozenLayer, self.frozen())
        if frozen.linear:
            return cast(Tensor, frozen(rows))
        one = replace(geometry, stride=(1, 1), padding=(0, 0), dilation=(1, 1))
        x = rows.view(len(rows), geometry.channels, *geometry.kernel)
        return cast(Tensor, frozen.with_geometry(one)(x)).flatten(1)

    def settle(self, rows: Tensor) -> Mapping[str, Any]:
        """What the report says of the layer; see the fields of `LayerReport`.

        Args:
            rows: samples of its input (n, D).
        """
        raise NotImplementedError

    @classmethod
    def sharing_key(cls, method: Any) -> Hashable | None:
        """What layers must have in common, beside their input and geometry, to share codes; None
        where the family shares none."""
        return None

    def share(self, leader: Any) -> None:
        """Takes codebooks and grid of a layer with the same key that reads the same input."""
        raise NotImplementedError

    def randomize(self) -> None:
        """Random tables on a grid around zero, for a look at the speed."""
        self.set_activation_range(-1.0, 1.0)

    def table_parameters(self) -> list[nn.Parameter]:
        """Parameters that weight decay must spare and that have a learning rate of their own."""
        return []

    def temperature_parameters(self) -> list[nn.Parameter]:
        """Parameters of a softmax temperature, which learn much faster than others."""
        return []

    def codebook_parameters(self) -> list[nn.Parameter]:
        """Parameters that decide which code an input gets."""
        return []

    def hold_codebooks(self, held: bool) -> None:
        """Whether what the layer moves by itself, without the optimiser, stays where it is."""

    def anneal(self, progress: float) -> None:
        """Called before every training step with the share of training that is done."""

    def compact_weight(self) -> Tensor | str | None:
        """Float weights (M, D) from which tables can be built again, or the reason why they cannot;
        None for layers without such tables."""
        return None

    def compact_centroids(self) -> Tensor | None:
        """The centroids uint8 (G, K, V) that go with `compact_weight` where the frozen layer has
        none: codes of trees need no centroids."""
        return None

    # ---- the grid -------------------------------------------------------------------------------

    def smoothed(self, rows: Tensor) -> Tensor:
        """Samples (n, D) of the input as the grid meets them."""
        return rows if self.smoothing is None else rows * (1.0 / self.smoothing)

    def _hold_grid(self, device: torch.device) -> None:
        """Registers what the grid is made of."""
        self._hold_step(device)
        self.register_buffer("signed", torch.zeros((), dtype=torch.bool, device=device))

    def _hold_step(self, device: torch.device) -> None:
        """Registers what `_step_source` returns."""
        self.register_buffer("act_scale", torch.ones((), device=device))

    def _step_source(self) -> Tensor:
        """The tensor that holds the step of the grid, in some form."""
        return self.act_scale

    def _step(self) -> Tensor:
        """The step of the grid."""
        return self.act_scale

    def _grid_source(self) -> tuple[Tensor, ...]:
        """The tensors that the grid is made of."""
        return self._step_source(), self.signed

    def _zero(self) -> int:
        """The integer that stands for zero."""
        return 1 << (self.method.act_bits - 1) if bool(self.signed) else 0

    def _set_step(self, step: float) -> None:
        self.act_scale.fill_(step)

    @property
    def kernel_weight(self) -> Tensor:
        """The weight with the outputs on its first axis: (M, C / G, ...) or (M, D)."""
        return self.form.kernel(self.weight)

    @property
    def outputs(self) -> int:
        return self.kernel_weight.shape[0]

    def grid(self) -> Grid:
        """The activation grid; read from the device again only after it was written."""
        source = self._grid_source()
        kept: tuple[Watch, Grid] | None = self.__dict__.get("_grid")
        if kept is None or not kept[0].unchanged(source):
            grid = Grid(float(self._step().detach()), self._zero(), self.method.act_bits)
            kept = (Watch(source), grid)
            self.__dict__["_grid"] = kept
        return kept[1]

    def set_activation_range(self, low: float, high: float) -> None:
        """Sets the grid to cover low..high: unsigned if nothing is below zero."""
        bits = self.method.act_bits
        signed = low < 0.0
        reach = max(high, -low) if signed else high
        levels = (1 << (bits - 1)) - 1 if signed else (1 << bits) - 1
        self.signed.fill_(signed)
        self._set_step(max(reach, 1e-6) / max(levels, 1))

    # ---- forward --------------------------------------------------------------------------------

    def _run(self, x: Tensor) -> Tensor:
        """y (N, M, H', W') of x (N, C, H, W), in float32, with gradients."""
        raise NotImplementedError

    def _check_input(self, x: Tensor) -> None:
        linear = op_spec(self.op).output_axis == -1
        check_input(x, self.geometry, linear, type(self).__name__, self.form)

    def dense_forward(self, x: Tensor) -> Tensor:
        """The output of the dense layer with the float weights."""
        raise NotImplementedError

    def freeze(self) -> FrozenLayer:
        """The layer as the engine runs it: integers in place of the weights."""
        raise NotImplementedError

    def _freeze(
        self, kind: type[_F], tensors: Mapping[str, Tensor], attrs: Mapping[str, Any] | None = None
    ) -> _F:
        """The frozen layer of some tensors; adds the bias."""
        zeros = tensors["scale"].new_zeros(self.outputs)
        bias = zeros if self.bias is None else self.bias.float().clone()
        name, every = type(self).__name__, {**tensors, "bias": bias}
        grid = self.grid() if self.has_grid else None
        made = kind(name, self.op, self.geometry, grid, every, attrs)
        made.form = self.form
        adopt_attributes(made, self)
        return made

    def frozen(self) -> nn.Module:
        """`freeze()`, kept until a parameter or buffer is written or replaced."""
        source = (*self.parameters(), *self.buffers())
        kept: tuple[Watch, nn.Module] | None = self.__dict__.get("_frozen")
        if kept is None or not kept[0].unchanged(source):
            kept = (Watch(source), self.freeze())
            self.__dict__["_frozen"] = kept  # not a submodule: it must not reach state_dict
        return kept[1]

    def forget_frozen(self) -> None:
        """Forgets what `frozen` kept: not every write to a parameter can be noticed."""
        self.__dict__.pop("_frozen", None)
        if self.has_grid and self._step_source().requires_grad:
            self.__dict__.pop("_grid", None)

    def train(self, mode: bool = True) -> Self:
        """As of every module; also forgets what was kept for eval mode."""
        if mode != self.training:
            self.forget_frozen()  # weights may have been written through .data
        return super().train(mode)

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k not in _DERIVED}


class ImageLayer(QuantizedLayer):
    """The form of a layer that replaces `nn.Conv2d` or `nn.Conv1d`."""

    def forward(self, x: Tensor) -> Tensor:
        """y (N, M, H', W') of x (N, C, H, W): frozen where no gradient is asked for. In place of
        `nn.Conv1d` y (N, M, L') of x (N, C, L)."""
        if self.training or torch.is_grad_enabled():
            self._check_input(x)
            return self.form.leave(self._run(self.form.enter(x)))
        return cast(Tensor, self.frozen()(x))

    def dense_forward(self, x: Tensor) -> Tensor:
        """As `forward`, with the float weights."""
        g, weight = self.geometry, self.kernel_weight
        kernel = weight.reshape(len(weight), -1, *g.kernel)
        y = F.conv2d(
            self.form.enter(x), kernel, self.bias, g.stride, g.padding, g.dilation, g.groups
        )
        return self.form.leave(y)


class RowLayer(QuantizedLayer):
    """The form of a layer that replaces `nn.Linear`."""

    def forward(self, x: Tensor) -> Tensor:
        """y (..., M) of x (..., D): frozen where no gradient is asked for."""
        if self.training or torch.is_grad_enabled():
            self._check_input(x)
            y = self._run(x.reshape(-1, x.shape[-1])[:, :, None, None])
            return y.reshape(*x.shape[:-1], self.outputs)
        return cast(Tensor, self.frozen()(x))

    def dense_forward(self, x: Tensor) -> Tensor:
        """As `forward`, with the float weights."""
        return F.linear(x, self.kernel_weight, self.bias)


def quantized_layers(model: nn.Module) -> Iterator[QuantizedLayer]:
    """The layers of all families in a model, each once."""
    return (module for module in model.modules() if isinstance(module, QuantizedLayer))
