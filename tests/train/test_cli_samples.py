"""Images, sounds and texts as the samples of ``lutra optimize`` and ``lutra convert``."""

from __future__ import annotations

import argparse
import gzip
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from audio_support import SMALL, sound, write_wav
from text_support import ID, WORDS, text_metadata, tiny_tokenizer
from torch import Tensor, nn

import lutra
from lutra.cli.samples import COLUMN, FOLDERS, Samples, add_arguments, read_samples
from lutra.errors import LutraError
from lutra.preprocess.audio import AudioPreprocess
from lutra.train import export, from_graph

pytest_plugins = ["cli_support"]

NETS = """
import torch

def sounds():
    torch.manual_seed(0)
    return torch.nn.Sequential(
        torch.nn.Conv2d(1, 8, 3, padding=1), torch.nn.ReLU(), torch.nn.Conv2d(8, 8, 3),
        torch.nn.ReLU(), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(8, 3),
    )

class Texts(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.table = torch.nn.Embedding(17, 16)
        self.hidden = torch.nn.Linear(16, 16)
        self.out = torch.nn.Linear(16, 2)

    def forward(self, input_ids, attention_mask):
        mask = attention_mask.unsqueeze(-1).float()
        x = self.hidden(self.table(input_ids)).relu() * mask
        return self.out(x.sum(1) / mask.sum(1).clamp(min=1.0))

def texts():
    torch.manual_seed(0)
    return Texts()
"""


class Texts(nn.Module):
    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return input_ids * attention_mask


class Whole(nn.Module):
    def forward(
        self, attention_mask: Tensor, ids: Tensor, token_type_ids: Tensor, more: Any = None
    ) -> Tensor:
        return ids


def given(data: str | Path, *words: str, model: str = "m.py:build") -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    args = parser.parse_args(words)
    args.data, args.model = str(data), model
    return args


def write_sounds(
    root: Path, count: int = 3, classes: tuple[str, ...] = ("yes", "no", "up")
) -> None:
    for place, name in enumerate(classes):
        (root / name).mkdir(parents=True)
        for i in range(count):
            samples = sound(600 + 10 * i, seed=10 * place + i, loud=1000.0 * (place + 1))
            write_wav(root / name / f"{i}.wav", samples, SMALL.rate)


def write_front(path: Path, front: AudioPreprocess = SMALL) -> None:
    path.write_text(json.dumps(front.to_dict()))


TEXTS = ["a good film", "bad", "the cat was not a dog", "", "is it good no it is bad", "film"]
LABELS = ["good", "bad", "good", "bad", "bad", "good"]


def write_texts(path: Path, labels: list[str] | None = LABELS, repeat: int = 1) -> Path:
    lines = TEXTS if labels is None else [f"{a}\t{b}" for a, b in zip(labels, TEXTS, strict=True)]
    data = ("\n".join(lines * repeat) + "\n").encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


def test_sounds_are_the_features_of_their_front_end(tmp_path: Path) -> None:
    write_sounds(tmp_path / "d")
    write_front(tmp_path / "front.json")
    front = ["--preprocess", str(tmp_path / "front.json")]
    made = read_samples(given(tmp_path / "d", *front), nn.Identity(), FOLDERS)
    assert made.names == [f"{name}/{i}.wav" for name in ("no", "up", "yes") for i in range(3)]
    assert made.labels is not None
    assert made.labels.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert made.metadata == {"preprocess": SMALL.to_dict(), "classes": ["no", "up", "yes"]}
    ((features,),) = made.batches
    assert features.shape == (9, 1, SMALL.frames, SMALL.width)
    clip = np.zeros((1, SMALL.samples), np.float32)
    clip[0, :610] = sound(610, seed=11, loud=2000.0) / 32768
    assert np.array_equal(features[1:2], SMALL.apply(clip))
    assert read_samples(given(tmp_path / "d", *front), nn.Identity()).labels is None


