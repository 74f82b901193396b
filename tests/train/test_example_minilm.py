"""The MiniLM examples: batches, measures, and both trainings of each on a tiny encoder."""

from __future__ import annotations

import json
import lzma
import random
import sys
from pathlib import Path
from typing import Any

import agnews_minilm as agnews
import minilm
import numpy as np
import pytest
import sst2_minilm as sst2
import torch
from text_support import ID, tiny_tokenizer

import lutra
from lutra.cli import main as command
from lutra.sentences import SentenceEncoder

transformers = pytest.importorskip("transformers")

WORDS = [word for word in ID if word.isalpha()]


def sentences(count: int, seed: int) -> tuple[list[int], list[str]]:
    draw = random.Random(seed)
    texts = [" ".join(draw.choices(WORDS, k=draw.randint(1, 9))) for _ in range(count)]
    return [int(WORDS[0] in text) for text in texts], texts


def write(path: Path, rows: tuple[list[int], list[str]]) -> None:
    with lzma.open(path, "wt", encoding="utf-8") as file:
        file.writelines(f"{label}\t{text}\n" for label, text in zip(*rows, strict=True))


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """Six blocks as in MiniLM, of width 16."""

    def load() -> tuple[Any, Any]:
        torch.manual_seed(0)
        config = transformers.BertConfig(
            vocab_size=len(ID), hidden_size=16, num_hidden_layers=6, num_attention_heads=2,
            intermediate_size=32, max_position_embeddings=128,
        )  # fmt: skip
        tokenizer = transformers.PreTrainedTokenizerFast(
            tokenizer_object=tiny_tokenizer(), pad_token="[PAD]", unk_token="[UNK]"
        )
        return transformers.BertModel(config).eval(), tokenizer

    for module in (sst2, agnews):
        monkeypatch.setattr(module, "load_bert", load)


def test_batches_hold_sentences_of_one_length_and_leave_none_out() -> None:
    draw = random.Random(1)
    tokens = [[1] * draw.randint(1, 40) for _ in range(101)]
    batches = minilm.Batches(tokens, range(101), 8, epochs=2)
    assert len(batches) == 26
    first = [batches[i] for i in range(13)]
    seen = torch.cat([rows for _, rows in first])
    assert sorted(seen.tolist()) == list(range(101))
    padding = 0
    for inputs, rows in first:
        assert inputs["attention_mask"].sum(1).tolist() == [len(tokens[row]) for row in rows]
        padding += int((1 - inputs["attention_mask"]).sum())
    assert padding < 0.2 * sum(map(len, tokens))
    others = [batches[13 + i][1].tolist() for i in range(13)]
    assert others != [rows.tolist() for _, rows in first]


def test_pooled_leaves_padding_out() -> None:
    hidden = torch.arange(12.0).view(1, 3, 4)
    mask = torch.tensor([[1, 1, 0]])
    torch.testing.assert_close(minilm.pooled(hidden, mask), hidden[:, :2].mean(1))


def test_measures_of_neighbours() -> None:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((60, 8))
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    assert agnews.neighbours_kept(x, x) == 100.0
    assert agnews.rank_correlation(x, x) == pytest.approx(1.0)
    turned, _ = np.linalg.qr(rng.standard_normal((8, 8)))
    assert agnews.neighbours_kept(x @ turned, x) == 100.0  # similarities are the same
    other = rng.standard_normal((60, 8))
    other /= np.linalg.norm(other, axis=1, keepdims=True)
    assert agnews.neighbours_kept(other, x) < 40.0  # 17 % by chance
    assert abs(agnews.rank_correlation(other, x)) < 0.2


def test_texts_are_compared_without_case_and_punctuation() -> None:
    assert sst2.plain("  It's GOOD, isn't it ? ") == "it s good isn t it"


@pytest.mark.slow
def test_sst2_trains_resumes_and_writes_a_file(
    tiny: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path / "sst2_phrases_train.tsv.xz", sentences(300, 0))
    write(tmp_path / "sst2_dev.tsv.xz", sentences(40, 1))
    write(tmp_path / "sst2_test.tsv.xz", sentences(40, 2))
    output = tmp_path / "sst2.lutra"
    arguments = ["sst2_minilm.py", "--data", str(tmp_path), "--output", str(output), "--v", "4",
                 "--checkpoints", str(tmp_path / "runs"), "--batch-size", "32", "--steps", "3",
                 "--dense-epochs", "1", "--reconstruction", "0.001"]  # fmt: skip
    monkeypatch.setattr(sys, "argv", [*arguments, "--dense-only"])
    sst2.main()
    dense = json.loads(output.with_suffix(".json").read_text())
    assert dense["top1"] == dense["dense_top1"]
    monkeypatch.setattr(sys, "argv", arguments)
    sst2.main()
    result = json.loads(output.with_suffix(".json").read_text())
    assert result["sentences"] == 40
    assert len(result["dev_top1"]) == 1
    session = lutra.Session(output)
    assert session.graph.metadata["training"]["steps"] == 3
    assert sum(node.op == "pq_linear" for node in session.graph.nodes) == 36
    assert sum(node.op == "attention" for node in session.graph.nodes) == 6
    encoder = SentenceEncoder(output)
    assert encoder.classes == ("negative", "positive")
    assert command(["verify", str(output)]) == 0
    capsys.readouterr()
    sst2.main()  # every training is done
    assert json.loads(output.with_suffix(".json").read_text())["top1"] == result["top1"]
    after = lutra.Session(output).graph
    assert after.nodes == session.graph.nodes
    assert after.tensors.keys() == session.graph.tensors.keys()
    for name, tensor in after.tensors.items():
        np.testing.assert_array_equal(tensor, session.graph.tensors[name], err_msg=name)


def run_agnews(folder: Path, monkeypatch: pytest.MonkeyPatch, *options: str) -> Path:
    """The file that the example makes of a few sentences."""
    write(folder / "agnews_train10k.tsv.xz", sentences(700, 3))
    write(folder / "agnews_test.tsv.xz", sentences(50, 4))
    output = folder / "minilm.lutra"
    arguments = ["agnews_minilm.py", "--data", str(folder), "--output", str(output), *options]
    monkeypatch.setattr(sys, "argv", arguments)
    agnews.main()
    return output


@pytest.mark.slow
def test_agnews_trains_and_measures_through_the_engine(
    tiny: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ["--v", "2", "--batch-size", "50", "--steps", "2", "--epochs", "1",
               "--int8", "attention.*", "--calibration", "2"]  # fmt: skip
    output = run_agnews(tmp_path, monkeypatch, *options)
    methods = {node.op for node in lutra.Session(output).graph.nodes}
    assert {"int8_linear", "pq_linear"} <= methods
    result = json.loads(output.with_suffix(".json").read_text())
    assert result["sentences"] == 50
    assert 30.0 < result["neighbours_kept"] <= 100.0
    assert 0.5 < result["rank_correlation"] <= 1.0
    vectors = SentenceEncoder(output).encode(sentences(5, 9)[1])
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1.0, rtol=1e-5)


@pytest.mark.slow
def test_agnews_without_training(
    tiny: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ["--int8", "*", "--calibration", "2", "--steps", "0"]
    output = run_agnews(tmp_path, monkeypatch, *options)
    graph = lutra.Session(output).graph
    assert "pq_linear" not in {node.op for node in graph.nodes}
    assert graph.metadata["training"] == {"steps": 0}
    assert json.loads(output.with_suffix(".json").read_text())["neighbours_kept"] > 60.0
