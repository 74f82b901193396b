"""Tokenizers of GGUF files, from the entries that llama.cpp reads."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, Final

from lutra.errors import UnsupportedModelError
from lutra.preprocess.tokens import JsonTokenizer, PieceTokenizer, Tokenizer

#: Kinds of tokens: unknown, control and unused ones stand for no text.
_CONTROLS: Final = (2, 3, 5)
_CONTROL: Final = 3
#: How text is cut into words before they are cut into tokens, by the name that files give it. From
#: src/llama-vocab.cpp of llama.cpp.
_CONTRACTIONS: Final = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_GPT2: Final = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_WORDS: Final = {
    "gpt-2": (_GPT2,),
    "smollm": (r"\p{N}", _GPT2),
    "llama-bpe": (
        _CONTRACTIONS
        + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
        + r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    ),
    "qwen2": (
        _CONTRACTIONS
        + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
        + r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    ),
}


def gguf_tokenizer(name: str, get: Callable[..., Any]) -> Tokenizer | None:
    """The tokenizer of a file; None where it has none.

    Args:
        name: The file.
        get: Gives an entry by its key, or its second argument where there is none.

    Raises:
        InputError: If its pieces do not make a tokenizer.
        UnsupportedModelError: If it is of a kind that lutra does not know.
    """
    kind = get("tokenizer.ggml.model")
    if kind is None or kind == "no_vocab":
        return None
    pieces = [str(piece) for piece in get("tokenizer.ggml.tokens", [])]
    types = get("tokenizer.ggml.token_type", [1] * len(pieces))
    if kind == "llama":
        return PieceTokenizer(
            tuple(piece.replace("▁", " ") for piece in pieces),
            tuple(float(score) for score in get("tokenizer.ggml.scores", [])),
            bool(get("tokenizer.ggml.add_space_prefix", True)),
            frozenset(index for index, kind in enumerate(types) if kind in _CONTROLS),
        )
    words = get("tokenizer.ggml.pre", "gpt-2")
    if kind != "gpt2" or words not in _WORDS:
        raise UnsupportedModelError(
            f"load_gguf: {name!r} has a tokenizer of the kind {kind!r} that cuts words as "
            f"{words!r}; lutra knows 'llama', and 'gpt2' with {', '.join(_WORDS)}: read the file "
            "without a tokenizer"
        )
    merges = [str(merge) for merge in get("tokenizer.ggml.merges", [])]
    controls = {index for index, kind in enumerate(types) if kind == _CONTROL}
    return JsonTokenizer(_json(pieces, merges, controls, words))


def _json(pieces: list[str], merges: list[str], controls: set[int], words: str) -> str:
    """A tokenizer.json of pieces of bytes that are written as letters, as GPT-2 does."""
    splits = [
        {
            "type": "Split",
            "pattern": {"Regex": pattern},
            "behavior": "Isolated",
            "invert": False,
        }
        for pattern in _WORDS[words]
    ]
    level = {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": False,
        "use_regex": False,
    }
    added = [
        {
            "id": index,
            "content": pieces[index],
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": True,
        }
        for index in sorted(controls)
    ]
    content = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [*splits, level]},
        "post_processor": None,
        "decoder": level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": words == "llama-bpe",
            "vocab": {piece: index for index, piece in enumerate(pieces)},
            "merges": merges,
        },
    }
    return json.dumps(content, ensure_ascii=False, separators=(",", ":"))
