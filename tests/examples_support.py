"""Finds the real data that some tests need."""

from __future__ import annotations

import os
from pathlib import Path

ROOT = Path(__file__).parents[1]
DATA = Path(os.environ.get("LUTRA_TEST_DATA", ROOT.parent / "shared" / "data"))
