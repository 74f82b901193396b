"""Tokenizers in files, and text to vectors and classes."""

from __future__ import annotations

import base64
import json
import subprocess
import sys
import threading
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from text_support import ID, WORDS, encoder_graph, sentiment_graph, text_metadata, tiny_tokenizer

import lutra
from lutra.errors import FormatError, InputError, LutraError
from lutra.format import graph_from_bytes, graph_to_bytes
from lutra.graph import Graph
from lutra.sentences import SentenceEncoder, TextPreprocess, text_preprocess

TEXTS = ["A good film.", "the cat was not a dog", "", "bad", "is it good? no, it is bad", "the"]


@pytest.fixture
def encoder() -> SentenceEncoder:
    return SentenceEncoder(encoder_graph(text_metadata()), threads=1)


def vector_of(graph: Graph, tokens: list[str]) -> Any:
    """The vector of one text by the reference, without padding."""
    ids = np.array([[ID[token] for token in tokens]], np.int32)
    feeds = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
    return lutra.run_reference(graph, feeds)[graph.outputs[0]][0]


def test_vectors_are_those_of_the_tokens(encoder: SentenceEncoder) -> None:
    vectors = encoder.encode(["A good film", "dogs"])
    assert vectors.shape == (2, 8)
    assert vectors.dtype == np.float32
    graph = encoder.session.graph
    for vector, tokens in zip(vectors, ("a good film", "dog ##s"), strict=True):
        expected = vector_of(graph, ["[CLS]", *tokens.split(), "[SEP]"])
        np.testing.assert_allclose(vector, expected, atol=1e-5)


@pytest.mark.parametrize("batch_size", [1, 2, 4, 100])
def test_order_and_batches(encoder: SentenceEncoder, batch_size: int) -> None:
    together = encoder.encode(TEXTS, batch_size)
    alone = [encoder.encode(text) for text in TEXTS]
    assert all(vector.shape == (8,) for vector in alone)
    np.testing.assert_allclose(together, alone, atol=1e-5)
    assert len({vector.tobytes() for vector in together}) == len(TEXTS)


