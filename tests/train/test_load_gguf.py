"""Language models in GGUF files, written here by the package gguf."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
gguf = pytest.importorskip("gguf")
transformers = pytest.importorskip("transformers")

from gguf import GGMLQuantizationType as Format  # noqa: E402
from transformers import (  # noqa: E402
    BitNetConfig,
    BitNetForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from lutra import Generator  # noqa: E402
from lutra.errors import InputError, LutraError, UnsupportedModelError  # noqa: E402
from lutra.node import Array  # noqa: E402
from lutra.ops.lowbit import load_rows  # noqa: E402
from lutra.train import export_decoder, load_gguf  # noqa: E402
from lutra.train.importing.gguf_file import _ENDS, _OWN_PARTS, _PARTS  # noqa: E402

WIDTH, VOCABULARY = 256, 40
SETTINGS: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "intermediate_size": 256,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rope_theta": 5000.0,
    "rms_norm_eps": 1e-4,
}
QUANTISED = [
    Format.F16,
    Format.BF16,
    Format.Q8_0,
    Format.Q4_0,
    Format.Q4_1,
    Format.TQ1_0,
    Format.TQ2_0,
]
PACKED = [Format.Q2_K, Format.Q3_K, Format.Q4_K, Format.Q5_K, Format.Q6_K]


def model_of(architecture: str) -> Any:
    torch.manual_seed(0)
    if architecture == "qwen2":
        model = Qwen2ForCausalLM(Qwen2Config(**SETTINGS, tie_word_embeddings=True))
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                torch.nn.init.normal_(parameter)
        return model.eval()
    if architecture == "qwen3":  # heads of another width than width / heads
        return norms(Qwen3ForCausalLM(Qwen3Config(**SETTINGS, head_dim=32)))
    if architecture == "bitnet":
        settings = {**SETTINGS, "hidden_act": "silu", "tie_word_embeddings": True}
        return norms(BitNetForCausalLM(BitNetConfig(**settings)))
    return LlamaForCausalLM(LlamaConfig(**SETTINGS)).eval()


def norms(model: Any) -> Any:
    """With norms that are not all one."""
    for name, parameter in model.named_parameters():
        if "norm" in name:
            torch.nn.init.uniform_(parameter, 0.5, 2.0)
    return model.eval()


def pairs(weight: Array, heads: int) -> Array:
    """Rows as llama.cpp wants them: the two features that are turned together are neighbours."""
    return weight.reshape(heads, 2, -1, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)


def tensors_of(model: Any, architecture: str) -> dict[str, Array]:
    """The tensors of a model by the names of GGUF."""
    own = _OWN_PARTS.get(architecture, {})
    names = {new: old for old, new in (*_PARTS.items(), *own.items(), *_ENDS.items())}
    made = {}
    for name, parameter in model.state_dict().items():
        module, kind = name.rsplit(".", 1)
        array = parameter.numpy()
        if module == "lm_head" and model.config.tie_word_embeddings:
            continue
        if module.startswith("model.layers."):
            _, _, layer, part = module.split(".", 3)
            if architecture == "llama" and part.endswith(("q_proj", "k_proj")):
                array = pairs(array, 4 if part.endswith("q_proj") else 2)
            made[f"blk.{layer}.{names[part]}.{kind}"] = array
        else:
            made[f"{names[module]}.{kind}"] = array
    return made


def write(
    path: Path,
    tensors: dict[str, Array],
    architecture: str = "llama",
    formats: dict[str, Any] | None = None,
    more: Any = None,
) -> Path:
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_context_length(64)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(1)
    writer.add_feed_forward_length(256)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-4)
    writer.add_rope_freq_base(5000.0)
    if more is not None:
        more(writer)
    for name, array in tensors.items():
        if formats and name in formats:
            writer.add_tensor(name, array, raw_dtype=formats[name])
        else:
            writer.add_tensor(name, np.ascontiguousarray(array, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def head_width(architecture: str) -> Any:
    """The entry for heads of another width."""
    return (lambda w: w.add_key_length(32)) if architecture == "qwen3" else None


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3", "bitnet"])
def test_a_model_comes_back_as_it_was(architecture: str, tmp_path: Path) -> None:
    model = model_of(architecture)
    tensors = tensors_of(model, architecture)
    path = write(tmp_path / "m.gguf", tensors, architecture, more=head_width(architecture))
    made = load_gguf(path)
    want, got = model.state_dict(), made.model.state_dict()
    assert want.keys() == got.keys()
    for name, parameter in want.items():
        assert torch.equal(parameter, got[name]), name
    ids = torch.randint(0, VOCABULARY, (2, 30))
    with torch.no_grad():
        assert torch.equal(model(ids).logits, made.model(ids).logits)
    assert (made.tokenizer, made.bos, made.eos, made.max_length) == (None, None, (), 64)
    assert made.formats == {"F32": len(tensors)}
    assert "made float32" in str(made)


@pytest.mark.parametrize("format_", QUANTISED, ids=lambda f: f.name)
def test_quantised_weights(format_: Any, tmp_path: Path) -> None:
    tensors = tensors_of(model_of("llama"), "llama")
    name = "blk.0.ffn_up.weight"
    packed = gguf.quantize(tensors[name], format_)
    path = write(tmp_path / "m.gguf", {**tensors, name: packed}, formats={name: format_})
    made = load_gguf(path, low_bits=False)
    got = made.model.model.layers[0].mlp.up_proj.weight.detach().numpy()
    np.testing.assert_array_equal(got, gguf.dequantize(packed, format_))
    assert made.formats[format_.name] == 1
    assert made.exact == 0


def weights_of(layer: Any) -> Array:
    """The weights that the codes of a frozen layer stand for."""
    node, tensors = layer.node, layer.arrays()
    levels, depth = int(node.attrs["levels"]), int(node.attrs["in_features"])
    codes = load_rows(tensors["weight"], levels, depth).astype(np.float32)
    scale, group = tensors["scale"], int(node.attrs["group"])
    level = codes - 1 if levels == 3 else 2 * codes - (levels - 1)
    zero = tensors.get("zero", np.zeros(scale.shape, np.int8)).astype(np.float32)
    return (level - zero.repeat(group, axis=1)) * scale.repeat(group, axis=1)


@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
@pytest.mark.parametrize("name", ["Q4_0", "TQ1_0", "TQ2_0"])
def test_codes_are_kept(architecture: str, name: str, tmp_path: Path) -> None:
    """Of queries and keys too, whose rows are reordered; with the biases of qwen2."""
    format_ = Format[name]
    tensors = tensors_of(model_of(architecture), architecture)
    matrices = [n for n, x in tensors.items() if n.startswith("blk") and x.ndim == 2]
    matrices += ["output.weight"] if architecture == "llama" else []
    packed = {n: gguf.quantize(tensors[n], format_) for n in matrices}
    packed["blk.0.ffn_up.weight"][3] = 0  # a row whose scales are 0
    path = write(
        tmp_path / "m.gguf", {**tensors, **packed}, architecture,
        formats=dict.fromkeys(matrices, format_),
    )  # fmt: skip
    made, floats = load_gguf(path), load_gguf(path, low_bits=False)
    assert made.exact == len(matrices)
    assert f"{len(matrices)} layers with the codes of the file" in str(made)
    layers = [m for m in made.model.named_modules() if hasattr(m[1], "arrays")]
    assert len(layers) == len(matrices)
    for layer, module in layers:
        want = floats.model.get_submodule(layer).weight.detach().numpy()
        np.testing.assert_array_equal(weights_of(module), want)
        bias = floats.model.get_submodule(layer).bias
        np.testing.assert_array_equal(
            module.bias.numpy(), np.zeros(len(want)) if bias is None else bias.detach().numpy()
        )
    ids = torch.randint(0, VOCABULARY, (2, 12))
    with torch.no_grad():
        near, exact = made.model(ids).logits, floats.model(ids).logits
    assert (near - exact).abs().max() < 0.1 * exact.abs().max()
    if name == "Q4_0" and architecture == "llama":
        graph = export_decoder(made.model, tmp_path / "m.lutra", max_length=20)
        assert sum(node.op == "lowbit_linear" for node in graph.nodes) == 8
        ids = made.model.generate(
            torch.tensor([[1, 2, 3]]), max_new_tokens=10, do_sample=False, pad_token_id=0
        )
        tokens = Generator(tmp_path / "m.lutra").generate([1, 2, 3], 10).tokens
        assert list(tokens) == ids[0, 3:].tolist()


@pytest.mark.parametrize("name", ["F32", "TQ1_0", "TQ2_0"])
def test_bitnet_with_scales_of_matrices(name: str, tmp_path: Path) -> None:
    """A number for all weights of a matrix is part of its scales."""
    model = model_of("bitnet")
    tensors, format_ = tensors_of(model, "bitnet"), Format[name]
    matrices = [n for n, x in tensors.items() if n.startswith("blk") and x.ndim == 2]
    scales = {n.replace("weight", "scale"): np.full(1, 0.7 + i, np.float32)
              for i, n in enumerate(matrices)}  # fmt: skip
    packed = {n: gguf.quantize(tensors[n], format_) for n in matrices}

    def more(writer: Any) -> None:
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(1.0)

    path = write(tmp_path / "m.gguf", {**tensors, **packed, **scales}, "bitnet",
                 formats=dict.fromkeys(matrices, format_), more=more)  # fmt: skip
    made = load_gguf(path)
    assert made.exact == (0 if name == "F32" else 7)
    for matrix in matrices:
        module = made.model.get_submodule(f"model.layers.0.{_PARTS[matrix.split('.')[2]]}")
        want = gguf.dequantize(packed[matrix], format_) * scales[matrix.replace("weight", "scale")]
        got = module.weight.detach().numpy() if name == "F32" else weights_of(module)
        np.testing.assert_array_equal(got, want)
    export_decoder(made.model, tmp_path / "m.lutra", max_length=20)
    ids = made.model.generate(
        torch.tensor([[1, 2, 3]]), max_new_tokens=10, do_sample=False, pad_token_id=0,
        eos_token_id=None,
    )  # fmt: skip
    tokens = Generator(tmp_path / "m.lutra").generate([1, 2, 3], 10).tokens
    assert list(tokens) == ids[0, 3:].tolist()


def test_bitnet_with_scales_that_are_not_one_number(tmp_path: Path) -> None:
    tensors = tensors_of(model_of("bitnet"), "bitnet")
    for scale in ("blk.0.attn_q.scale", "blk.1.attn_q.scale"):
        count = 2 if scale.startswith("blk.0") else 1
        path = write(tmp_path / "m.gguf", {**tensors, scale: np.ones(count, np.float32)}, "bitnet")
        with pytest.raises(InputError, match=rf"has {count} scales for the weights of "):
            load_gguf(path)


def test_frequencies_of_llama_3(tmp_path: Path) -> None:
    """Files of Llama 3.1 hold what the speed of each pair of features is divided by."""
    scaled = {"rope_type": "llama3", "rope_theta": 5000.0, "factor": 8.0, "low_freq_factor": 1.0,
              "high_freq_factor": 4.0, "original_max_position_embeddings": 32}  # fmt: skip
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**{**SETTINGS, "rope_parameters": scaled})).eval()
    plain = LlamaForCausalLM(LlamaConfig(**SETTINGS))
    factors = (plain.model.rotary_emb.inv_freq / model.model.rotary_emb.inv_freq).numpy()
    assert 1 == factors[0] < factors[-1]
    tensors = {**tensors_of(model, "llama"), "rope_freqs.weight": factors}
    made = load_gguf(write(tmp_path / "m.gguf", tensors))
    ids = torch.randint(0, VOCABULARY, (2, 60))
    with torch.no_grad():
        want = model(ids).logits
        torch.testing.assert_close(made.model(ids).logits, want)
        made.model.model.rotary_emb.inv_freq = plain.model.rotary_emb.inv_freq
        assert (made.model(ids).logits - want).abs().max() > 1e-3
    made = load_gguf(tmp_path / "m.gguf")
    export_decoder(made.model, tmp_path / "m.lutra", max_length=64)
    ids = model.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=40, do_sample=False,
                         pad_token_id=0, eos_token_id=None)  # fmt: skip
    tokens = Generator(tmp_path / "m.lutra").generate([1, 2, 3], 40).tokens
    assert list(tokens) == ids[0, 3:].tolist()


def test_biases_of_llama(tmp_path: Path) -> None:
    """Where some linear layers have one, as in InternLM: those without have zeros."""
    tensors = tensors_of(model_of("llama"), "llama")
    bias = np.random.default_rng(0).normal(size=256).astype(np.float32)
    more = {"blk.0.attn_q.bias": bias, "blk.0.attn_v.bias": bias[:128], "blk.0.ffn_up.bias": bias}
    made = load_gguf(write(tmp_path / "m.gguf", {**tensors, **more})).model
    layer = made.model.layers[0]
    turned = pairs(layer.self_attn.q_proj.bias.detach().numpy()[:, None], 4)[:, 0]
    np.testing.assert_array_equal(turned, bias)
    np.testing.assert_array_equal(layer.self_attn.v_proj.bias.detach().numpy(), bias[:128])
    np.testing.assert_array_equal(layer.mlp.up_proj.bias.detach().numpy(), bias)
    for other in (layer.self_attn.k_proj, layer.self_attn.o_proj, layer.mlp.down_proj):
        assert not other.bias.any()
    assert load_gguf(write(tmp_path / "n.gguf", tensors)).model.config.attention_bias is False


def blocks_of(name: str, rows: int, depth: int) -> Array:
    """Random bytes of a format with scales and lowest weights of a size that models have."""
    rng = np.random.default_rng(0)
    block, size = gguf.GGML_QUANT_SIZES[Format[name]]
    packed = rng.integers(0, 256, (rows * depth // block, size), dtype=np.uint8)
    halves = rng.uniform(0.001, 0.01, (len(packed), 2)).astype(np.float16)
    if name == "Q4_1":
        halves[:, 1] = -halves[:, 0] * rng.uniform(0.5, 14.5, len(packed))
    else:
        halves[:, 1] = halves[:, 0] / 8  # of 63 steps at most
    packed[:, :4] = halves.view(np.uint8)
    packed[5, :2] = 0  # weights that are all the same
    return packed.reshape(rows, -1)


@pytest.mark.parametrize("name", ["Q4_1", "Q4_K"])
def test_codes_with_lowest_weights_are_requantised(name: str, tmp_path: Path) -> None:
    """Codes and scales stay; the lowest weight of a group moves by a quarter of a step at most."""
    tensors = tensors_of(model_of("llama"), "llama")
    matrices = [n for n, x in tensors.items() if n.startswith("blk") and x.ndim == 2]
    packed = {n: blocks_of(name, len(tensors[n]), 256) for n in matrices}
    far = packed["blk.0.ffn_up.weight"]
    if name == "Q4_1":
        far[0, 2:4] = np.full(1, 5.0, np.float16).view(np.uint8)  # weights of one sign
    path = write(
        tmp_path / "m.gguf", {**tensors, **packed}, formats=dict.fromkeys(matrices, Format[name])
    )
    made, floats = load_gguf(path), load_gguf(path, low_bits=False)
    count = len(matrices) - (name == "Q4_1")
    assert (made.exact, made.rounded) == (0, count)
    assert f"{count} layers with the codes of the file requantised" in str(made)
    assert "all others made float32" in str(made)
    layers = [m for m in made.model.named_modules() if hasattr(m[1], "arrays")]
    assert len(layers) == count
    for layer, module in layers:
        want = floats.model.get_submodule(layer).weight.detach().numpy().reshape(-1, 32)
        got = weights_of(module).reshape(-1, 32)
        step = (want.max(axis=1) - want.min(axis=1)) / 15  # at most: not every code is there
        scale = 2 * module.arrays()["scale"].reshape(-1)
        moved = np.abs(got - want).max(axis=1)
        assert (moved <= np.where(step > 0, np.abs(scale) / 4, 0) + 1e-6).all()
        assert moved.max() > 0
        # codes stay: all weights of a group move together
        np.testing.assert_allclose(got - want, np.broadcast_to((got - want)[:, :1], got.shape),
                                   atol=1e-6)  # fmt: skip
    export_decoder(made.model, tmp_path / "m.lutra", max_length=20)
    ids = torch.randint(0, VOCABULARY, (2, 12))
    with torch.no_grad():
        near, exact = made.model(ids).logits, floats.model(ids).logits
    assert (near - exact).abs().max() < 0.2 * exact.abs().max()


@pytest.mark.parametrize("format_", PACKED, ids=lambda f: f.name)
def test_weights_in_super_blocks(format_: Any, tmp_path: Path) -> None:
    """The package does not write these formats: any bytes with finite scales are weights."""
    tensors = tensors_of(model_of("llama"), "llama")
    _, size = gguf.GGML_QUANT_SIZES[format_]
    packed = np.random.default_rng(0).integers(0, 60, (256, size), dtype=np.uint8)
    name = "blk.0.ffn_down.weight"
    path = write(tmp_path / "m.gguf", {**tensors, name: packed}, formats={name: format_})
    got = load_gguf(path, low_bits=False).model.model.layers[0].mlp.down_proj.weight.detach()
    want = gguf.dequantize(packed, format_)
    assert np.abs(want).max() > 0
    np.testing.assert_array_equal(got, want)


def test_a_tokenizer_of_pieces(tmp_path: Path) -> None:
    pieces = ["<unk>", "<s>", "</s>", "<0x0A>", "▁", "a", "b", "▁a", "ab"]
    pieces += [f"p{i}" for i in range(VOCABULARY - len(pieces))]

    def more(writer: Any) -> None:
        writer.add_tokenizer_model("llama")
        writer.add_token_list(pieces)
        writer.add_token_scores([0.0] * 4 + [-9.0, -9.0, -9.0, -2.0, -1.0] + [-20.0] * 31)
        writer.add_token_types([2, 3, 3, 6] + [1] * 36)
        writer.add_bos_token_id(1)
        writer.add_eos_token_id(2)

    made = load_gguf(write(tmp_path / "m.gguf", tensors_of(model_of("llama"), "llama"), more=more))
    assert made.tokenizer is not None
    assert made.tokenizer.encode("ab\na") == [4, 8, 3, 5]
    assert made.tokenizer.encode("a") == [7]
    assert made.tokenizer.decode([1, 7, 8, 3, 2]) == " aab\n"
    assert (made.bos, made.eos) == (1, (2,))
    assert load_gguf(tmp_path / "m.gguf", tokenizer=False).tokenizer is None


def test_a_tokenizer_of_bytes(tmp_path: Path) -> None:
    pytest.importorskip("tokenizers")
    letters = ["a", "b", "c", "Ġ", "Ċ", "1", "2", "Ã", "Ł", "<|end|>"]
    pieces = [*letters, "ab", "Ġa", "12"]
    pieces += [f"p{i}" for i in range(VOCABULARY - len(pieces))]

    def more(words: str) -> Any:
        def add(writer: Any) -> None:
            writer.add_tokenizer_model("gpt2")
            writer.add_tokenizer_pre(words)
            writer.add_token_list(pieces)
            writer.add_token_types([1] * 9 + [3] + [1] * 30)
            writer.add_token_merges(["a b", "Ġ a", "1 2"])
            writer.add_eos_token_id(9)

        return add

    tensors = tensors_of(model_of("llama"), "llama")
    for words, numbers in (("qwen2", [5, 6]), ("smollm", [5, 6]), ("llama-bpe", [12])):
        made = load_gguf(write(tmp_path / "m.gguf", tensors, more=more(words)))
        assert made.tokenizer is not None
        assert made.tokenizer.encode("ab a\n12ß") == [10, 11, 4, *numbers, 7, 8]
        assert made.tokenizer.decode([10, 11, 4, 7, 8, 9]) == "ab a\nß"
        assert (made.bos, made.eos) == (None, (9,))
    write(tmp_path / "m.gguf", tensors, more=more("words"))
    with pytest.raises(UnsupportedModelError, match="cuts words as 'words'"):
        load_gguf(tmp_path / "m.gguf")
    assert load_gguf(tmp_path / "m.gguf", tokenizer=False).tokenizer is None


def test_damaged_and_unknown_files(tmp_path: Path) -> None:
    tensors = tensors_of(model_of("llama"), "llama")
    whole = write(tmp_path / "m.gguf", tensors).read_bytes()
    for size in (0, 3, 20, 200, 900, len(whole) // 2, len(whole) - 40):
        cut = tmp_path / "cut.gguf"
        cut.write_bytes(whole[:size])
        with pytest.raises(InputError, match=r"copy (it|the file) again") as caught:
            load_gguf(cut)
        assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match="there is no file"):
        load_gguf(tmp_path / "none.gguf")
    path = tmp_path / "n.gguf"
    for architecture in ("falcon", "mamba"):
        write(path, tensors, architecture)
        with pytest.raises(UnsupportedModelError, match=f"architecture '{architecture}'; lutra"):
            load_gguf(path)
    for more, match in (
        (lambda w: w.add_expert_count(8), "llama.expert_count = 8, experts, which lutra does not"),
        (lambda w: w.add_rope_scaling_type(gguf.RopeScalingType.YARN), "scaled positions"),
        (lambda w: w.add_sliding_window(16), "attention that forgets"),
    ):
        write(path, tensors, more=more)
        with pytest.raises(UnsupportedModelError, match=match):
            load_gguf(path)
    for factors in (np.ones(31), np.zeros(32), -np.ones(32)):
        write(path, {**tensors, "rope_freqs.weight": factors.astype(np.float32)})
        with pytest.raises(InputError, match=r"'rope_freqs.weight' of .* 32 numbers above 0"):
            load_gguf(path)
    for unknown in ("blk.0.attn_q_norm.weight", "blk.0.attn_sub_norm.weight", "blk.0.attn_q.scale"):
        write(path, {**tensors, unknown: np.ones(1, np.float32)})
        with pytest.raises(UnsupportedModelError, match=rf"the tensor '{unknown}', which lutra"):
            load_gguf(path)
    write(path, {n: x for n, x in tensors.items() if n != "blk.0.ffn_up.weight"})
    with pytest.raises(InputError, match=r"do not fit its settings: .*up_proj"):
        load_gguf(path)
    for more, match in (
        (lambda w: w.add_uint32("llama.block_count", 2**30), "block_count asks for 1073741824, "),
        (lambda w: w.add_uint32("llama.embedding_length", 2**30), "embedding_length asks for "),
        (lambda w: w.add_uint32("llama.feed_forward_length", 2**30), "feed_forward_length asks "),
        (lambda w: w.add_uint32("llama.attention.head_count", 2**30), ".* rows, no pairs for 1073"),
        (
            lambda w: w.add_uint32("llama.attention.head_count_kv", 2**30),
            ".* rows, no pairs for 1073",
        ),
        (lambda w: w.add_uint32("llama.attention.head_count_kv", 1), "head_count_kv asks for 64"),
    ):
        write(path, tensors, more=more)
        with pytest.raises(InputError, match=rf"do not fit its settings: {match}"):
            load_gguf(path)
    nan = tensors["output_norm.weight"] * np.nan
    write(path, {**tensors, "output_norm.weight": nan})
    with pytest.raises(InputError, match=r"'output_norm.weight' .* holds NaN"):
        load_gguf(path)


def test_damaged_headers(tmp_path: Path) -> None:
    """Absurd counts, sizes and places in the bytes before the weights: one sentence, at once."""
    whole = write(tmp_path / "m.gguf", tensors_of(model_of("llama"), "llama")).read_bytes()
    said = []
    for place in range(4, 1300, 12):
        for bytes_ in (b"\xff" * 8, b"\x00" * 8, b"\x00\x00\x00\x00\x00\x01\x00\x00"):
            path = tmp_path / "n.gguf"
            path.write_bytes(whole[:place] + bytes_ + whole[place + 8 :])
            try:
                load_gguf(path)
            except LutraError as error:
                said.append(str(error))
    assert len(said) > 200
    assert not any("\n" in text for text in said)
