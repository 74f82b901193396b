"""Language models in lutra and in llama.cpp: how fast prompts are read and tokens made.

    python -m benchmarks.decoders [--data FOLDER] [--isa avx2] [--json FILE]

stories260K (with --data, the folder that holds stories260K.bin of llama2.c) in float32 and int8,
and four blocks of BitNet b1.58 2B4T with random ternary weights. All contestants of a model take
turns.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any, Final, Protocol

import numpy as np

import lutra
from benchmarks import llama_peer
from benchmarks.machine import CLOCKS, machine, spread, write_json
from benchmarks.peers import Array, reason
from lutra.preprocess.tokens import PICKED, START, TOKENS

VOCABULARY: Final = 8192  # of BitNet here; the model has 128,256 tokens
#: The title of a contestant, its file, and how many tensors of a GGUF file have which format.
File = tuple[str, Path, dict[str, int]]
_CHUNK: Final = 256  # tokens that `lutra.Generator` reads at once
METHOD: Final = (
    "One process, one sequence. A run forgets all tokens, reads --prompt random tokens (prefill) "
    "and makes --tokens more, one by one, each the likeliest (decode); scores of the last token "
    "come back as float32 every time. Contestants take turns, who begins changes, and the first "
    "turn does not count. Figures are tokens a second, medians of the runs; ms has the spread. "
    "lutra runs a .lutra file as lutra.Generator does; llama.cpp runs a GGUF file by llama_decode "
    "with its default settings (keys and values in float16, where lutra has float32). Of BitNet "
    "lutra computes the squared ReLU of the model, and llama.cpp SiLU, the only one that it has in "
    "this architecture."
)


class Contestant(Protocol):
    """A model that remembers."""

    def clear(self) -> None:
        """Forgets all tokens."""

    def read(self, ids: Sequence[int]) -> Array:
        """Reads tokens behind those that it has; the scores (V,) behind the last one."""


class Engine:
    """A file in lutra."""

    def __init__(self, path: Path, threads: int, isa: str | None) -> None:
        self._session = lutra.Session(path, threads=threads, isa=isa)
        self.clear()

    def clear(self) -> None:
        """Forgets all tokens."""
        self._cache, self._start = self._session.new_cache(), 0

    def read(self, ids: Sequence[int]) -> Array:
        """Reads tokens behind those that it has; the scores (V,) behind the last one."""
        for first in range(0, len(ids), _CHUNK):
            part = np.array([ids[first : first + _CHUNK]], np.int32)
            given = {
                TOKENS: part,
                START: np.array([self._start], np.int32),
                PICKED: np.array([[part.shape[1] - 1]], np.int32),
            }
            (scores,) = self._session.run(None, given, cache=self._cache)
            self._start += part.shape[1]
        made: Array = scores[0, 0]
        return made


def _stories(folder: Path, scratch: Path, options: argparse.Namespace) -> Iterator[File]:
    import torch

    from benchmarks.decoder_models import stories, write_gguf, write_lutra
    from lutra.train import Int8, convert

    model, length = stories(folder), options.prompt + options.tokens
    ids = np.random.default_rng(1).integers(3, 512, (16, 32))
    int8, _ = convert(model, {"*": Int8()}, [torch.from_numpy(ids)])
    for name, made in (("float32", model), ("int8", int8)):
        path = scratch / f"{name}.lutra"
        write_lutra(made, path, length)
        yield f"lutra {name}", path, {}
    for kind in ("F32", "Q8_0"):
        path = scratch / f"{kind}.gguf"
        yield f"llama.cpp {kind}", path, write_gguf(model, path, "llama", kind, kind, length)


def _bitnet(scratch: Path, options: argparse.Namespace) -> Iterator[File]:
    from benchmarks.decoder_models import bitnet, with_ternary, write_gguf, write_lutra

    model, length = bitnet(options.blocks, VOCABULARY), options.prompt + options.tokens
    for kind in ("TQ1_0", "TQ2_0"):
        path = scratch / f"{kind}.gguf"
        yield f"llama.cpp {kind}", path, write_gguf(model, path, "bitnet", kind, "Q8_0", length)
    path = scratch / "ternary.lutra"
    write_lutra(with_ternary(model), path, length)
    yield "lutra ternary", path, {}


def measure(
    name: str, vocabulary: int, files: Iterable[File], options: argparse.Namespace
) -> dict[str, Any]:
    """The record of a model.

    Args:
        name: Of the model.
        vocabulary: Tokens that it knows.
        files: A .lutra or GGUF file for each contestant, made when it is asked for.
        options: Of the command.
    """
    contestants: dict[str, Contestant] = {}
    sizes, formats, failed = {}, {}, {}
    for title, path, kinds in files:
        sizes[title] = path.stat().st_size
        formats[title] = kinds
        try:
            if path.suffix == ".gguf":
                length = options.prompt + options.tokens
                contestants[title] = llama_peer.Decoder(path, length, options.threads)
            else:
                contestants[title] = Engine(path, options.threads, options.isa)
        except Exception as error:  # whatever a runtime raises becomes a line in the record
            failed[title] = reason(error)
    prompt = np.random.default_rng(0).integers(3, vocabulary, options.prompt).tolist()
    now, titles = CLOCKS[options.clock], list(contestants)
    times: dict[str, tuple[list[float], list[float]]] = {t: ([], []) for t in titles}
    first: dict[str, Array] = {}
    for turn in range(options.runs + 1):
        for place in range(len(titles)):
            title = titles[(turn + place) % len(titles)]
            made = contestants[title]
            made.clear()
            start = now()
            scores = made.read(prompt)
            middle = now()
            first.setdefault(title, scores)
            for _ in range(options.tokens):
                scores = made.read([int(scores.argmax())])
            end = now()
            if turn:
                times[title][0].append(middle - start)
                times[title][1].append(end - middle)
    top = first[titles[0]]
    return {
        "model": name,
        "isa": options.isa or lutra.runnable_isas()[-1],
        "threads": options.threads,
        "clock": options.clock,
        "prompt": options.prompt,
        "tokens": options.tokens,
        "prefill": {t: options.prompt / median(times[t][0]) for t in titles},
        "decode": {t: options.tokens / median(times[t][1]) for t in titles},
        "ms": {t: {"prefill": spread(times[t][0]), "decode": spread(times[t][1])} for t in titles},
        "bytes": sizes,
        "formats": {t: kinds for t, kinds in formats.items() if kinds},
        "difference": {t: float(np.abs(first[t] - top).max() / np.abs(top).max()) for t in titles},
        "failed": failed,
    }


def _print(record: dict[str, Any]) -> None:
    for title, prefill in record["prefill"].items():
        decode = record["decode"][title]
        print(
            f"{record['model']:32} {title:18} prefill {prefill:9,.0f} tokens/s, decode "
            f"{decode:8,.1f}",
            flush=True,
        )


def main() -> None:
    """Parses the arguments, measures the models and writes the records."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--data", type=Path, help="folder with stories260K.bin (default: without)")
    parser.add_argument("--case", choices=("stories260K", "bitnet"), help="only this model")
    parser.add_argument("--blocks", type=int, default=4, help="of BitNet (default: 4)")
    parser.add_argument("--prompt", type=int, default=256, help="tokens read (default: 256)")
    parser.add_argument("--tokens", type=int, default=64, help="tokens made (default: 64)")
    parser.add_argument("--runs", type=int, default=7, help="turns that count (default: 7)")
    parser.add_argument("--threads", type=int, default=1, help="of everybody (default: 1)")
    parser.add_argument("--isa", choices=lutra.runnable_isas(), help="of lutra")
    parser.add_argument("--clock", choices=list(CLOCKS), default="wall",
                        help="cpu: time that the process computes (default: wall)")  # fmt: skip
    parser.add_argument("--json", type=Path, metavar="FILE", help="where the records go")
    options = parser.parse_args()
    if min(options.prompt, options.tokens, options.runs, options.threads, options.blocks) < 1:
        parser.error("--prompt, --tokens, --runs, --threads and --blocks must be at least 1")
    if options.case == "stories260K" and options.data is None:
        parser.error("--case stories260K needs --data FOLDER")
    records = []
    with TemporaryDirectory(prefix="lutra-bench-") as folder:
        if options.data is not None and options.case != "bitnet":
            files = _stories(options.data, Path(folder), options)
            records.append(measure("stories260K", 512, files, options))
            _print(records[-1])
        if options.case != "stories260K":
            name = f"{options.blocks} blocks of BitNet b1.58 2B4T"
            records.append(measure(name, VOCABULARY, _bitnet(Path(folder), options), options))
            _print(records[-1])
    write_json(
        options.json,
        {
            "command": shlex.join(["python", "-m", "benchmarks.decoders", *sys.argv[1:]]),
            "method": METHOD,
            "machine": machine(),
            "llama_cpp": llama_peer.features(),
            "records": records,
        },
    )


if __name__ == "__main__":
    main()
