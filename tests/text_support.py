"""A tiny tokenizer and tiny models of text."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from graphs import Builder

from lutra.graph import Graph

WORDS = [
    *("[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "bad", "cat", "dog", "film"),
    *("good", "is", "it", "no", "not", "the", "was", "##s"),
]
#: Row of each word in the tables of vectors.
ID = {word: index for index, word in enumerate(WORDS)}


def tiny_tokenizer() -> Any:
    """Lower-case WordPiece with [CLS] and [SEP], as BERT's; the test is skipped without it."""
    tokenizers = pytest.importorskip(
        "tokenizers", reason="needs tokenizers: pip install 'lutra[text]'"
    )
    models, pre, post = (
        getattr(tokenizers, name) for name in ("models", "pre_tokenizers", "processors")
    )
    tokenizer = tokenizers.Tokenizer(models.WordPiece(vocab=ID, unk_token="[UNK]"))
    tokenizer.normalizer = tokenizers.normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre.BertPreTokenizer()
    tokenizer.post_processor = post.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", ID["[CLS]"]), ("[SEP]", ID["[SEP]"])]
    )
    tokenizer.add_special_tokens(["[PAD]", "[UNK]", "[CLS]", "[SEP]"])
    return tokenizer


def text_metadata(max_length: int = 12, **entries: Any) -> dict[str, Any]:
    """Metadata with the tiny tokenizer."""
    from lutra.sentences import text_preprocess

    return {"preprocess": text_preprocess(tiny_tokenizer(), max_length=max_length), **entries}


def encoder_graph(
    metadata: dict[str, Any],
    *,
    shape: tuple[int | None, int | None] = (None, None),
    names: tuple[str, str] = ("input_ids", "attention_mask"),
    rows: int = len(WORDS),
    positions: int = 16,
    outputs: int | None = None,
) -> Graph:
    """One block of attention between embeddings and a mean; scores where `outputs` says so."""
    b = Builder(*((name, shape, "int32") for name in names))
    rng, ids, mask = b.rng, *names
    weight = rng.normal(size=(rows, 8)).astype(np.float32)
    x = b.add("embedding", ids, tensors={"weight": weight})
    weight = rng.normal(size=(positions, 8)).astype(np.float32)
    x = b.add("position_embedding", x, tensors={"weight": weight})
    a = b.add("attention", x, x, x, mask, heads=2, scale=0.5)
    x = b.add("masked_mean", b.add("add", a, x), mask)
    if outputs is not None:
        x = b.linear(x, 8, outputs)
    return b.graph(x, metadata=metadata)


def sentiment_graph() -> Graph:
    """A classifier of (bad, good): it counts the words good and bad."""
    b = Builder(*((name, (None, None), "int32") for name in ("input_ids", "attention_mask")))
    weight = np.zeros((len(WORDS), 2), np.float32)
    weight[ID["bad"], 0] = weight[ID["good"], 1] = 1
    x = b.add("embedding", "input_ids", tensors={"weight": weight})
    x = b.add("masked_mean", x, "attention_mask")
    y = b.add("affine_scalar", x, scale=10.0, bias=0.0)
    return b.graph(y, metadata=text_metadata(classes=["bad", "good"]))
