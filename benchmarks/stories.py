"""Perplexity of stories260K with weights of few bits, through the engine.

    python -m benchmarks.stories --data FOLDER [--stories 64]

FOLDER holds stories260K.bin and stories260K_tok512.bin of llama2.c. The float model tells stories
of 256 tokens (temperature 1): some calibrate the conversion, others, of another seed, are held out
and judged. Nothing is trained.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch

from lutra import Generator
from lutra.train import (
    Int8,
    LowBit,
    convert,
    export_decoder,
    load_llama2c,
    load_llama2c_tokenizer,
)
from lutra.train.recipe import Recipe

_TOKENS = 256
_LONGEST = 512


def _recipes() -> dict[str, Recipe]:
    ends = {"lm_head": Int8(), "model.embed_tokens": Int8()}
    recipes: dict[str, Recipe] = {"int8": {"*": Int8()}}
    for bits in (4, 3, 2, 1.58, 1):
        for rounding in ("nearest", "calibrated"):
            method = LowBit(bits, rounding=rounding, otherwise=Int8())  # type: ignore[arg-type]
            recipes[f"{bits:g} bits, {rounding}"] = {**ends, "*": method}
    return recipes


def _stories(generator: Generator, count: int, seed: int) -> np.ndarray[Any, Any]:
    """Ids (n, 256) of the stories that did not end before."""
    made: Any = generator.generate([""] * count, _TOKENS - 1, temperature=1.0, seed=seed)
    texts = [[*each.prompt, *each.tokens] for each in made]
    return np.array([text for text in texts if len(text) == _TOKENS])


def _perplexity(path: Path, held: np.ndarray[Any, Any]) -> float:
    generator = Generator(path, threads=1)
    return float(np.exp(-np.concatenate([generator.score(text.tolist()) for text in held]).mean()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--stories", type=int, default=64, help="of each part (default: 64)")
    options = parser.parse_args()
    torch.manual_seed(0)
    model = load_llama2c(options.data / "stories260K.bin")
    tokenizer = load_llama2c_tokenizer(options.data / "stories260K_tok512.bin")
    with TemporaryDirectory(prefix="lutra-bench-") as folder:
        path = Path(folder) / "model.lutra"

        def write(made: torch.nn.Module) -> None:
            export_decoder(
                made, path, max_length=_LONGEST, tokenizer=tokenizer, bos=1, eos=(), tolerance=1.0
            )

        def report(name: str) -> None:
            value = _perplexity(path, held)
            print(f"{name:22} {value:8.2f} {path.stat().st_size:10,} bytes", flush=True)

        write(model)
        teller = Generator(path, threads=1)
        calibration = torch.from_numpy(_stories(teller, options.stories, seed=1))
        held = _stories(teller, options.stories, seed=2)
        report("float32")
        for name, recipe in _recipes().items():
            converted, _ = convert(model, recipe, list(calibration.split(8)))
            write(converted)
            report(name)


if __name__ == "__main__":
    main()
