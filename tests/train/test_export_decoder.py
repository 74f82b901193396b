"""Language models of transformers: files with a cache give what the models give."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from small_decoders import LENGTH, SETTINGS, VOCABULARY  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from torch.utils.data import DataLoader  # noqa: E402
from transformers import (  # noqa: E402
    BioGptConfig,
    BioGptForCausalLM,
    BitNetConfig,
    BitNetForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTJConfig,
    GPTJForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from lutra import Generator, Session, run_reference, runnable_isas  # noqa: E402
from lutra.errors import InputError, UnsupportedModelError  # noqa: E402
from lutra.preprocess.tokens import CharacterTokenizer  # noqa: E402
from lutra.train import PQ, Int8, Keep, LowBit, convert, export_decoder, finetune  # noqa: E402
from lutra.train.exporting.decoder import feeds  # noqa: E402


def spread(model: nn.Module, seed: int = 0) -> Any:
    """Weights that make texts of a random model say something."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim == 1 and "norm" in name:
                parameter.copy_(1 + 0.2 * noise)
            else:
                scale = 0.2 if "embed" in name else 1.5 * parameter.shape[-1] ** -0.5
                parameter.copy_(noise * scale)
    return model.eval()


MODELS = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SETTINGS, tie_word_embeddings=True)),
    "llama-own-head": lambda: LlamaForCausalLM(LlamaConfig(**SETTINGS)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SETTINGS)),
    "bitnet": lambda: BitNetForCausalLM(BitNetConfig(**SETTINGS)),
}
_SIZES: dict[str, Any] = {"vocab_size": VOCABULARY, "bos_token_id": None, "eos_token_id": None}
_NARROW: dict[str, Any] = {**_SIZES, "n_embd": 32, "n_layer": 1, "n_head": 4, "n_positions": 64}
_WIDE: dict[str, Any] = {
    **_SIZES,
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
#: Positions that are learnt, or are read from a table where transformers computes.
POSITIONS = {
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(**_NARROW)),
    "opt": lambda: OPTForCausalLM(OPTConfig(**_WIDE, ffn_dim=48, word_embed_proj_dim=32)),
    "biogpt": lambda: BioGptForCausalLM(BioGptConfig(**_WIDE, intermediate_size=48)),
    "gptj": lambda: GPTJForCausalLM(GPTJConfig(**_NARROW, rotary_dim=4)),
}


def greedy(model: Any, ids: list[int], count: int) -> list[int]:
    """The text of `generate` of transformers."""
    made = model.generate(
        torch.tensor([ids]), max_new_tokens=count, do_sample=False, use_cache=True, pad_token_id=0
    )
    return [int(token) for token in made[0, len(ids) :]]


@pytest.mark.parametrize(
    "name",
    [*list(MODELS)[:1], *(pytest.param(n, marks=pytest.mark.slow) for n in list(MODELS)[1:])],
)
def test_greedy_text_of_a_file_is_that_of_transformers(name: str, tmp_path: Path) -> None:
    model = spread(MODELS[name]())
    path = tmp_path / "m.lutra"
    graph = export_decoder(model, path, max_length=LENGTH)
    ops = [node.op for node in graph.nodes]
    norms = 5 if name == "bitnet" else 3
    assert (ops.count("cached_attention"), ops.count("rms_norm")) == (1, norms)
    assert not {"expand", "transpose", "attention"} & set(ops)
    attention = next(node for node in graph.nodes if node.op == "cached_attention")
    assert (attention.attrs["heads"], attention.attrs["kv_heads"]) == (4, 2)
    embedding = next(node for node in graph.nodes if node.op == "embedding")
    tied = name == "llama"
    assert (graph.nodes[-1].tensors["weight"] == embedding.tensors["weight"]) == tied
    assert embedding.name == "model.embed_tokens"
    prompt = [3, 14, 15, 9, 2]
    want = greedy(model, prompt, 20)
    assert len(set(want)) > 2
    code = (
        "import sys, lutra; g = lutra.Generator(sys.argv[1], threads=1, isa=sys.argv[2]); "
        "print(list(g.generate([3, 14, 15, 9, 2], 20).tokens)); "
        "assert not {'torch', 'tokenizers', 'transformers'} & set(sys.modules)"
    )
    for isa in runnable_isas():
        made = subprocess.run(
            [sys.executable, "-c", code, str(path), isa], capture_output=True, text=True, check=True
        )
        assert made.stdout.strip() == str(want)
    batch = Generator(path).generate([prompt, [1], [5, 6, 7]], 12)
    for each in batch:
        assert list(each.tokens) == greedy(model, list(each.prompt), 12)


