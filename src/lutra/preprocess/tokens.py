"""Tokens of language models: from text to ids and back, as the file of a decoder says.

The entry ``decoder`` of the metadata of such a file holds what generation needs::

    {"max_length": 512, "vocabulary": 512, "bos": 1, "eos": [2], "tokenizer": {...}}

``tokenizer`` is None, or one of these, by its ``kind``:

* ``characters``: token i is the i-th of ``characters``;
* ``pieces``: token i stands for ``pieces[i]``, text, or a byte where it is written ``<0x0A>``. A
  text, with a space in front where ``prefix`` says so, is cut into characters, and those that are
  no piece into bytes; then the two neighbours whose union is the piece with the highest of the
  ``scores`` are joined, the first ones of equal ones, until none are left. That is what
  SentencePiece calls BPE (https://github.com/google/sentencepiece).
* ``json``: a ``tokenizer.json`` of Hugging Face, as ``lutra.preprocess.text`` packs it, which the
  package ``tokenizers`` runs.
"""

from __future__ import annotations

import codecs
import heapq
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Final

from lutra.errors import FormatError, InputError
from lutra.ops.limits import MAX_TOKENS
from lutra.preprocess.image import shown
from lutra.preprocess.text import pack, parse, unpack

__all__ = ["CharacterTokenizer", "Decoding", "JsonTokenizer", "PieceTokenizer", "Tokenizer"]

#: The entry of the metadata.
KEY: Final = "decoder"
#: Inputs of a decoder, and its output.
TOKENS, START, PICKED, LOGITS = "tokens", "start", "picked", "logits"
_FIELDS: Final = frozenset({"max_length", "vocabulary", "bos", "eos", "tokenizer"})


