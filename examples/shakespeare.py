"""Tiny-shakespeare: a character model in Llama's form, then its linear layers at a few bits.

    python examples/shakespeare.py --data DATA --bits 1.58 --output zoo/shakespeare_ternary.lutra \
        --checkpoints runs/shakespeare --mixed-precision bf16

DATA is a folder with tinyshakespeare.txt. Two trainings: the dense network, and its low-bit form by
straight-through gradients with the dense one as teacher. The run can be stopped at any time: the
same command goes on from the last checkpoint; `--dense-only` ends after the first training, which
all --bits share.

The first 90 % of the text are for training, the next 5 % for every choice, and the last 5 % are
used once, at the end, through the engine.
"""

from __future__ import annotations

import argparse
import copy
import math
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from tasks import add_data, add_training, finish, stage
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import lutra
from lutra.preprocess.tokens import CharacterTokenizer
from lutra.train import Int8, LowBit, convert, export_decoder

CONTEXT = 256


class Text(NamedTuple):
    """Characters, and the text as their indices: int64 vectors to train, to choose, to test."""

    characters: str
    train: Tensor
    valid: Tensor
    test: Tensor


def load_text(path: Path) -> Text:
    """The text of a file, cut at 90 % and 95 %."""
    symbols, ids = np.unique(np.frombuffer(path.read_bytes(), np.uint8), return_inverse=True)
    whole = torch.from_numpy(ids.astype(np.int64))
    cuts = [int(0.9 * len(whole)), int(0.95 * len(whole))]
    return Text("".join(map(chr, symbols)), *torch.tensor_split(whole, cuts))


