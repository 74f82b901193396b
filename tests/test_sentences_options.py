"""The options of `SentenceTransformer.encode`: the same names, shapes and orders of results."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from text_support import encoder_graph, text_metadata

import lutra
from lutra.errors import FormatError, InputError, LutraError
from lutra.sentences import SentenceEncoder

TEXTS = ["A good film.", "the cat was not a dog", "", "bad"]
PROMPTS = {"query": "is it good? ", "nothing": ""}


@pytest.fixture
def encoder() -> SentenceEncoder:
    return SentenceEncoder(encoder_graph(text_metadata(prompts=PROMPTS)), threads=1)


def test_the_defaults_are_those_of_sentence_transformers(encoder: SentenceEncoder) -> None:
    plain = encoder.encode(TEXTS)
    given = encoder.encode(
        TEXTS,
        batch_size=2,
        show_progress_bar=False,
        output_value="sentence_embedding",
        precision="float32",
        convert_to_numpy=True,
        convert_to_tensor=False,
        device="cpu",
        normalize_embeddings=False,
        prompt=None,
        prompt_name=None,
        truncate_dim=None,
    )
    np.testing.assert_allclose(given, plain, atol=1e-6)
    assert given.dtype == np.float32


def test_prompts_stand_in_front_of_every_text(encoder: SentenceEncoder) -> None:
    wanted = encoder.encode(["is it good? " + text for text in TEXTS])
    assert np.array_equal(encoder.encode(TEXTS, prompt="is it good? "), wanted)
    assert np.array_equal(encoder.encode(TEXTS, prompt_name="query"), wanted)
    assert np.array_equal(encoder.encode(TEXTS, prompt_name="nothing"), encoder.encode(TEXTS))
    assert np.array_equal(encoder.encode(TEXTS[0], prompt_name="query"), wanted[0])
    assert not np.array_equal(wanted, encoder.encode(TEXTS))
    # a prompt that is given comes before one that is named
    given = encoder.encode(TEXTS, prompt="", prompt_name="query")
    assert np.array_equal(given, encoder.encode(TEXTS))
    assert encoder.prompts == PROMPTS


def test_vectors_are_cut_before_they_get_length_1(encoder: SentenceEncoder) -> None:
    whole = encoder.encode(TEXTS)
    assert np.array_equal(encoder.encode(TEXTS, truncate_dim=3), whole[:, :3])
    cut = encoder.encode(TEXTS, truncate_dim=3, normalize_embeddings=True)
    np.testing.assert_allclose(np.linalg.norm(cut, axis=1), 1, atol=1e-6)
    assert encoder.encode("bad", truncate_dim=3).shape == (3,)
    assert encoder.encode(TEXTS, truncate_dim=99).shape == (4, 8)


def test_bits_are_the_signs(encoder: SentenceEncoder) -> None:
    vectors = encoder.encode(TEXTS)
    unsigned = encoder.encode(TEXTS, precision="ubinary")
    assert unsigned.dtype == np.uint8
    assert unsigned.shape == (4, 1)
    assert np.array_equal(np.unpackbits(unsigned, axis=1), vectors > 0)
    signed = encoder.encode(TEXTS, precision="binary")
    assert signed.dtype == np.int8
    assert np.array_equal(signed.astype(int) + 128, unsigned)
    assert encoder.encode("bad", precision="binary").shape == (1,)


def test_tensors(encoder: SentenceEncoder) -> None:
    torch = pytest.importorskip("torch", reason="needs PyTorch")
    wanted = encoder.encode(TEXTS)
    made = encoder.encode(TEXTS, convert_to_tensor=True)
    assert isinstance(made, torch.Tensor)
    assert np.array_equal(made.numpy(), wanted)
    rows = encoder.encode(TEXTS, convert_to_numpy=False)
    assert isinstance(rows, list)
    assert [tuple(row.shape) for row in rows] == [(8,)] * 4
    assert np.array_equal(np.stack([row.numpy() for row in rows]), wanted)
    one = encoder.encode("bad", convert_to_tensor=True)
    assert tuple(one.shape) == (8,)
    assert tuple(encoder.encode("bad", convert_to_numpy=False).shape) == (8,)
    assert np.array_equal(encoder.similarity(made, made), encoder.similarity(wanted, wanted))
    assert tuple(encoder.encode([], convert_to_tensor=True).shape) == (0, 8)


def test_without_pytorch_tensors_are_refused(
    encoder: SentenceEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    for settings in ({"convert_to_tensor": True}, {"convert_to_numpy": False}):
        with pytest.raises(LutraError, match="tensors need PyTorch"):
            encoder.encode(TEXTS, **settings)  # type: ignore[arg-type]


def test_the_bar_counts_batches(
    encoder: SentenceEncoder, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("tqdm", reason="needs tqdm: pip install 'lutra[text]'")
    wanted = encoder.encode(TEXTS, 2)
    assert capsys.readouterr().err == ""
    assert np.array_equal(encoder.encode(TEXTS, 2, show_progress_bar=True), wanted)
    shown = capsys.readouterr()
    assert "Batches: 100%" in shown.err
    assert "2/2" in shown.err
    assert shown.out == ""
    monkeypatch.setitem(sys.modules, "tqdm", None)
    with pytest.raises(LutraError, match="needs tqdm"):
        encoder.encode(TEXTS, show_progress_bar=True)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"output_value": "token_embeddings"}, "a file has one vector for each text"),
        ({"output_value": None}, "output_value=None"),
        ({"precision": "int8"}, "needs the ranges of many vectors"),
        ({"precision": "float16"}, "is not one of"),
        ({"device": "cuda"}, "runs on the CPU"),
        ({"truncate_dim": 0}, "whole number above 0"),
        ({"truncate_dim": True}, "whole number above 0"),
        ({"prompt_name": "doc"}, "not a prompt of the model ('query', 'nothing')"),
        ({"prompt": 3}, "the prompt is a int"),
    ],
)
def test_what_is_not_supported_is_refused(
    encoder: SentenceEncoder, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError) as error:
        encoder.encode(TEXTS, **settings)
    assert message in str(error.value)


@pytest.mark.parametrize("prompts", [3, ["a"], {"a": 1}])
def test_prompts_of_a_file_are_texts(prompts: Any) -> None:
    with pytest.raises(FormatError, match="have the prompts"):
        SentenceEncoder(encoder_graph(text_metadata(prompts=prompts)))


def test_similarities_of_pairs() -> None:
    a, b = np.float32([[1, 0], [2, 2], [0, 0]]), np.float32([[3, 0], [2, -2], [1, 1]])
    np.testing.assert_allclose(SentenceEncoder.similarity_pairwise(a, b), [1, 0, 0], atol=1e-6)
    assert SentenceEncoder.similarity_pairwise(a[0], b[0]).shape == (1,)
    with pytest.raises(InputError, match="as many of both"):
        SentenceEncoder.similarity_pairwise(a, b[:2])


def test_names_of_sentence_transformers(encoder: SentenceEncoder) -> None:
    assert encoder.max_seq_length == encoder.max_length == 12
    assert encoder.get_sentence_embedding_dimension() == 8


def test_an_encoder_from_a_folder(encoder: SentenceEncoder, tmp_path: Path) -> None:
    lutra.save_graph(encoder.session.graph, tmp_path / "model.lutra")
    again = SentenceEncoder.from_pretrained(tmp_path, threads=1)
    assert np.array_equal(again.encode(TEXTS), encoder.encode(TEXTS))
    with pytest.raises(InputError, match=r"has no file 'other\.lutra'"):
        SentenceEncoder.from_pretrained(tmp_path, filename="other.lutra")