@pytest.mark.parametrize(
    "name",
    ["gpt2", *(pytest.param(n, marks=pytest.mark.slow) for n in ("opt", "biogpt", "gptj"))],
)
def test_positions_from_a_table(name: str, tmp_path: Path) -> None:
    """Tokens of later runs have the positions behind those before them."""
    model = spread(POSITIONS[name]())
    path = tmp_path / "m.lutra"
    graph = export_decoder(model, path, max_length=LENGTH)
    tables = [node for node in graph.nodes if node.op == "position_embedding"]
    assert tables
    for node in tables:
        assert node.inputs[1] == "start"
        assert len(graph.tensors[node.tensors["weight"]]) == LENGTH
    given = Generator(path, threads=1)
    for each in given.generate([[3, 14, 15, 9, 2], [1], [5, 6, 7]], 12):
        assert list(each.tokens) == greedy(model, list(each.prompt), 12)
    ids = torch.randint(0, VOCABULARY, (2, 12), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        want = model(ids).logits.numpy()
    tokens, cache, made = ids.numpy().astype(np.int32), given.session.new_cache(2), []
    for begin, end in ((0, 5), (5, 6), (6, 12)):
        cut = {**feeds(tokens[:, begin:end]), "start": np.full(2, begin, np.int32)}
        made.append(given.session.run(None, cut, cache=cache)[0])
    (reference,) = run_reference(graph, feeds(tokens)).values()
    for scores in (np.concatenate(made, axis=1), reference):
        np.testing.assert_allclose(scores, want, atol=1e-3 * np.abs(want).max())
    with pytest.raises(UnsupportedModelError, match=r"has 6\d positions and max_length=70; choose"):
        export_decoder(model, path, max_length=70)


@pytest.mark.parametrize("method", [Int8(), PQ(k=16, v=4), LowBit(4)], ids=["int8", "pq", "lowbit"])
def test_a_converted_model_says_what_the_module_says(method: Any, tmp_path: Path) -> None:
    model = spread(MODELS["llama"]())
    ids = torch.randint(0, VOCABULARY, (16, 20), generator=torch.Generator().manual_seed(1))
    converted, report = convert(model, {"*lm_head": Keep(), "*": method}, [ids[:8], ids[8:]])
    assert len(report.replaced) == (8 if isinstance(method, Int8) else 7)  # the embedding too
    path = tmp_path / "m.lutra"
    graph = export_decoder(converted, path, max_length=LENGTH, example=ids[:2, :16])
    assert [node.op for node in graph.nodes].count(f"{method.name}_linear") == 7
    session = Session(path)
    given = feeds(ids[:, :12].numpy().astype(np.int32))
    (scores,) = session.run(None, given)
    with torch.no_grad():
        want = converted.eval()(ids[:, :12]).logits.numpy()
    np.testing.assert_allclose(scores, want, atol=2e-3 * np.abs(want).max())
    prompt = [3, 14, 15, 9, 2]
    made = Generator(path).generate(prompt, 15)
    assert list(made.tokens) == greedy(converted, prompt, 15)
    (reference,) = run_reference(graph, given).values()
    # its sums are of float64: an activation between two integers may be rounded to the other one
    moved = np.abs(reference - scores).max(axis=2) / np.abs(want).max()  # of each token
    assert np.median(moved) < 1e-5
    assert moved.max() < 0.02


def test_fine_tuning_by_the_loss_of_transformers(tmp_path: Path) -> None:
    """Batches with labels need no loss of their own; the file says what was learnt."""
    model = spread(MODELS["llama"]())
    ids = torch.tensor([[1, 2, 3, 4, 5, 6] * 4] * 8)  # a text to be learnt
    method = {"*lm_head": Keep(), "*": Int8()}
    converted, _ = convert(model, method, [ids])
    path = tmp_path / "m.lutra"
    export_decoder(converted, path, max_length=LENGTH)
    before = Generator(path).perplexity(ids[0].numpy())
    rows = [{"input_ids": row, "labels": row} for row in ids]
    finetune(converted, DataLoader(rows, batch_size=8), epochs=30, lr=3e-3)
    export_decoder(converted, path, max_length=LENGTH)
    generator = Generator(path)
    assert generator.perplexity(ids[0].numpy()) < min(before / 2, 3)
    assert generator.generate([1, 2, 3, 4, 5, 6, 1, 2], 6).tokens == (3, 4, 5, 6, 1, 2)


@pytest.mark.parametrize("name", ["llama", pytest.param("gptj", marks=pytest.mark.slow)])
def test_positions_beyond_those_of_the_model(name: str, tmp_path: Path) -> None:
    """Angles are computed as far as asked for, also where a table would end at 2048."""
    if name == "llama":
        settings = {**SETTINGS, "max_position_embeddings": 4096}
        model = spread(LlamaForCausalLM(LlamaConfig(**settings)))
        graph = export_decoder(model, tmp_path / "m.lutra", max_length=3000)
        cos = next(node for node in graph.nodes if node.op == "rotary").tensors["cos"]
        assert graph.tensors[cos].shape == (3000, 8)
    else:
        settings = {**_NARROW, "n_positions": 4096}
        model = spread(GPTJForCausalLM(GPTJConfig(**settings, rotary_dim=4)))
        export_decoder(model, tmp_path / "m.lutra", max_length=3000)
    ids = [int(i) for i in torch.randint(0, VOCABULARY, (2500,))]
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0].double()
    want = logits.log_softmax(-1)[torch.arange(2499), torch.tensor(ids[1:])].numpy()
    got = Generator(tmp_path / "m.lutra").score(ids)
    np.testing.assert_allclose(got, want, atol=1e-3)