def test_batches_have_texts_of_one_length(
    encoder: SentenceEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    shapes: list[tuple[int, ...]] = []
    run = lutra.Session.run

    def spy(self: Any, names: Any, feeds: Any) -> Any:
        shapes.append(feeds["input_ids"].shape)
        assert feeds["attention_mask"].shape == shapes[-1]
        return run(self, names, feeds)

    monkeypatch.setattr(lutra.Session, "run", spy)
    encoder.encode(["a", "a cat was a cat", "bad", "the cat is a cat"], 2)
    assert shapes == [(2, 7), (2, 3)]  # filled up to the longest of the batch, the longest first


def test_normalized(encoder: SentenceEncoder) -> None:
    vectors = encoder.encode(TEXTS)
    units = encoder.encode(TEXTS, normalize_embeddings=True)
    np.testing.assert_allclose(np.linalg.norm(units, axis=1), 1, atol=1e-6)
    np.testing.assert_allclose(
        encoder.similarity(vectors, vectors), units @ units.T, rtol=0, atol=1e-5
    )


def test_similarity_of_nothing() -> None:
    zero = np.zeros(3, np.float32)
    assert SentenceEncoder.similarity(zero, np.eye(3, dtype=np.float32)).tolist() == [[0, 0, 0]]
    with pytest.raises(InputError, match=r"shapes \(3,\) and \(2, 4\)"):
        SentenceEncoder.similarity(zero, np.zeros((2, 4)))


def test_nothing_to_encode(encoder: SentenceEncoder) -> None:
    assert encoder.encode([]).shape == (0, 8)
    assert encoder.predict([]) == []
    assert encoder.predict_proba([]).shape == (0, 8)
    assert encoder.tokenize([]) == []


def test_an_empty_text_has_the_added_tokens(encoder: SentenceEncoder) -> None:
    assert [row.tolist() for row in encoder.tokenize(["", "  \n"])] == [
        [ID["[CLS]"], ID["[SEP]"]]
    ] * 2
    expected = vector_of(encoder.session.graph, ["[CLS]", "[SEP]"])
    np.testing.assert_allclose(encoder.encode(""), expected, atol=1e-5)


def test_a_tokenizer_that_adds_nothing() -> None:
    tokenizer = tiny_tokenizer()
    from tokenizers import Tokenizer

    content = json.loads(tokenizer.to_str()) | {"post_processor": None}
    plain = Tokenizer.from_str(json.dumps(content))
    metadata = {"preprocess": text_preprocess(plain, max_length=4)}
    encoder = SentenceEncoder(encoder_graph(metadata))
    vectors = encoder.encode(["", "bad", ""])
    assert np.isfinite(vectors).all()
    assert not vectors[0].any()  # the mean of no token
    assert vectors[1].any()


def test_long_texts_are_cut(encoder: SentenceEncoder) -> None:
    long = "cat " * 50
    (row,) = encoder.tokenize(long)
    assert row.tolist() == [ID["[CLS]"], *[ID["cat"]] * 10, ID["[SEP]"]]
    np.testing.assert_array_equal(encoder.encode(long), encoder.encode("cat " * 10))
    with pytest.raises(InputError, match=r"sentences\[1\] has 52 tokens and the model takes 12"):
        encoder.encode(["cat", long], truncate=False)
    assert encoder.encode(["cat " * 10], truncate=False).shape == (1, 8)


@pytest.mark.parametrize(
    ("sentences", "match"),
    [
        (["a", 3], r"sentences\[1\] is a int \(3\); every text must be a str"),
        (["a", None], r"sentences\[1\] is a NoneType"),
        ([["a"]], r"sentences\[0\] is a list"),
        (b"a", "the sentences are a bytes; give a str or a list of str"),
        (None, "the sentences are a NoneType"),
        (5, "the sentences are a int"),
        ({"a": 1}, "the sentences are a dict"),
        (["fine", "\ud800"], r"sentences\[1\] is not valid Unicode"),
    ],
)
def test_what_is_not_text(encoder: SentenceEncoder, sentences: Any, match: str) -> None:
    for method in (encoder.encode, encoder.predict, encoder.predict_proba, encoder.tokenize):
        with pytest.raises(InputError, match=match):
            method(sentences)


def test_iterables_of_text(encoder: SentenceEncoder) -> None:
    expected = encoder.encode(TEXTS)
    for given in (tuple(TEXTS), iter(TEXTS), np.array(TEXTS), (text for text in TEXTS)):
        np.testing.assert_array_equal(encoder.encode(given), expected)


@pytest.mark.parametrize("size", [0, -1, 2.0, True, None])
def test_batch_size_that_makes_no_sense(encoder: SentenceEncoder, size: Any) -> None:
    with pytest.raises(InputError, match="batch_size"):
        encoder.encode(["a"], size)


def test_unknown_words_and_odd_characters(encoder: SentenceEncoder) -> None:
    odd = ["\0", "\U0001f431" * 5, "ﷺ", "a" * 10_000, "\u202eabc", "GOOD  FILM"]
    assert np.isfinite(encoder.encode(odd)).all()
    np.testing.assert_array_equal(encoder.encode("GOOD  FILM"), encoder.encode("good film"))


def test_threads_share_an_encoder(encoder: SentenceEncoder) -> None:
    expected = encoder.encode(TEXTS)
    wrong: list[int] = []

    def work() -> None:
        for _ in range(20):
            if not np.array_equal(encoder.encode(TEXTS), expected):
                wrong.append(1)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


# Classifiers


def test_classes() -> None:
    encoder = SentenceEncoder(sentiment_graph())
    assert encoder.classes == ("bad", "good")
    assert encoder.predict(["a good good film", "bad", "it was bad"]) == ["good", "bad", "bad"]
    assert encoder.predict("good") == "good"
    shares = encoder.predict_proba(["good", "a cat"])
    assert shares.dtype == np.float32
    np.testing.assert_allclose(shares.sum(axis=1), 1, atol=1e-6)
    np.testing.assert_allclose(shares[1], 0.5, atol=1e-6)
    scores = encoder.encode("good")
    np.testing.assert_allclose(shares[0, 1], 1 / (1 + np.exp(scores[0] - scores[1])), rtol=1e-5)
    assert encoder.predict_proba("good").shape == (2,)


def test_classes_without_names() -> None:
    graph = sentiment_graph()
    metadata = {name: entry for name, entry in graph.metadata.items() if name != "classes"}
    encoder = SentenceEncoder(replace(graph, metadata=metadata))
    assert encoder.classes is None
    assert encoder.predict(["good", "bad"]) == [1, 0]


@pytest.mark.parametrize("classes", [["bad"], "ab", ["bad", 1], {"a": 0, "b": 1}, 2])
def test_classes_that_do_not_fit(classes: Any) -> None:
    graph = sentiment_graph()
    metadata = {**graph.metadata, "classes": classes}
    with pytest.raises(FormatError, match="the model has 2 scores"):
        SentenceEncoder(replace(graph, metadata=metadata))


# Models of other inputs


def test_fixed_sizes() -> None:
    metadata = text_metadata()
    open_sizes = SentenceEncoder(encoder_graph(metadata))
    expected = open_sizes.encode(TEXTS)
    for shape in ((4, 12), (None, 12), (1, None), (4, 16)):
        fixed = SentenceEncoder(encoder_graph(metadata, shape=shape))
        np.testing.assert_allclose(fixed.encode(TEXTS), expected, atol=1e-5)


def test_a_model_without_a_mask() -> None:
    from graphs import Builder

    b = Builder(("ids", (None, None), "int32"))
    weight = b.rng.normal(size=(len(WORDS), 4)).astype(np.float32)
    b.add("mean", b.add("embedding", "ids", tensors={"weight": weight}), axes=(1,))
    pre = text_preprocess(tiny_tokenizer(), inputs={"ids": "ids"})
    encoder = SentenceEncoder(b.graph(metadata={"preprocess": pre}))
    for text, vector in zip(TEXTS, encoder.encode(TEXTS), strict=True):
        rows = weight[encoder.tokenize(text)[0]]
        np.testing.assert_allclose(vector, rows.mean(0), atol=1e-5)


def test_token_types_are_zero() -> None:
    from graphs import Builder

    b = Builder(*((name, (None, None), "int32") for name in ("i", "t", "m")))
    weight = b.rng.normal(size=(len(WORDS), 4)).astype(np.float32)
    x = b.add("embedding", "i", tensors={"weight": weight})
    types = np.array([[0.0] * 4, [1e6] * 4], np.float32)
    x = b.add("add", x, b.add("embedding", "t", tensors={"weight": types}))
    b.add("masked_mean", x, "m")
    pre = text_preprocess(tiny_tokenizer(), inputs={"ids": "i", "mask": "m", "types": "t"})
    vectors = SentenceEncoder(b.graph(metadata={"preprocess": pre})).encode(TEXTS)
    assert np.abs(vectors).max() < 1e3


def test_models_that_do_not_fit_their_tokenizer() -> None:
    metadata = text_metadata(12)
    cases = [
        (encoder_graph({}), "the model carries no tokenizer"),
        (encoder_graph(metadata, names=("ids", "mask")), "inputs ids, mask, but preprocess"),
        (encoder_graph(metadata, rows=5), "the tokenizer knows 17 tokens, but .* has 5 rows"),
        (encoder_graph(metadata, positions=10), "allows 12 tokens, but .* has 10 positions"),
        (encoder_graph(metadata, shape=(None, 8)), "allows 12 tokens, but the model takes 8"),
    ]
    for graph, match in cases:
        with pytest.raises(FormatError, match=match):
            SentenceEncoder(graph)


def test_models_of_something_else() -> None:
    from graphs import Builder

    pre = text_preprocess(tiny_tokenizer(), inputs={"ids": "x"})
    b = Builder(("x", (None, 4)))
    b.add("relu", "x")
    with pytest.raises(FormatError, match=r"the input 'x' is float32 \(N, 4\)"):
        SentenceEncoder(b.graph(metadata={"preprocess": pre}))
    b = Builder(("x", (None, None), "int32"))
    b.add("embedding", "x", tensors={"weight": np.ones((len(WORDS), 2), np.float32)})
    with pytest.raises(FormatError, match=r"outputs \(N, \?, 2\)"):
        SentenceEncoder(b.graph(metadata={"preprocess": pre}))


def test_a_session_may_be_given() -> None:
    session = lutra.Session(encoder_graph(text_metadata()), threads=1, isa="scalar")
    encoder = SentenceEncoder(session)
    assert encoder.session is session
    assert encoder.dimension == 8
    assert encoder.max_length == 12


# The entry of the metadata


def test_the_tokenizer_survives_the_file(tmp_path: Path) -> None:
    graph = encoder_graph(text_metadata())
    loaded = graph_from_bytes(graph_to_bytes(graph))
    assert loaded.metadata == graph.metadata
    lutra.save_graph(graph, tmp_path / "m.lutra")
    vectors = SentenceEncoder(tmp_path / "m.lutra").encode(TEXTS)
    np.testing.assert_array_equal(vectors, SentenceEncoder(graph).encode(TEXTS))


def test_sources_of_a_tokenizer(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    entry = text_preprocess(tokenizer, max_length=7)
    path = tmp_path / "tokenizer.json"
    tokenizer.save(str(path))

    class Fast:  # as tokenizers of transformers are
        backend_tokenizer = tokenizer
        pad_token_id = 5

    assert text_preprocess(path, max_length=7) == entry
    assert text_preprocess(str(path), max_length=7) == entry
    assert text_preprocess(Fast(), max_length=7) == {**entry, "pad_id": 5}
    assert (entry["kind"], entry["max_length"], entry["pad_id"]) == ("text", 7, ID["[PAD]"])
    assert entry["inputs"] == {"ids": "input_ids", "mask": "attention_mask"}


def test_settings_of_the_tokenizer_do_not_count() -> None:
    tokenizer = tiny_tokenizer()
    entry = text_preprocess(tokenizer)
    tokenizer.enable_truncation(3)
    tokenizer.enable_padding(length=9, pad_id=2)
    assert text_preprocess(tokenizer) == {**entry, "pad_id": 2}


def test_padding_token_of_other_vocabularies() -> None:
    tokenizer = tiny_tokenizer()
    content = json.loads(tokenizer.to_str())
    for token in content["added_tokens"]:
        if token["content"] == "[PAD]":
            token["content"] = "<none>"
    from tokenizers import Tokenizer

    assert text_preprocess(Tokenizer.from_str(json.dumps(content)))["pad_id"] == 0
    tokenizer.add_special_tokens(["<pad>"])
    content = json.loads(tokenizer.to_str())
    content["added_tokens"] = [t for t in content["added_tokens"] if t["content"] != "[PAD]"]
    assert TextPreprocess.from_dict(
        text_preprocess(Tokenizer.from_str(json.dumps(content)))
    ).pad_id == len(WORDS)


def test_entries_are_small() -> None:
    tokenizer = tiny_tokenizer()
    vocabulary = {f"word{i}": i for i in range(5000)} | {"[UNK]": 5000}
    from tokenizers import Tokenizer, models

    large = Tokenizer(models.WordPiece(vocab=vocabulary, unk_token="[UNK]"))
    entry = text_preprocess(large)
    assert len(entry["tokenizer"]) < entry["tokenizer_bytes"] / 2
    assert entry["tokenizer_bytes"] > len(tokenizer.to_str())


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"kind": "image"}, "kind 'image', not 'text'"),
        ({"more": 1}, "has the fields"),
        ({"max_length": 0}, "max_length is 0"),
        ({"max_length": "12"}, "max_length is '12'"),
        ({"max_length": True}, "max_length is True"),
        ({"max_length": 2**40}, "max_length is 1099511627776"),
        ({"pad_id": -1}, "pad_id is -1"),
        ({"pad_id": 1.5}, "pad_id is 1.5"),
        ({"inputs": {"mask": "m"}}, "inputs is"),
        ({"inputs": {"ids": 3}}, "inputs is"),
        ({"inputs": {"ids": "a", "mask": "a"}}, "inputs is"),
        ({"inputs": {"ids": "a", "length": "b"}}, "inputs is"),
        ({"inputs": ["ids"]}, "inputs is"),
        ({"tokenizer": 5}, "tokenizer is a int"),
        ({"tokenizer": "?!"}, "tokenizer cannot be unpacked"),
        ({"tokenizer": "AAAA"}, "tokenizer cannot be unpacked"),
        ({"tokenizer_bytes": 5}, "it does not have 5 bytes"),
        ({"tokenizer_bytes": 10**7}, "it does not have 10000000 bytes"),
        ({"tokenizer_bytes": 10**9}, "must be text of 1 to"),
        ({"tokenizer_bytes": -1}, "must be text of 1 to"),
    ],
)
def test_entries_that_make_no_sense(change: dict[str, Any], match: str) -> None:
    entry = {**text_preprocess(tiny_tokenizer()), **change}
    with pytest.raises(FormatError, match=match):
        TextPreprocess.from_dict(entry)
    if "kind" not in change:
        with pytest.raises(FormatError, match=match):
            SentenceEncoder(encoder_graph({"preprocess": entry}))


