"""``lutra report``: a page about a file."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Final

from lutra.cli.common import (
    UserError,
    add_engine,
    add_file,
    add_shape,
    at_least,
    check_writable,
    new_session,
    plain,
    read_sizes,
)
from lutra.format import load_graph
from lutra.reporting.page import need_packages, page, write_page

_RUNS: Final = 20


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of the command."""
    add_file(parser)
    parser.add_argument(
        "-o", "--output", metavar="OUT.html", help="the page (default: FILE with .html)"
    )
    add_shape(parser, "to measure with")
    parser.add_argument(
        "--runs", type=at_least(1), default=_RUNS, metavar="N", help=f"default: {_RUNS}"
    )
    add_engine(parser)


def run(args: argparse.Namespace) -> int:
    """Runs the command."""
    need_packages()
    graph = load_graph(args.file)
    output = args.output or str(Path(args.file).with_suffix(".html"))
    check_writable(output)
    sizes = read_sizes(args.shape, graph)
    if sizes is None and graph.nominal_sizes() is None:
        raise UserError(
            f"{args.file!r} takes inputs of any size and holds no golden data; give --shape"
        )
    profile = new_session(graph, args.threads, args.isa).profile(sizes=sizes, runs=args.runs)
    text = page(os.path.basename(args.file), graph, profile, size=os.path.getsize(args.file))
    write_page(output, text)
    print(f"wrote {plain(output)}")
    return 0
