"""`from_pretrained`: a converted model from a folder or a repository of the Hugging Face hub."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from safetensors import SafetensorError
from safetensors.torch import load_file, load_model
from torch import nn

from lutra.errors import LutraError
from lutra.hub import find_file
from lutra.train.conversion.structure import Structure, rebuild
from lutra.train.publishing import dense as sources

WEIGHTS: Final = "model.safetensors"
CONFIG: Final = "config.json"
#: Of config.json. Another number is of a version whose folders this one cannot read.
FORMAT: Final = 1


def from_pretrained(
    where: str | os.PathLike[str],
    model: sources.Dense | None = None,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
) -> nn.Module:
    """Builds a model again that `save_pretrained` wrote, ready to be trained or exported.

    Nothing in a folder is run as code: a model of a class of the caller needs that class.

    Args:
        where: the folder, or the name of a repository of the Hugging Face hub, `owner/name`, which
            needs `pip install 'lutra[hub]'`.
        model: the dense model that was converted, with any weights, or a function that returns it,
            such as its class. It is not modified. Folders of models of `transformers`, and those
            that hold a file of the dense model, need none.
        revision: branch, tag or commit of the repository.
        token: of the hub, for private repositories.
        cache_dir: where files of the hub are kept.

    Returns:
        The converted model in eval mode, with the parameters and buffers that were saved.

    Raises:
        InputError: there is no such folder, or the dense model is missing.
        LutraError: a file is damaged or of a newer version, or the dense model is another one than
            the model that was converted.
    """
    place = os.fspath(where)

    def find(name: str) -> Path:
        return find_file(where, name, revision=revision, token=token, cache_dir=cache_dir)

    config = _config(find(CONFIG), place)
    structure = Structure.from_dict(config.get("structure"))
    weights = find(WEIGHTS)
    named = str(config.get("model_class"))
    dense = sources.make(config.get("dense"), model, find, place, named)
    try:
        state = load_file(weights)
        made = rebuild(dense, structure, state)
        load_model(made, weights)
    except (OSError, SafetensorError) as error:
        raise LutraError(
            f"from_pretrained: cannot read {str(weights)!r} ({error}); fetch it again"
        ) from error
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:400]
        raise LutraError(
            f"from_pretrained: the weights in {place!r} do not fit the dense model, a "
            f"{type(dense).__name__} ({reason}); give the {named} that was converted"
        ) from error
    except LutraError as error:
        raise LutraError(f"from_pretrained: {place!r}: {error}") from error
    return made.eval()


def _config(path: Path, place: str) -> Mapping[str, Any]:
    """What stands in config.json.

    Raises:
        LutraError: it is damaged, of something else, or of a newer version.
    """
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise LutraError(
            f"from_pretrained: cannot read {CONFIG} of {place!r} ({error}); fetch it again"
        ) from error
    if not isinstance(config, dict) or "structure" not in config or "format" not in config:
        raise LutraError(
            f"from_pretrained: {CONFIG} of {place!r} is not of lutra.train.save_pretrained; give a "
            "folder that it wrote"
        )
    if config["format"] != FORMAT:
        raise LutraError(
            f"from_pretrained: {place!r} has the format {config['format']!r}, and this version of "
            f"lutra reads {FORMAT}; install a newer one"
        )
    return config