def test_a_model_of_sound_brings_front_end_and_classes(tmp_path: Path) -> None:
    write_sounds(tmp_path / "d", 1)
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    entries = {"preprocess": SMALL.to_dict(), "classes": ["up", "off", "no", "yes"]}
    example = torch.rand(2, 1, SMALL.frames, SMALL.width)
    path = tmp_path / "m.lutra"
    graph = export(net, path, example, metadata=entries)
    args = given(tmp_path / "d", model=str(path))
    made = read_samples(args, from_graph(graph), FOLDERS)
    assert made.labels is not None
    assert made.labels.tolist() == [2, 0, 3]  # of the folders no, up, yes
    assert made.metadata["classes"] == entries["classes"]
    (tmp_path / "d" / "left").mkdir()
    write_wav(tmp_path / "d" / "left" / "0.wav", sound(500), SMALL.rate)
    with pytest.raises(LutraError, match="'left', which is none of the model; its classes are up"):
        read_samples(args, from_graph(graph), FOLDERS)


def test_features_take_the_shape_of_an_imported_model(tmp_path: Path) -> None:
    write_sounds(tmp_path / "d", 1)
    write_front(tmp_path / "front.json")
    args = given(tmp_path / "d", "--preprocess", str(tmp_path / "front.json"))
    for shape, fits in (((SMALL.frames, SMALL.width), True), ((SMALL.frames, 3), False)):
        net = nn.Sequential(nn.Linear(shape[1], 4))
        export(net, tmp_path / "m.lutra", torch.rand(2, *shape))
        model = from_graph(lutra.load_graph(tmp_path / "m.lutra"))
        if fits:
            assert read_samples(args, model).batches[0][0].shape == (3, *shape)
        else:
            with pytest.raises(LutraError, match=r"gives features of the shape \(1, 9, 12\)"):
                read_samples(args, model)


def test_texts_run_with_others_of_their_length(tmp_path: Path) -> None:
    tiny_tokenizer().save(str(tmp_path / "t.json"))
    path = write_texts(tmp_path / "d.tsv.gz")
    words = ["--tokenizer", str(tmp_path / "t.json"), "--max-length", "6"]
    made = read_samples(given(path, *words), Texts(), COLUMN)
    ((ids, mask),) = made.batches
    assert ids.shape == mask.shape == (6, 6)
    assert ids.dtype == mask.dtype == np.int64
    lengths = mask.sum(1).tolist()
    assert lengths == [6, 6, 5, 3, 3, 2]
    assert made.order is not None
    assert made.order.tolist() == [2, 4, 0, 1, 5, 3]
    assert made.names == [TEXTS[i] for i in made.order]
    assert made.labels is not None
    assert made.labels.tolist() == [["bad", "good"].index(LABELS[i]) for i in made.order]
    assert made.metadata["classes"] == ["bad", "good"]
    assert made.dynamic_axes == (1,)
    good = [ID[word] for word in ("[CLS]", "a", "good", "film", "[SEP]", "[PAD]")]
    assert ids[2].tolist() == good
    assert mask[2].tolist() == [1, 1, 1, 1, 1, 0]


def test_labels_of_a_file_follow_the_texts(tmp_path: Path) -> None:
    tiny_tokenizer().save(str(tmp_path / "t.json"))
    np.save(tmp_path / "y.npy", np.arange(6))
    path = write_texts(tmp_path / "d.txt", None)
    args = given(path, "--tokenizer", str(tmp_path / "t.json"), "--fill", "--max-length", "8")
    made = read_samples(args, Texts(), str(tmp_path / "y.npy"))
    assert made.labels is not None
    assert made.order is not None
    assert np.array_equal(made.labels, made.order)
    assert made.batches[0][0].shape == (6, 8)
    assert made.dynamic_axes == ()
    assert "classes" not in made.metadata
    with pytest.raises(LutraError, match="has texts alone"):
        read_samples(args, Texts(), COLUMN)


