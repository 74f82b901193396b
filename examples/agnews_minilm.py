"""AG News with MiniLM: how well sentence vectors by lookups keep the neighbours of the dense ones.

    python examples/agnews_minilm.py --data DATA --v 16 --output minilm_v16.lutra \
        --checkpoints runs/agnews

DATA is a folder with agnews_*.tsv.xz. The sentence encoder all-MiniLM-L6-v2 is converted and then
trained to give the dense network's vectors, without labels, on the sentences of `agnews_train10k`;
500 of them are held out to watch it. The test sentences are used once, at the end, through the
engine: for each of the first `--test-sentences` of them, the share of its ten nearest neighbours
(by cosine similarity) that lookups keep, and the rank correlation of all similarities. The run can
be stopped at any time: the same command goes on from the last checkpoint.
"""

from __future__ import annotations

import argparse
import copy
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from minilm import (
    FEATURES,
    Batches,
    Sentences,
    export_text,
    first,
    load_bert,
    pq_recipe,
    read_tsv,
    tokenize,
)
from tasks import Log, add_data, add_steady, finish, stage, steady
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

import lutra
from lutra.train import convert, finetune, recipe_to_json

HELD_OUT = 500


class Vectors(Dataset[tuple[dict[str, Tensor], Tensor]]):
    """Batches of sentences, with the vectors that a network gives them as targets."""

    def __init__(self, batches: Batches, vectors: Tensor) -> None:
        self.batches, self.vectors = batches, vectors

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, index: int) -> tuple[dict[str, Tensor], Tensor]:
        inputs, rows = self.batches[index]
        return inputs, self.vectors[rows]


@torch.no_grad()
def embed(model: nn.Module, tokens: list[list[int]], size: int = 64) -> Tensor:
    """Sentence vectors (n, 384) in the order given."""
    model.eval()
    device = next(model.parameters()).device
    batches = Batches(tokens, range(len(tokens)), size)
    vectors = torch.zeros((len(tokens), model.bert.config.hidden_size))
    for index in range(len(batches)):
        inputs, rows = batches[index]
        found = model(**{name: tensor.to(device) for name, tensor in inputs.items()})
        vectors[rows] = found.cpu()
    return vectors


def neighbours_kept(vectors: np.ndarray, dense: np.ndarray, count: int = 10) -> float:
    """Share in percent of the `count` nearest neighbours of the dense vectors that are kept."""

    def nearest(x: np.ndarray) -> np.ndarray:
        similar = x @ x.T
        np.fill_diagonal(similar, -np.inf)
        return np.argpartition(-similar, count, axis=1)[:, :count]

    pairs = zip(nearest(vectors), nearest(dense), strict=True)
    return 100.0 * float(np.mean([len(np.intersect1d(a, b)) / count for a, b in pairs]))


