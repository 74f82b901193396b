"""From text to the input of a model: the tokenizer that its file carries.

The entry ``preprocess`` of the metadata of such a file says how text becomes token ids::

    {"kind": "text", "tokenizer": "...", "tokenizer_bytes": 466133, "max_length": 256,
     "pad_id": 0, "inputs": {"ids": "input_ids", "mask": "attention_mask"}}

``tokenizer`` is a ``tokenizer.json`` of Hugging Face, compressed (zlib, RFC 1950) and in base64;
``tokenizer_bytes`` is its size before. The package ``tokenizers`` runs it
(``pip install "lutra[text]"``); nothing else here needs more than NumPy.
"""

from __future__ import annotations

import base64
import binascii
import json
import os
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from lutra.errors import FormatError, InputError, LutraError
from lutra.preprocess.image import KEY, shown

if TYPE_CHECKING:
    from tokenizers import Tokenizer

__all__ = ["TextPreprocess", "takes_text", "text_preprocess"]

#: What an input of the model holds: ids and mask of the tokens, and which of two texts it is from.
_ROLES: Final = ("ids", "mask", "types")
_FIELDS: Final = frozenset(
    {"kind", "tokenizer", "tokenizer_bytes", "max_length", "pad_id", "inputs"}
)
_MAX_TOKENIZER: Final = 2**26  # bytes of JSON; those of 250 thousand words have 17 MB
_MAX_LENGTH: Final = 2**20
_MAX_ID: Final = 2**31 - 1
#: What vocabularies call the token that fills up short texts.
_PADS: Final = ("[PAD]", "<pad>", "<|pad|>", "<|endoftext|>")


@dataclass(frozen=True)
class TextPreprocess:
    """How text becomes the inputs of a model.

    Attributes:
        tokenizer: The text of a ``tokenizer.json``.
        max_length: The most tokens of a text, those that the tokenizer adds included.
        pad_id: The token that fills up the shorter texts of a batch; the mask takes it out again.
        inputs: Which input of the model is which: ``ids``, ``mask`` and ``types`` (which is 0
            everywhere), the last two only where the model has them.

    Raises:
        InputError: If a field makes no sense.
    """

    tokenizer: str = field(repr=False)
    max_length: int = 256
    pad_id: int = 0
    inputs: Mapping[str, str] = field(
        default_factory=lambda: {"ids": "input_ids", "mask": "attention_mask"}
    )

    def __post_init__(self) -> None:
        if not isinstance(self.tokenizer, str):
            raise InputError(
                f"preprocess: tokenizer is a {type(self.tokenizer).__name__}; it must be the text "
                "of a tokenizer.json"
            )
        for name, least, most in (("max_length", 1, _MAX_LENGTH), ("pad_id", 0, _MAX_ID)):
            value = getattr(self, name)
            if type(value) is not int or not least <= value <= most:
                raise InputError(
                    f"preprocess: {name} is {shown(value)}; it must be a whole number in "
                    f"{least}..{most}"
                )
        inputs = self.inputs
        if (
            not isinstance(inputs, Mapping)
            or "ids" not in inputs
            or not set(inputs) <= set(_ROLES)
            or not all(isinstance(name, str) for name in inputs.values())
            or len(set(inputs.values())) < len(inputs)
        ):
            raise InputError(
                f"preprocess: inputs is {shown(inputs)}; it must give an input of the model for "
                "'ids', and may for 'mask' and 'types'"
            )

    @classmethod
    def from_dict(cls, entry: object) -> TextPreprocess:
        """Reads the ``preprocess`` entry of the metadata of a file.

        Args:
            entry: What the file says.

        Raises:
            FormatError: If it is not such an entry.
        """
        if not isinstance(entry, Mapping) or entry.get("kind") != "text":
            kind = entry.get("kind") if isinstance(entry, Mapping) else entry
            raise FormatError(
                f"preprocess is of the kind {shown(kind)}, not 'text'; this model takes no text"
            )
        if set(entry) != _FIELDS:
            found = ", ".join(sorted(map(str, entry)))[:200]
            raise FormatError(
                f"preprocess has the fields {found}; it must have {', '.join(sorted(_FIELDS))}"
            )
        try:
            return cls(
                unpack(entry["tokenizer"], entry["tokenizer_bytes"]),
                entry["max_length"],
                entry["pad_id"],
                entry["inputs"],
            )
        except InputError as error:
            raise FormatError(str(error)) from error

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, Any]) -> TextPreprocess | None:
        """The description in the metadata of a graph, or None where it has none of text.

        Raises:
            FormatError: If there is one of text that makes no sense.
        """
        return cls.from_dict(metadata[KEY]) if takes_text(metadata) else None

    def to_dict(self) -> dict[str, Any]:
        """The entry for the metadata of a file."""
        packed, size = pack(self.tokenizer)
        return {
            "kind": "text",
            "tokenizer": packed,
            "tokenizer_bytes": size,
            "max_length": self.max_length,
            "pad_id": self.pad_id,
            "inputs": dict(self.inputs),
        }

    def load(self, *, truncate: bool = True) -> Tokenizer:
        """The tokenizer, ready to run.

        Args:
            truncate: Whether it cuts texts to ``max_length``.

        Raises:
            LutraError: If the package ``tokenizers`` is not installed.
            FormatError: If that cannot read the tokenizer.
        """
        tokenizer = parse(self.tokenizer)
        tokenizer.no_padding()
        if truncate:
            added = tokenizer.num_special_tokens_to_add(False)
            if added >= self.max_length:
                raise FormatError(
                    f"preprocess: max_length is {self.max_length}, but the tokenizer adds {added} "
                    "tokens to every text; raise it"
                )
            tokenizer.enable_truncation(self.max_length)
        else:
            tokenizer.no_truncation()
        return tokenizer


