"""Passes through a traced model that begin where the last one found something that may change.

Sequential calibration runs the converted model once for each layer. A model of many small operators
that no modules hold, as imported files are, would compute all operators in front of the layer again
in each pass. Here a pass goes on from the values that are alive at the first layer that is not
fitted yet, so that all passes together compute about as much as one.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any, Final

from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

#: Modules of these packages are functions of their input, in eval mode.
_PURE: Final = ("torch.nn.", "lutra.")


def is_pure(model: nn.Module) -> bool:
    """Whether a model is a traced graph of functions whose results can be kept."""
    return isinstance(model, fx.GraphModule) and all(
        type(module).__module__.startswith(_PURE)
        for module in model.modules()
        if module is not model and type(module) is not nn.Module
    )


@dataclass
class _Stop:
    """Where passes on a batch begin.

    Attributes:
        place: of the next operator.
        values: that are alive there, by the names of the operators that made them.
        versions: of the tensors among them, which count the writes into them.
        bytes: that they take.
    """

    place: int
    values: dict[str, Any]
    versions: list[int]
    bytes: int


class Prefix:
    """Keeps the values at the first layer that may change, for each batch.

    Args:
        memory_bytes: that the values of all batches may take; batches beyond begin at the front.
    """

    def __init__(self, memory_bytes: int) -> None:
        self._left = memory_bytes
        self._stops: dict[int, _Stop] = {}
        self._written: set[int] = set()  # batches whose values an operator writes into

    def instead_of(
        self, model: fx.GraphModule, pending: Collection[str], batch: Callable[[], int]
    ) -> Callable[..., Any]:
        """What takes the place of the model's `forward`.

        Args:
            model: that `is_pure` is true of.
            pending: paths of the layers that will change still.
            batch: the number of the batch that runs.
        """
        nodes = list(model.graph.nodes)
        last: dict[fx.Node, fx.Node] = {}
        for node in nodes:
            for source in node.all_input_nodes:
                last[source] = node
        dead: dict[fx.Node, list[str]] = {}
        for source, reader in last.items():
            dead.setdefault(reader, []).append(source.name)
        first = _first_place(model, nodes, pending)
        by_name = {node.name: node for node in nodes}

        def call(*args: Any, **kwargs: Any) -> Any:
            number = batch()
            run = fx.Interpreter(model, garbage_collect_values=False)
            run.args_iter = iter(_arguments(model, args, kwargs))
            start = self._start(number)
            values = dict(start.values) if start is not None else {}
            run.env = {by_name[name]: value for name, value in values.items()}
            for place in range(0 if start is None else start.place, len(nodes)):
                node = nodes[place]
                if place == first:
                    self._keep(number, place, {n.name: value for n, value in run.env.items()})
                run.env[node] = made = run.run_node(node)
                if node.op == "output":
                    return made
                for name in dead.get(node, ()):
                    del run.env[by_name[name]]
                if node not in last:
                    del run.env[node]
            raise AssertionError("a graph without an output")

        return call

    def _start(self, batch: int) -> _Stop | None:
        """Where a pass on a batch begins; None for the front."""
        stop = self._stops.get(batch)
        if stop is None:
            return None
        if [tensor._version for tensor in tensors_of(stop.values)] == stop.versions:
            return stop
        self._drop(batch)
        self._written.add(batch)
        return None

    def _keep(self, batch: int, place: int, values: dict[str, Any]) -> None:
        """Remembers where the next pass on a batch begins, if there is room."""
        tensors = tensors_of(values)
        if batch in self._written or any(tensor.is_inference() for tensor in tensors):
            return
        self._drop(batch)
        size = bytes_of(values)
        if size <= self._left:
            self._left -= size
            versions = [tensor._version for tensor in tensors]
            self._stops[batch] = _Stop(place, values, versions, size)

    def _drop(self, batch: int) -> None:
        stop = self._stops.pop(batch, None)
        if stop is not None:
            self._left += stop.bytes


def _first_place(model: nn.Module, nodes: list[fx.Node], pending: Collection[str]) -> int | None:
    """The first operator that calls, or reads a parameter of, a layer that may change."""
    for place, node in enumerate(nodes):
        if node.op in ("call_module", "get_attr"):
            target = str(node.target)
            if any(
                target == name or target.startswith(f"{name}.") or name.startswith(f"{target}.")
                for name in pending
            ):
                return place
    return None


def _arguments(model: fx.GraphModule, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
    """All arguments in the order of the placeholders, as far as they are given."""
    names = [str(node.target) for node in model.graph.nodes if node.op == "placeholder"]
    named = [kwargs[name] for name in names[len(args) :] if name in kwargs]
    return [*args, *named]


def tensors_of(value: Any) -> list[Tensor]:
    """The tensors of any structure."""
    return [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor)]


def bytes_of(value: Any) -> int:
    """What the tensors of any structure take."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors_of(value))
