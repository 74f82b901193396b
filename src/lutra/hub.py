"""Files of models in a local folder or in a repository of the Hugging Face hub."""

from __future__ import annotations

import importlib
import os
import re
from pathlib import Path
from typing import Any, Final

from lutra.errors import InputError, LutraError

#: The file that the engine runs.
MODEL: Final = "model.lutra"
#: A name of the hub: `name` or `owner/name`.
_REPOSITORY: Final = re.compile(r"[\w.-]+(/[\w.-]+)?")


def find_file(
    where: str | os.PathLike[str],
    name: str,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
) -> Path:
    """The path of a file in a folder, or of one that is fetched from a repository.

    Args:
        where: A folder, or the name of a repository of the Hugging Face hub (`owner/name`), for
            which the package `huggingface_hub` is needed. A folder of the name comes first.
        name: Of the file.
        revision: Branch, tag or commit of the repository; None is its main branch.
        token: Of the hub, for private repositories; None takes what is logged in.
        cache_dir: Where fetched files are kept; None takes the cache of `huggingface_hub`.

    Returns:
        The path of the file.

    Raises:
        InputError: There is neither such a folder nor a name of a repository, or the file is
            missing.
        LutraError: `huggingface_hub` is not installed, or the file cannot be fetched.
    """
    folder = Path(where)
    if folder.is_dir():
        if (folder / name).is_file():
            return folder / name
        held = ", ".join(sorted(entry.name for entry in folder.iterdir())[:8]) or "nothing"
        raise InputError(
            f"{os.fspath(where)!r} has no file {name!r}, only {held}; give a folder that "
            "lutra.train.save_pretrained wrote"
        )
    repository = os.fspath(where)
    if not _REPOSITORY.fullmatch(repository) or ".." in repository:
        raise InputError(
            f"{repository!r} is neither a folder nor the name of a repository; give a folder that "
            "lutra.train.save_pretrained wrote, or owner/name"
        )
    return _fetched(repository, name, revision, token, cache_dir)


def need_hub(what: str) -> Any:
    """The module `huggingface_hub`.

    Args:
        what: that needs it, for the error.

    Raises:
        LutraError: It is not installed.
    """
    try:
        return importlib.import_module("huggingface_hub")
    except ModuleNotFoundError as error:
        raise LutraError(
            f"{what} needs huggingface_hub, which is not installed; install it with pip install "
            "'lutra[hub]'"
        ) from error


def _fetched(
    repository: str,
    name: str,
    revision: str | None,
    token: str | bool | None,
    cache_dir: str | os.PathLike[str] | None,
) -> Path:
    hub = need_hub(f"{repository!r} is no folder, and a repository of the hub")
    try:
        return Path(
            hub.hf_hub_download(
                repository, name, revision=revision, token=token, cache_dir=cache_dir
            )
        )
    except Exception as error:  # of the network, of HTTP, of names, of the disk
        reason = " ".join(str(error).split())[:300]
        raise LutraError(
            f"cannot fetch {name!r} of the repository {repository!r}: {type(error).__name__}: "
            f"{reason}; check the name, the network and the token, or give a local folder"
        ) from error
