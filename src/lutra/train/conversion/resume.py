"""A conversion that was stopped goes on: finished layers are kept in a folder."""

from __future__ import annotations

import hashlib
import io
import json
import os
import pickle
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lutra.atomic import write_whole
from lutra.errors import LutraError
from lutra.train.layers.base import QuantizedLayer

_SETTINGS = "conversion.json"


class FinishedLayers:
    """The layers that a conversion has fitted, one file each, written whole or not at all.

    Args:
        folder: is made where it is missing.
        settings: JSON values, everything that decides the result.

    Raises:
        LutraError: the folder cannot be used, or belongs to another conversion.
    """

    def __init__(self, folder: str | os.PathLike[str], settings: Mapping[str, Any]) -> None:
        self._folder = Path(folder)
        path, own = self._folder / _SETTINGS, json.loads(json.dumps(settings))
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            found = json.loads(path.read_text()) if path.exists() else None
            if found is None:
                write_whole(path, json.dumps(own, indent=1).encode())
        except (OSError, ValueError) as error:
            raise LutraError(
                f"convert: checkpoint={str(folder)!r} cannot be used ({error}); give a folder "
                "that can be written"
            ) from error
        if found is not None and found != own:
            known = found if isinstance(found, dict) else {}
            other = sorted(k for k in {*known, *own} if known.get(k) != own.get(k))
            raise LutraError(
                f"convert: checkpoint={str(folder)!r} belongs to a conversion with another "
                f"{', '.join(other)}; give another folder"
            )

    def _path(self, name: str) -> Path:
        return self._folder / f"{hashlib.sha256(name.encode()).hexdigest()[:24]}.pt"

    def load(self, name: str) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """State and report of a layer; None where it is not finished.

        Raises:
            LutraError: the file is damaged.
        """
        path = self._path(name)
        if not path.exists():
            return None
        try:
            saved = torch.load(path, map_location="cpu", weights_only=True)
            return saved["state"], saved["report"]
        except (OSError, RuntimeError, KeyError, EOFError, pickle.UnpicklingError) as error:
            raise LutraError(
                f"convert: '{path}' of layer '{name}' is damaged ({type(error).__name__}); "
                "delete it"
            ) from error

    def save(self, name: str, layer: QuantizedLayer, old: nn.Module, report: Any) -> None:
        """Keeps a layer that was fitted, and its fields of the report."""
        state = dict(layer.state_dict())
        if layer.weight is old.weight:  # it may be another module's as well
            del state["weight"]
        buffer = io.BytesIO()
        torch.save({"state": state, "report": dict(report)}, buffer)
        write_whole(self._path(name), buffer.getvalue())


@torch.no_grad()
def restore(layer: QuantizedLayer, state: Mapping[str, Tensor]) -> None:
    """Gives a layer, fresh from the dense one, the state of a fitted one."""
    device = layer.weight.device
    left = dict(state)
    bias, trained = layer.bias, layer.weight.requires_grad
    for name in ("weight", "bias"):
        value = left.pop(name, None)
        if value is not None:
            own = trained if name == "weight" or bias is None else bias.requires_grad
            setattr(layer, name, nn.Parameter(value.to(device), requires_grad=own))
    for name, tensor in (*layer.named_parameters(), *layer.named_buffers()):
        if name in left:
            tensor.copy_(left.pop(name))
    layer.forget_frozen()


def digest(*values: Any) -> str:
    """A digest of tensors in any structure, and of what else has a `repr`."""
    total = hashlib.sha256()
    for part in _parts(values):
        total.update(part)
    return total.hexdigest()[:32]


def _parts(value: Any) -> Iterator[bytes]:
    if isinstance(value, Tensor):
        yield repr((tuple(value.shape), value.dtype)).encode()
        yield value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
    elif isinstance(value, Mapping):
        for name in value:
            yield repr(name).encode()
            yield from _parts(value[name])
    elif isinstance(value, tuple | list):
        for entry in value:
            yield from _parts(entry)
    else:
        yield repr(value).encode()
