"""`optimize`, from a model to a file and a page, in Python and on the command line."""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import lutra
from lutra.errors import LutraError
from lutra.graph import Graph
from lutra.runtime.session import Session
from lutra.train import PQ, Budget, Int8, Lookup, convert, optimize, recipe_from_json
from lutra.train.search import candidates, samples, search
from lutra.train.search.bench import Bench
from lutra.train.search.candidates import FLOAT32, INT8
from lutra.train.search.effort import EFFORTS, Effort, Efforts, plan
from lutra.train.search.search import Search

pytest_plugins = ["cli_support"]
pytest.importorskip("scipy")


class Net(nn.Module):
    """Two convolutions, of which the second is one of groups, and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.deep = nn.Conv2d(1, 8, 3, padding=1), nn.Conv2d(8, 8, 3, groups=8)
        self.wide, self.last = nn.Conv2d(8, 16, 3), nn.Linear(16, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.wide(torch.relu(self.deep(torch.relu(self.first(x))))))
        return self.last(x.mean((2, 3)))


def images(count: int = 48) -> torch.Tensor:
    return torch.rand(count, 1, 8, 8, generator=torch.Generator().manual_seed(1))


def net() -> Net:
    torch.manual_seed(0)
    return Net().eval()


def timed(graphs: Mapping[str, Graph], *_: Any) -> dict[str, float]:
    """Times by what is stored, so that tests do not hang on those of this machine."""
    fast = {"lookup 16x15": 0.5, "pq row": 0.2, "pq patch, tree": 0.1, INT8: 1.0, FLOAT32: 2.0}
    return {key: fast.get(key, 3.0) for key in graphs}


def by_bytes(_: Bench, sessions: Mapping[str, Session], seconds: float) -> dict[str, list[float]]:
    """As many milliseconds as parameters have kilobytes."""
    return {name: [s.graph.parameter_bytes() / 1e3] * 3 for name, s in sessions.items()}


@pytest.fixture
def steady(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(candidates, "time_graphs", timed)
    monkeypatch.setattr(Bench, "times", by_bytes)


@pytest.mark.slow
@pytest.mark.usefixtures("steady")
@pytest.mark.parametrize("target", ["latency", "size"])
def test_rough_trials(target: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where conversion takes long a part of the samples calibrates trials, and all the choice."""
    pytest.importorskip("optuna")
    efforts = Efforts(EFFORTS[-1], Effort(13, 1024))
    monkeypatch.setattr(search, "plan", lambda *_: efforts)
    monkeypatch.setattr(samples, "_BATCH", 4)
    rows: list[tuple[int, int]] = []

    def counted(model: Any, recipe: Any, batches: Any, **settings: Any) -> Any:
        rows.append((settings["rows"], sum(len(batch[0][0]) for batch in batches)))
        return convert(model, recipe, batches, **settings)

    monkeypatch.setattr(search, "convert", counted)
    kept, data = tmp_path / "study.log", images()
    budget = Budget(max_drop=100.0, minutes=5, trials=3, target=target)
    study = optimize(net(), data, budget=budget, storage=kept)
    rough = [trial for trial in study.trials if trial.rough]
    whole = [trial for trial in study.trials if not trial.rough]
    assert len(rough) == 3
    assert all(trial.label.endswith(", rough") for trial in rough)
    assert {trial.label for trial in whole} >= {"dense", "int8 everywhere"}
    assert rows[0] == (EFFORTS[0].rows, 12)  # which is timed
    assert rows[1] == (4096, 36)  # int8
    assert rows[2:5] == [(1024, 13)] * 3
    assert set(rows[5:]) <= {(4096, 36)}
    assert "calibrated; with more minutes" not in study.message
    assert not study.choice.rough
    cheapest = min(rough, key=lambda t: t.cost(target))
    refined = cheapest.cost(target) < study.trials[1].cost(target)  # than int8
    assert refined == (target == "size")
    assert (cheapest.choice in [trial.choice for trial in whole]) == refined
    assert study.choice.choice == min(whole, key=lambda t: t.cost(target)).choice
    assert not study.choice.label.endswith(", rough")
    assert study.choice.choice in [trial.choice for trial in study.front]
    twice = [trial for trial in study.front if trial.choice == study.choice.choice]
    assert len(twice) == 1
    count = len(rows)
    again = optimize(net(), data, budget=Budget(**{**vars(budget), "trials": 0}), storage=kept)
    assert again.choice.choice == study.choice.choice
    assert len(rows) - count <= 2  # the choice, and int8 beside it, and nothing is timed again
    assert [t.label for t in again.trials] == [t.label for t in study.trials]