def test_labels_of_texts_are_numbers_or_names_of_classes(tmp_path: Path) -> None:
    tiny_tokenizer().save(str(tmp_path / "t.json"))
    words = ["--tokenizer", str(tmp_path / "t.json")]
    numbers = write_texts(tmp_path / "n.tsv", ["4", "0", "1", "1", "0", "2"])
    made = read_samples(given(numbers, *words), Texts(), COLUMN)
    assert made.labels is not None
    assert made.order is not None
    assert made.labels.tolist() == [[4, 0, 1, 1, 0, 2][i] for i in made.order]
    assert "classes" not in made.metadata
    graph = lutra.Graph(
        (lutra.Value("x", "float32", (None, 3)),), ("y",),
        (lutra.Node("relu", "relu", ("x",), "y"),),
        metadata=text_metadata(5, classes=["good", "bad"]),
    )  # fmt: skip
    lutra.save_graph(graph, tmp_path / "t.lutra")
    own = ["--preprocess", str(tmp_path / "t.lutra")]
    made = read_samples(given(write_texts(tmp_path / "d.tsv"), *own), Texts(), COLUMN)
    assert made.labels is not None
    assert made.order is not None
    assert made.labels.tolist() == [["good", "bad"].index(LABELS[i]) for i in made.order]
    assert made.batches[0][0].shape[1] == 5  # the length that the file allows
    bad = write_texts(tmp_path / "b.tsv", ["good", "none", *LABELS[2:]])
    with pytest.raises(LutraError, match="class 'none', which is none of the model"):
        read_samples(given(bad, *own), Texts(), COLUMN)


def test_arguments_of_texts_are_found_by_their_names(tmp_path: Path) -> None:
    tiny_tokenizer().save(str(tmp_path / "t.json"))
    path, words = write_texts(tmp_path / "d.txt", None), ["--tokenizer", str(tmp_path / "t.json")]
    ((mask, ids, types),) = read_samples(given(path, *words), Whole()).batches
    assert mask.max() == 1
    assert ids.max() > 1
    assert not types.any()

    class Two(nn.Module):
        def forward(self, ids: Tensor, other: Tensor) -> Tensor:
            return ids

    class Mask(nn.Module):
        def forward(self, mask: Tensor) -> Tensor:
            return mask

    with pytest.raises(LutraError, match="takes 'other', which is neither"):
        read_samples(given(path, *words), Two())
    with pytest.raises(LutraError, match="no argument for token ids"):
        read_samples(given(path, *words), Mask())


def test_samples_of_no_kind_and_arguments_of_another(tmp_path: Path) -> None:
    write_sounds(tmp_path / "d", 1)
    write_front(tmp_path / "front.json")
    write_texts(tmp_path / "d.tsv")
    tiny_tokenizer().save(str(tmp_path / "t.json"))
    (tmp_path / "empty").mkdir()
    np.save(tmp_path / "x.npy", np.ones((3, 4), np.float32))
    (tmp_path / "ragged.tsv").write_text("a\tb\nc\n")
    (tmp_path / "wide.tsv").write_text("a\tb\tc\n")
    (tmp_path / "no.json").write_text("{")
    front, sounds = ["--preprocess", str(tmp_path / "front.json")], tmp_path / "d"

    def bad(match: str, data: Path, *words: str, labels: str | None = None, **more: str) -> None:
        with pytest.raises(LutraError, match=match) as error:
            read_samples(given(data, *words, **more), Texts(), labels)
        assert "\n" not in str(error.value)

    bad("holds WAV files; give --preprocess", sounds)
    bad("holds no images", tmp_path / "empty")
    bad("for a folder of images; leave", sounds, *front, "--size", "4")
    bad("are for texts; leave", sounds, *front, "--fill")
    bad("is for WAV files and texts", tmp_path / "x.npy", *front)
    bad("--labels column is for a .tsv", sounds, *front, labels=COLUMN)
    bad("--labels folders is for a folder", tmp_path / "d.tsv", labels=FOLDERS)
    bad("carries no tokenizer; give --tokenizer", tmp_path / "d.tsv")
    bad("carries no tokenizer", tmp_path / "d.tsv", *front)
    bad("does not say how sound becomes", sounds, "--preprocess", _text_entry(tmp_path))
    bad("both say how texts", tmp_path / "d.tsv", *front, "--tokenizer", "t.json")
    bad("cannot read .*none.json", sounds, "--preprocess", str(tmp_path / "none.json"))
    bad("is no JSON", sounds, "--preprocess", str(tmp_path / "no.json"))
    words = ["--tokenizer", str(tmp_path / "t.json")]
    bad("line 2 of .* has 1 columns", tmp_path / "ragged.tsv", *words)
    bad("line 1 of .* has 3 columns", tmp_path / "wide.tsv", *words)
    bad("max_length is 2, but the tokenizer adds", tmp_path / "d.tsv", *words, "--max-length", "2")
    write_wav(sounds / "one.wav", sound(500), SMALL.rate)
    bad("beside folders of classes", sounds, *front, labels=FOLDERS)
    write_wav(sounds / "one.wav", sound(500), 4000)
    bad("has 4000 samples a second, but the model takes 8000", sounds, *front)
    (sounds / "one.png").write_bytes(b"")
    bad("holds images and WAV files", sounds, *front)


