"""``lutra run --text`` and ``lutra eval --text``."""

from __future__ import annotations

import gzip
import io
import json
import lzma
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cli_support import image_graph, save
from text_support import encoder_graph, sentiment_graph, text_metadata

from lutra.format import save_graph
from lutra.sentences import SentenceEncoder

pytest_plugins = ["cli_support"]


@pytest.fixture
def vectors(folder: Path) -> str:
    save_graph(encoder_graph(text_metadata()), "vectors.lutra")
    return "vectors.lutra"


@pytest.fixture
def classes(folder: Path) -> str:
    save_graph(sentiment_graph(), "classes.lutra")
    return "classes.lutra"


# Vectors


def test_one_text(vectors: str, capture: Any) -> None:
    code, out, err = capture("run", vectors, "--text", "a good film")
    assert (code, err) == (0, "")
    value = SentenceEncoder(vectors).encode("a good film")
    assert out.startswith(f'"a good film": 8 values of length {np.linalg.norm(value):.4g}: ')
    assert f" {value[1]:.4f} " in out
    assert out.count("\n") == 1


def test_several_texts_have_similarities(vectors: str, capture: Any) -> None:
    code, out, _ = capture("run", vectors, "--text", "a cat", "--text", "bad", "--text", "")
    assert code == 0
    lines = out.splitlines()
    assert len(lines) == 3 + 2 + 4
    assert lines[4] == "cosine similarities"
    encoder = SentenceEncoder(vectors)
    made = encoder.encode(["a cat", "bad", ""])
    assert lines[6].split() == ["1", *(f"{x:.3f}" for x in encoder.similarity(made, made)[0])]


def test_json_of_vectors(vectors: str, capture: Any) -> None:
    code, out, _ = capture("run", vectors, "--text", "a cat", "--text", "bad", "--json")
    report = json.loads(out)
    assert code == 0
    assert report["model"] == vectors
    expected = SentenceEncoder(vectors).encode(["a cat", "bad"])
    assert [entry["text"] for entry in report["answers"]] == ["a cat", "bad"]
    np.testing.assert_array_equal(
        np.array([entry["vector"] for entry in report["answers"]], np.float32), expected
    )
    assert np.shape(report["similarities"]) == (2, 2)


@pytest.mark.parametrize("flag", ["out.npy", "{name}=out.npy"])
def test_vectors_go_to_a_file(vectors: str, capture: Any, flag: str) -> None:
    encoder = SentenceEncoder(vectors)
    flag = flag.format(name=encoder.session.graph.outputs[0])
    code, out, err = capture("run", vectors, "--text", "a cat", "--text", "bad", "-o", flag)
    assert (code, out, err) == (0, "", "")
    np.testing.assert_array_equal(np.load("out.npy"), encoder.encode(["a cat", "bad"]))


@pytest.mark.parametrize("name", ["t.txt", "t.txt.gz", "t.txt.xz", "-"])
def test_lines_of_a_file(
    vectors: str,
    capture: Any,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
) -> None:
    data = "\ufeffa cat\r\n\nbad\u2028dog\nit".encode()
    if name == "-":
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))
    else:
        opener: Any = {".gz": gzip.open, ".xz": lzma.open}.get(name[-3:], open)
        with opener(name, "wb") as file:
            file.write(data)
    code, out, err = capture("run", vectors, "--texts", name, "-o", "out.npy")
    assert (code, out, err) == (0, "", "")
    expected = SentenceEncoder(vectors).encode(["a cat", "", "bad\u2028dog", "it"])
    np.testing.assert_array_equal(np.load("out.npy"), expected)


def test_many_texts_have_no_table(vectors: str, capture: Any) -> None:
    Path("t.txt").write_text("cat\n" * 20)
    code, out, _ = capture("run", vectors, "--texts", "t.txt")
    assert (code, out.count("\n")) == (0, 20)
    assert "cosine" not in out


def test_texts_cannot_command_the_terminal(vectors: str, capture: Any) -> None:
    code, out, _ = capture("run", vectors, "--text", "a\x1b[2Jb\u202e", "--text", "x" * 200)
    assert code == 0
    assert "\x1b" not in out
    assert "\u202e" not in out
    assert "x" * 61 not in out


# Classes


def test_classes(classes: str, capture: Any) -> None:
    code, out, _ = capture("run", classes, "--text", "good good", "--text", "a bad film")
    assert code == 0
    lines = out.splitlines()
    assert len(lines) == 2
    assert lines[0].startswith('"good good": good 99.')
    assert lines[1].startswith('"a bad film": bad 8')


def test_json_of_classes(classes: str, capture: Any) -> None:
    code, out, _ = capture("run", classes, "--text", "good", "--json")
    (answer,) = json.loads(out)["answers"]
    assert code == 0
    assert (answer["text"], answer["label"]) == ("good", "good")
    assert answer["probabilities"]["good"] == answer["probability"] > 0.9
    assert sum(answer["probabilities"].values()) == pytest.approx(1)