def packed(text: bytes) -> dict[str, Any]:
    return {
        "tokenizer": base64.b64encode(zlib.compress(text)).decode(),
        "tokenizer_bytes": len(text),
    }


@pytest.mark.parametrize(
    "text", [b"{}", b"[]", b"null", b'{"model": {}}', b'{"version": "1.0"}', b"a" * 999]
)
def test_tokenizers_that_cannot_be_read(text: bytes) -> None:
    entry = {**text_preprocess(tiny_tokenizer()), **packed(text)}
    with pytest.raises(FormatError, match="tokenizers cannot read the tokenizer"):
        SentenceEncoder(encoder_graph({"preprocess": entry}))


def test_tokenizers_that_are_not_utf8() -> None:
    entry = {**text_preprocess(tiny_tokenizer()), **packed(b"\xff\xfe")}
    with pytest.raises(FormatError, match="cannot be unpacked"):
        TextPreprocess.from_dict(entry)


def test_a_bomb_is_not_unpacked() -> None:
    bomb = base64.b64encode(zlib.compress(bytes(50_000_000), 9)).decode()
    entry = {**text_preprocess(tiny_tokenizer()), "tokenizer": bomb, "tokenizer_bytes": 1000}
    with pytest.raises(FormatError, match="it does not have 1000 bytes"):
        TextPreprocess.from_dict(entry)


