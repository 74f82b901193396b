"""The structure of a converted model as JSON values, and the same structure without calibration.

What conversion changes in a model can be read off the converted model: the layers with their
methods, the layers that share codebooks, the norms that evaluate as in a file, the function tables.
With that and the dense model the converted model is built again, with other values in its
parameters; its state dict then fits.
"""

from __future__ import annotations

import glob
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import torch
from torch import Tensor, nn

from lutra.errors import LutraError
from lutra.train.conversion.candidate import Candidate
from lutra.train.conversion.prepare import (
    PARENTS,
    leave_fast_path,
    prepare,
    replace_modules,
    wrapped_paths,
)
from lutra.train.conversion.speed_gate import attach, attached
from lutra.train.functions.structure import put_tables, tables_of
from lutra.train.layers.base import FrozenLayer, QuantizedLayer, families, family_of
from lutra.train.layers.dropin import copy_model, move_hooks
from lutra.train.layers.folded_norm import FoldedNorm, fold_behind
from lutra.train.layers.forms import form_of, is_parametrized
from lutra.train.layers.wrapper import Wrapper
from lutra.train.recipe import Int8, Method, recipe_from_json, recipe_to_json
from lutra.train.report import LayerReport

_WHERE: Final = "the structure of the converted model"


@dataclass(frozen=True)
class Structure:
    """What distinguishes a converted model from its dense one. All paths are those in the
    converted model.

    Attributes:
        layers: the method of every converted layer, by path.
        split: paths of modules whose dense layer is a part of its own: attentions, recurrent
            layers, transposed convolutions and layers with a forward of their own; and other names
            of them and of the layers.
        shared: layers that hold the codebooks of another one, whose path is the value.
        norms: batch norms that evaluate as in a file, and the layer in front of each.
        tables: function tables, as `lutra.train.functions.structure.tables_of` gives them.
        speed_gate: what the speed gate did, for the metadata of a file.
    """

    layers: Mapping[str, Method] = field(default_factory=dict)
    split: tuple[str, ...] = ()
    shared: Mapping[str, str] = field(default_factory=dict)
    norms: Mapping[str, str] = field(default_factory=dict)
    tables: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    speed_gate: Mapping[str, Any] | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            "layers": recipe_to_json(self.layers),
            "split": list(self.split),
            "shared": dict(self.shared),
            "norms": dict(self.norms),
            "tables": {path: dict(entry) for path, entry in self.tables.items()},
            "speed_gate": None if self.speed_gate is None else dict(self.speed_gate),
        }

    @classmethod
    def from_dict(cls, data: Any) -> Structure:
        """The inverse of `to_dict`.

        Raises:
            LutraError: other values.
        """
        if not isinstance(data, Mapping):
            raise LutraError(f"{_WHERE} is a {type(data).__name__}; it must be an object")
        split = data.get("split", [])
        maps = {name: data.get(name, {}) for name in ("layers", "shared", "norms", "tables")}
        gate = data.get("speed_gate")
        bad = [name for name, value in maps.items() if not isinstance(value, Mapping)]
        if not isinstance(split, list) or not all(isinstance(path, str) for path in split):
            bad.append("split")
        for name in ("shared", "norms"):
            if name not in bad and not all(isinstance(path, str) for path in maps[name].values()):
                bad.append(name)
        if "tables" not in bad and not all(isinstance(e, Mapping) for e in maps["tables"].values()):
            bad.append("tables")
        if gate is not None and not isinstance(gate, Mapping):
            bad.append("speed_gate")
        if bad:
            raise LutraError(
                f"{_WHERE} has no sound {bad[0]}: {data.get(bad[0])!r}; save the model again"
            )
        methods = recipe_from_json(maps["layers"])
        return cls(methods, tuple(split), maps["shared"], maps["norms"], maps["tables"], gate)


def structure_of(model: nn.Module) -> Structure:
    """The structure of a converted model; an empty one of a dense model.

    Raises:
        LutraError: its layers are frozen, and cannot be trained any more.
    """
    kinds = {kind: family for family in families() for kind in family.layers.values()}
    layers: dict[str, Method] = {}
    split: list[str] = []
    norms: dict[str, str] = {}
    paths = {module: path for path, module in reversed(list(model.named_modules()))}
    for path, module in model.named_modules():
        if isinstance(module, FrozenLayer):
            raise LutraError(
                f"layer '{path}' is frozen ({type(module).__name__}); give the model as convert "
                "and finetune return it"
            )
        family = kinds.get(type(module))
        if family is not None:
            layers[path] = getattr(module, "method", None) or family.method()
        if family is not None or isinstance(module, Wrapper):
            split += [name for name in wrapped_paths(model, path) if name not in split]
        if isinstance(module, PARENTS):
            split.append(path)
        if isinstance(module, FoldedNorm):
            norms[path] = paths[module.__dict__["_layer"]]
    return Structure(
        layers, tuple(dict.fromkeys(split)), _leaders(model, layers), norms, tables_of(model),
        attached(model),
    )  # fmt: skip


