"""Language models for the benchmark, as .lutra files and as GGUF files of the same weights."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from torch import nn

from benchmarks.peers import Array
from lutra.train import Int8, Keep, convert, export_decoder, load_llama2c
from lutra.train.layers.lowbit import frozen_of_codes

#: The ends of a model in 8 bits, as files of few bits have them.
ENDS: Final = {"lm_head": Int8(), "model.embed_tokens": Int8(), "*": Keep()}
_PARTS: Final = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.attn_sub_norm": "attn_sub_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "mlp.ffn_sub_norm": "ffn_sub_norm",
}
_ENDS: Final = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
}


def bitnet(blocks: int, vocabulary: int, **changes: Any) -> nn.Module:
    """A random model with the sizes of BitNet b1.58 2B4T, whose weights are ternary.

    Args:
        blocks: How many; the model itself has 30.
        vocabulary: Its tokens; the model itself has 128,256.
        changes: Other settings of ``BitNetConfig``.
    """
    from transformers import BitNetConfig, BitNetForCausalLM

    sizes = {
        "hidden_size": 2560,
        "intermediate_size": 6912,
        "num_attention_heads": 20,
        "num_key_value_heads": 5,
        "num_hidden_layers": blocks,
        "vocab_size": vocabulary,
        "max_position_embeddings": 4096,
        "rope_theta": 500000.0,
        "tie_word_embeddings": True,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
    }
    model = BitNetForCausalLM(BitNetConfig(**{**sizes, **changes}))
    rng = np.random.default_rng(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.startswith("model.layers.") and parameter.ndim == 2:
                codes = rng.integers(-1, 2, tuple(parameter.shape), dtype=np.int8)
                scale = _step(parameter.shape[1])
                parameter.copy_(torch.from_numpy(codes).float() * scale)
    return model.eval()


def _step(depth: int) -> float:
    """The scale of ternary weights: float16 holds it exactly."""
    return float(np.float16(depth**-0.5))


def with_ternary(model: nn.Module) -> nn.Module:
    """The model of ``bitnet`` with frozen ternary layers, and embedding and head in int8."""
    ids = torch.randint(0, model.config.vocab_size, (4, 8))
    made, _ = convert(model, ENDS, [ids])
    for name, layer in list(made.named_modules()):
        if name.startswith("model.layers.") and isinstance(layer, nn.Linear):
            weight = layer.weight.detach().numpy()
            scale = np.full((len(weight), 1), _step(weight.shape[1]), np.float32)
            codes = (np.rint(weight / scale) + 1).astype(np.uint8)
            made.set_submodule(name, frozen_of_codes(codes, 3, scale, None, None))
    return made


def write_lutra(model: nn.Module, path: Path, length: int) -> None:
    """Writes a decoder; random and rounded models may differ from PyTorch by some of the largest
    score."""
    export_decoder(model, path, max_length=length, tolerance=0.1)


def stories(folder: Path) -> nn.Module:
    """stories260K of llama2.c."""
    return load_llama2c(folder / "stories260K.bin")


def write_gguf(
    model: nn.Module, path: Path, architecture: str, matrices: str, ends: str, length: int
) -> dict[str, int]:
    """Writes a model of transformers as llama.cpp wants it.

    Args:
        model: A LlamaForCausalLM or BitNetForCausalLM with float32 weights.
        path: The file.
        architecture: ``llama`` or ``bitnet``.
        matrices: The format of the matrices of the blocks; those whose rows it does not divide are
            F16, as llama.cpp's own quantisation does.
        ends: The format of embedding and head.
        length: The most tokens of a text.

    Returns:
        How many tensors have which format.
    """
    import gguf

    config: Any = model.config
    writer = gguf.GGUFWriter(path, architecture)
    heads, groups = config.num_attention_heads, config.num_key_value_heads
    writer.add_context_length(length)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(heads)
    writer.add_head_count_kv(groups)
    writer.add_rope_dimension_count(config.hidden_size // heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("no_vocab")
    formats: dict[str, int] = {}
    for name, array in _tensors(model, architecture == "llama", heads, groups).items():
        wanted = "F32" if array.ndim == 1 else matrices if name.startswith("blk.") else ends
        block, _ = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[wanted]]
        wanted = wanted if array.shape[-1] % block == 0 else "F16"
        kind = gguf.GGMLQuantizationType[wanted]
        formats[wanted] = formats.get(wanted, 0) + 1
        writer.add_tensor(name, gguf.quantize(array, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return formats


def _tensors(model: nn.Module, paired: bool, heads: int, groups: int) -> Mapping[str, Array]:
    """float32 by the names of GGUF; paired: features that are turned together are neighbours."""
    made = {}
    for name, parameter in model.state_dict().items():
        module, kind = name.rsplit(".", 1)
        array = parameter.float().numpy()
        if module == "lm_head" and model.config.tie_word_embeddings:
            continue
        if not module.startswith("model.layers."):
            made[f"{_ENDS[module]}.{kind}"] = array
            continue
        _, _, layer, part = module.split(".", 3)
        if paired and part.endswith(("q_proj", "k_proj")):
            count = heads if part.endswith("q_proj") else groups
            apart = array.reshape(count, 2, -1, array.shape[1]).swapaxes(1, 2)
            array = np.ascontiguousarray(apart.reshape(array.shape))
        made[f"blk.{layer}.{_PARTS[part]}.{kind}"] = array
    return made
