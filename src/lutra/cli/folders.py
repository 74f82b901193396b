"""Files in a folder, or in a folder for each class."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from lutra.errors import InputError


def files_of(folder: str, endings: Sequence[str]) -> tuple[list[tuple[Path, int]], list[str]]:
    """Files with certain endings in a folder and the folders in it.

    Args:
        folder: Holds files, or CLASS/files.
        endings: Of the names, in small letters, with the dot.

    Returns:
        Each file with the place of its folder among the classes, 0 for those beside the folders;
        and the classes, which are the names of the folders that hold such files, in the order of
        the alphabet, or of the numbers where all of them are numbers.

    Raises:
        InputError: If the folder cannot be read.
    """
    root = Path(folder)
    try:
        folders = _in_order(entry.name for entry in os.scandir(root) if entry.is_dir())
        held = {name: _matching(root / name, endings) for name in folders}
        beside = _matching(root, endings)
    except OSError as error:
        raise InputError(f"cannot read {folder!r}: {error.strerror}; give a folder") from error
    classes = [name for name in folders if held[name]]
    found = [(path, place) for place, name in enumerate(classes) for path in held[name]]
    return [*found, *((path, 0) for path in beside)], classes


def _in_order(names: Iterable[str]) -> list[str]:
    """Names of folders, sorted: "2" is in front of "10" where all are numbers."""
    found = sorted(names)
    if all(name.isascii() and name.isdigit() for name in found):
        found.sort(key=int)
    return found


def _matching(folder: Path, endings: Sequence[str]) -> list[Path]:
    return sorted(
        path for path in folder.iterdir() if path.suffix.lower() in endings and path.is_file()
    )
