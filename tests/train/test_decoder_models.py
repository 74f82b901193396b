"""Decoders of transformers beside Llama: which become files, and what is said of the others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from small_decoders import LENGTH, SETTINGS, VOCABULARY  # noqa: E402
from torch import Tensor, nn  # noqa: E402

from lutra import Generator, Session  # noqa: E402
from lutra.errors import UnsupportedModelError  # noqa: E402
from lutra.preprocess.tokens import CharacterTokenizer  # noqa: E402
from lutra.train import Keep, LowBit, convert, export, export_decoder  # noqa: E402
from lutra.train.exporting.decoder import feeds  # noqa: E402

#: The name of a family, and settings of its own.
FAMILIES: dict[str, dict[str, Any]] = {
    "Phi": {},  # rotary embeddings of a half of each head, blocks side by side
    "Qwen3": {"head_dim": 8},  # norms of queries and keys
    "Phi3": {},  # one layer makes queries, keys and values, one gate and up
    "StableLm": {},
    "Gemma": {"head_dim": 8},
    "Mistral": {"sliding_window": 64},
    "SmolLM3": {"num_hidden_layers": 2, "no_rope_layer_interval": 2},
    "Olmo": {},  # norms without weights
    "Olmo2": {},
    "GPTNeoX": {},
    "Granite": {"embedding_multiplier": 2.0, "residual_multiplier": 0.5, "logits_scaling": 3.0},
    "Cohere": {},  # pairs next to each other, norms without biases
    "Starcoder2": {},
    "Falcon": {},
    "Glm": {"head_dim": 8},
    "Nemotron": {},
    "Helium": {"head_dim": 8},
}
QUICK = ("Phi", "Qwen3")


def build(family: str, **options: Any) -> Any:
    """A model whose random weights make texts that say something."""
    settings = {**SETTINGS, **FAMILIES.get(family, {}), **options}
    if family in ("GPTNeoX", "Falcon"):
        del settings["num_key_value_heads"]
    config = getattr(transformers, f"{family}Config")
    model = getattr(transformers, f"{family}ForCausalLM")(config(**settings)).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim == 1:
                parameter.copy_(parameter + 0.2 * noise)
            else:
                parameter.copy_(noise * 1.5 * parameter.shape[-1] ** -0.5)
    return model


def greedy(model: Any, ids: list[int], count: int) -> list[int]:
    """The text of `generate` of transformers."""
    given = torch.tensor([ids])
    made = model.generate(
        given, attention_mask=torch.ones_like(given), max_new_tokens=count, do_sample=False,
        pad_token_id=0,
    )  # fmt: skip
    return [int(token) for token in made[0, len(ids) :]]


def check(model: nn.Module, path: Path, tolerance: float) -> None:
    """The file has the scores of the model, and its text."""
    generator = Generator(path, threads=1)
    ids = torch.randint(0, VOCABULARY, (2, 12), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        want = model(ids, use_cache=False).logits.numpy()
    (scores,) = generator.session.run(None, feeds(ids.numpy().astype(np.int32)))
    np.testing.assert_allclose(scores, want, atol=tolerance * np.abs(want).max())
    for each in generator.generate([[3, 14, 15, 9, 2], [1]], 12):
        assert list(each.tokens) == greedy(model, list(each.prompt), 12)


families = pytest.mark.parametrize(
    "family",
    [*QUICK, *(pytest.param(f, marks=pytest.mark.slow) for f in FAMILIES if f not in QUICK)],
)


@families
def test_a_file_continues_texts_as_the_model_does(family: str, tmp_path: Path) -> None:
    model = build(family)
    graph = export_decoder(model, tmp_path / "m.lutra", max_length=LENGTH)
    ops = [node.op for node in graph.nodes]
    attention = [node.attrs for node in graph.nodes if node.op == "cached_attention"]
    # Falcon's one head of keys comes to the cache as often as there are heads.
    groups = 4 if family in ("GPTNeoX", "Falcon") else 2
    assert all((each["heads"], each["kv_heads"]) == (4, groups) for each in attention)
    assert attention
    assert ("expand" in ops) == (family == "Falcon")
    if family == "Qwen3":
        assert ops.count("rms_norm") == 5  # those of queries and keys too
        assert "rsqrt" not in ops
    check(model, tmp_path / "m.lutra", 1e-3)


# The linear layers of Falcon multiply by `@`: they are kept.
@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "bits"),
    [*((family, 4) for family in FAMILIES if family != "Falcon"), ("Phi", 1.58), ("Gemma", 1.58)],
)
def test_a_converted_model_says_what_the_module_says(
    family: str, bits: float, tmp_path: Path
) -> None:
    ids = torch.randint(0, VOCABULARY, (8, 20), generator=torch.Generator().manual_seed(1))
    recipe = {"*lm_head": Keep(), "*": LowBit(bits, otherwise=Keep())}
    converted, report = convert(build(family), recipe, [ids[:4], ids[4:]])
    assert report.replaced
    export_decoder(converted, tmp_path / "m.lutra", max_length=LENGTH, example=ids[:2, :16])
    check(converted, tmp_path / "m.lutra", 2e-3)


def test_a_window_is_as_long_as_texts_may_be(tmp_path: Path) -> None:
    """Also where it is longer than what a model is tried on."""
    path = tmp_path / "m.lutra"
    model = build("Mistral", sliding_window=26)
    with pytest.raises(
        UnsupportedModelError,
        match=r"self_attn' sees the last 26 tokens only, and a text may have max_length=27; "
        "choose 26 at most",
    ):
        export_decoder(model, path, max_length=27)
    assert not path.exists()
    export_decoder(model, path, max_length=26)
    ids = [int(i) for i in torch.randint(0, VOCABULARY, (26,))]
    with torch.no_grad():
        scores = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
    want = scores[torch.arange(25), torch.tensor(ids[1:])].numpy()
    np.testing.assert_allclose(Generator(path).score(ids), want, atol=1e-3)


class Scores(nn.Module):
    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor) -> Tensor:
        scores: Tensor = self.model(ids, use_cache=False).logits
        return scores


@pytest.mark.slow
def test_a_file_of_whole_texts_has_the_window(tmp_path: Path) -> None:
    """Of inputs that are longer than the window, though the example is shorter."""
    model = Scores(build("Mistral", sliding_window=26))
    ids = torch.randint(0, VOCABULARY, (2, 50), generator=torch.Generator().manual_seed(2))
    export(model, tmp_path / "m.lutra", ids[:, :12], dynamic_axes=(0, 1))
    with torch.no_grad():
        want = model(ids).numpy()
    session = Session(tmp_path / "m.lutra")
    (scores,) = session.run(None, {session.inputs[0].name: ids.numpy().astype(np.int32)})
    np.testing.assert_allclose(scores, want, atol=1e-3 * np.abs(want).max())


@pytest.mark.parametrize(
    ("family", "options", "match"),
    [
        ("Gemma2", {"head_dim": 8}, r"squashes its scores by tanh \(`attn_logit_softcapping`\)"),
        pytest.param(
            "Bloom", {"n_layer": 1, "n_head": 4}, "its scores by affine, add, relative_bias, which",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            "XGLM", {"d_model": 32, "ffn_dim": 48, "num_layers": 1, "attention_heads": 4},
            "computes its scores by relative_bias, maximum, which", marks=pytest.mark.slow,
        ),
    ],
)  # fmt: skip
def test_scores_that_a_cache_does_not_know(
    family: str, options: dict[str, Any], match: str, tmp_path: Path
) -> None:
    with pytest.raises(UnsupportedModelError, match=match) as caught:
        export_decoder(build(family, **options), tmp_path / "m.lutra", max_length=LENGTH)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "m.lutra").exists()


@pytest.mark.slow
def test_a_file_ends_texts_as_the_model_does(tmp_path: Path) -> None:
    path = tmp_path / "m.lutra"
    model = build("Llama")
    letters = "".join(chr(ord("A") + i) for i in range(VOCABULARY))
    options: Any = {"max_length": LENGTH, "tokenizer": CharacterTokenizer(letters)}
    export_decoder(model, path, **options)  # the model has no end
    whole = list(Generator(path).generate([3, 14, 15], 12).tokens)
    assert len(whole) == 12
    first = {token: whole.index(token) for token in whole}
    late, early = sorted(first, key=lambda token: first[token])[-1:-3:-1]

    def made(**settings: Any) -> tuple[list[int], str]:
        given = Generator(path).generate([3, 14, 15], 12, **settings)
        return list(given.tokens), given.reason

    model.config.eos_token_id = late
    model.generation_config.eos_token_id = None
    export_decoder(model, path, **options)
    assert made() == (whole[: first[late]], "end")
    model.generation_config.eos_token_id = [late, early, VOCABULARY]  # before those of config
    export_decoder(model, path, **options)
    assert made() == (whole[: first[early]], "end")
    assert made()[0] == greedy(model, [3, 14, 15], 12)[: first[early]]
    assert made(stop=letters[whole[0]]) == ([whole[0]], "stop")  # beside its own ends
    export_decoder(model, path, eos=(), **options)
    assert made() == (whole, "length")
    export_decoder(model, path, eos=late, **options)
    assert made() == (whole[: first[late]], "end")
