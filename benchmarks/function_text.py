"""Function tables in MiniLM without retraining: accuracy on SST-2, and sentence vectors.

    python -m benchmarks.function_text DATA [--train 2000] [--entries 16]

DATA holds sst2_train.tsv.xz, sst2_dev.tsv.xz and sst2_test.tsv.xz. The encoder is frozen; a linear
classifier is fitted once, to exact sentence vectors of the training part. Then every GELU, softmax
and layer norm of the encoder is swapped, and the sentences of dev and test are classified again.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from examples.minilm import Sentences, load_bert, padded, read_tsv, tokenize
from lutra.train import Function, convert

_BATCH = 32


@torch.no_grad()
def vectors(model: nn.Module, tokens: list[list[int]]) -> Tensor:
    """Sentence vectors (n, 384)."""
    order = sorted(range(len(tokens)), key=lambda i: len(tokens[i]))
    made = torch.empty((len(tokens), 384))
    for start in range(0, len(order), _BATCH):
        rows = order[start : start + _BATCH]
        made[rows] = model(**padded([tokens[i] for i in rows]))
    return made


def classifier(x: Tensor, labels: Tensor) -> nn.Linear:
    """Logistic regression."""
    layer = nn.Linear(x.shape[1], 2)
    nn.init.zeros_(layer.weight)
    solver = torch.optim.LBFGS(layer.parameters(), max_iter=100, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        solver.zero_grad()
        value = F.cross_entropy(layer(x), labels) + 1e-4 * layer.weight.square().sum()
        value.backward()
        return value

    solver.step(loss)
    return layer


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path)
    parser.add_argument("--train", type=int, default=2000, help="sentences for the classifier")
    parser.add_argument("--method", default="minimax")
    parser.add_argument("--entries", type=int, action="append", help="default: 16")
    args = parser.parse_args()
    bert, tokenizer = load_bert()
    model = Sentences(bert).eval()
    labels, texts = read_tsv(args.data / "sst2_train.tsv.xz")
    train = tokenize(tokenizer, texts[: args.train])
    layer = classifier(vectors(model, train), torch.tensor(labels[: args.train]))
    held: list[list[int]] = []
    wanted: list[int] = []
    for part in ("dev", "test"):
        some, texts = read_tsv(args.data / f"sst2_{part}.tsv.xz")
        held += tokenize(tokenizer, texts)
        wanted += some
    truth = torch.tensor(wanted)
    exact = vectors(model, held)
    base = layer(exact).argmax(1)
    print(f"{len(held)} sentences\n\n| functions | accuracy | other answers | least cosine |")
    print("|---|---|---|---|")
    print(f"| exact | {100 * float((base == truth).float().mean()):.2f} | | |", flush=True)
    sample = [padded(train[i : i + _BATCH]) for i in range(0, 128, _BATCH)]
    for entries in args.entries or [16]:
        for calibrate in (False, True):
            recipe = {"*": Function(entries=entries, method=args.method, calibrate=calibrate)}
            swapped, _ = convert(model, recipe, sample)
            made = vectors(swapped, held)
            answers = layer(made).argmax(1)
            right = 100 * float((answers == truth).float().mean())
            changed = int((answers != base).sum())
            name = f"tables of {entries}{', calibrated' * calibrate}"
            cosine = float(F.cosine_similarity(made, exact).min())
            print(f"| {name} | {right:.2f} | {changed} | {cosine:.5f} |", flush=True)


if __name__ == "__main__":
    main()
