"""Puts the page together: a folder for any static server.

    python examples/web/build.py DIGITS.lutra FOLDER

`make wasm` makes lutra.wasm, `make demo` the digits (build/digits.lutra); `make web` does it all.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path
from typing import Final

from lutra import load_graph, save_compiled

_HERE: Final = Path(__file__).resolve().parent
_ROOT: Final = _HERE.parents[1]


def build(digits: Path, folder: Path) -> None:
    """Copies the page and lutra, and compiles the models."""
    (folder / "models").mkdir(parents=True, exist_ok=True)
    for name in ("index.html", "style.css", "page.js", "audio.js", "digits.js"):
        shutil.copy(_HERE / name, folder / name)
    for name in ("lutra.js", "lutra.wasm", "lutra_dot.wasm"):
        shutil.copy(_ROOT / "js" / name, folder / name)
    save_compiled(load_graph(digits), folder / "models" / "digits.lutrac")
    keywords = load_graph(_ROOT / "zoo" / "dscnn_speech_commands.lutra")
    save_compiled(keywords, folder / "models" / "keywords.lutrac")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("digits", type=Path)
    parser.add_argument("folder", type=Path)
    options = parser.parse_args()
    build(options.digits, options.folder)
