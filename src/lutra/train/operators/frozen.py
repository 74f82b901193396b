"""One PyTorch operator for every layer that computes in integers: `lutra::frozen`.

`torch.export` keeps such a layer as one node, whatever its family is. The operator takes the input,
the tensors of the layer and a text that says which operator of the graph it is.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TypeAlias, TypeVar

import torch
from torch import Tensor

from lutra.errors import LutraError
from lutra.node import AttrValue, Node, Value
from lutra.ops import OpSpec, op_spec
from lutra.train.geometry import Geometry
from lutra.train.operators import native


@dataclass(frozen=True)
class FrozenNode:
    """A layer as one node of a graph, without its tensors.

    Attributes:
        op: name of the operator, see `lutra.ops`.
        attrs: all its attributes.
        roles: the role of each tensor, in the order in which they are given.
    """

    op: str
    attrs: Mapping[str, AttrValue]
    roles: tuple[str, ...]

    @property
    def spec(self) -> OpSpec:
        """The rules of the operator."""
        return op_spec(self.op, "a frozen layer")

    @property
    def is_linear(self) -> bool:
        """Whether it works along the last axis of its input, and not on images."""
        return self.spec.output_axis == -1

    def to_json(self) -> str:
        """The text that `lutra::frozen` takes: equal nodes have equal texts."""
        entries = {"op": self.op, "attrs": dict(self.attrs), "roles": self.roles}
        return json.dumps(entries, sort_keys=True, separators=(",", ":"))

    @classmethod
    @lru_cache(maxsize=4096)
    def from_json(cls, text: str) -> FrozenNode:
        """The inverse of `to_json`."""
        entries = json.loads(text)
        attrs = {k: tuple(v) if isinstance(v, list) else v for k, v in entries["attrs"].items()}
        return cls(entries["op"], attrs, tuple(entries["roles"]))

    def output_shape(self, shape: Sequence[int], tensors: Sequence[Tensor]) -> tuple[int, ...]:
        """The shape of the output for an input of some shape.

        Raises:
            GraphError: the input does not fit.
        """
        node = Node(self.op, self.op, ("x",), "y", self.attrs)
        value = Value("x", "float32", tuple(shape))
        arrays = dict(zip(self.roles, tensors, strict=True))
        made = self.spec.infer(node, [value], arrays)  # type: ignore[arg-type]  # reads shapes only
        return made.shape  # type: ignore[return-value]  # every size of the input is known


#: `kernel(x, node, tensors)` gives y (N, M, H', W') of x (N, C, H, W) float32. A linear layer is
#: one whose images have one pixel.
FrozenKernel: TypeAlias = Callable[[Tensor, FrozenNode, Mapping[str, Tensor]], Tensor]
_K = TypeVar("_K", bound=FrozenKernel)
_KERNELS: dict[str, FrozenKernel] = {}


def frozen_kernel(*ops: str) -> Callable[[_K], _K]:
    """Registers what `lutra::frozen` calls for some operators."""

    def register(kernel: _K) -> _K:
        for op in ops:
            if op in _KERNELS:
                raise LutraError(f"frozen_kernel: {op} has a kernel already; remove one of the two")
            _KERNELS[op] = kernel
        return kernel

    return register


def frozen_native(
    x: Tensor,
    node: FrozenNode,
    tensors: Mapping[str, Tensor],
    kernel: tuple[int, int] = (1, 1),
) -> Tensor:
    """The kernel of every operator of which the engine has a layer, on the CPU.

    The layer is packed once for as long as none of its tensors is replaced or written.

    Args:
        x: images (N, C, H, W).
        node: the layer.
        tensors: its tensors by role.
        kernel: height and width of the kernel, of operators without an attribute for it.
    """
    if x.device.type != "cpu":
        raise LutraError(
            f"lutra::frozen: the operator {node.op!r} has no kernel for {x.device.type}; move the "
            "model to the CPU, or register one with frozen_kernel"
        )
    geometry = Geometry.of_attrs(node.attrs, x.shape[1], kernel)
    shape = (x.shape[0], x.shape[1]) if node.is_linear else x.shape
    outputs = node.output_shape(shape, list(tensors.values()))[1]
    layer = native.cached(
        tuple(tensors.values()), node, lambda: native.make_layer(node.op, node.attrs, tensors)
    )
    return native.run(layer, geometry, x, outputs, None)


@torch.library.custom_op("lutra::frozen", mutates_args=())
def frozen(x: Tensor, tensors: Sequence[Tensor], node: str) -> Tensor:
    """A frozen layer of x: images (N, C, H, W), or rows (..., D) of a linear layer.

    Args:
        x: the input; it is computed with in float32.
        tensors: those of the layer, in the order of the roles of `node`.
        node: `FrozenNode.to_json()`.
    """
    parsed = FrozenNode.from_json(node)
    kernel = _KERNELS.get(parsed.op, frozen_native)
    roles = dict(zip(parsed.roles, tensors, strict=True))
    x = x.float()
    if not parsed.is_linear:
        return kernel(x, parsed, roles)
    y = kernel(x.reshape(-1, x.shape[-1])[:, :, None, None], parsed, roles)
    return y.reshape(*x.shape[:-1], y.shape[1]).contiguous()


@frozen.register_fake
def _(x: Tensor, tensors: Sequence[Tensor], node: str) -> Tensor:
    parsed = FrozenNode.from_json(node)
    shape = parsed.output_shape(x.shape, tensors)
    if parsed.is_linear:
        return x.new_empty(shape, dtype=torch.float32)
    return native.empty_output(x, *shape[1:])