@pytest.mark.parametrize(
    ("given", "match"),
    [
        (5, "the tokenizer is a int; give a"),
        ("missing.json", "cannot read 'missing.json': No such file"),
    ],
)
def test_what_is_no_tokenizer(given: Any, match: str) -> None:
    with pytest.raises(InputError, match=match):
        text_preprocess(given)


def test_a_file_that_is_no_tokenizer(tmp_path: Path) -> None:
    tiny_tokenizer()
    path = tmp_path / "tokenizer.json"
    for text in ("{", "[]", "{}"):
        path.write_text(text)
        with pytest.raises(InputError, match="text_preprocess"):
            text_preprocess(path)


def test_room_for_no_word() -> None:
    with pytest.raises(InputError, match="max_length is 2, but the tokenizer adds 2 tokens"):
        text_preprocess(tiny_tokenizer(), max_length=2)


def test_without_tokenizers(monkeypatch: pytest.MonkeyPatch) -> None:
    metadata = text_metadata()
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(LutraError, match=r'pip install "lutra\[text\]"'):
        SentenceEncoder(encoder_graph(metadata))


def test_the_package_is_imported_late() -> None:
    code = (
        "import sys, lutra, lutra.sentences, lutra.cli.run, lutra.cli.evaluate\n"
        "assert not {'tokenizers', 'torch', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_name_at_the_top() -> None:
    assert lutra.SentenceEncoder is SentenceEncoder


def test_like_sentence_transformers() -> None:
    """Token ids of texts of all kinds are those of the tokenizer of transformers."""
    transformers = pytest.importorskip("transformers", reason="needs transformers")
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tiny_tokenizer(), pad_token="[PAD]"
    )
    encoder = SentenceEncoder(encoder_graph({"preprocess": text_preprocess(fast, max_length=9)}))
    texts = [*TEXTS, "cat " * 20, "Dogs, cats & Films!"]
    expected = fast(texts, truncation=True, max_length=9)["input_ids"]
    assert [row.tolist() for row in encoder.tokenize(texts)] == expected