def test_a_tokenizer_goes_with_the_file(tmp_path: Path) -> None:
    model = spread(MODELS["llama"]())
    letters = "".join(chr(ord("A") + i) for i in range(38))
    export_decoder(
        model, tmp_path / "m.lutra", max_length=LENGTH,
        tokenizer=CharacterTokenizer(letters), bos=38, eos=[39], metadata={"seed": 3},
    )  # fmt: skip
    generator = Generator(tmp_path / "m.lutra")
    assert generator.tokens("BAD") == [38, 1, 0, 3]
    assert generator.session.graph.metadata["seed"] == 3
    with pytest.raises(InputError, match="the tokenizer has 41 tokens, and the model knows 40"):
        export_decoder(
            model, tmp_path / "n.lutra", max_length=9,
            tokenizer=CharacterTokenizer(letters + "xyz"),
        )  # fmt: skip
    assert not (tmp_path / "n.lutra").exists()


class Mixer(nn.Module):
    """A causal mean over tokens beside attention: a cache of keys does not remember it."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = spread(MODELS["llama"]()).model
        self.head = nn.Linear(32, VOCABULARY)

    def forward(self, ids: Tensor) -> Tensor:
        h = self.inner(ids, use_cache=False).last_hidden_state
        return self.head(h + h.cumsum(1))


class Bidirectional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, 16)
        self.layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)

    def forward(self, ids: Tensor) -> Tensor:
        result: Tensor = self.layer(self.embed(ids)) @ self.embed.weight.T
        return result


def test_what_is_no_decoder_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "m.lutra"
    for model, match in (
        (Mixer(), "the model looks at tokens in a way that lutra does not know"),
        (Bidirectional().eval(), "is attention to later tokens"),
        (nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 9)), "has no attention that lutra knows"),
    ):
        with pytest.raises(Exception, match=match) as caught:
            export_decoder(model, path, max_length=LENGTH)
        assert "\n" not in str(caught.value)
        assert not path.exists()
    llama = spread(MODELS["llama"]())
    for options, match in (
        ({"max_length": 3}, "max_length=3 must be a whole number in 4.."),
        ({"max_length": 9, "bos": 40}, "40 as the beginning or end of texts is no token"),
        ({"max_length": 9, "example": torch.zeros(1, 12).long()}, "with 4..9 tokens"),
        ({"max_length": 9, "example": torch.full((1, 5), 40)}, "the model has tokens 0..39"),
    ):
        with pytest.raises(InputError, match=re.escape(match)):
            export_decoder(llama, path, **options)
    with pytest.raises((InputError, UnsupportedModelError)):
        export_decoder(nn.Linear(3, 3), path, max_length=9)


@pytest.mark.parametrize("length", [4, 9, 20])
def test_an_example_as_long_as_texts_may_be(tmp_path: Path, length: int) -> None:
    torch.manual_seed(0)
    model = spread(LlamaForCausalLM(LlamaConfig(**SETTINGS))).eval()
    ids = torch.randint(0, model.config.vocab_size, (1, length))
    export_decoder(model, tmp_path / "m.lutra", max_length=length, example=ids)
    export_decoder(model, tmp_path / "n.lutra", max_length=length)
    assert Generator(tmp_path / "m.lutra").max_length == length
