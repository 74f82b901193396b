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


pytestmark = pytest.mark.slow


def counts(folder: Path, seconds: str) -> tuple[int, int, int]:
    """How many files were refused, opened, and run."""
    program = c_library.build(
        c_library.ROOT / "build" / "fuzz-test", c_library.FUZZ, "fuzz_mutations"
    )
    text = c_library.command(str(program / "fuzz_mutations"), str(folder), seconds)
    found = re.fullmatch(r"(\d+) refused, (\d+) opened, (\d+) ran\n", text)
    assert found, text
    return int(found[1]), int(found[2]), int(found[3])


def test_changed_files(tmp_path: Path) -> None:
    number = fuzz_corpus.write(tmp_path / "corpus", fuzz_corpus.corpus())
    refused, _, ran = counts(tmp_path / "corpus", "0")
    assert refused == 0
    assert ran > 0.9 * number  # a decoder does not take any numbers
    refused, _, ran = counts(tmp_path / "corpus", SECONDS)
    # Changes that nothing refuses are what may do harm.
    assert refused > 0
    assert ran > 0


def test_wrong_steps(tmp_path: Path) -> None:
    number = fuzz_corpus.write(tmp_path / "wrong", fuzz_corpus.wrong(1000))
    refused, opened, ran = counts(tmp_path / "wrong", "0")
    assert refused + opened + ran == number
    assert refused > number // 10
    assert ran > number // 10
