"""Changed files do the C library no harm. ``make fuzz`` tries for longer, and with libFuzzer."""

from __future__ import annotations

import os
import re
from pathlib import Path

import c_library
import fuzz_corpus
import pytest

#: Of changed files.
SECONDS = os.environ.get("LUTRA_FUZZ_SECONDS", "10")


@pytest.mark.slow
def test_changed_files(tmp_path: Path) -> None:
    folder = c_library.build(
        c_library.ROOT / "build" / "fuzz-test", c_library.FUZZ, "fuzz_mutations"
    )
    assert fuzz_corpus.write(tmp_path / "corpus") > 100
    text = c_library.command(str(folder / "fuzz_mutations"), str(tmp_path / "corpus"), SECONDS)
    counts = re.fullmatch(r"(\d+) refused, (\d+) opened, (\d+) ran\n", text)
    assert counts, text
    # Changes that nothing refuses are what may do harm.
    assert int(counts[1]) > 0
    assert int(counts[3]) > 0