@pytest.mark.usefixtures("steady")
def test_models_that_are_slow_for_their_minutes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Few samples calibrate and judge, and the message says so; the model that was timed is that of
    int8 everywhere."""
    made: list[int] = []

    def counted(model: Any, recipe: Any, batches: Any, **settings: Any) -> Any:
        made.append(sum(len(batch[0][0]) for batch in batches))
        return convert(model, recipe, batches, **settings)

    def slow(_: float, samples: int, seconds: float) -> Efforts:
        assert 0.0 < seconds < 300.0
        return plan(1e6, samples, seconds)

    monkeypatch.setattr(search, "convert", counted)
    monkeypatch.setattr(search, "plan", slow)
    monkeypatch.setattr(search, "_JUDGED_SHARE", 0.0)
    out = tmp_path / "m.lutra"
    budget = Budget(max_drop=100.0, minutes=5, trials=1)
    study = optimize(net(), images(96), budget=budget, output=out)
    assert made[:2] == [EFFORTS[0].samples] * 2  # int8, a trial; then the choice, if it is another
    assert [trial.rough for trial in study.trials] == [False] * 3
    assert "so 12 of the 72 samples calibrated" in study.message
    assert "16 of 24 samples judged" in study.message
    with torch.no_grad():
        wanted = study.model(images()).numpy()
    graph = lutra.load_graph(out)
    assert graph.golden is not None
    np.testing.assert_allclose(lutra.Session(graph)(images().numpy()), wanted, atol=1e-4)
    assert graph.metadata["study"]["message"] == study.message


@pytest.mark.slow
@pytest.mark.usefixtures("steady")
def test_optimize(tmp_path: Path) -> None:
    pytest.importorskip("optuna")
    model, x = net(), images()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    out, kept = tmp_path / "m.lutra", tmp_path / "study.log"
    budget = Budget(max_drop=100.0, minutes=5, trials=7)
    study = optimize(model, x, budget=budget, storage=kept, output=out)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    labels = [trial.label for trial in study.trials]
    assert labels[:2] == ["dense", "int8 everywhere"]
    assert len(labels) == 9
    assert sum("wherever it may gain" in label for label in labels) == 3
    assert any("the least predicted loss" in label for label in labels)
    choices = [tuple(trial.choice.items()) for trial in study.trials]
    assert len(set(choices)) == len(choices)  # none is tried twice
    assert not any(trial.failed for trial in study.trials)
    layers = {layer.name: layer for layer in study.layers}
    assert list(layers) == ["first", "deep", "wide", "last"]
    assert layers["deep"].lookups == []  # of groups
    assert layers["wide"].lookups == ["lookup 16x15", "pq row", "pq patch, tree"]
    assert layers["wide"].shape == (1, 8, 6, 6)
    assert "alone, int8" in layers["wide"].dropped["pq pixel"]
    dense = study.trials[0]
    assert (dense.quality, dense.drop, dense.loss) == (100.0, 0.0, 0.0)
    assert 0 < study.trials[1].loss < 0.1
    assert study.measure.name == "agreement"
    assert [t.ms for t in study.front] == sorted(t.ms for t in study.front)
    assert study.choice.ms <= min(study.final[name]["ms"] for name in ("dense", "int8")) * 1.02
    # the file is the choice: the same outputs as a conversion with its recipe
    graph = lutra.load_graph(out)
    entry = graph.metadata["study"]
    assert entry["message"] == study.message
    recipe = recipe_from_json(graph.metadata["recipe"]["patterns"])
    assert recipe == study.recipe
    assert [trial["label"] for trial in entry["trials"]] == labels
    with torch.no_grad():
        wanted = study.model(x).numpy()
    np.testing.assert_allclose(lutra.Session(graph)(x.numpy()), wanted, atol=1e-4)
    assert study.choice.label in str(study)
    # the same study goes on where it stopped
    more = optimize(model, x, budget=Budget(max_drop=100.0, minutes=5, trials=1), storage=kept)
    assert [t.label for t in more.trials[:9]] == labels
    assert len(more.trials) == 10
    with pytest.raises(LutraError, match="another data, split"):
        optimize(model, images(40), budget=budget, storage=kept)


@pytest.mark.slow
@pytest.mark.usefixtures("steady")
def test_labels_training_and_measures_of_ones_own(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = net(), images()
    with torch.no_grad():
        y = model(x).argmax(1)
    budget = Budget(max_drop=0.0, minutes=1, trials=1, finetune_minutes=0.02)
    peer = {"name": "a peer", "quality": 100.0, "drop": 0.0, "ms": 0.0, "text": "by hand"}
    study = optimize(model, [(x, y)], budget=budget, peers=lambda data, judge: [peer])
    assert study.message.endswith("a peer is faster here: 0.0000 ms, drop 0.00.")
    assert (study.measure.name, study.measure.dense) == ("accuracy", 100.0)
    assert "Fine-tuning of" in study.message
    assert study.choice.drop <= 0.0
    assert study.trials[-1].finetuned
    seen = []

    def own(file: nn.Module) -> float:
        with torch.no_grad():
            seen.append(file(x))
        return -float((seen[-1] - model(x)).detach().square().mean())

    def stopped(self: Search) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Search, "_search", stopped)
    study = optimize(model, x, own, Budget(max_drop=1e-12, minutes=1))
    assert len(seen) >= 2
    assert study.measure.dense == pytest.approx(0.0, abs=1e-9)
    assert study.choice.label == "dense"  # nothing else is as exact
    assert not study.reached
    assert "Nothing faster than the dense model was found" in study.message
    assert "The nearest beyond it is 'int8 everywhere'" in study.message
    assert "The search was stopped before its time" in study.message
    assert study.recipe == {}


@pytest.mark.usefixtures("steady")
def test_what_cannot_be_optimized(tmp_path: Path) -> None:
    model, x = net(), images(16)
    for arguments, match in (
        ({"model": "m.onnx"}, "the model is a str; give a torch.nn.Module"),
        ({"model": nn.ReLU()}, "matches no convolution"),
        ({"budget": 5}, "budget is a int"),
        ({"evaluate": 5}, "evaluate is a int"),
        ({"evaluate": len}, r"must say, in its unit, .*max_drop="),
        ({"data": []}, "data are empty"),
        ({"data": x[:2]}, "hold 2 samples"),
        ({"labels": [1, 2]}, "2 labels for 16 samples"),
        ({"labels": [9] * 16}, "labels are 9..9, but the model has 4 scores"),
        ({"output": tmp_path / "no" / "m.lutra"}, "the folder .* does not exist"),
        ({"data": torch.zeros(16, 3)}, "cannot be|shape|calibration"),
    ):
        given: Any = {"model": model, "data": x, "budget": Budget(minutes=0), **arguments}
        with pytest.raises(LutraError, match=match):
            optimize(**given)


@pytest.mark.usefixtures("steady")
def test_candidates_fit_the_layer() -> None:
    from lutra.train.search.samples import split

    model, x = net(), images(16)
    parts = split(model, x, None, 0)
    known: dict[str, dict[str, float]] = {}
    found = candidates.find_layers(model, parts, Budget(), known)
    assert len(known) == 4
    choice = {layer.name: layer.active[-1] for layer in found}
    recipe = candidates.recipe_of(found, choice)
    assert recipe["first"] == PQ(encoder="tree")
    assert isinstance(recipe["deep"], Int8)
    assert isinstance(recipe["last"], Lookup | PQ)
    _, report = convert(model, recipe, [x], rows=256, progress=False)
    assert [layer.name for layer in report.replaced] == ["first", "deep", "wide", "last"]
    small = candidates.find_layers(model, parts, Budget(target="size"), known)
    assert all(
        layer.candidates[key].bytes < layer.candidates[INT8].bytes
        for layer in small
        for key in layer.lookups
    )


# The command line, and pages


BUILD = """
import torch
from test_optimize import net
"""


class Page(HTMLParser):
    """The tags of a page, which must all be closed; what it loads; its text."""

    VOID = ("meta", "img", "br", "link")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.loads: list[str] = []
        self.words = ""
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag not in ("script", "link", "iframe")
        self.loads += [str(value) for name, value in attrs if name in ("src", "href")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.loads += [str(value) for name, value in attrs if name in ("src", "href")]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words += " " + data


@pytest.mark.slow
@pytest.mark.usefixtures("steady")
def test_the_command(
    capture: Any, refuse: Any, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("jinja2")
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(sys, "path", sys.path[:])
    Path("build_net.py").write_text(BUILD)
    np.save("x.npy", images(40).numpy())
    np.save("y.npy", np.zeros(40, np.int64))
    words = [
        "optimize",
        "build_net.py:net",
        "--data",
        "x.npy",
        "-o",
        "m.lutra",
        "--max-drop",
        "100",
    ]
    code, out, err = capture(*words, "--minutes", "0", "--report", "r.html")
    assert (code, err) == (0, "")
    assert "2 recipes in" in out
    assert "wrote m.lutra" in out
    assert "verified with" in out
    page = Page(Path("r.html").read_text())
    assert all(link.startswith(("data:image/png;base64,", "#")) for link in page.loads)
    assert sum(link.startswith("data:") for link in page.loads) == 8  # the worst inputs
    for part in ("The front", "int8 everywhere", "Where time goes", "30 of 40 samples calibrate",
                 "The recipe", "agreement", "Worst inputs"):  # fmt: skip
        assert part in page.words, part
    assert "<svg" in Path("r.html").read_text()
    # the file alone gives the same page, without the images
    assert capture("report", "m.lutra")[0] == 0
    alone = Page(Path("m.html").read_text())
    assert "int8 everywhere" in alone.words
    assert not any(link.startswith("data:") for link in alone.loads)
    assert "study" not in capture("verify", "m.lutra")[1]
    code, out, _ = capture(*words, "--minutes", "0", "--labels", "y.npy", "--target", "size")
    assert code == 0
    assert "accuracy" in out

    def bad(match: str, *more: str) -> None:
        refuse(*words, "--minutes", "0", *more, match=match)

    bad("invalid choice", "--target", "speed")
    bad("is not a number of 0 or more", "--max-drop", "-1")
    bad("for a folder of images", "--size", "8,8")
    bad("for a folder of images", "--labels", "folders")
    bad("No such file", "--labels", "none.npy")
    bad("does not exist", "--report", "no/r.html")
    bad("does not exist", "--storage", "no/study.log")
    np.save("y.npy", np.zeros(39, np.int64))
    bad("39 labels for 40 samples", "--labels", "y.npy")
    np.save("x.npy", images(2).numpy())
    bad("hold 2 samples; give at least 8")
    refuse("report", "none.lutra", match="No such file")
    refuse("report", "m.lutra", "-o", "no/r.html", match="does not exist")


def test_a_page_of_any_file(capture: Any, refuse: Any, folder: Path) -> None:
    pytest.importorskip("jinja2")
    pytest.importorskip("matplotlib")
    node = lutra.Node("relu", "<b>relu</b>", ("x",), "y")
    value = lutra.Value("x", "float32", (None, 3))
    lutra.save_graph(lutra.Graph((value,), ("y",), (node,)), "m.lutra")
    assert capture("report", "m.lutra", "-o", "r.html", "--runs", "2", "--threads", "1")[0] == 0
    text = Path("r.html").read_text()
    page = Page(text)
    assert "<b>relu</b>" in page.words  # names are text, and no tags
    assert "<b>relu</b>" not in text
    assert "The front" not in page.words
    assert re.search(r"1\s+relu", page.words)
    for broken in ({}, 5, {"message": 1}):
        graph = lutra.Graph((value,), ("y",), (node,), metadata={"study": broken})
        lutra.save_graph(graph, "m.lutra")
        refuse("report", "m.lutra", match="holds a study that is not sound")


def test_pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pillow = pytest.importorskip("PIL.Image")
    from lutra.cli.pictures import read_pictures

    for name, size, value in (("b", (8, 6), 255), ("a", (6, 6), 0)):
        (tmp_path / name).mkdir()
        pillow.new("L", size, value).save(tmp_path / name / "one.png")
    with pytest.raises(LutraError, match="several sizes"):
        read_pictures(str(tmp_path), None, [0.0], [1.0])
    found, classes = read_pictures(str(tmp_path), (4, 5), [0.5], [0.5])
    assert (found.shape, found.dtype) == ((2, 1, 4, 5), np.float32)
    assert (found.mean(axis=(1, 2, 3)).tolist(), classes.tolist()) == ([-1.0, 1.0], [0, 1])
    assert read_pictures(str(tmp_path), (4, 5), [0.5] * 3, [0.5] * 3)[0].shape == (2, 3, 4, 5)
    (tmp_path / "a" / "two.png").write_bytes(b"no image")
    with pytest.raises(LutraError, match="as an image"):
        read_pictures(str(tmp_path), (4, 5), [0.0], [1.0])
    for name in ("2", "10"):
        (tmp_path / "numbers" / name).mkdir(parents=True)
        pillow.new("L", (6, 6), int(name)).save(tmp_path / "numbers" / name / "one.png")
    found, classes = read_pictures(str(tmp_path / "numbers"), None, [0.0], [1.0])
    assert (255 * found.mean(axis=(1, 2, 3))).round().tolist() == [2, 10]  # in this order
    (tmp_path / "empty").mkdir()
    with pytest.raises(LutraError, match="holds no images"):
        read_pictures(str(tmp_path / "empty"), None, [0.0], [1.0])