# Mistakes


def test_mistakes_of_run(vectors: str, refuse: Any) -> None:
    save("x.npy", np.zeros((1, 3), np.int32))
    text = ("--text", "a")
    refuse("run", vectors, *text, "--texts", "f", match="give one of them")
    refuse("run", vectors, *text, "-i", "input_ids=x.npy", match="--text stands for --input")
    refuse("run", vectors, *text, "--wav", "x.wav", match="--text stands for --wav")
    refuse("run", vectors, *text, "-o", "a.npy", "-o", "b.npy", match="give it once")
    refuse("run", vectors, *text, "-o", "no/a.npy", match="does not exist")
    refuse("run", vectors, "--texts", "no.txt", match="cannot read 'no.txt': No such file")
    refuse("run", vectors, match="--text TEXT for a model of text")
    refuse("run", vectors, "--json", "-i", "x.npy", "-o", "y.npy", match="--json is for --wav")


def test_files_that_are_no_text(vectors: str, refuse: Any) -> None:
    Path("empty.txt").write_bytes(b"")
    refuse("run", vectors, "--texts", "empty.txt", match="holds no text")
    Path("latin.txt").write_bytes("Müller".encode("latin-1"))
    refuse("run", vectors, "--texts", "latin.txt", match="is not text in UTF-8")
    for name in ("bad.gz", "bad.xz"):
        Path(name).write_bytes(b"not packed")
        refuse("run", vectors, "--texts", name, match=f"cannot read '{name}'")
    Path("cut.gz").write_bytes(gzip.compress(b"a cat" * 100)[:-12])
    refuse("run", vectors, "--texts", "cut.gz", match="cannot read 'cut.gz'")


def test_models_of_something_else(folder: Path, refuse: Any) -> None:
    save_graph(image_graph(), "image.lutra")
    refuse("run", "image.lutra", "--text", "a", match="the model takes no text")
    Path("t.tsv").write_text("0\ta\n")
    refuse("eval", "image.lutra", "--text", "t.tsv", match="the model takes no text")


def test_arrays_for_a_model_of_text(vectors: str, refuse: Any) -> None:
    inputs = save("x.npy", np.zeros((2, 4), np.float32))
    labels = save("y.npy", np.zeros(2, np.int64))
    refuse("eval", vectors, "--inputs", inputs, "--labels", labels, match="text|one input")


def test_without_tokenizers(
    classes: str,
    refuse: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    refuse("run", classes, "--text", "a", match=r'pip install "lutra\[text\]"')


# lutra eval


def test_eval(classes: str, capture: Any) -> None:
    Path("t.tsv").write_text("good\ta good film\nbad\tit was bad\n1\tbad\n0\tthe bad\n")
    code, out, err = capture("eval", classes, "--text", "t.tsv", "--batch", "2")
    assert (code, err) == (0, "")
    assert "top-1 75.00% (3 of 4 texts)" in out
    code, out, _ = capture("eval", classes, "--text", "t.tsv", "--json", "--limit", "2")
    report = json.loads(out)
    assert code == 0
    assert (report["metric"], report["texts"], report["correct"], report["top1"]) == (
        "top1", 2, 2, 1.0,
    )  # fmt: skip
    assert report["ms_per_text"] > 0


@pytest.mark.parametrize(
    ("line", "match"),
    [
        ("good", "line 2 of 't.tsv' has 1 columns"),
        ("1\ta\tb", "line 2 of 't.tsv' has 3 columns"),
        ("great\ta", "has the label 'great'; give one of bad, good or the number"),
        ("-1\ta", "has the label '-1'"),
        ("2\ta", "labels must be in 0..1"),
        ("²\ta", "has the label"),
        ("1.0\ta", "has the label '1.0'"),
    ],
)
def test_lines_that_make_no_sense(classes: str, refuse: Any, line: str, match: str) -> None:
    Path("t.tsv").write_text(f"1\ta\n{line}\n", encoding="utf-8")
    refuse("eval", classes, "--text", "t.tsv", match=match)


def test_mistakes_of_eval(classes: str, refuse: Any) -> None:
    Path("t.tsv").write_text("1\ta\n")
    refuse("eval", classes, match=r"or --text X.tsv")
    for flags in (("--images", "x.npy"), ("--wav", "f"), ("--metric", "psnr")):
        refuse("eval", classes, "--text", "t.tsv", *flags, match="--text stands for")
    refuse("eval", classes, "--text", "t.tsv", "--border", "2", match="--border is for")


def test_inspect(vectors: str, capture: Any) -> None:
    code, out, _ = capture("inspect", vectors)
    assert code == 0
    assert max(map(len, out.splitlines())) < 400  # the tokenizer is cut
