"""The command line: ``lutra`` and ``python -m lutra``.

One module for each command, with ``HELP``, ``add_arguments(parser)`` and ``run(args)``, which
returns the exit code. Everything but ``convert``, ``optimize``, ``report`` and ``hardware``
needs NumPy and safetensors only.

Exit codes: 0 for success, 1 for a model that fails a check, 2 for a mistake of the caller (one
sentence on stderr), 3 for a mistake of lutra, 130 for Ctrl-C, 141 for a closed pipe.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
import traceback
import warnings
from collections.abc import Sequence
from typing import Final, NoReturn, Protocol

import lutra
from lutra.errors import LutraError

__all__ = ["main"]

#: Module of each command, imported only when it runs.
COMMANDS: Final = {
    "doctor": ("doctor", "show CPU, kernels, versions and a self test"),
    "inspect": ("inspect", "show what is in a file"),
    "run": ("run", "run a model on .npy files"),
    "generate": ("generate", "continue a text with a language model"),
    "verify": ("verify", "check the engine against the reference on this machine"),
    "eval": ("evaluate", "measure a model on data with known answers"),
    "bench": ("bench", "measure the speed of a model"),
    "compile": ("compile", "write a file for the C library and the browser"),
    "convert": ("convert", "convert a PyTorch model (needs lutra[train])"),
    "optimize": ("optimize", "find the fastest recipe within a budget (needs lutra[train,search])"),
    "report": ("report", "write a page about a file (needs lutra[report])"),
    "hardware": ("hardware", "write a layer as a circuit (needs lutra[hardware])"),
}
_MISTAKE: Final = 2
_BUG: Final = 3
_INTERRUPTED: Final = 130
_PIPE_CLOSED: Final = 141


class UsageError(LutraError):
    """Arguments that do not fit."""


class _Command(Protocol):
    def add_arguments(self, parser: argparse.ArgumentParser) -> None: ...

    def run(self, args: argparse.Namespace) -> int: ...


class _Parser(argparse.ArgumentParser):
    """Raises instead of printing its usage, so that every error is one sentence."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}; see {self.prog} --help")


class _Version(argparse.Action):
    """Prints the version, which takes an import that no other command needs."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        print(f"lutra {lutra.__version__}")
        parser.exit()


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command.

    Args:
        argv: Arguments after the program name; by default those of the process.

    Returns:
        The exit code.
    """
    arguments = sys.argv[1:] if argv is None else list(argv)
    debug = "--debug" in arguments
    try:
        with warnings.catch_warnings():
            if not debug:
                warnings.showwarning = _warn
            code = _run(arguments)
        sys.stdout.flush()  # a closed pipe is found out here and not in the exit of Python
        return code
    except KeyboardInterrupt:
        print("lutra: interrupted", file=sys.stderr)
        return _INTERRUPTED
    except BrokenPipeError:
        # What is still buffered cannot be written, and Python would complain at exit.
        _silence_stdout()
        return _PIPE_CLOSED
    except (LutraError, OSError, MemoryError) as error:
        if debug:
            traceback.print_exc()
        print(f"lutra: error: {_sentence(error)}", file=sys.stderr)
        try:
            sys.stdout.flush()
        except OSError:  # the device is full: Python would try again at exit, and complain
            _silence_stdout()
        return _MISTAKE
    except Exception as error:
        if debug:
            traceback.print_exc()
        what = f"{type(error).__name__}: {_sentence(error)}"
        print(f"lutra: internal error: {what}; please report it with --debug", file=sys.stderr)
        return _BUG


def _warn(message: Warning | str, *_: object, **__: object) -> None:
    """Prints a warning as one line, without the place in the code that `--debug` shows."""
    text = message if isinstance(message, Warning) else UserWarning(message)
    print(f"lutra: warning: {_sentence(text)}", file=sys.stderr)


def _run(arguments: list[str]) -> int:
    name = next((word for word in arguments if not word.startswith("-")), "")
    parser, commands = _parser(), {}
    choices = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for command, (module, summary) in COMMANDS.items():
        sub = choices.add_parser(
            command, help=summary, description=f"{summary[0].upper()}{summary[1:]}."
        )
        sub.add_argument(
            "--debug", action="store_true", default=argparse.SUPPRESS, help=argparse.SUPPRESS
        )
        if command == name:  # the others need no arguments, and no import
            loaded: _Command = importlib.import_module(f"lutra.cli.{module}")
            loaded.add_arguments(sub)
            commands[command] = loaded
    args = parser.parse_args(arguments)
    return commands[args.command].run(args)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="lutra", description="Neural networks by table lookup.")
    parser.add_argument("--version", action=_Version, nargs=0, help="show the version")
    parser.add_argument("--debug", action="store_true", help="show a traceback with every error")
    return parser


def _sentence(error: BaseException) -> str:
    """What went wrong, in one line, without anything that a terminal could obey."""
    if isinstance(error, OSError) and error.strerror:
        place = f"{os.fsdecode(error.filename)!r}: " if isinstance(error.filename, str) else ""
        return f"{place}{error.strerror}"
    if isinstance(error, MemoryError):
        return f"out of memory ({error}); use smaller inputs" if str(error) else "out of memory"
    line = " ".join(str(error).split())
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in line)


def _silence_stdout() -> None:
    try:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, sys.stdout.fileno())
        os.close(null)
    except (OSError, ValueError):  # stdout has no file below it, so nothing can fail at exit
        pass