def _text_entry(folder: Path) -> str:
    (folder / "text.json").write_text(json.dumps(text_metadata()["preprocess"]))
    return str(folder / "text.json")


def test_arrays_are_as_before(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.ones((130, 4), np.float32))
    made = read_samples(given(tmp_path / "x.npy"), nn.Identity())
    assert [len(batch[0]) for batch in made.batches] == [64, 64, 2]
    assert made == Samples(made.batches)


def test_what_a_file_says_of_its_inputs_is_carried_on(capture: Any, folder: Path) -> None:
    entries = {"preprocess": {"kind": "mine"}, "classes": ["a", "b", "c"], "seed": 7}
    export(nn.Sequential(nn.Linear(4, 3)), "float.lutra", torch.rand(4, 4), metadata=entries)
    np.save("x.npy", np.random.default_rng(0).random((100, 4), np.float32))
    words = ["float.lutra", "--data", "x.npy", "--method", "int8", "-o", "m.lutra"]
    assert capture("convert", *words)[0] == 0
    metadata = lutra.load_graph("m.lutra").metadata
    assert metadata["classes"] == ["a", "b", "c"]
    assert metadata["preprocess"] == {"kind": "mine"}
    assert metadata["seed"] == 0


def test_convert_sounds(capture: Any, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", sys.path[:])
    Path("sample_nets.py").write_text(NETS)
    write_sounds(Path("d"), 6)
    write_front(Path("front.json"))
    code, out, err = capture(
        "convert", "sample_nets.py:sounds", "--data", "d", "--preprocess", "front.json",
        "--method", "int8", "-o", "m.lutra",
    )  # fmt: skip
    assert (code, err) == (0, "")
    assert "3 of 3 layers replaced" in out
    # the file takes sound itself
    code, out, err = capture("run", "m.lutra", "--wav", "d/yes/0.wav", "--json")
    assert (code, err) == (0, "")
    assert set(json.loads(out)["answers"][0]["probabilities"]) == {"no", "up", "yes"}
    assert capture("eval", "m.lutra", "--wav", "d")[0] == 0


def test_convert_texts(capture: Any, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", sys.path[:])
    Path("sample_nets.py").write_text(NETS)
    write_texts(Path("d.tsv"), repeat=20)
    tiny_tokenizer().save("t.json")
    assert len(WORDS) == 17
    code, _, err = capture(
        "convert", "sample_nets.py:texts", "--data", "d.tsv", "--tokenizer", "t.json",
        "--method", "int8", "-o", "m.lutra",
    )  # fmt: skip
    assert (code, err) == (0, "")
    encoder = lutra.SentenceEncoder("m.lutra")
    assert encoder.classes == ("bad", "good")
    assert encoder.encode(["a film", "the good cat was not a dog"]).shape == (2, 2)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sounds", "texts"])
def test_optimize(kind: str, capture: Any, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("jinja2")
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(sys, "path", sys.path[:])
    Path("sample_nets.py").write_text(NETS)
    if kind == "sounds":
        write_sounds(Path("d"), 12)
        write_front(Path("front.json"))
        words = ["--data", "d", "--preprocess", "front.json", "--labels", "folders"]
    else:
        write_texts(Path("d.tsv"), repeat=40)
        tiny_tokenizer().save("t.json")
        words = ["--data", "d.tsv", "--tokenizer", "t.json", "--labels", "column"]
    code, out, err = capture(
        "optimize", f"sample_nets.py:{kind}", *words, "-o", "m.lutra", "--minutes", "0",
        "--max-drop", "100", "--report", "r.html",
    )  # fmt: skip
    assert (code, err) == (0, "")
    assert "accuracy" in out
    page = Path("r.html").read_text()
    if kind == "sounds":
        assert "<q>" in page
        assert ".wav</q>" in page
        assert capture("run", "m.lutra", "--wav", "d/yes/0.wav")[0] == 0
    else:
        assert any(f"<q>{text}</q>" in page for text in TEXTS if text)
        assert lutra.SentenceEncoder("m.lutra").encode("a film").shape == (2,)
