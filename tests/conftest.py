"""Without PyTorch the tests of the training side are left out; all others must run and pass."""

from __future__ import annotations

import gc
import os
from importlib.util import find_spec

from ci_skips import ENVIRONMENT, pytest_make_collect_report, pytest_runtest_makereport

__all__ = ["pytest_make_collect_report", "pytest_runtest_makereport"]

# Workers of pytest-xdist share the cores, so each has one thread. The libraries read this when they
# are imported, which is later.
if "PYTEST_XDIST_WORKER" in os.environ:
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ[name] = "1"

collect_ignore = [] if find_spec("torch") or os.environ.get(ENVIRONMENT) == "1" else ["train"]


def pytest_collection_finish() -> None:
    """What is imported and collected by now stays: later garbage collections pass it over."""
    gc.collect()
    gc.freeze()
