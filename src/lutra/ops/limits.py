"""Every limit of the operators, once. The engine has the same: ``lutra._engine.limits()``."""

from __future__ import annotations

from typing import Final
