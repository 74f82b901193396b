"""The benchmark of language models: files of the same weights for lutra and for llama.cpp."""

from __future__ import annotations

import sys
from argparse import Namespace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("gguf")

sys.path.insert(0, str(Path(__file__).parents[2]))
from transformers import LlamaConfig, LlamaForCausalLM  # noqa: E402

from benchmarks.decoder_models import bitnet, with_ternary, write_gguf, write_lutra  # noqa: E402
from benchmarks.decoders import Engine, measure  # noqa: E402
from lutra.format import load_graph  # noqa: E402
from lutra.graph import Graph  # noqa: E402
from lutra.train import LowBit, convert, load_gguf  # noqa: E402

VOCABULARY, LENGTH = 64, 40
SIZES: dict[str, Any] = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def need_llama() -> None:
    if find_spec("llama_cpp") is None:
        pytest.skip("needs llama_cpp: pip install llama-cpp-python")


def ops(path: Path) -> list[str]:
    graph: Graph = load_graph(path)
    return [node.op for node in graph.nodes]


def test_ternary_weights_are_those_of_the_model(tmp_path: Path) -> None:
    """With activations in int8 the scores are near those of float32."""
    torch.manual_seed(0)  # of the model's weights
    model = bitnet(1, VOCABULARY, **SIZES)
    ids = torch.randint(0, VOCABULARY, (1, 12), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        want = model(ids).logits[0, -1].numpy()
    path = tmp_path / "m.lutra"
    write_lutra(with_ternary(model), path, LENGTH)
    assert ops(path).count("lowbit_linear") == 7
    assert ops(path).count("rms_norm") == 5
    engine = Engine(path, 1, None)
    engine.read(ids[0, :5].tolist())
    got = engine.read(ids[0, 5:].tolist())
    np.testing.assert_allclose(got, want, atol=0.05 * np.abs(want).max())


def test_models_of_bitnet_convert(tmp_path: Path) -> None:
    """From float weights by mean magnitude, as they were trained."""
    model = bitnet(1, VOCABULARY, **SIZES)
    ids = torch.randint(0, VOCABULARY, (4, 8), generator=torch.Generator().manual_seed(0))
    recipe = {"model.layers.*": LowBit(1.58, rounding="absmean")}
    made, report = convert(model, recipe, [ids])
    assert len(report.replaced) == 7
    write_lutra(made, tmp_path / "m.lutra", LENGTH)
    assert ops(tmp_path / "m.lutra").count("lowbit_linear") == 7


def test_a_gguf_file_holds_the_weights(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SIZES, vocab_size=VOCABULARY, num_hidden_layers=1))
    formats = write_gguf(model.eval(), tmp_path / "m.gguf", "llama", "Q8_0", "F32", LENGTH)
    assert formats == {"F32": 5, "Q8_0": 7}
    made = load_gguf(tmp_path / "m.gguf").model.state_dict()
    for name, want in model.state_dict().items():
        near = want.abs().max() / 127 if name.startswith("model.layers") else 0
        assert (made[name] - want).abs().max() <= near, name


@pytest.mark.parametrize("kind", ["TQ1_0", "TQ2_0"])
def test_llama_cpp_computes_the_same(kind: str, tmp_path: Path) -> None:
    need_llama()
    model = bitnet(2, VOCABULARY, **SIZES, hidden_act="silu")
    path = tmp_path / "m.lutra"
    write_lutra(with_ternary(model), path, LENGTH)
    files = [
        ("lutra", path, {}),
        ("llama.cpp", tmp_path / "m.gguf",
         write_gguf(model, tmp_path / "m.gguf", "bitnet", kind, "Q8_0", LENGTH)),
    ]  # fmt: skip
    options = Namespace(prompt=30, tokens=4, runs=2, threads=1, isa=None, clock="cpu")
    record = measure("tiny", VOCABULARY, files, options)
    assert record["failed"] == {}
    assert 0 < record["difference"]["llama.cpp"] < 0.05
    assert record["formats"]["llama.cpp"] == {kind: 14, "Q8_0": 1, "F32": 9}
    assert all(record[what][title] > 0 for what in ("prefill", "decode") for title, *_ in files)