class Tokenizer(ABC):
    """How text becomes tokens, and tokens text."""

    @property
    @abstractmethod
    def size(self) -> int:
        """How many tokens there are: ids are 0..size - 1."""

    @abstractmethod
    def encode(self, text: str) -> list[int]:
        """The tokens of a text, without those that begin or end one.

        Raises:
            InputError: If the text holds what no token stands for.
        """

    @abstractmethod
    def bytes_of(self, token: int) -> bytes:
        """What a token stands for: bytes of UTF-8, which may end within a character.

        Tokens that a model has beyond those of the tokenizer stand for nothing.
        """

    @abstractmethod
    def to_dict(self) -> dict[str, Any]:
        """The entry of a file."""

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of tokens; bytes that are no UTF-8 become U+FFFD."""
        return b"".join(map(self.bytes_of, tokens)).decode("utf-8", "replace")


@dataclass(frozen=True)
class CharacterTokenizer(Tokenizer):
    """A token for each character.

    Attributes:
        characters: All of them, each once: the i-th is token i.

    Raises:
        InputError: If there are none, or one of them is there twice.

    Examples:
        >>> from lutra.preprocess.tokens import CharacterTokenizer
        >>> tokens = CharacterTokenizer("abc")
        >>> tokens.encode("cab"), tokens.decode([1, 0])
        ([2, 0, 1], 'ba')
    """

    characters: str

    def __post_init__(self) -> None:
        if not isinstance(self.characters, str) or not self.characters:
            raise InputError(f"CharacterTokenizer: {shown(self.characters)} holds no characters")
        for index, character in enumerate(self.characters):
            if self.characters.index(character) != index:
                raise InputError(
                    f"CharacterTokenizer: the character {character!r} is there twice; give each "
                    "once"
                )

    @cached_property
    def _ids(self) -> dict[str, int]:
        return {character: index for index, character in enumerate(self.characters)}

    @property
    def size(self) -> int:
        return len(self.characters)

    def encode(self, text: str) -> list[int]:
        for index, character in enumerate(text):
            if character not in self._ids:
                raise InputError(
                    f"the text holds the character {character!r} at {index}, which the model has "
                    f"no token for; it knows {self.characters[:100]!r}"
                )
        return [self._ids[character] for character in text]

    def bytes_of(self, token: int) -> bytes:
        return self.characters[token : token + 1].encode()

    def to_dict(self) -> dict[str, Any]:
        return {"kind": "characters", "characters": self.characters}


@dataclass(frozen=True)
class PieceTokenizer(Tokenizer):
    """Pieces of text with scores, joined from characters: see the head of the module.

    Attributes:
        pieces: What each token stands for, with plain spaces.
        scores: Of each piece; those that are joined first have the highest.
        prefix: Whether a space goes in front of a text.
        controls: Tokens that text never becomes, and that stand for no text: beginnings and ends.

    Raises:
        InputError: If pieces, scores and controls do not fit each other.
    """

    pieces: tuple[str, ...] = field(repr=False)
    scores: tuple[float, ...] = field(repr=False)
    prefix: bool = True
    controls: frozenset[int] = frozenset()

    def __post_init__(self) -> None:
        if (
            not self.pieces
            or len(self.pieces) != len(self.scores)
            or not all(isinstance(piece, str) for piece in self.pieces)
            or not all(type(s) in (int, float) and math.isfinite(s) for s in self.scores)
        ):
            raise InputError(
                f"PieceTokenizer: {len(self.pieces)} pieces have {len(self.scores)} scores; give "
                "texts and a finite number for each"
            )
        if not all(type(i) is int and 0 <= i < len(self.pieces) for i in self.controls):
            raise InputError(
                f"PieceTokenizer: the controls {sorted(self.controls)} are no tokens of 0.."
                f"{len(self.pieces) - 1}"
            )

    @cached_property
    def _ids(self) -> dict[str, int]:
        ids: dict[str, int] = {}
        for index, piece in enumerate(self.pieces):
            if index not in self.controls and self._byte(piece) is None:
                ids.setdefault(piece, index)
        return ids

    @cached_property
    def _bytes(self) -> dict[int, int]:
        """The token of each byte that has one."""
        found = ((self._byte(piece), index) for index, piece in enumerate(self.pieces))
        return {byte: index for byte, index in found if byte is not None}

    @staticmethod
    def _byte(piece: str) -> int | None:
        if len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
            try:
                return int(piece[3:5], 16)
            except ValueError:
                return None
        return None

    @property
    def size(self) -> int:
        return len(self.pieces)

    def encode(self, text: str) -> list[int]:
        if not text:
            return []
        parts = [" ", *text] if self.prefix else [*text]
        tokens: list[int] = []
        for part in self._joined(parts):
            known = self._ids.get(part)
            tokens += self._fallback(part) if known is None else [known]
        return tokens

    def _fallback(self, character: str) -> list[int]:
        raw = character.encode("utf-8", "surrogatepass")
        missing = [byte for byte in raw if byte not in self._bytes]
        if missing:
            raise InputError(
                f"the text holds the character {character!r}, which the model has no token for, "
                f"and none for its byte 0x{missing[0]:02X} either"
            )
        return [self._bytes[byte] for byte in raw]

    def _joined(self, parts: list[str]) -> list[str]:
        """Neighbours joined, the pair of the highest score first."""
        count = len(parts)
        before, behind = list(range(-1, count - 1)), [*range(1, count), -1]
        waiting: list[tuple[float, int, int, str]] = []

        def offer(left: int) -> None:
            right = behind[left]
            if right >= 0:
                union = parts[left] + parts[right]
                if union in self._ids:
                    heapq.heappush(waiting, (-self.scores[self._ids[union]], left, right, union))

        for left in range(count - 1):
            offer(left)
        while waiting:
            _, left, right, union = heapq.heappop(waiting)
            if behind[left] != right or parts[left] + parts[right] != union or not parts[left]:
                continue  # one of them was joined with another before
            parts[left], parts[right] = union, ""
            behind[left] = behind[right]
            if behind[left] >= 0:
                before[behind[left]] = left
            offer(left)
            if before[left] >= 0:
                offer(before[left])
        return [part for part in parts if part]

    def bytes_of(self, token: int) -> bytes:
        if token in self.controls or token >= self.size:
            return b""
        byte = self._byte(self.pieces[token])
        return (
            self.pieces[token].encode("utf-8", "surrogatepass") if byte is None else bytes([byte])
        )

    def to_dict(self) -> dict[str, Any]:
        return {
            "kind": "pieces",
            "pieces": list(self.pieces),
            "scores": list(self.scores),
            "prefix": self.prefix,
            "controls": sorted(self.controls),
        }


@dataclass(frozen=True)
class JsonTokenizer(Tokenizer):
    """A ``tokenizer.json`` of Hugging Face, run by the package ``tokenizers`` (extra ``text``).

    Attributes:
        text: The text of the file.

    Raises:
        InputError: If it is no such file.
        LutraError: If the package is not installed.
    """

    text: str = field(repr=False)

    @cached_property
    def _tokenizer(self) -> Any:
        made = parse(self.text)
        made.no_padding()
        made.no_truncation()
        return made

    @property
    def size(self) -> int:
        return int(self._tokenizer.get_vocab_size())

    def encode(self, text: str) -> list[int]:
        return list(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def bytes_of(self, token: int) -> bytes:
        piece = self._tokenizer.id_to_token(token)
        if piece is None or token in self._specials:
            return b""
        if self._byte_level:
            return bytes(
                _BYTES_OF_LETTERS[letter] for letter in piece if letter in _BYTES_OF_LETTERS
            )
        byte = PieceTokenizer._byte(piece)
        return piece.replace("▁", " ").encode() if byte is None else bytes([byte])

    @cached_property
    def _specials(self) -> set[int]:
        added = self._tokenizer.get_added_tokens_decoder()
        return {index for index, token in added.items() if token.special}

    @cached_property
    def _byte_level(self) -> bool:
        return "ByteLevel" in self.text

    def to_dict(self) -> dict[str, Any]:
        packed, size = pack(self.text)
        return {"kind": "json", "tokenizer": packed, "tokenizer_bytes": size}


def _letters() -> dict[str, int]:
    """The byte that each letter of a byte-level vocabulary stands for, as GPT-2 writes them: bytes
    that are printable in Latin-1 as they are, the others as letters from U+0100 on."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in plain]
    return {
        **{chr(byte): byte for byte in plain},
        **{chr(0x100 + index): byte for index, byte in enumerate(others)},
    }


