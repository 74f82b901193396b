"""Builds a `torch.fx` module call by call, and knows the shape of every value while it does.

Every call is run on fake tensors whose dynamic sizes are symbols. So an importer sees at once which
sizes are fixed; arithmetic with sizes stays arithmetic with Python numbers; and what computes with
constants only is computed right away.
"""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final, TypeAlias

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import (
    DimDynamic,
    ShapeEnv,
    StatelessSymbolicContext,
    statically_known_true,
)

from lutra.errors import LutraError

SYMBOLIC: Final = (torch.SymInt, torch.SymFloat, torch.SymBool)
#: A constant may have so many elements. Files of a few bytes can ask for any number.
MAX_CONSTANT: Final = 1 << 27
_RESERVED: Final = {"self", "torch", "operator", "math", "inf", "nan"}


class Refusal(LutraError):
    """Something of a model that cannot be imported: one reason, without its place."""


@dataclass(frozen=True)
class Numbers:
    """A tensor of one axis or none, whose entries are numbers or sizes known at run time only.

    Attributes:
        items: Python numbers, and fx nodes that compute one.
        dtype: Of the tensor.
        scalar: Whether the tensor has no axis.
    """

    items: tuple[Any, ...]
    dtype: torch.dtype
    scalar: bool = False

    @property
    def ndim(self) -> int:
        """Axes of the tensor."""
        return 0 if self.scalar else 1


#: A constant, a value of the module, or numbers.
Value: TypeAlias = Tensor | fx.Node | Numbers


