"""``lutra generate``: a language model continues a text."""

from __future__ import annotations

import argparse
import json
import sys

from lutra.cli.common import UserError, add_engine, add_file, at_least, open_model, plain
from lutra.errors import InputError
from lutra.formatting import counted
from lutra.generator import Generator, Prompt


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of the command."""
    add_file(parser)
    given = parser.add_mutually_exclusive_group(required=True)
    given.add_argument("--prompt", metavar="TEXT", help="what to continue; may be empty")
    given.add_argument(
        "--ids", metavar="ID,...", help="the prompt as tokens, for files without a tokenizer"
    )
    parser.add_argument(
        "-n",
        "--max-tokens",
        type=at_least(1),
        metavar="N",
        help="the most tokens to make (default: as many as the model can remember)",
    )
    parser.add_argument(
        "--temperature",
        type=float,
        default=0.0,
        metavar="T",
        help="0 takes the likeliest token, 1 draws by the model's probabilities (default: 0)",
    )
    parser.add_argument(
        "--top-k", type=at_least(0), default=0, metavar="K", help="draw from the K likeliest tokens"
    )
    parser.add_argument(
        "--top-p",
        type=float,
        default=1.0,
        metavar="P",
        help="draw from the likeliest tokens that together have this probability",
    )
    parser.add_argument("--seed", type=at_least(0), default=0, help="of what is drawn (default: 0)")
    parser.add_argument(
        "--stop", action="append", default=[], metavar="TEXT", help="end before this text"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object at the end")
    add_engine(parser)


def run(args: argparse.Namespace) -> int:
    """Runs the command."""
    _, session = open_model(args.file, args.threads, args.isa)
    generator = Generator(session)
    prompt: Prompt = args.prompt if args.ids is None else _ids(args.ids)
    if args.ids is None and generator.tokenizer is None:
        raise UserError(f"{plain(args.file)} has no tokenizer; give the prompt as --ids ID,...")
    stream = generator.stream(
        prompt,
        args.max_tokens,
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        seed=args.seed,
        stop=args.stop,
    )
    if not args.json and isinstance(prompt, str):
        print(prompt, end="", flush=True)
    for token in stream:
        if not args.json:
            text = f"{token.id} " if generator.tokenizer is None else token.text
            print(text, end="", flush=True)
    made = stream.completion
    rate, prompt_rate = made.tokens_per_second, made.prompt_tokens_per_second
    if args.json:
        answer = {
            "text": made.text,
            "tokens": list(made.tokens),
            "reason": made.reason,
            "prompt": list(made.prompt),
            "prompt_tokens_per_second": prompt_rate,
            "tokens_per_second": rate,
        }
        print(json.dumps(answer, ensure_ascii=False))
        return 0
    print()
    each = "" if rate is None else f", {len(made.tokens)} behind it at {rate:,.0f} a second"
    print(
        f"{counted(len(made.prompt), 'token')} of the prompt at {prompt_rate:,.0f} a second{each} "
        f"({session.isa}, {counted(session.threads, 'thread')}; ended by {made.reason!r})",
        file=sys.stderr,
    )
    return 0


def _ids(text: str) -> list[int]:
    try:
        return [int(word) for word in text.split(",")]
    except ValueError:
        raise InputError(f"--ids {text!r} must be whole numbers with commas between them") from None