def new_model(vocabulary: int, options: argparse.Namespace) -> LlamaForCausalLM:
    """A small Llama with random weights; its head is the embedding."""
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=options.width, intermediate_size=options.width * 8 // 3,
        num_hidden_layers=options.layers, num_attention_heads=options.width // 32,
        num_key_value_heads=options.width // 64, max_position_embeddings=CONTEXT,
        tie_word_embeddings=True, attention_dropout=0.0, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def windows(ids: Tensor, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """`count` random windows of the text, and the characters that follow: (count, CONTEXT) each."""
    starts = torch.randint(len(ids) - CONTEXT, (count, 1), generator=generator)
    places = starts + torch.arange(CONTEXT)
    return ids[places], ids[places + 1]


@torch.no_grad()
def mean_loss(model: nn.Module, ids: Tensor) -> float:
    """Mean negative log likelihood of a character in nats, over windows that follow each other."""
    model.eval()
    count = (len(ids) - 1) // CONTEXT
    inputs = ids[: count * CONTEXT].view(count, CONTEXT)
    targets = ids[1 : count * CONTEXT + 1].view(count, CONTEXT)
    total = 0.0
    for x, y in zip(inputs.split(16), targets.split(16), strict=True):
        scores = model(input_ids=x, use_cache=False).logits.float()
        total += float(F.cross_entropy(scores.flatten(0, 1), y.flatten(), reduction="sum"))
    return total / targets.numel()


def train(
    model: nn.Module,
    text: Text,
    steps: int,
    lr: float,
    options: argparse.Namespace,
    folder: Path | None,
    *,
    teacher: nn.Module | None = None,
    name: str,
) -> None:
    """Trains `model` in place; with a folder it goes on from the last evaluation.

    The targets are the characters that follow; with a teacher, its scores too. The model ends with
    the parameters that were best on the validation text.
    """
    decay = [p for p in model.parameters() if p.ndim > 1]
    rest = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": decay, "weight_decay": options.weight_decay},
              {"params": rest, "weight_decay": 0.0}]  # fmt: skip
    optimizer = torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.99))
    state = None if folder is None else folder / "state.pt"
    first, best, kept = 0, math.inf, copy.deepcopy(model.state_dict())
    if state is not None and state.exists():
        saved = torch.load(state, weights_only=True)
        first, best, kept = saved["step"], saved["best"], saved["kept"]
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
    warmup = min(100, steps // 10)
    for step in range(first, steps):
        model.train()
        rate = min((step + 1) / (warmup + 1), 0.5 + 0.5 * math.cos(math.pi * step / steps))
        for group in optimizer.param_groups:
            group["lr"] = lr * rate
        generator = torch.Generator().manual_seed(options.seed * 1_000_003 + step)
        x, y = windows(text.train, options.batch, generator)
        bf16 = options.mixed_precision == "bf16"
        with torch.autocast("cpu", torch.bfloat16, bf16):
            scores = model(input_ids=x, use_cache=False).logits
        flat = scores.float().flatten(0, 1)
        loss = F.cross_entropy(flat, y.flatten())
        if teacher is not None:
            with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, bf16):
                wanted = teacher(input_ids=x, use_cache=False).logits.float().flatten(0, 1)
            soft = F.kl_div(flat.log_softmax(1), wanted.log_softmax(1),
                            reduction="batchmean", log_target=True)  # fmt: skip
            loss = 0.5 * loss + 0.5 * soft
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if (step + 1) % options.evaluate_every == 0 or step + 1 == steps:
            value = mean_loss(model, text.valid)
            print(f"{name}: step {step + 1}, validation {value:.4f} nats a character", flush=True)
            if value < best:
                best, kept = value, copy.deepcopy(model.state_dict())
            if state is not None:
                state.parent.mkdir(parents=True, exist_ok=True)
                now = {"step": step + 1, "best": best, "kept": kept, "model": model.state_dict(),
                       "optimizer": optimizer.state_dict()}  # fmt: skip
                torch.save(now, state.with_suffix(".new"))
                state.with_suffix(".new").replace(state)
    model.load_state_dict(kept)  # of the best evaluation
    model.eval()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_data(parser, "folder with tinyshakespeare.txt")
    add_training(parser, "shakespeare.lutra", tables=False)
    parser.add_argument("--width", type=int, default=192)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--dense-steps", type=int, default=2000)
    parser.add_argument("--dense-lr", type=float, default=2e-3)
    parser.add_argument("--steps", type=int, default=1500, help="of the low-bit form; 0: none")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--weight-decay", type=float, default=0.1, help="of the dense network")
    parser.add_argument("--evaluate-every", type=int, default=250)
    parser.add_argument("--bits", type=float, default=1.58, choices=(1, 1.58, 2, 3, 4))
    parser.add_argument("--group", type=int, choices=(32, 64), help="default: one scale an output")
    parser.add_argument("--dense-only", action="store_true", help="write the dense network")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    text = load_text(options.data / "tinyshakespeare.txt")
    torch.manual_seed(options.seed)
    dense = new_model(len(text.characters), options)
    parameters = sum(p.numel() for p in dense.parameters())
    print(f"{parameters} parameters", flush=True)
    train(
        dense, text, options.dense_steps, options.dense_lr, options,
        stage(options.checkpoints, "dense"), name="dense",
    )  # fmt: skip
    results: dict[str, Any] = {
        "parameters": parameters, "dense_validation": math.exp(mean_loss(dense, text.valid)),
    }  # fmt: skip
    model: nn.Module = dense
    if not options.dense_only:
        rounding = "absmean" if options.bits < 2 and options.steps else "calibrated"
        method = LowBit(options.bits, group=options.group, rounding=rounding)
        recipe = {"lm_head": Int8(), "model.embed_tokens": Int8(), "*": method}
        generator = torch.Generator().manual_seed(options.seed)
        calibration = [windows(text.train, 16, generator)[0] for _ in range(8)]
        model, report = convert(dense, recipe, calibration, seed=options.seed)
        print(report, flush=True)
        results["converted_validation"] = math.exp(mean_loss(model, text.valid))
        print(f"converted: validation {results['converted_validation']:.3f}", flush=True)
        if options.steps:
            options.weight_decay = 0.0
            train(
                model, text, options.steps, options.lr, options,
                stage(options.checkpoints, f"{options.bits:g} bits"),
                teacher=dense, name=f"{options.bits:g} bits",
            )  # fmt: skip
        results["validation"] = math.exp(mean_loss(model, text.valid))
    settings = ("dense_steps", "dense_lr", "steps", "lr", "batch", "bits", "group", "seed")
    export_decoder(
        model, options.output, max_length=CONTEXT,
        tokenizer=CharacterTokenizer(text.characters), example=text.valid[None, :64],
        metadata={"training": {name: getattr(options, name) for name in settings}},
    )  # fmt: skip
    generator = lutra.Generator(options.output)
    results |= {
        "engine_validation": generator.perplexity(text.valid.numpy(), context=CONTEXT),
        "engine_test": generator.perplexity(text.test.numpy(), context=CONTEXT),
        "dense_test": math.exp(mean_loss(dense, text.test)),
    }
    print(generator.generate("ROMEO:", 200, temperature=0.8, seed=options.seed).text)
    finish(options.output, results)


if __name__ == "__main__":
    main()
