"""Llama models in GGUF files, the format of llama.cpp (https://github.com/ggml-org/ggml).

The package ``gguf`` reads the file and makes floats of quantised weights; the names of entries and
tensors are those of its ``constants`` module.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import numpy as np
import torch
from torch import nn

from lutra.errors import InputError, LutraError, UnsupportedModelError
from lutra.formatting import counted
from lutra.node import Array
from lutra.preprocess.tokens import Tokenizer
from lutra.train.importing.gguf_tokenizer import gguf_tokenizer
from lutra.train.importing.llama import halved, llama
from lutra.train.layers.lowbit import frozen_of_codes

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM

#: Architectures, and whether neighbouring features of queries and keys are turned together there.
_ARCHITECTURES: Final = {"llama": True, "qwen2": False, "qwen3": False, "bitnet": False}
_PARTS: Final = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
#: Parts of a block that an architecture has besides.
_OWN_PARTS: Final[Mapping[str, Mapping[str, str]]] = {
    "qwen3": {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"},
    "bitnet": {"attn_sub_norm": "self_attn.attn_sub_norm", "ffn_sub_norm": "mlp.ffn_sub_norm"},
}
#: What the speed of each pair of features is divided by (Llama 3.1 and later).
_FREQUENCIES: Final = "rope_freqs.weight"
_ENDS: Final = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}


class _Codes(NamedTuple):
    """A format whose weights are a scale times an integer, plus the lowest weight of the group.

    Attributes:
        levels: Values of a code.
        group: Weights that share a scale.
        parts: The scales and the lowest weights of blocks of bytes (B, S), float32 (B, G) each.
    """

    levels: int
    group: int
    parts: Callable[[Array], tuple[Array, Array]]


def _half(blocks: Array, place: int) -> Array:
    """float32 (B, 1): the float16 that begins at a place of each block."""
    raw = np.ascontiguousarray(blocks[:, place : place + 2 or None])
    return raw.view(np.float16).astype(np.float32)


def _symmetric(middle: int, place: int) -> Callable[[Array], tuple[Array, Array]]:
    """Blocks with one scale, in which a code in the middle stands for zero."""

    def parts(blocks: Array) -> tuple[Array, Array]:
        scale = _half(blocks, place)
        return scale, scale * np.float32(-middle)

    return parts


def _q4_k(blocks: Array) -> tuple[Array, Array]:
    from gguf.quants import Q4_K

    factors, lows = Q4_K.get_scale_min(np.ascontiguousarray(blocks[:, 4:16]))
    scale = _half(blocks, 0) * factors.reshape(len(blocks), -1).astype(np.float32)
    low = _half(blocks, 2) * lows.reshape(len(blocks), -1).astype(np.float32)
    return scale, -low


_CODES: Final = {
    "Q4_0": _Codes(16, 32, _symmetric(8, 0)),
    "Q4_1": _Codes(16, 32, lambda blocks: (_half(blocks, 0), _half(blocks, 2))),
    "Q4_K": _Codes(16, 32, _q4_k),
    "TQ1_0": _Codes(3, 256, _symmetric(1, -2)),
    "TQ2_0": _Codes(3, 256, _symmetric(1, -2)),
}
#: The most weights that share a scale in a low-bit layer, if not all of a row.
_GROUP: Final = 128


@dataclass(frozen=True)
class GGUFModel:
    """A language model from a GGUF file.

    Attributes:
        model: Of transformers, float32, in eval mode.
        tokenizer: How text becomes tokens; None where the file has none.
        bos: The token that every text begins with, or None.
        eos: The tokens that end a text.
        max_length: The most tokens of a text that the model was trained with.
        formats: How many tensors the file holds in each format, by its name.
        exact: How many linear layers keep the codes and scales of the file.
        rounded: How many keep its codes and scales, with its lowest weights rounded to half a step.
    """

    model: LlamaForCausalLM
    tokenizer: Tokenizer | None
    bos: int | None
    eos: tuple[int, ...]
    max_length: int
    formats: Mapping[str, int] = field(repr=False)
    exact: int = 0
    rounded: int = 0

    def __str__(self) -> str:
        kinds = ", ".join(f"{count} in {name}" for name, count in self.formats.items())
        made = [
            f"{counted(count, 'layer')} with the codes of the file{how}"
            for count, how in (
                (self.exact, ""),
                (self.rounded, " requantised (lowest weights of groups rounded to half a step)"),
            )
            if count
        ]
        rest = "all others" if made else "all"
        tensors = counted(sum(self.formats.values()), "tensor")
        return f"{tensors} ({kinds}): {', '.join([*made, f'{rest} made float32'])}"


def load_gguf(
    path: str | os.PathLike[str], *, tokenizer: bool = True, low_bits: bool = True
) -> GGUFModel:
    """Reads a language model of the form of Llama from a GGUF file.

    Architectures are ``llama`` (Mistral and SmolLM too), ``qwen2``, ``qwen3`` and ``bitnet``.

    Every format of weights that the package ``gguf`` can make floats of is read: F32, F16, BF16,
    Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q2_K to Q6_K, TQ1_0, TQ2_0 and others.

    Args:
        path: The file.
        tokenizer: Whether to read how text becomes tokens.
        low_bits: Whether linear layers of Q4_0, TQ1_0 and TQ2_0 keep their codes and scales, bit
            for bit, and those of Q4_1 and Q4_K too, with the lowest weight of a group rounded to
            half a step (unless all weights of a group have one sign), as frozen layers of low-bit
            weights, which round activations to int8 row by row. Without, and in all other formats,
            layers have float32 weights and can be converted and trained.

    Raises:
        InputError: If the file cannot be read or is damaged.
        UnsupportedModelError: If the architecture, its settings, a format of weights or the
            tokenizer are none that lutra knows.
        LutraError: If the packages ``gguf`` or ``transformers`` are not installed.
    """
    name = os.fspath(path)
    reader = _reader(name)
    entries = _Entries(name, reader)
    architecture = entries.text("general.architecture")
    if architecture not in _ARCHITECTURES:
        raise UnsupportedModelError(
            f"load_gguf: {name!r} holds a model of the architecture {architecture!r}; lutra reads "
            f"{', '.join(_ARCHITECTURES)}"
        )
    config = _config(name, entries, architecture)
    state, scales, formats = _state(name, reader, architecture, config)
    config["tie_word_embeddings"] = "lm_head.weight" not in state
    frequencies = state.pop(_FREQUENCIES, None)
    _check_sizes(name, config, state)
    if architecture == "llama":
        _fill_biases(config, state)
    try:
        model = llama(config, state, architecture)
    except RuntimeError as error:
        raise InputError(
            f"load_gguf: the tensors of {name!r} do not fit its settings: "
            f"{' '.join(str(error).split())[:300]}"
        ) from error
    if frequencies is not None:
        _divide_frequencies(name, model, frequencies)
    exact, rounded = _keep_codes(model, scales) if low_bits else (0, 0)
    found = gguf_tokenizer(name, entries.get) if tokenizer else None
    bos = entries.get("tokenizer.ggml.bos_token_id")
    spm = entries.get("tokenizer.ggml.model") == "llama"
    begins = entries.get("tokenizer.ggml.add_bos_token", spm)
    ends = [entries.get(f"tokenizer.ggml.{end}_token_id") for end in ("eos", "eot", "eom")]
    return GGUFModel(
        model,
        found,
        bos if begins else None,
        tuple(dict.fromkeys(end for end in ends if end is not None)),
        config["max_position_embeddings"],
        formats,
        exact,
        rounded,
    )


def _reader(name: str) -> Any:
    try:
        from gguf import GGUFReader
    except ModuleNotFoundError as error:
        raise LutraError(
            'GGUF files need the package gguf; install it with: pip install "lutra[gguf]"'
        ) from error
    if not os.path.isfile(name):
        raise InputError(f"load_gguf: there is no file {name!r}; check the path")
    try:
        return GGUFReader(name)
    except Exception as error:  # it reads sizes from the file and trusts them
        raise InputError(
            f"load_gguf: {name!r} is cut off or is no GGUF file ({type(error).__name__}: "
            f"{' '.join(str(error).split())[:200]}); copy it again"
        ) from error


class _Entries:
    """The settings of a file."""

    def __init__(self, name: str, reader: Any) -> None:
        self._name, self._fields = name, reader.fields

    def get(self, key: str, default: Any = None) -> Any:
        if key not in self._fields:
            return default
        try:
            return self._fields[key].contents()
        except Exception as error:
            raise InputError(
                f"load_gguf: the entry {key!r} of {self._name!r} cannot be read "
                f"({type(error).__name__}); copy the file again"
            ) from error

    def text(self, key: str) -> str:
        return str(self._need(key))

    def count(self, key: str) -> int:
        value = self._need(key)
        if not isinstance(value, int) or not 0 < value < 2**31:
            raise UnsupportedModelError(
                f"load_gguf: the entry {key!r} of {self._name!r} is {value!r}; lutra reads models "
                "with one whole number there"
            )
        return value

    def _need(self, key: str) -> Any:
        value = self.get(key)
        if value is None:
            raise InputError(f"load_gguf: {self._name!r} lacks the entry {key!r}")
        return value


def _config(name: str, entries: _Entries, architecture: str) -> dict[str, Any]:
    def key(end: str) -> str:
        return f"{architecture}.{end}"

    heads = entries.count(key("attention.head_count"))
    width = entries.count(key("embedding_length"))
    head = int(entries.get(key("attention.key_length"), width // heads))
    wanted = {
        "expert_count": (0, "experts"),
        "rope.dimension_count": (head, "positions that turn a part of each head"),
        "attention.value_length": (head, "values of another width than keys"),
        "attention.sliding_window": (0, "attention that forgets"),
        "rope.scaling.type": ("none", "scaled positions"),
    }
    scaling = (entries.get(key(f"rope.scaling.{end}")) for end in ("type", "factor"))
    if tuple(scaling) == ("linear", 1.0):
        del wanted["rope.scaling.type"]  # positions as they are
    for end, (value, what) in wanted.items():
        got = entries.get(key(end), value)
        if got != value:
            raise UnsupportedModelError(
                f"load_gguf: {name!r} has {key(end)} = {got!r}, {what}, which lutra does not read"
            )
    config: dict[str, Any] = {
        "hidden_size": width,
        "intermediate_size": entries.count(key("feed_forward_length")),
        "num_hidden_layers": entries.count(key("block_count")),
        "num_attention_heads": heads,
        "num_key_value_heads": int(entries.get(key("attention.head_count_kv"), heads)),
        "head_dim": head,
        "max_position_embeddings": entries.count(key("context_length")),
        "rms_norm_eps": float(entries.get(key("attention.layer_norm_rms_epsilon"), 1e-5)),
        "rope_theta": float(entries.get(key("rope.freq_base"), 10000.0)),
        "bos_token_id": None,
        "eos_token_id": None,
    }
    if architecture == "qwen2":
        if head * heads != width:
            raise UnsupportedModelError(
                f"load_gguf: {name!r} has {heads} heads of {head} for a width of {width}, which "
                "lutra does not read for qwen2"
            )
        del config["head_dim"]
    if architecture == "bitnet":
        config["hidden_act"] = "silu"  # as llama.cpp computes it
    return config


def _state(
    name: str, reader: Any, architecture: str, config: dict[str, Any]
) -> tuple[dict[str, Array], dict[str, _Scales], dict[str, int]]:
    """The parameters by their names in transformers; scales of those that have codes of low-bit
    layers, by module; and how many tensors are in which format."""
    state: dict[str, Array] = {}
    scales: dict[str, _Scales] = {}
    formats: dict[str, int] = {}
    factors: dict[str, Array] = {}
    for tensor in reader.tensors:
        target, kind = _target(tensor.name, architecture)
        if target is None:
            raise UnsupportedModelError(
                f"load_gguf: {name!r} holds the tensor {tensor.name!r}, which lutra does not know "
                f"in a model of the architecture {architecture!r}"
            )
        array, scale = _floats(name, tensor), _scales(tensor)
        if kind == "scale":
            factors[target] = array
        if _ARCHITECTURES[architecture] and target.endswith(("q_proj", "k_proj")):
            heads = "num_attention_heads" if target.endswith("q_proj") else "num_key_value_heads"
            if not len(array) or len(array) % (2 * config[heads]):
                raise InputError(
                    f"load_gguf: the tensors of {name!r} do not fit its settings: {tensor.name!r} "
                    f"has {len(array)} rows, no pairs for {config[heads]} heads; copy the file "
                    "again"
                )
            array = halved(array, config[heads])
            if scale is not None:
                scale = scale._replace(
                    scale=halved(scale.scale, config[heads]), low=halved(scale.low, config[heads])
                )
        if kind != "scale":
            state[target if target == _FREQUENCIES else f"{target}.{kind}"] = array
        format_ = tensor.tensor_type.name
        if scale is not None:
            scales[target] = scale
        formats[format_] = formats.get(format_, 0) + 1
    _apply_factors(name, factors, state, scales)
    if "model.embed_tokens.weight" not in state:
        raise InputError(f"load_gguf: {name!r} lacks the tensor 'token_embd.weight'")
    config["vocab_size"] = state["model.embed_tokens.weight"].shape[0]
    return state, scales, formats


def _apply_factors(
    name: str, factors: Mapping[str, Array], state: dict[str, Array], scales: dict[str, _Scales]
) -> None:
    """Multiplies matrices by the number that BitNet has for all weights of each."""
    for target, factor in factors.items():
        weight = state.get(f"{target}.weight")
        if weight is None or factor.size != 1:
            raise InputError(
                f"load_gguf: {name!r} has {factor.size} scales for the weights of {target!r}, "
                "which are one matrix or none; copy the file again"
            )
        one = np.float32(factor.reshape(-1)[0])
        state[f"{target}.weight"] = weight * one
        if target in scales:
            known = scales[target]
            scales[target] = known._replace(scale=known.scale * one, low=known.low * one)


def _fill_biases(config: dict[str, Any], state: dict[str, Array]) -> None:
    """Models of transformers have biases in all linear layers of attention, or in none."""
    for setting, parts in (
        ("attention_bias", [part for part in _PARTS.values() if part.startswith("self_attn.")]),
        ("mlp_bias", [part for part in _PARTS.values() if part.startswith("mlp.")]),
    ):
        ends = tuple(f".{part}.bias" for part in parts)
        config[setting] = any(path.endswith(ends) for path in state)
        if not config[setting]:
            continue
        for path in [path for path in state if path.endswith(".weight")]:
            bias = path.removesuffix("weight") + "bias"
            if bias.endswith(ends):
                state.setdefault(bias, np.zeros(len(state[path]), np.float32))


def _divide_frequencies(name: str, model: LlamaForCausalLM, factors: Array) -> None:
    """Slows the positions of pairs of features down."""
    rotary = model.model.rotary_emb
    wanted = rotary.inv_freq.numel()
    if factors.shape != (wanted,) or not (factors > 0).all():
        raise InputError(
            f"load_gguf: {_FREQUENCIES!r} of {name!r} has the shape {factors.shape}; it must hold "
            f"{wanted} numbers above 0; copy the file again"
        )
    for buffer in ("inv_freq", "original_inv_freq"):
        if hasattr(rotary, buffer):
            setattr(rotary, buffer, getattr(rotary, buffer) / torch.tensor(factors))


def _check_sizes(name: str, config: Mapping[str, Any], state: Mapping[str, Array]) -> None:
    """Raises InputError where a setting asks for more than the tensors have: a model is only made
    of sizes that are there."""
    width = config.get("head_dim", config["hidden_size"] // config["num_attention_heads"])
    first = "model.layers.0"
    blocks = {path.split(".")[2] for path in state if path.startswith("model.layers.")}
    sizes = {
        "embedding_length": (config["hidden_size"], state["model.embed_tokens.weight"].shape[-1]),
        "block_count": (config["num_hidden_layers"], len(blocks)),
    }
    for what, size, tensor in (
        ("feed_forward_length", config["intermediate_size"], f"{first}.mlp.up_proj.weight"),
        ("head_count", config["num_attention_heads"] * width, f"{first}.self_attn.q_proj.weight"),
        (
            "head_count_kv",
            config["num_key_value_heads"] * width,
            f"{first}.self_attn.k_proj.weight",
        ),
    ):
        if tensor in state:
            sizes[what] = size, state[tensor].shape[0]
    for what, (said, there) in sizes.items():
        if said != there:
            raise InputError(
                f"load_gguf: the tensors of {name!r} do not fit its settings: {what} asks for "
                f"{said}, and they have {there}; copy the file again"
            )


class _Scales(NamedTuple):
    """Scales and lowest weights, float32 (M, G), of a matrix of codes."""

    format: str
    scale: Array
    low: Array


def _scales(tensor: Any) -> _Scales | None:
    """Those of a matrix; None for a tensor that has none."""
    name = tensor.tensor_type.name
    if name not in _CODES or len(tensor.shape) != 2:
        return None
    from gguf import GGML_QUANT_SIZES

    depth, rows = (int(size) for size in tensor.shape)
    _, size = GGML_QUANT_SIZES[tensor.tensor_type]
    with np.errstate(all="ignore"):  # numbers of damaged files, whose weights are refused
        scale, low = _CODES[name].parts(np.asarray(tensor.data).reshape(-1, size))
    groups = depth // _CODES[name].group
    return _Scales(name, scale.reshape(rows, groups), low.reshape(rows, groups))


def _keep_codes(model: nn.Module, scales: Mapping[str, _Scales]) -> tuple[int, int]:
    """Puts frozen layers of the codes in the place of linear layers; how many have exactly the
    weights of the file, and how many nearly."""
    exact = rounded = 0
    for path, known in scales.items():
        layer, layout = model.get_submodule(path), _CODES[known.format]
        if not isinstance(layer, nn.Linear):
            continue  # the embedding
        weight = layer.weight.detach().numpy().reshape(*known.scale.shape, layout.group)
        scale, low = known.scale[:, :, None], known.low[:, :, None]
        flat = scale == 0  # every weight is the lowest one
        steps = np.divide(weight - low, scale, out=np.zeros_like(weight), where=~flat)
        codes = np.rint(steps).astype(np.int64)
        if codes.min() < 0 or codes.max() >= layout.levels:
            raise InputError(
                f"load_gguf: the layer {path!r} holds codes beyond its format {known.format}"
            )
        zero = None
        scale, low, flat = known.scale, known.low, flat[:, :, 0]
        if layout.levels != 3:
            # levels of codes are odd numbers, two for a step; the largest one stands for the
            # weights of a group that are all the same
            top = layout.levels - 1
            codes[flat] = top
            wanted = np.divide(-2 * low, scale, out=np.full_like(low, top), where=~flat) - top
            if np.abs(wanted).max() > top:
                continue  # all weights of a group are on one side of zero: no level stands for it
            zero = np.rint(wanted).astype(np.int8)
            same = bool((zero == wanted).all()) and not low[flat].any()
            scale = np.where(flat, low / np.float32(top), scale / 2)
            exact, rounded = exact + same, rounded + (not same)
        else:
            codes[flat] = 1
            exact += 1
        share = -(-layout.group // _GROUP)
        made = frozen_of_codes(
            codes.reshape(len(codes), -1).astype(np.uint8),
            layout.levels,
            scale.repeat(share, axis=1),
            None if zero is None else zero.repeat(share, axis=1),
            layer.bias,
        )
        model.set_submodule(path, made)
    return exact, rounded


def _target(name: str, architecture: str) -> tuple[str | None, str]:
    """The module of a tensor, and what it is there: weight, bias, or the scale of a matrix."""
    if name == _FREQUENCIES and architecture == "llama":
        return _FREQUENCIES, "weight"
    rest, _, kind = name.rpartition(".")
    if kind not in ("weight", "bias", *(["scale"] if architecture == "bitnet" else [])):
        return None, kind
    if rest in _ENDS:
        return _ENDS[rest], kind
    words = rest.split(".")
    parts = {**_PARTS, **_OWN_PARTS.get(architecture, {})}
    if len(words) == 3 and words[0] == "blk" and words[1].isdecimal() and words[2] in parts:
        return f"model.layers.{words[1]}.{parts[words[2]]}", kind
    return None, kind


def _floats(name: str, tensor: Any) -> Array:
    """float32, the rows first."""
    from gguf import dequantize

    try:
        made = np.asarray(dequantize(tensor.data, tensor.tensor_type), np.float32)
    except NotImplementedError as error:
        raise UnsupportedModelError(
            f"load_gguf: the tensor {tensor.name!r} of {name!r} is in the format "
            f"{tensor.tensor_type.name}, which the package gguf makes no floats of; upgrade it, or "
            "quantise the model to another format"
        ) from error
    except Exception as error:
        raise InputError(
            f"load_gguf: the tensor {tensor.name!r} of {name!r} cannot be read "
            f"({type(error).__name__}); copy the file again"
        ) from error
    shape = tuple(int(size) for size in reversed(tensor.shape))
    if made.size != int(np.prod(shape)) or not np.isfinite(made).all():
        raise InputError(
            f"load_gguf: the tensor {tensor.name!r} of {name!r} is cut off or holds NaN or "
            "infinite values; copy the file again"
        )
    return made.reshape(shape)
