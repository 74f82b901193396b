"""``lutra compile``: a file for programs without Python."""

from __future__ import annotations

import argparse
from pathlib import Path

from lutra.cli.common import add_file, bytes_text, check_writable, plain
from lutra.format import load_graph
from lutra.runtime.compiled import save_compiled


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of the command."""
    add_file(parser)
    parser.add_argument(
        "-o",
        "--output",
        metavar="OUT.lutrac",
        help="the compiled model, which the C library reads (default: FILE with .lutrac)",
    )


def run(args: argparse.Namespace) -> int:
    """Runs the command."""
    graph = load_graph(args.file)
    output = args.output or str(Path(args.file).with_suffix(".lutrac"))
    check_writable(output)
    save_compiled(graph, output)
    print(f"wrote {plain(output)}, {bytes_text(Path(output).stat().st_size)}")
    return 0
