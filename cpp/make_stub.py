"""Writes src/lutra/_engine.pyi, the types of the native engine: ``python cpp/make_stub.py``.

Needs nanobind and the built package.
"""

from __future__ import annotations

import re
from pathlib import Path

STUB = Path(__file__).parents[1] / "src" / "lutra" / "_engine.pyi"


def stub_text() -> str:
    """The stub of the extension as it is installed now."""
    from nanobind.stubgen import StubGen

    import lutra._engine

    generator = StubGen(lutra._engine, quiet=True)
    generator.put(lutra._engine)
    text: str = generator.get()
    # mypy wants to know what is in a list, and nobody wants to read the layout of every array.
    text = re.sub(r"Annotated\[(NDArray\[numpy\.\w+\]), dict\([^[\]]*\)\]", r"\1", text)
    text = re.sub(r"Annotated\[NDArray, dict\([^[\]]*\)\]", "NDArray[numpy.generic]", text)
    text = text.replace("-> list:", "-> list[NDArray[numpy.float32]]:")
    text = text.replace("from typing import Annotated\n", "")
    text = re.sub(r"\n{3,}", "\n\n", text)
    text = re.sub(r"^( +.*: \.\.\.)\n\n(?= )", r"\1\n", text, flags=re.M)
    text = re.sub(r"^(def .*: \.\.\.)\n\n(?=def)", r"\1\n", text, flags=re.M)
    return text.rstrip() + "\n"


if __name__ == "__main__":
    STUB.write_text(stub_text())