def text_preprocess(
    tokenizer: object,
    *,
    max_length: int = 256,
    pad_id: int | None = None,
    inputs: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """The metadata entry that puts a tokenizer into a file.

    Args:
        tokenizer: A ``tokenizers.Tokenizer``, a fast tokenizer of transformers, or the path of a
            ``tokenizer.json``. Its own truncation and padding are left out.
        max_length: The most tokens of a text; longer ones are cut. Sentence encoders state it as
            ``max_seq_length``.
        pad_id: The token that fills up short texts; by default the tokenizer's, or 0.
        inputs: Which input of the model is which: ``ids``, ``mask`` and ``types``; by default
            ``{"ids": "input_ids", "mask": "attention_mask"}``.

    Returns:
        The entry, for ``export(..., metadata={"preprocess": entry})``.

    Raises:
        InputError: If the tokenizer is something else or cannot be read, or a number makes no
            sense.
        LutraError: If the package ``tokenizers`` is not installed.

    Examples:
        >>> tokenizer = AutoTokenizer.from_pretrained("sentence-transformers/all-MiniLM-L6-v2")
        >>> metadata = {"preprocess": text_preprocess(tokenizer, max_length=256)}
        >>> export(model, "minilm.lutra", (ids, mask), metadata=metadata, dynamic_axes=(0, 1))
    """
    text = _tokenizer_text(tokenizer)
    try:
        content = json.loads(text)
        if not isinstance(content, dict):
            raise ValueError("it is not an object")
    except (ValueError, RecursionError) as error:
        raise InputError(
            f"text_preprocess: the tokenizer is no tokenizer.json ({error}); save one with "
            "tokenizer.save(path)"
        ) from error
    if pad_id is None:
        known = getattr(tokenizer, "pad_token_id", None)
        pad_id = known if isinstance(known, int) else _pad_of(content)
    content |= {"truncation": None, "padding": None}
    compact = json.dumps(content, ensure_ascii=False, separators=(",", ":"))
    made = TextPreprocess(
        compact,
        max_length,
        pad_id,
        {"ids": "input_ids", "mask": "attention_mask"} if inputs is None else dict(inputs),
    )
    try:
        made.load()
    except FormatError as error:
        raise InputError(f"text_preprocess: {error}") from error
    return made.to_dict()


def takes_text(metadata: Mapping[str, Any]) -> bool:
    """Whether the metadata of a graph describe how text becomes its input."""
    entry = metadata.get(KEY)
    return isinstance(entry, Mapping) and entry.get("kind") == "text"


def _tokenizer_text(tokenizer: object) -> str:
    """The tokenizer.json of whatever holds one."""
    if isinstance(tokenizer, (str, os.PathLike)):
        try:
            return Path(tokenizer).read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or str(error)
            raise InputError(
                f"text_preprocess: cannot read {os.fspath(tokenizer)!r}: {reason}; give the path "
                "of a tokenizer.json"
            ) from error
    inner = getattr(tokenizer, "backend_tokenizer", tokenizer)
    to_str = getattr(inner, "to_str", None)
    if to_str is None:
        raise InputError(
            f"text_preprocess: the tokenizer is a {type(tokenizer).__name__}; give a "
            "tokenizers.Tokenizer, a fast tokenizer of transformers, or the path of a "
            "tokenizer.json"
        )
    return str(to_str())


def _pad_of(content: Mapping[str, Any]) -> int:
    """The padding token in the content of a tokenizer.json, or 0."""
    padding = content.get("padding")
    if isinstance(padding, Mapping) and isinstance(padding.get("pad_id"), int):
        return int(padding["pad_id"])
    added = content.get("added_tokens")
    known = [token for token in added if isinstance(token, Mapping)] if added else []
    ids: dict[Any, Any] = {token.get("content"): token.get("id") for token in known}
    return next((int(ids[pad]) for pad in _PADS if isinstance(ids.get(pad), int)), 0)


def parse(text: str) -> Tokenizer:
    """The tokenizer of the text of a tokenizer.json.

    Raises:
        LutraError: If the package ``tokenizers`` is not installed.
        FormatError: If that cannot read it.
    """
    try:
        from tokenizers import Tokenizer
    except ModuleNotFoundError as error:
        raise LutraError(
            'text needs the package tokenizers; install it with: pip install "lutra[text]"'
        ) from error
    try:
        return Tokenizer.from_str(text)
    except BaseException as error:
        # Panics of its Rust code are no Exceptions.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        reason = " ".join(str(error).split())[:200]
        raise FormatError(
            f"preprocess: the package tokenizers cannot read the tokenizer ({reason}); upgrade it "
            "with: pip install -U tokenizers"
        ) from error


def pack(text: str) -> tuple[str, int]:
    """The text of a tokenizer.json for the metadata of a file, and its size before."""
    data = text.encode()
    return base64.b64encode(zlib.compress(data, 9)).decode(), len(data)


def unpack(packed: object, size: object) -> str:
    """The text of a tokenizer.json.

    Raises:
        FormatError: If it is not what to_dict makes, or too large.
    """
    if not isinstance(packed, str) or type(size) is not int or not 0 < size <= _MAX_TOKENIZER:
        raise FormatError(
            f"preprocess: tokenizer is a {type(packed).__name__} of {shown(size)} bytes; it must "
            f"be text of 1 to {_MAX_TOKENIZER} bytes"
        )
    try:
        data = base64.b64decode(packed, validate=True)
        # One byte more than there should be: a short entry must not fill the memory.
        unpacker = zlib.decompressobj()
        raw = unpacker.decompress(data, size + 1)
        if len(raw) != size or not unpacker.eof or unpacker.unused_data:
            raise ValueError(f"it does not have {size} bytes")
        return raw.decode()
    except (ValueError, binascii.Error, zlib.error) as error:
        raise FormatError(f"preprocess: tokenizer cannot be unpacked ({error})") from error
