"""SST-2 with MiniLM: sentiment of sentences, every linear layer of the encoder by lookups.

    python examples/sst2_minilm.py --data DATA --v 16 --output sst2_v16.lutra \
        --checkpoints runs/sst2

DATA is a folder with sst2_*.tsv.xz. Two trainings: the dense network, and its lookup form with
the dense one as teacher. The run can be stopped at any time: the same command goes on from the last
checkpoint; `--dense-only` ends after the first training, which all --v share, and writes
the dense network.

Training sentences are those of `sst2_phrases_train` (phrases and sentences, as in GLUE; those that
are also in the other two files are left out), every choice is made on `sst2_dev`, and `sst2_test`
is used once, at the end, through the engine.
"""

from __future__ import annotations

import argparse
import copy
import re
import time
from pathlib import Path

import numpy as np
import torch
from minilm import (
    FEATURES,
    Batches,
    Classifier,
    accuracy,
    export_text,
    first,
    load_bert,
    pq_recipe,
    read_tsv,
    tokenize,
)
from safetensors.torch import load_model
from tasks import Log, add_data, add_steady, finish, stage, steady
from torch import nn
from torch.utils.data import DataLoader

from lutra.sentences import SentenceEncoder
from lutra.train import FinetuneReport, convert, finetune, recipe_to_json
from lutra.train.recipe import Recipe


def plain(text: str) -> str:
    """A text without case and punctuation, to find repeats."""
    return re.sub(r"[^a-z0-9]+", " ", text.lower()).strip()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_data(parser, "folder with sst2_*.tsv.xz")
    parser.add_argument("--output", type=Path, default=Path("sst2.lutra"))
    parser.add_argument("--checkpoints", type=Path, required=True, help="folder; stop and resume")
    parser.add_argument("--v", type=int, default=16, help="values per sub-vector; default: 16")
    parser.add_argument(
        "--int8", nargs="+", default=(), metavar="PATTERN",
        help="layers of the blocks that become int8 instead, such as 'attention.*'",
    )  # fmt: skip
    parser.add_argument("--gradient", default="projected")
    parser.add_argument("--reconstruction", type=float, default=0.0, help="eLUT-NN: 1e-3")
    parser.add_argument("--epochs", type=int, default=3, help="of the lookup form; default: 3")
    parser.add_argument("--dense-epochs", type=int, default=2)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--lr", type=float, default=3e-4)
    parser.add_argument("--dense-lr", type=float, default=3e-5)
    parser.add_argument("--feature-weight", type=float, default=1.0)
    parser.add_argument("--distillation-temperature", type=float, default=2.0)
    parser.add_argument("--steps", type=int, help="stop the lookup training after so many")
    parser.add_argument("--start", type=Path, help="checkpoint of another run to start from")
    parser.add_argument("--name", help="of the run's checkpoints; default: v<V>")
    parser.add_argument("--dense-only", action="store_true")
    add_steady(parser)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    bert, tokenizer = load_bert()
    sets = {name: read_tsv(options.data / f"sst2_{name}.tsv.xz") for name in ("dev", "test")}
    labels, texts = read_tsv(options.data / "sst2_phrases_train.tsv.xz")
    seen = {plain(text) for _, others in sets.values() for text in others}
    kept = [i for i, text in enumerate(texts) if plain(text) not in seen]
    labels, texts = [labels[i] for i in kept], [texts[i] for i in kept]
    print(f"{len(texts)} training phrases", flush=True)
    train = tokenize(tokenizer, texts)
    dev = Batches(tokenize(tokenizer, sets["dev"][1]), sets["dev"][0], 64)

    torch.manual_seed(options.seed)
    dense = Classifier(bert, 2)
    dense.bert.embeddings.word_embeddings.weight.requires_grad_(False)
    report = finetune(
        dense,
        DataLoader(
            Batches(train, labels, 64, options.dense_epochs, options.seed),
            batch_size=1, shuffle=True, collate_fn=first,
        ),
        epochs=1, lr=options.dense_lr, warmup=100, clip_norm=1.0,
        evaluate=Log("dense", lambda model: accuracy(model, dev), "%"), evaluate_every=400,
        checkpoint_dir=stage(options.checkpoints, "dense"), checkpoint_every=400, seed=options.seed,
    )  # fmt: skip
    print(report.history[-1], flush=True)

    def export_and_measure(
        model: nn.Module, teacher: nn.Module, recipe: Recipe, report: FinetuneReport
    ) -> None:
        """Writes the file and prints what the engine makes of the test sentences."""
        labels, texts = sets["test"]
        export_text(
            model, options.output, tokenizer, dev[0][0], longest=128,
            metadata={
                "classes": ["negative", "positive"],
                "recipe": recipe_to_json(recipe),
                "seed": options.seed,
                "training": {"steps": report.steps, "seconds": report.seconds},
            },
        )  # fmt: skip
        encoder = SentenceEncoder(options.output, threads=options.threads)
        test = Batches(tokenize(tokenizer, texts), labels, 32)
        start = time.perf_counter()
        dense_accuracy = accuracy(teacher, test)
        dense_seconds = time.perf_counter() - start
        start = time.perf_counter()
        found = encoder.encode(texts).argmax(1)
        seconds = time.perf_counter() - start
        finish(
            options.output,
            {
                "sentences": len(labels),
                "dense_top1": round(dense_accuracy, 2),
                "top1": round(100.0 * float((found == np.array(labels)).mean()), 2),
                "dev_top1": [round(entry["metric"], 2) for entry in report.history],
                "dense_sentences_per_second": round(len(labels) / dense_seconds, 1),
                "sentences_per_second": round(len(labels) / seconds, 1),
            },
        )

    if options.dense_only:
        export_and_measure(dense, dense, {}, report)
        return
    teacher = copy.deepcopy(dense).eval()
    calibration = Batches(train[:20000], labels[:20000], 64, 1, 1)
    picked = [calibration[i] for i in range(0, len(calibration), max(1, len(calibration) // 32))]
    dense.dropout.p = 0.0
    for module in dense.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    recipe = pq_recipe(
        options.v, options.int8, gradient=options.gradient, reconstruction=options.reconstruction
    )
    lookups, converted = convert(dense, recipe, picked, seed=options.seed)
    print(converted, flush=True)
    print("after conversion", accuracy(lookups, dev), flush=True)
    if options.start is not None:
        load_model(lookups, options.start / "model.safetensors")
        print("start", accuracy(lookups, dev), flush=True)
    report = finetune(
        lookups,
        DataLoader(
            Batches(train, labels, options.batch_size, options.epochs, options.seed + 1),
            batch_size=1, shuffle=True, collate_fn=first,
        ),
        **({"steps": options.steps} if options.steps else {"epochs": 1}),
        lr=options.lr, warmup=100, clip_norm=1.0, **steady(options),
        teacher=teacher, distillation=1.0,
        distillation_temperature=options.distillation_temperature,
        feature_layers=FEATURES, feature_weight=options.feature_weight,
        evaluate=Log(f"V={options.v}", lambda model: accuracy(model, dev), "%"), evaluate_every=100,
        checkpoint_dir=stage(options.checkpoints, options.name or f"v{options.v}"),
        checkpoint_every=100, seed=options.seed,
    )  # fmt: skip
    export_and_measure(lookups, teacher, recipe, report)


if __name__ == "__main__":
    main()
