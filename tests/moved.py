"""What the tests of old module paths share."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping

#: Runs in another process with -W error or -W ignore: all names at all old paths.
_CODE = """
import importlib, json, pickle, sys, warnings
raises = sys.argv[1] == "raises"
import lutra
importlib.import_module(sys.argv[2])  # what installs the old paths
paths = json.loads(sys.stdin.read())
for old, (new, names) in paths.items():
    old_module, new_module = importlib.import_module(old), importlib.import_module(new)
    names = names or [n for n in dir(new_module) if not n.startswith("__")]
    assert names
    for name in names:
        if f"{old}.{name}" in paths:
            continue  # an old path of its own
        want = getattr(new_module, name)
        try:
            got = getattr(old_module, name)
        except DeprecationWarning as warning:
            assert raises and f"{old}.{name}" in str(warning), warning
            assert f"{new}.{name}" in str(warning), warning
            continue
        assert not raises, f"{old}.{name} does not warn"
        assert got is want, f"{old}.{name}"
        if isinstance(want, type) and want.__module__ == new:
            # GLOBAL of protocol 0: the class as a pickle of the last release names it
            assert pickle.loads(f"c{old}\\n{name}\\n.".encode()) is want
print("torch" in sys.modules)
"""


def check_old_paths(
    paths: Mapping[str, tuple[str, list[str] | None]], *, package: str, raises: bool
) -> bool:
    """Fetches everything at old paths, in a process of its own.

    Args:
        paths: Old path -> new path, and the names to fetch; None for all names of the new path.
        package: Imported first.
        raises: Whether warnings are errors there, and every name must raise one.

    Returns:
        Whether PyTorch was imported.
    """
    # Warnings of ours only: PyTorch has some too.
    filters = ["-W", "error:lutra.:DeprecationWarning" if raises else "ignore"]
    done = subprocess.run(
        [sys.executable, *filters, "-c", _CODE, "raises" if raises else "works", package],
        input=json.dumps(paths),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip() == "True"