def _leaders(model: nn.Module, layers: Mapping[str, Method]) -> dict[str, str]:
    """For each layer that holds parameters of the codebooks of another the path of that one."""
    groups: dict[int, list[str]] = {}
    modules = {path: model.get_submodule(path) for path in layers}
    for path, layer in modules.items():
        if isinstance(layer, QuantizedLayer) and layer.sharing_key(layer.method) is not None:
            for name, parameter in layer.named_parameters(recurse=False):
                if name not in ("weight", "bias"):
                    groups.setdefault(id(parameter), []).append(path)
    found: dict[str, str] = {}
    for members in groups.values():
        followers = [path for path in members if getattr(modules[path], "follows", False)]
        leader = next((path for path in members if path not in followers), members[0])
        found.update({path: leader for path in members if path != leader})
    return found


def rebuild(dense: nn.Module, structure: Structure, state: Mapping[str, Tensor]) -> nn.Module:
    """Gives a copy of a dense model the structure of a converted one.

    Args:
        dense: the model that was converted, with any weights; it is not modified.
        structure: from `structure_of`.
        state: the tensors of the converted model by name. The caller loads them into the result;
            here they say which layers got a bias, and give tables of functions their size.

    Returns:
        A model whose state dict has the names and shapes of the converted one.

    Raises:
        LutraError: the structure does not fit the dense model.
    """
    names = {*structure.layers, *structure.split, *_folded(dense, state)}
    ready = prepare(dense, {glob.escape(name): Int8() for name in names}, _makes_layers)
    model = copy_model(dense) if ready.model is dense else ready.model
    made: dict[str, nn.Module] = {}
    for path, method in _leaders_first(structure):
        old = _submodule(model, path)
        leader = made.get(structure.shared.get(path, ""))
        made[path] = new = _layer(path, old, method, leader)
        if getattr(new, "bias", None) is None and f"{path}.bias".lstrip(".") in state:
            new.bias = nn.Parameter(torch.zeros_like(state[f"{path}.bias".lstrip(".")]))
        move_hooks(new, old)
        model = replace_modules(model, {old: new})
    for path, name in structure.norms.items():
        old, layer = _submodule(model, path), made.get(name)
        folded = fold_behind(old, layer) if isinstance(layer, QuantizedLayer) else None
        if folded is None:
            raise LutraError(
                f"the dense model has a {type(old).__name__} at '{path}', where the converted one "
                f"has a batch norm behind '{name}'; give the dense model that was converted"
            )
        move_hooks(folded, old)
        model = replace_modules(model, {old: folded})
    leave_fast_path(model)
    model = replace_modules(model, put_tables(model, structure.tables, state))
    if structure.speed_gate is not None:
        attach(model, structure.speed_gate)
    return model


def _makes_layers(method: Any) -> bool:
    return isinstance(method, Method) and family_of(method) is not None


def _folded(dense: nn.Module, state: Mapping[str, Tensor]) -> Iterable[str]:
    """The modules whose weights are computed, as by weight norm, and are plain in the state."""
    for path, module in dense.named_modules():
        if is_parametrized(module) and f"{path}.weight".lstrip(".") in state:
            yield path


def _leaders_first(structure: Structure) -> list[tuple[str, Method]]:
    """The layers, those that share codebooks of others behind all others."""
    return sorted(structure.layers.items(), key=lambda entry: entry[0] in structure.shared)


def _submodule(model: nn.Module, path: str) -> nn.Module:
    try:
        return model.get_submodule(path)
    except AttributeError:
        raise LutraError(
            f"the dense model has no module '{path}', which the converted one has; give the dense "
            "model that was converted"
        ) from None


def _layer(path: str, old: nn.Module, method: Method, leader: nn.Module | None) -> nn.Module:
    """A layer that is not calibrated, in the place of a dense one."""
    form, family = form_of(old), family_of(method)
    if form is None or family is None or form.dense not in family.layers:
        raise LutraError(
            f"the dense model has a {type(old).__name__} at '{path}', which cannot be "
            f"{method.name!r} as in the converted one; give the dense model that was converted"
        )
    candidate = Candidate(old, path, method, LayerReport(path, form.name, True, ""))
    if not candidate.is_calibrated:
        return candidate.embed()
    new = candidate.make(old)
    if leader is not None:
        key = new.sharing_key(method)
        if not isinstance(leader, QuantizedLayer) or key is None or leader.method != method:
            raise LutraError(
                f"layer '{path}' ({method.name}) cannot hold the codebooks of a "
                f"{type(leader).__name__} of other settings; save the model again"
            )
        new.share(leader)
    return new
