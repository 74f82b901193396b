"""Files that are written whole or not at all."""

from __future__ import annotations

import contextlib
import os
import secrets
from pathlib import Path


def write_whole(target: Path, data: bytes) -> None:
    """Writes to a new file next to the target, then gives it the name of the target.

    Raises:
        OSError: If it cannot be written; then the target is as it was, and nothing is left behind.
    """
    temporary = target.with_name(f".{target.name[:200]}.{secrets.token_hex(8)}.tmp")
    # Not tempfile: its files are private, and a result is as public as the umask says.
    binary: int = getattr(os, "O_BINARY", 0)  # without it Windows changes ends of lines
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | binary, 0o666)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