_BYTES_OF_LETTERS: Final = _letters()


def read_tokenizer(entry: object) -> Tokenizer:
    """The tokenizer of an entry, see ``Tokenizer.to_dict``.

    Raises:
        FormatError: If it is not such an entry.
    """
    kind = entry.get("kind") if isinstance(entry, Mapping) else entry
    try:
        if isinstance(entry, Mapping):
            if kind == "characters":
                return CharacterTokenizer(entry["characters"])
            if kind == "pieces":
                return PieceTokenizer(
                    tuple(entry["pieces"]),
                    tuple(entry["scores"]),
                    bool(entry["prefix"]),
                    frozenset(entry["controls"]),
                )
            if kind == "json":
                return JsonTokenizer(unpack(entry["tokenizer"], entry["tokenizer_bytes"]))
    except (InputError, KeyError, TypeError) as error:
        raise FormatError(f"decoder: its tokenizer makes no sense: {error}") from error
    raise FormatError(
        f"decoder: its tokenizer is of the kind {shown(kind)}; 'characters', 'pieces' and 'json' "
        "are known"
    )


@dataclass(frozen=True)
class Decoding:
    """What a file says about the tokens of its decoder.

    Attributes:
        max_length: The most tokens of a text.
        tokenizer: How text becomes tokens, or None.
        bos: The token that every text begins with, or None.
        eos: The tokens that end a text.
        vocabulary: How many tokens the model knows.

    Raises:
        InputError: If a token is none of the model's, or the tokenizer has more than it.
    """

    max_length: int
    tokenizer: Tokenizer | None
    bos: int | None
    eos: tuple[int, ...]
    vocabulary: int

    def __post_init__(self) -> None:
        for name, low, high in (("max_length", 1, MAX_TOKENS), ("vocabulary", 1, 2**31 - 1)):
            value = getattr(self, name)
            if type(value) is not int or not low <= value <= high:
                raise InputError(
                    f"decoder: {name} is {shown(value)}; it must be a whole number in {low}..{high}"
                )
        for token in (*self.eos, *(() if self.bos is None else (self.bos,))):
            if type(token) is not int or not 0 <= token < self.vocabulary:
                raise InputError(
                    f"decoder: {shown(token)} as the beginning or end of texts is no token of "
                    f"0..{self.vocabulary - 1}"
                )
        if self.tokenizer is not None and self.tokenizer.size > self.vocabulary:
            raise InputError(
                f"decoder: the tokenizer has {self.tokenizer.size} tokens, and the model knows "
                f"{self.vocabulary}; use the tokenizer that it was trained with"
            )

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, Any]) -> Decoding | None:
        """The entry in the metadata of a graph, or None where it has none.

        Raises:
            FormatError: If there is one that makes no sense.
        """
        entry = metadata.get(KEY)
        if entry is None:
            return None
        if not isinstance(entry, Mapping) or set(entry) != _FIELDS:
            raise FormatError(
                f"decoder: the entry is {shown(entry)}; it must have {', '.join(sorted(_FIELDS))}"
            )
        tokenizer = None if entry["tokenizer"] is None else read_tokenizer(entry["tokenizer"])
        eos = entry["eos"]
        try:
            return cls(
                entry["max_length"],
                tokenizer,
                entry["bos"],
                tuple(eos if isinstance(eos, list) else [eos]),
                entry["vocabulary"],
            )
        except InputError as error:
            raise FormatError(str(error)) from error

    def to_dict(self) -> dict[str, Any]:
        """The entry."""
        return {
            "max_length": self.max_length,
            "vocabulary": self.vocabulary,
            "bos": self.bos,
            "eos": list(self.eos),
            "tokenizer": None if self.tokenizer is None else self.tokenizer.to_dict(),
        }


