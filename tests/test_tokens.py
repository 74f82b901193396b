"""Tokenizers of language models, and the text of tokens as they come."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from lutra.errors import FormatError, InputError
from lutra.preprocess.tokens import (
    CharacterTokenizer,
    Decoding,
    JsonTokenizer,
    PieceTokenizer,
    TextStream,
    Tokenizer,
    read_tokenizer,
)

BYTES = tuple(f"<0x{byte:02X}>" for byte in range(256))
PIECES = {"kind": "pieces", "pieces": ["a"], "scores": [1], "prefix": True, "controls": []}
WORDS = (" ", "a", "b", "ab", " a", "abab", "ba", "é")


def pieces(prefix: bool = False, with_bytes: bool = True) -> PieceTokenizer:
    """Longer pieces first, but "ba" before all."""
    names = ("<s>", "</s>", *(BYTES if with_bytes else ()), *WORDS)
    scores = [0.0] * (len(names) - len(WORDS)) + [-9, -9, -9, -2, -3, -1, 0, -9]
    return PieceTokenizer(names, tuple(map(float, scores)), prefix, frozenset({0, 1}))


def test_characters() -> None:
    tokens = CharacterTokenizer("ab\n é")
    assert tokens.encode("é\nba") == [4, 2, 1, 0]
    assert tokens.decode([4, 2, 1, 0]) == "é\nba"
    assert tokens.decode([1, 5, 900]) == "b"
    assert read_tokenizer(tokens.to_dict()) == tokens
    with pytest.raises(InputError, match=r"the character 'x' at 2, which the model has no token"):
        tokens.encode("abx")
    with pytest.raises(InputError, match="the character 'a' is there twice"):
        CharacterTokenizer("aba")
    with pytest.raises(InputError, match="holds no characters"):
        CharacterTokenizer("")


def test_pieces_are_joined_by_score() -> None:
    tokens = pieces()
    known = {piece: index for index, piece in enumerate(tokens.pieces)}
    assert tokens.encode("ab") == [known["ab"]]
    assert tokens.encode("aba") == [known["a"], known["ba"]]  # "ba" has the better score
    assert tokens.encode("abab") == [known["a"], known["ba"], known["b"]]
    assert tokens.encode("a a") == [known["a"], known[" a"]]
    assert tokens.encode("") == []
    assert tokens.encode("aé") == [known["a"], known["é"]]
    assert tokens.encode("ß") == [known["<0xC3>"], known["<0x9F>"]]
    assert tokens.decode(tokens.encode("ab ß\n<s> éé")) == "ab ß\n<s> éé"
    assert tokens.decode([0, known["ab"], 1, tokens.size]) == "ab"
    assert pieces(prefix=True).encode("a") == [known[" a"]]
    assert read_tokenizer(tokens.to_dict()) == tokens
    with pytest.raises(InputError, match=r"'ß', which the model has no token for, and none for"):
        pieces(with_bytes=False).encode("aß")
    with pytest.raises(InputError, match="2 pieces have 1 scores"):
        PieceTokenizer(("a", "b"), (1.0,))
    with pytest.raises(InputError, match=r"controls \[5\] are no tokens"):
        PieceTokenizer(("a", "b"), (1.0, 2.0), controls=frozenset({5}))


def test_joining_is_the_slow_rule() -> None:
    """The pair of the best score, the first of equal ones, again and again."""
    names = ("a", "b", "c", "aa", "ab", "bc", "aab", "abc", "cc", "ca", "bca", "aaa")
    scores = (-9.0, -9.0, -9.0, -1.0, -1.0, -2.0, -3.0, -0.5, -1.0, -4.0, -2.0, -3.0)
    tokens = PieceTokenizer(names, scores, prefix=False)
    known = dict(zip(names, scores, strict=True))

    def slow(text: str) -> list[str]:
        parts = [*text]
        while True:
            pairs = [
                (-known[a + b], i)
                for i, (a, b) in enumerate(itertools.pairwise(parts))
                if a + b in known
            ]
            if not pairs:
                return parts
            _, i = min(pairs)
            parts[i : i + 2] = [parts[i] + parts[i + 1]]

    import random

    rng = random.Random(0)
    for _ in range(300):
        text = "".join(rng.choice("abc") for _ in range(rng.randrange(1, 30)))
        assert [names[i] for i in tokens.encode(text)] == slow(text)


def test_text_comes_in_whole_characters_and_ends_before_a_stop() -> None:
    tokens = pieces()
    known = {piece: index for index, piece in enumerate(tokens.pieces)}

    def texts(words: list[str], *stop: str) -> list[str]:
        stream = TextStream(tokens, stop)
        return [*(stream.push(known[word]) for word in words), stream.finish()]

    assert texts(["<0xC3>", "<0x9F>", "a"]) == ["", "ß", "a", ""]
    assert texts(["a", "<0xC3>"]) == ["a", "", "�"]
    assert texts(["a", "b", "a", " "], "bb") == ["a", "", "ba", " ", ""]
    assert texts(["a", "b", "ab", "a"], "ba") == ["a", "", "", "", ""]
    assert texts(["a", "b", "b"], "bbb") == ["a", "", "", "bb"]
    assert texts(["abab", "a"], "ab", "b") == ["", "", ""]
    begins = TextStream(pieces(prefix=True), begins=True)
    assert [begins.push(known[" a"]), begins.push(known[" a"])] == ["a", " a"]


def test_a_tokenizer_json() -> None:
    pytest.importorskip("tokenizers")
    from tokenizers import Tokenizer as Fast
    from tokenizers import decoders, models, pre_tokenizers

    letters = pre_tokenizers.ByteLevel.alphabet()
    vocabulary = {letter: index for index, letter in enumerate(sorted(letters))}
    vocabulary |= {"<end>": len(vocabulary), "ab": len(vocabulary) + 1}
    fast = Fast(models.BPE(vocabulary, [("a", "b")]))
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast.decoder = decoders.ByteLevel()
    fast.add_special_tokens(["<end>"])
    tokens = JsonTokenizer(fast.to_str())
    text = "ab, ß\n 漢"
    assert tokens.encode(text) == fast.encode(text).ids
    assert tokens.decode(tokens.encode(text)) == text
    assert tokens.decode([vocabulary["<end>"]]) == ""
    assert tokens.size == 258
    assert read_tokenizer(tokens.to_dict()) == tokens


@pytest.mark.parametrize(
    ("entry", "match"),
    [
        ({"kind": "words"}, "is of the kind 'words'"),
        (3, "is of the kind 3"),
        ({"kind": "characters"}, "its tokenizer makes no sense"),
        (
            {"kind": "pieces", "pieces": ["a"], "scores": ["b"], "prefix": 1, "controls": []},
            "sense",
        ),
        ({"kind": "pieces", "pieces": 3, "scores": [], "prefix": 1, "controls": []}, "no sense"),
    ],
)
def test_entries_that_make_no_sense(entry: Any, match: str) -> None:
    with pytest.raises(FormatError, match=match):
        read_tokenizer(entry)


def test_what_a_file_says() -> None:
    known = CharacterTokenizer("abc")
    decoding = Decoding(20, known, 1, (2,), 5)
    assert Decoding.from_metadata({"decoder": decoding.to_dict()}) == decoding
    assert Decoding.from_metadata({}) is None
    with pytest.raises(FormatError, match="it must have bos, eos, max_length, tokenizer"):
        Decoding.from_metadata({"decoder": {"bos": 1}})
    with pytest.raises(FormatError, match=r"7 as the beginning or end of texts is no token"):
        Decoding.from_metadata({"decoder": {**decoding.to_dict(), "eos": [7]}})
    for wrong in ({"max_length": 0}, {"vocabulary": 2}, {"bos": "a"}, {"eos": None}):
        with pytest.raises(FormatError):
            Decoding.from_metadata({"decoder": {**decoding.to_dict(), **wrong}})


def test_decode_is_what_tokens_stand_for() -> None:
    tokens: Tokenizer = pieces()
    assert tokens.decode([tokens.size - 1, 2 + 0xC3]) == "é�"
