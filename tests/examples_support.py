"""Makes the folder of the examples importable, and finds the real data that some tests need."""

from __future__ import annotations

import os
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"
DATA = Path(os.environ.get("LUTRA_TEST_DATA", ROOT.parent / "shared" / "data"))

if str(EXAMPLES) not in sys.path:
    sys.path.append(str(EXAMPLES))
