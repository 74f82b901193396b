"""Without PyTorch the tests of the training side are left out; all others must run and pass."""

from __future__ import annotations

from importlib.util import find_spec

collect_ignore = [] if find_spec("torch") else ["train"]