class TextStream:
    """Text of tokens as they come: held back are parts of characters, and of what it stops at.

    Args:
        tokenizer: Of the tokens.
        stop: Texts that end it; they are not part of it.
        begins: Whether it begins a text: a space that the tokenizer puts in front of texts is left
            out.
    """

    def __init__(
        self, tokenizer: Tokenizer, stop: Sequence[str] = (), *, begins: bool = False
    ) -> None:
        self._tokenizer = tokenizer
        self._begins = begins and isinstance(tokenizer, PieceTokenizer) and tokenizer.prefix
        self._stop = tuple(stop)
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._held = ""
        self.stopped = False

    def push(self, token: int) -> str:
        """The text that is certain with one more token."""
        return self._certain(self._decoder.decode(self._tokenizer.bytes_of(token)))

    def finish(self) -> str:
        """What was held back, at the end."""
        text = self._certain(self._decoder.decode(b"", final=True))
        rest = "" if self.stopped else self._held
        self._held = ""
        return text + rest

    def _certain(self, text: str) -> str:
        if self.stopped:
            return ""
        if self._begins and text:
            text, self._begins = text.removeprefix(" "), False
        self._held += text
        ends = [at for at in (self._held.find(stop) for stop in self._stop) if at >= 0]
        if ends:
            self.stopped = True
            made, self._held = self._held[: min(ends)], ""
            return made
        keep = max((_overlap(self._held, stop) for stop in self._stop), default=0)
        cut = len(self._held) - keep
        made, self._held = self._held[:cut], self._held[cut:]
        return made


def _overlap(text: str, stop: str) -> int:
    """Characters at the end of a text that may be the beginning of a stop."""
    return next(
        (n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0
    )
