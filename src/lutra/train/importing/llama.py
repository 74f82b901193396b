"""Llama models of transformers from weights that other projects write.

Other projects turn neighbouring features of queries and keys by the angles of their positions, and
transformers feature a and feature a + d / 2 of a head of d: rows of the two matrices are reordered.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import torch

from lutra.errors import InputError, LutraError
from lutra.node import Array
from lutra.preprocess.tokens import PieceTokenizer

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM

_HEADER: Final = 7  # integers
_MOST: Final = 2**24  # of any of them
#: What transformers calls models of the form of Llama.
_FAMILIES: Final = {"llama": "Llama", "qwen2": "Qwen2", "qwen3": "Qwen3", "bitnet": "BitNet"}
#: Tokens of llama2.c that begin and end a text.
BOS, EOS = 1, 2


def load_llama2c(path: str | os.PathLike[str]) -> LlamaForCausalLM:
    """Reads the weights of a model of llama2.c (https://github.com/karpathy/llama2.c).

    Args:
        path: A file of its first version, such as ``stories260K.bin``: seven int32 (width, hidden
            width, layers, heads, heads of keys, vocabulary, length; a vocabulary below 0 says that
            the head has weights of its own), then float32.

    Returns:
        A model of transformers, in eval mode.

    Raises:
        InputError: If the file cannot be read or is no such file.
        LutraError: If transformers is not installed.
    """
    data = _read("load_llama2c", path)
    name = os.fspath(path)
    if len(data) < 4 * _HEADER:
        raise InputError(f"load_llama2c: {name!r} has {len(data)} bytes and is no file of llama2.c")
    dim, hidden, layers, heads, kv_heads, vocabulary, length = struct.unpack_from("<7i", data)
    own_head, vocabulary = vocabulary < 0, abs(vocabulary)
    sizes = (dim, hidden, layers, heads, kv_heads, vocabulary, length)
    if not all(0 < size <= _MOST for size in sizes) or dim % heads or heads % kv_heads:
        raise InputError(
            f"load_llama2c: {name!r} begins with the sizes {sizes}, which no model has; give a "
            "file of the first version of llama2.c"
        )
    width = dim // heads
    parts: dict[str, tuple[int, ...]] = {
        "embed": (vocabulary, dim),
        "input_layernorm": (layers, dim),
        "self_attn.q_proj": (layers, dim, dim),
        "self_attn.k_proj": (layers, kv_heads * width, dim),
        "self_attn.v_proj": (layers, kv_heads * width, dim),
        "self_attn.o_proj": (layers, dim, dim),
        "post_attention_layernorm": (layers, dim),
        "mlp.gate_proj": (layers, hidden, dim),
        "mlp.down_proj": (layers, dim, hidden),
        "mlp.up_proj": (layers, hidden, dim),
        "norm": (dim,),
        "angles": (2, length, width // 2),
        **({"head": (vocabulary, dim)} if own_head else {}),
    }
    need = 4 * (_HEADER + sum(int(np.prod(shape, dtype=np.int64)) for shape in parts.values()))
    if len(data) != need:
        raise InputError(
            f"load_llama2c: {name!r} has {len(data)} bytes, and a model of its sizes {sizes} has "
            f"{need}; copy it again"
        )
    floats, at = np.frombuffer(data, "<f4", offset=4 * _HEADER), 0
    arrays: dict[str, Array] = {}
    for part, shape in parts.items():
        count = int(np.prod(shape))
        arrays[part] = floats[at : at + count].reshape(shape)
        at += count
    state = {"model.embed_tokens.weight": arrays["embed"], "model.norm.weight": arrays["norm"]}
    state["lm_head.weight"] = arrays["head" if own_head else "embed"]
    for layer in range(layers):
        for part in parts:
            if part in ("embed", "norm", "angles", "head"):
                continue
            array = arrays[part][layer]
            if part in ("self_attn.q_proj", "self_attn.k_proj"):
                array = halved(array, heads if part.endswith("q_proj") else kv_heads)
            state[f"model.layers.{layer}.{part}.weight"] = array
    return llama(
        {
            "hidden_size": dim,
            "intermediate_size": hidden,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": kv_heads,
            "vocab_size": vocabulary,
            "max_position_embeddings": length,
            "rms_norm_eps": 1e-5,
            "tie_word_embeddings": not own_head,
            "bos_token_id": BOS,
            "eos_token_id": EOS,
        },
        state,
    )


def load_llama2c_tokenizer(path: str | os.PathLike[str]) -> PieceTokenizer:
    """Reads the tokenizer of a model of llama2.c, such as ``tok512.bin``.

    Args:
        path: An int32, the length of the longest piece; then for each piece a float32, its score,
            an int32, its bytes, and the bytes.

    Raises:
        InputError: If the file cannot be read or is no such file.
    """
    data = _read("load_llama2c_tokenizer", path)
    pieces: list[str] = []
    scores: list[float] = []
    at = 4
    try:
        while at < len(data):
            score, size = struct.unpack_from("<fi", data, at)
            raw = data[at + 8 : at + 8 + size]
            if size < 0 or len(raw) != size:
                raise ValueError(f"piece {len(pieces)} is cut off")
            pieces.append(raw.decode())
            scores.append(score)
            at += 8 + size
        controls = frozenset(range(min(EOS + 1, len(pieces))))
        return PieceTokenizer(tuple(pieces), tuple(scores), controls=controls)
    except (ValueError, struct.error, InputError) as error:
        raise InputError(
            f"load_llama2c_tokenizer: {os.fspath(path)!r} is no tokenizer of llama2.c: {error}"
        ) from error


def llama(
    config: Mapping[str, Any], state: Mapping[str, Array], kind: str = "llama"
) -> LlamaForCausalLM:
    """A model of transformers, in eval mode.

    Args:
        config: Arguments of ``LlamaConfig``, or of that of another kind.
        state: float32 arrays by the names of its parameters.
        kind: ``"llama"``, ``"qwen2"``, ``"qwen3"`` or ``"bitnet"``.

    Raises:
        LutraError: If transformers is not installed.
    """
    try:
        import transformers
    except ModuleNotFoundError as error:
        raise LutraError(
            "language models need the package transformers; install it with: pip install "
            '"lutra[gguf]"'
        ) from error
    family = _FAMILIES[kind]
    given = getattr(transformers, f"{family}Config")(**config)
    with torch.device("meta"):
        model: LlamaForCausalLM = getattr(transformers, f"{family}ForCausalLM")(given)
    model = model.to_empty(device="cpu")
    # made without weights, so the angles of positions were not computed
    model.model.rotary_emb = type(model.model.rotary_emb)(model.config)
    weights = {name: torch.from_numpy(np.array(array, np.float32)) for name, array in state.items()}
    if config.get("tie_word_embeddings"):
        weights.setdefault("lm_head.weight", weights["model.embed_tokens.weight"])
    model.load_state_dict(weights, strict=True)
    model.tie_weights()
    return model.eval()


def halved(weight: Array, heads: int) -> Array:
    """Rows of queries or keys whose neighbours are turned together, as halves of each head.

    Args:
        weight: (heads d, ...).
        heads: How many heads it is of.
    """
    width = weight.shape[0] // heads
    apart = weight.reshape(heads, width // 2, 2, -1).swapaxes(1, 2)
    return apart.reshape(weight.shape)


def _read(what: str, path: str | os.PathLike[str]) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise InputError(f"{what}: cannot read {os.fspath(path)!r}: {error.strerror}") from error