def rank_correlation(vectors: np.ndarray, dense: np.ndarray) -> float:
    """Spearman's correlation of the similarities of all pairs."""
    upper = np.triu_indices(len(vectors), 1)
    ranks = [np.argsort(np.argsort((x @ x.T)[upper])) for x in (vectors, dense)]
    return float(np.corrcoef(*ranks)[0, 1])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_data(parser, "folder with agnews_*.tsv.xz")
    parser.add_argument("--output", type=Path, default=Path("minilm.lutra"))
    parser.add_argument("--checkpoints", type=Path, help="folder; enables stop and resume")
    parser.add_argument("--v", type=int, default=16, help="values per sub-vector; default: 16")
    parser.add_argument(
        "--int8", nargs="+", default=(), metavar="PATTERN",
        help="layers of the blocks that become int8 instead, such as 'attention.*'",
    )  # fmt: skip
    parser.add_argument("--gradient", default="projected")
    parser.add_argument("--reconstruction", type=float, default=0.0)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument(
        "--steps", type=int, help="stop after so many; 0: no training; default: all epochs"
    )
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--calibration", type=int, default=32, help="batches; default: 32")
    parser.add_argument("--lr", type=float, default=4e-4)
    parser.add_argument("--feature-weight", type=float, default=1.0)
    parser.add_argument("--longest", type=int, default=128, help="tokens; default: 128")
    parser.add_argument("--train-sentences", type=int)
    parser.add_argument("--test-sentences", type=int, default=2000)
    add_steady(parser)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    bert, tokenizer = load_bert()
    dense = Sentences(bert)
    dense.bert.embeddings.word_embeddings.weight.requires_grad_(False)
    texts = read_tsv(options.data / "agnews_train10k.tsv.xz")[1]
    tokens = tokenize(tokenizer, texts, options.longest)
    held_out, tokens = tokens[:HELD_OUT], tokens[HELD_OUT:][: options.train_sentences]
    train = Batches(tokens, range(len(tokens)), options.batch_size, options.epochs, options.seed)
    targets, wanted = embed(dense, tokens), embed(dense, held_out).numpy()
    teacher = copy.deepcopy(dense).eval()
    for module in dense.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    recipe = pq_recipe(
        options.v, options.int8, gradient=options.gradient, reconstruction=options.reconstruction
    )
    apart = max(1, len(train) // options.calibration)
    picked = [train[i] for i in range(0, len(train), apart)][: options.calibration]
    lookups, report = convert(dense, recipe, picked, seed=options.seed)
    print(report, flush=True)

    def kept(model: nn.Module) -> float:
        return neighbours_kept(embed(model, held_out).numpy(), wanted)

    print(f"after conversion: {kept(lookups):.1f} % of the neighbours", flush=True)
    length: dict[str, Any] = {"epochs": 1} if options.steps is None else {"steps": options.steps}
    training: dict[str, Any] = {"steps": 0}
    if options.steps != 0:
        tuned = finetune(
            lookups,
            DataLoader(Vectors(train, targets), batch_size=1, shuffle=True, collate_fn=first),
            **length, lr=options.lr, warmup=50, clip_norm=1.0, **steady(options),
            loss=lambda got, want: 1.0 - F.cosine_similarity(got, want).mean(),
            teacher=teacher, distillation=0.0,
            feature_layers=FEATURES, feature_weight=options.feature_weight,
            evaluate=Log(f"V={options.v}", kept, "% of the neighbours"), evaluate_every=200,
            checkpoint_dir=stage(options.checkpoints, f"v{options.v}"), checkpoint_every=200,
            seed=options.seed,
        )  # fmt: skip
        training = {"steps": tuned.steps, "seconds": tuned.seconds}
    lookups.eval()
    export_text(
        lookups, options.output, tokenizer, {**train[0][0]}, longest=options.longest,
        metadata={
            "recipe": recipe_to_json(recipe),
            "seed": options.seed,
            "training": training,
        },
    )  # fmt: skip
    test = tokenize(tokenizer, read_tsv(options.data / "agnews_test.tsv.xz")[1], options.longest)[
        : options.test_sentences
    ]
    start = time.perf_counter()
    reference = embed(teacher, test).numpy()
    dense_seconds = time.perf_counter() - start
    session = lutra.Session(options.output, threads=options.threads)
    batches = Batches(test, range(len(test)), 64)
    got = np.zeros_like(reference)
    start = time.perf_counter()
    for index in range(len(batches)):
        inputs, rows = batches[index]
        feeds = {name: tensor.numpy() for name, tensor in inputs.items()}
        got[rows.numpy()] = session.run(None, feeds)[0]
    seconds = time.perf_counter() - start
    finish(
        options.output,
        {
            "v": options.v,
            "sentences": len(test),
            "neighbours_kept": round(neighbours_kept(got, reference), 2),
            "rank_correlation": round(rank_correlation(got, reference), 4),
            "mean_cosine": round(float((got * reference).sum(1).mean()), 4),
            "dense_sentences_per_second": round(len(test) / dense_seconds, 1),
            "lookup_sentences_per_second": round(len(test) / seconds, 1),
        },
    )


if __name__ == "__main__":
    main()
