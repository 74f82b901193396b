"""``lutra convert`` of language models: GGUF files and files of llama2.c."""

from __future__ import annotations

import argparse
import os
import tempfile
from pathlib import Path
from typing import Any, Final

import numpy as np

from lutra.cli.common import UserError, bytes_text, plain, read_array
from lutra.formatting import counted
from lutra.generator import Generator
from lutra.node import Array

_ENDINGS: Final = (".gguf", ".bin")
_LONGEST: Final = 2048  # tokens of a text, where --max-length does not say
#: Texts that a model generates to calibrate itself, and their tokens.
_TEXTS: Final = 32
_TOKENS: Final = 128


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of language models."""
    group = parser.add_argument_group("language models (.gguf, .bin of llama2.c)")
    group.add_argument(
        "--vocabulary", metavar="FILE", help="of a .bin model: its tokenizer, such as tok512.bin"
    )


def is_language_model(args: argparse.Namespace) -> bool:
    """Whether the model is a file of a language model."""
    return str(args.model).endswith(_ENDINGS)


def check_arguments(args: argparse.Namespace) -> None:
    """Raises UserError about arguments that are for another kind of model."""
    if not is_language_model(args):
        if args.vocabulary is not None:
            raise UserError("--vocabulary is for .bin files of llama2.c; leave it out")
        return
    if args.speed_gate or args.functions is not None or args.tables != "stored":
        raise UserError(
            "--speed-gate, --functions and --tables are not for language models; leave them out"
        )
    if args.vocabulary is not None and not args.model.endswith(".bin"):
        raise UserError("--vocabulary is for .bin models; a .gguf file has its own")


def run(args: argparse.Namespace, recipe: Any, torch: Any, train: Any) -> int:
    """Writes a language model, converted where there is a recipe.

    Args:
        args: Those of ``lutra convert``.
        recipe: Makes the recipe of a model; None for one that stays float.
        torch: The package.
        train: ``lutra.train``.
    """
    source = {"format": Path(args.model).suffix[1:], "name": Path(args.model).name}
    options, model = _load(args, train, low_bits=recipe is None)
    text = "no layer was converted"
    metadata: dict[str, Any] = {"source": source}
    example = None
    if recipe is not None:
        ids = _ids(args, model, options, train)
        batches = [torch.from_numpy(ids[i : i + 8].astype(np.int64)) for i in range(0, len(ids), 8)]
        chosen = recipe(model)
        model, report = train.convert(model, chosen, batches, seed=args.seed)
        metadata |= {"recipe": train.recipe_to_json(chosen), "seed": args.seed}
        text, example = str(report), batches[0][:2, : min(16, options["max_length"])]
    train.export_decoder(
        model, args.output, example=example, metadata=metadata, tolerance=args.tolerance, **options
    )
    print(text)
    print(f"wrote {plain(args.output)}, {bytes_text(os.path.getsize(args.output))}")
    return 0


def _load(args: argparse.Namespace, train: Any, *, low_bits: bool) -> tuple[dict[str, Any], Any]:
    """Options of ``export_decoder``, and the model."""
    if args.model.endswith(".gguf"):
        found = train.load_gguf(args.model, low_bits=low_bits)
        print(f"read {plain(args.model)}: {found}")
        options = {"tokenizer": found.tokenizer, "bos": found.bos, "eos": found.eos}
        model, longest = found.model, found.max_length
    else:
        model = train.load_llama2c(args.model)
        known = args.vocabulary
        tokenizer = None if known is None else train.load_llama2c_tokenizer(known)
        config = model.config
        # a beginning in the middle of a text ends it: that is how its texts were put together
        bos, eos = config.bos_token_id, config.eos_token_id
        options = {"tokenizer": tokenizer, "bos": bos, "eos": (bos, eos)}
        longest = config.max_position_embeddings
    options["max_length"] = min(longest, args.max_length or _LONGEST)
    return options, model


def _ids(args: argparse.Namespace, model: Any, options: dict[str, Any], train: Any) -> Array:
    """Ids (N, T) for calibration: those of --data, or what the model itself generates."""
    if args.data is not None:
        array = read_array(args.data)
        if array.ndim != 2 or array.dtype.kind not in "iu":
            raise UserError(
                f"{args.data!r} holds {array.dtype} of shape {array.shape}; a language model is "
                "calibrated with ids (N, T), integers"
            )
        return array
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "float.lutra"
        train.export_decoder(model, path, tolerance=args.tolerance, **{**options, "eos": ()})
        generator = Generator(path)
        bos = options["bos"]
        rng = np.random.default_rng(args.seed)
        starts = rng.integers(0, generator.vocabulary, _TEXTS) if bos is None else [bos] * _TEXTS
        length = min(_TOKENS, options["max_length"])
        made = generator.generate(
            [[int(start)] for start in starts], length - 1, temperature=1.0, seed=args.seed
        )
        assert isinstance(made, list)
        print(f"calibrates on {counted(_TEXTS, 'text')} of {length} tokens that it generates")
        return np.array([[*each.prompt, *each.tokens] for each in made])