class Builder:
    """The module so far."""

    def __init__(self) -> None:
        self.root = nn.Module()
        self.graph = fx.Graph()
        self.shape_env = ShapeEnv(specialize_zero_one=True, duck_shape=True)
        self.fake_mode = FakeTensorMode(shape_env=self.shape_env, allow_non_fake_inputs=True)
        self._buffers: dict[int, tuple[Tensor, fx.Node]] = {}
        self._constant_names: dict[int, str] = {}
        self._taken: set[str] = set()
        self._paths: set[str] = set()
        self._at = ""

    # ---- inputs and outputs ---------------------------------------------------------------------

    def input(
        self, name: str, shape: Sequence[int], dynamic: Sequence[int], dtype: torch.dtype
    ) -> fx.Node:
        """Adds an argument of `forward`.

        Args:
            shape: An example of its shape. Dynamic sizes that are equal are taken for one.
            dynamic: The axes that may have any size.
        """
        node = self.graph.create_node("placeholder", self._new_name(name))
        context: Any = StatelessSymbolicContext(
            dynamic_sizes=[
                DimDynamic.DUCK if axis in dynamic else DimDynamic.STATIC
                for axis in range(len(shape))
            ]
        )
        if math.prod(shape) > MAX_CONSTANT:
            raise Refusal(
                f"the input {name!r} of shape {tuple(shape)} has more than {MAX_CONSTANT} entries"
            )
        example = torch.zeros(tuple(shape), dtype=dtype)
        fake = self.fake_mode.from_tensor(example, symbolic_context=context)
        node.meta["val"] = fake
        return node

    def finish(self, outputs: Sequence[Value]) -> fx.GraphModule:
        """Returns the module, which gives one tensor, or a tuple of several."""
        nodes = [self.node_of(value) for value in outputs]
        self.graph.output(nodes[0] if len(nodes) == 1 else tuple(nodes))
        self.root.eval()
        module = fx.GraphModule(self.root, self.graph)
        module.graph.eliminate_dead_code()
        module.delete_all_unused_submodules()
        module.graph.lint()
        module.recompile()
        for node in module.graph.nodes:
            node.meta.clear()
        return module.eval()

    # ---- calls ----------------------------------------------------------------------------------

    @contextmanager
    def named(self, name: str) -> Iterator[None]:
        """What is called inside gets names that begin like this."""
        before, self._at = self._at, name
        try:
            yield
        finally:
            self._at = before

    def call(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Calls a function, now if all arguments are constants.

        Args:
            function: Of torch, or of Python on numbers.
            args, kwargs: Values, numbers, and lists, tuples and slices of them.

        Returns:
            A tensor or a number where it is known, a node otherwise; of a function with several
            results a tuple of them.
        """
        given = fx.node.map_aggregate((args, kwargs), self._plain)
        if not _nodes(given):
            return self._constant(function, given)
        return self._emit("call_function", function, given, lambda a, k: function(*a, **k))

    def call_like(
        self, sketch: Callable[..., Any], function: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> Any:
        """The same for a function that takes symbols of sizes for numbers.

        Args:
            sketch: Returns what the function would, in shape and dtype.
        """
        given = fx.node.map_aggregate((args, kwargs), self._plain)
        if not _nodes(given):
            return self._constant(function, given)
        return self._emit("call_function", function, given, lambda a, k: sketch(*a, **k))

    def method(self, name: str, *args: Any) -> Any:
        """Calls a method of the first argument, which is no constant."""
        given: Any = fx.node.map_aggregate((args, {}), self._plain)
        return self._emit("call_method", name, given, lambda a, k: getattr(a[0], name)(*a[1:], **k))

    def module(
        self, path: str, module: nn.Module, *args: Any, sketch: Callable[..., Any] | None = None
    ) -> Any:
        """Calls a module, which becomes a submodule.

        Args:
            path: Where, with dots between the modules; another one where it is taken.
            module: The module.
            args: What it is called on: values, and tuples of them.
            sketch: Returns what the module would, in shape and dtype, where it cannot itself for
                sizes that are symbols.
        """
        for parameter in module.parameters():
            parameter.requires_grad_(parameter.is_floating_point())
        module.eval()
        given: Any = fx.node.map_aggregate(
            args, lambda x: self.node_of(x) if isinstance(x, (Tensor, Numbers)) else x
        )
        path = self._new_path(path)
        self._put(path, module)
        return self._emit("call_module", path, (given, {}), lambda a, k: (sketch or module)(*a))

    def _emit(self, kind: str, target: Any, given: Any, run: Callable[..., Any]) -> Any:
        values = fx.node.map_aggregate(
            given, lambda x: x.meta["val"] if isinstance(x, fx.Node) else x
        )
        with self.fake_mode, torch.no_grad():
            value = run(*values)
        value = _known(value)
        if isinstance(value, (int, float, bool)):
            return value
        args, kwargs = fx.node.map_aggregate(
            given, lambda x: self._buffer(x) if isinstance(x, Tensor) else x
        )
        name = self._new_name(self._at or getattr(target, "__name__", str(target)))
        node = self.graph.create_node(kind, target, args, kwargs, name=name)
        node.meta["val"] = value
        if isinstance(value, (tuple, list)):
            return tuple(
                self._emit(
                    "call_function", operator.getitem, ((node, i), {}), lambda a, k: a[0][a[1]]
                )
                for i in range(len(value))
            )
        return node

    def _constant(self, function: Callable[..., Any], given: Any) -> Any:
        args, kwargs = given
        with torch.no_grad():
            try:  # what it would take
                with self.fake_mode:
                    sketch = function(*args, **kwargs)
            except Exception:  # it looks at values
                sketch = None
            size = max((x.numel() for x in _leaves(sketch) if isinstance(x, Tensor)), default=0)
            if size > MAX_CONSTANT:
                raise Refusal(
                    f"it makes a constant of {int(size)} elements, and {MAX_CONSTANT} are allowed"
                )
            return function(*args, **kwargs)

    def _plain(self, x: Any) -> Any:
        """An argument of a call: `Numbers` become a tensor."""
        return self.tensor(x) if isinstance(x, Numbers) else x

    # ---- values ---------------------------------------------------------------------------------

    def name_constant(self, tensor: Tensor, name: str) -> None:
        """Says how a constant is called, should it become a buffer."""
        self._constant_names.setdefault(id(tensor), name)

    def name_of_constant(self, tensor: Tensor) -> str | None:
        """The name that a constant was given."""
        return self._constant_names.get(id(tensor))

    def tensor(self, value: Value) -> Tensor | fx.Node:
        """A value as a tensor: `Numbers` become one."""
        if not isinstance(value, Numbers):
            return value
        if not _nodes(value.items):
            made = torch.tensor(value.items, dtype=value.dtype)
            return made.reshape(()) if value.scalar else made
        scalars = [self.call(torch.scalar_tensor, x, dtype=value.dtype) for x in value.items]
        made_: Tensor | fx.Node = scalars[0] if value.scalar else self.call(torch.stack, scalars)
        return made_

    def node_of(self, value: Value) -> fx.Node:
        """A value as a node: constants become buffers."""
        made = self.tensor(value)
        return self._buffer(made) if isinstance(made, Tensor) else made

    def shape(self, value: Value) -> tuple[Any, ...]:
        """The shape: numbers, and nodes for those sizes that are known at run time only."""
        if isinstance(value, Numbers):
            return () if value.scalar else (len(value.items),)
        if isinstance(value, Tensor):
            return tuple(value.shape)
        return tuple(self.size(value, axis) for axis in range(self.ndim(value)))

    def size(self, value: Value, axis: int) -> Any:
        """One size."""
        if not isinstance(value, fx.Node):
            return self.shape(value)[axis]
        known = _known(value.meta["val"].shape[axis])
        if not isinstance(known, torch.SymInt):
            return known
        key = f"size {axis}"
        if key not in value.meta:
            with self.named(f"{value.name}_size"):
                value.meta[key] = self.method("size", value, axis)
        return value.meta[key]

    def sizes(self, value: Value) -> tuple[int | None, ...]:
        """The shape with None for those sizes that are known at run time only."""
        if not isinstance(value, fx.Node):
            return tuple(self.shape(value))
        return tuple(
            None if isinstance(size, torch.SymInt) else size
            for size in map(_known, value.meta["val"].shape)
        )

    def example_shape(self, value: fx.Node) -> tuple[Any, ...]:
        """The shape in symbols."""
        return tuple(value.meta["val"].shape)

    def ndim(self, value: Value) -> int:
        """Axes of a value."""
        return int(value.meta["val"].ndim if isinstance(value, fx.Node) else value.ndim)

    def dtype(self, value: Value) -> torch.dtype:
        """The dtype of a value."""
        made: torch.dtype = value.meta["val"].dtype if isinstance(value, fx.Node) else value.dtype
        return made

    # ---- names ----------------------------------------------------------------------------------

    def _buffer(self, tensor: Tensor) -> fx.Node:
        known = self._buffers.get(id(tensor))
        if known is not None:
            return known[1]
        path = self._new_path(self._constant_names.get(id(tensor), "constant"), flat=True)
        stored = tensor.detach().clone().contiguous()
        self.root.register_buffer(path, stored)
        first = next(iter(self.graph.nodes), None)
        with self.graph.inserting_after(self._last_placeholder()) if first else _nothing():
            node = self.graph.create_node("get_attr", path, name=self._new_name(path))
        node.meta["val"] = self.fake_mode.from_tensor(stored, static_shapes=True)
        self._buffers[id(tensor)] = (tensor, node)
        return node

    def _last_placeholder(self) -> Any:
        last: Any = None
        for node in self.graph.nodes:
            if node.op in ("placeholder", "get_attr"):
                last = node
            else:
                break
        return last

    def _new_name(self, wanted: str) -> str:
        name = identifier(wanted)
        return _unique(name, self._taken)

    def _new_path(self, wanted: str, flat: bool = False) -> str:
        parts = [identifier(part, digits=True) for part in wanted.split(".") if part]
        path = ("_" if flat else ".").join(parts) or "layer"
        inside = any(path.startswith(other + ".") for other in self._paths)
        around = any(other.startswith(path + ".") for other in self._paths)
        if flat or inside or around:
            path = identifier(path.replace(".", "_"))
        return _unique(path, self._paths)

    def _put(self, path: str, module: nn.Module) -> None:
        *parents, name = path.split(".")
        place = self.root
        for parent in parents:
            if parent not in place._modules:
                place.add_module(parent, nn.Module())
            child = place._modules[parent]
            assert child is not None
            place = child
        place.add_module(name, module)


def identifier(text: str, digits: bool = False) -> str:
    """A name of Python that resembles a text; with `digits` it may begin with one."""
    name = re.sub(r"\W+", "_", text, flags=re.ASCII).strip("_") or "value"
    if name[0].isdigit() and not digits:
        name = f"_{name}"
    return f"{name}_" if name in _RESERVED or name in dir(nn.Module) else name


def _unique(name: str, taken: set[str]) -> str:
    made, count = name, 0
    while made in taken:
        count += 1
        made = f"{name}_{count}"
    taken.add(made)
    return made


def _known(value: Any) -> Any:
    """A symbolic number as a number, where it can only be one."""
    if isinstance(value, torch.SymBool):
        if statically_known_true(value):
            return True
        negated: Any = torch.sym_not  # it has no types
        return False if statically_known_true(negated(value)) else value
    if isinstance(value, (torch.SymInt, torch.SymFloat)):
        expression = value.node.expr
        if expression.is_number:
            return int(expression) if isinstance(value, torch.SymInt) else float(expression)
    return value


def _leaves(value: Any) -> list[Any]:
    found: list[Any] = []
    fx.node.map_aggregate(value, found.append)
    return found


def _nodes(value: Any) -> list[fx.Node]:
    return [leaf for leaf in _leaves(value) if isinstance(leaf, fx.Node)]


@contextmanager
def _nothing() -> Iterator[None]:
    yield
