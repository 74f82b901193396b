"""The parts of a search: proposals, beliefs, measures, samples, and the storage of trials."""

from __future__ import annotations

import itertools
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from lutra.errors import LutraError
from lutra.train import Budget, Trial
from lutra.train.search.effort import EFFORTS, Efforts, plan, whole
from lutra.train.search.predict import Belief, SumModel
from lutra.train.search.proposals import cheapest, propose, spread
from lutra.train.search.quality import MAX_PSNR, Top1, choose_measure, relative_errors, surrogate
from lutra.train.search.samples import split
from lutra.train.search.storage import Journal, cut_half_line, open_storage
from lutra.train.search.trial import best, front

# Proposals


def problem(seed: int) -> tuple[dict[Any, float], dict[Any, float]]:
    """Random losses and costs of three to five layers with two to four candidates."""
    rng = np.random.default_rng(seed)
    terms = [
        (f"layer{i}", f"way{j}")
        for i in range(rng.integers(3, 6))
        for j in range(rng.integers(2, 5))
    ]
    losses = {term: float(rng.exponential()) for term in terms}
    return losses, {term: float(rng.uniform(0.01, 1.0)) for term in terms}


def by_hand(losses: dict[Any, float], costs: dict[Any, float], limit: float, tried: Any) -> Any:
    """The least loss of all recipes that are within the limit and not tried; None without."""
    layers: dict[str, list[str]] = {}
    for name, key in losses:
        layers.setdefault(name, []).append(key)
    found = []
    for keys in itertools.product(*layers.values()):
        choice = dict(zip(layers, keys, strict=True))
        if choice not in tried and sum(costs[t] for t in choice.items()) <= limit:
            found.append(sum(losses[t] for t in choice.items()))
    return min(found, default=None)


@pytest.mark.parametrize("seed", range(12))
def test_proposals_are_the_best_that_is_left(seed: int) -> None:
    losses, costs = problem(seed)
    least, most = cheapest(costs), sum(costs.values())
    limit = least + 0.3 * (most - least)
    tried: list[dict[str, str]] = []
    for _ in range(5):
        want = by_hand(losses, costs, limit, tried)
        choice = propose(losses, costs, limit, tried)
        if want is None:
            assert choice is None
            return
        assert choice is not None
        assert choice not in tried
        assert sum(costs[term] for term in choice.items()) <= limit * (1 + 1e-6)
        assert sum(losses[term] for term in choice.items()) == pytest.approx(want, rel=1e-3)
        tried.append(choice)


def test_proposals_end() -> None:
    losses, costs = problem(0)
    assert propose(losses, costs, 0.5 * cheapest(costs)) is None
    assert propose({}, {}, 1.0) is None
    one = {("a", "x"): 1.0, ("a", "y"): 2.0}
    assert propose(one, one, 10.0, [{"a": "x"}]) == {"a": "y"}
    assert propose(one, one, 10.0, [{"a": "x"}, {"a": "y"}]) is None
    assert propose(one, one, 10.0, [{"a": "gone"}]) == {"a": "x"}  # no candidate any more


def test_limits_fall_into_gaps() -> None:
    assert [spread(i) for i in range(5)] == [0.5, 0.25, 0.75, 0.125, 0.625]


# Beliefs


def test_beliefs_come_to_the_sum() -> None:
    rng = np.random.default_rng(0)
    names = [f"layer{i}" for i in range(6)]
    truth = {(n, key): float(rng.uniform(0, 1)) for n in names for key in "abc"}
    guess = {term: Belief(float(value + rng.normal(0, 0.3)), 0.3) for term, value in truth.items()}
    model = SumModel(guess, Belief(0.0, 5.0))
    choices = [{n: "abc"[rng.integers(3)] for n in names} for _ in range(60)]
    values = [2.0 + sum(truth[t] for t in choice.items()) for choice in choices]

    def error(of: SumModel) -> float:
        return max(abs(of.predict(c).mean - v) for c, v in zip(choices, values, strict=True))

    before = error(model)
    model.observe(choices[:40], [Belief(v, 0.01) for v in values[:40]])
    assert before > 0.5
    assert error(model) < 0.1  # of the twenty that it did not see too
    unseen = dict.fromkeys(names, "a") | {"layer0": "elsewhere"}
    assert model.predict(unseen).deviation > model.predict(choices[0]).deviation
    assert model.predict(choices[0]).mean == pytest.approx(values[0], abs=0.05)
    drawn = model.terms(np.random.default_rng(1))
    assert drawn.keys() == truth.keys()
    assert drawn != model.terms()
    model.observe([], [])
    assert error(model) < 0.1


# Measures


def scores(*rows: list[float]) -> list[list[Any]]:
    return [[np.array(rows, np.float32)]]


def test_agreement_and_accuracy() -> None:
    dense = scores([3, 1, 0], [0, 2, 1], [0, 1, 5], [9, 1, 0])
    other = scores([3, 1, 0], [0, 2, 1], [6, 1, 5], [9, 1, 0])
    measure = choose_measure(dense, None)
    assert (measure.name, measure.dense) == ("agreement", 100.0)
    assert measure.drop(measure.quality(other)) == pytest.approx(25.0)
    assert int(measure.badness(other).argmax()) == 2
    labelled = choose_measure(dense, np.array([0, 1, 0, 0]))
    assert (labelled.name, labelled.dense) == ("accuracy", 75.0)
    assert labelled.drop(labelled.quality(other)) == pytest.approx(-25.0)  # it is better
    assert "25 points" in measure.text
    right = choose_measure(dense, np.array([0, 1, 2, 1]))
    assert isinstance(right, Top1)
    assert right.doubt == ""
    wrong = choose_measure(dense, np.array([1, 0, 0, 2]))
    assert isinstance(wrong, Top1)
    assert "only 0.00 % right" in wrong.doubt
    assert "label is that of 50.00 %" in wrong.doubt
    with pytest.raises(LutraError, match=r"labels are 0\.\.3, but the model has 3 scores"):
        choose_measure(dense, np.array([0, 1, 0, 3]))
    with pytest.raises(LutraError, match=r"a label has shape \(2,\).*evaluate"):
        choose_measure(dense, np.zeros((4, 2)))


def test_other_outputs() -> None:
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((8, 16)).astype(np.float32)
    unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    assert choose_measure([[unit]], None).name == "cosine similarity"  # embeddings, not scores
    pair = choose_measure([[rows, unit]], None)
    assert (pair.name, pair.dense) == ("cosine similarity", pytest.approx(100.0))
    assert pair.quality([[-rows, unit]]) == pytest.approx(0.0, abs=1e-4)
    images = rng.uniform(size=(4, 3, 8, 8)).astype(np.float32)
    measure = choose_measure([[images]], None)
    assert (measure.name, measure.unit, measure.dense) == ("PSNR", "dB", MAX_PSNR)
    peak = float(images.max() - images.min())
    worse = measure.quality([[images + 0.01 * peak]])
    assert worse == pytest.approx(40.0, abs=0.01)
    # 40 dB from a model that has 30 against the truth: 1.1 times the squared error
    assert measure.drop(worse) == pytest.approx(10 * np.log10(1.1), abs=1e-3)
    truth = images + 0.1 * rng.standard_normal(images.shape)
    against = choose_measure([[images]], truth)
    assert against.drop(against.quality([[truth]])) < 0
    targets = rng.standard_normal((8, 16))
    explained = choose_measure([[rows]], targets)
    assert explained.name == "explained variance"
    assert explained.quality([[targets]]) == pytest.approx(100.0)


def test_surrogate() -> None:
    rng = np.random.default_rng(0)
    dense = [[rng.standard_normal((50, 10)), 100 * rng.standard_normal((50, 3))] for _ in range(2)]
    assert surrogate(dense, dense) == 0.0
    mean = [[np.full_like(y, y.mean()) for y in batch] for batch in dense]
    assert surrogate(mean, dense) == pytest.approx(1.0, abs=0.05)  # both outputs count alike
    assert relative_errors(mean, dense).shape == (100,)


# Samples


class Pair(nn.Module):
    def forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return a + b


def test_split() -> None:
    x = torch.arange(100.0)[:, None].repeat(1, 3)
    y = torch.arange(100)
    whole = split(nn.Linear(3, 2), x, None, 0)
    assert whole.judged.labels is None
    seen = np.concatenate([whole.calibration.index, whole.judged.index])
    assert sorted(seen) == list(range(100))
    assert (whole.calibration.count, whole.judged.count) == (75, 25)
    assert "no calibration sees" in whole.text
    for part in (whole.calibration, whole.judged):
        rows = np.concatenate([batch[0][:, 0].numpy() for batch in part.batches])
        assert rows.tolist() == part.index.tolist()
    again = split(
        nn.Linear(3, 2), [(a, b) for a, b in zip(x.split(7), y.split(7), strict=True)], None, 0
    )
    assert again.judged.index.tolist() == whole.judged.index.tolist()
    assert again.judged.labels is not None  # those of the batches
    assert again.judged.labels.tolist() == again.judged.index.tolist()
    given = split(nn.Linear(3, 2), x.numpy(), 2 * y.numpy(), 0)
    assert given.judged.labels is not None
    assert given.judged.labels.tolist() == (2 * given.judged.index).tolist()
    named = split(Pair(), {"b": x, "a": 0 * x}, None, 1)
    assert float(named.judged.batches[0][0].sum()) == 0.0  # by the order of forward
    mixed = split(nn.Conv2d(1, 1, 1), [torch.zeros(9, 1, 4, w) for w in (4, 5)], None, 0)
    assert mixed.dynamic_axes == ((0, 3),)
    assert len({batch[0].shape for batch in mixed.judged.batches}) == 2
    large = split(nn.Linear(1, 1), torch.zeros(9000, 1), None, 0)
    assert (large.calibration.count, large.judged.count) == (1024, 4096)
    assert "3880 are not used" in large.text
    assert whole.judged.sample(3)[0].shape == (1, 3)


def test_thinned_parts() -> None:
    data = [torch.arange(n).float()[:, None] + 100 * i for i, n in enumerate((60, 30, 4))]
    batches = [(part, part[:, 0].long()) for part in data]
    part = split(nn.Linear(1, 1), batches, None, 0).calibration
    for most in (1, 5, 20, part.count - 1):
        few = part.thinned(most)
        assert few.count == sum(len(batch[0]) for batch in few.batches)
        assert abs(few.count - most) <= len(part.batches)
        assert len(set(few.index)) == few.count
        values = np.concatenate([batch[0][:, 0].numpy() for batch in few.batches])
        assert few.labels is not None
        assert values.tolist() == few.labels.tolist()
    assert part.thinned(part.count) is part
    assert part.thinned(9).index.tolist() == part.thinned(9).index.tolist()


# Effort


def test_effort_fits_the_minutes() -> None:
    least, most = EFFORTS[0], EFFORTS[-1]
    assert plan(0.01, 768, 600.0) == Efforts(most, most) == whole()
    assert plan(100.0, 768, 300.0) == Efforts(least, least)
    assert not plan(100.0, 768, 300.0).rough
    for timed in (0.05, 0.2, 0.5, 1.0, 3.0):
        found = plan(timed, 768, 600.0)
        assert found.coarse.samples <= found.fine.samples
        assert Efforts.from_dict(found.to_dict()) == found
        later = plan(2 * timed, 768, 600.0)
        assert later.fine.samples <= found.fine.samples
        assert later.coarse.samples <= found.coarse.samples
    assert plan(1.0, 768, 600.0).rough
    assert not plan(1.0, 12, 600.0).rough  # they are the same samples
    assert plan(0.5, 768, 0.0) == Efforts(least, least)


@pytest.mark.parametrize(
    ("data", "labels", "match"),
    [
        ([], None, "are empty"),
        (torch.zeros(3, 3), None, "hold 3 samples; give at least 8"),
        ("data.npy", None, "are a str"),
        (torch.full((9, 3), torch.nan), None, "NaN or infinity"),
        (torch.zeros(20, 3), np.zeros(19, int), "19 labels for 20 samples"),
        (torch.zeros(20, 3), ["a"] * 20, "a number or an array of numbers"),
        ([torch.zeros(1, 3, w) for w in range(1, 9)], None, "no two of the 8 samples"),
        ([torch.zeros(8, 3), torch.zeros(8, 3, 1)], None, "different numbers of axes"),
    ],
)
def test_data_that_cannot_be_used(data: Any, labels: Any, match: str) -> None:
    with pytest.raises(LutraError, match=match):
        split(nn.Linear(3, 2), data, labels, 0)


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"target": "latancy"}, "did you mean 'latency'"),
        ({"max_drop": -1.0}, "max_drop=-1.0"),
        ({"max_drop": float("nan")}, "max_drop=nan"),
        ({"minutes": -1}, "minutes=-1"),
        ({"finetune_minutes": float("inf")}, "finetune_minutes=inf"),
        ({"threads": 0}, "threads=0"),
        ({"trials": 1.5}, "trials=1.5"),
        ({"isa": "mmx"}, "mmx"),
    ],
)
def test_budgets_that_make_no_sense(settings: Any, match: str) -> None:
    with pytest.raises(LutraError, match=match):
        Budget(**settings)


# Trials


def made(cost: float, drop: float, label: str = "") -> Trial:
    return Trial(label, {"a": label}, 100 - drop, drop, drop, cost, 1.0, int(100 * cost))


def test_front_and_best() -> None:
    trials = [made(4, 0), made(2, 0.5), made(3, 1), made(1, 9), Trial("x", {}, failed="no")]
    assert [t.ms for t in front(trials, "latency")] == [1, 2, 4]
    chosen = best(trials, "size", 1.0)
    assert chosen is not None
    assert chosen.bytes == 200
    assert best(trials[3:], "latency", 1.0) is None
    assert Trial.from_dict(trials[0].to_dict()) == trials[0]
    with pytest.raises(LutraError, match="no trial of this version"):
        Trial.from_dict({"label": "x"})


# Storage

KILLED = """
import os, random, signal, sys, time
from lutra.train import Trial
from lutra.train.search.storage import open_storage

path, random = sys.argv[1], random.Random(0)

def write(end):
    storage = open_storage(path, {"model": "m"})
    while True:
        count = len(storage.trials())
        number = storage.start({"a": str(count)})
        storage.finish(number, Trial(f"trial {count}", {"a": str(count)}, 1.0, 0.0, 0.0, 1.0))
        os.write(end, b"%d\\n" % count)

open_storage(path, {"model": "m"})
kills = found = 0
while kills < 20 or found < 20:
    out, end = os.pipe()
    child = os.fork()
    if not child:
        os.close(out)
        write(end)
    os.close(end)
    time.sleep(random.uniform(0.0, 0.2))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    with os.fdopen(out, "rb") as file:
        said = [int(line) for line in file.read().split()]
    labels = [trial.label for trial in open_storage(path, {"model": "m"}).trials()]
    assert labels == [f"trial {i}" for i in range(len(labels))], labels
    assert len(labels) >= max([found, *(number + 1 for number in said)]), (labels, said)
    kills, found = kills + 1, len(labels)
print(kills, found)
"""


@pytest.mark.slow
def test_killed_processes_lose_no_finished_trial(tmp_path: Path) -> None:
    """Twenty processes or more, one after the other, each killed at a random moment."""
    pytest.importorskip("optuna")
    words = [sys.executable, "-c", KILLED, str(tmp_path / "study.log")]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert min(map(int, done.stdout.split())) >= 20


def test_journal(tmp_path: Path) -> None:
    pytest.importorskip("optuna")
    path = tmp_path / "study.log"
    settings = {"model": "m", "threads": 1}
    one = open_storage(path, settings)
    assert isinstance(one, Journal)
    number = one.start({"a": "x"})
    one.note("times", {"k": {"int8": 1.5}})
    with path.open("ab") as file:
        file.write(b'{"op_code": 5, "half')  # as of a process that was killed while it wrote
    two = open_storage(path, settings)
    assert two.trials() == []
    assert two.notes("times") == {"k": {"int8": 1.5}}
    assert two.running() == []  # of this process itself
    one.finish(number, made(1.0, 0.0, "x"))
    failed = two.start({"a": "y"})
    two.finish(failed, Trial("y", {"a": "y"}, failed="too deep"))
    for storage in (one, two, open_storage(path, settings)):
        assert [t.label for t in storage.trials()] == ["x", "y"]
        assert storage.trials()[0] == made(1.0, 0.0, "x")
    child = (
        "import sys, time\nfrom lutra.train.search.storage import open_storage\n"
        "s = open_storage(sys.argv[1], {'model': 'm', 'threads': 1})\n"
        "s.start({'a': 'z'})\nprint('started', flush=True)\ntime.sleep(600)"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", child, str(path)], stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        process.stdout.readline()
        assert one.running() == [{"a": "z"}]
        assert one.claim({"a": "z"}) is None  # the other process is first
        assert one.claim({"a": "x"}) is None  # it is measured
        assert one.claim({"a": "new"}) is not None
    finally:
        process.kill()
        process.communicate()
    assert one.running() == []
    with pytest.raises(LutraError, match="another threads; give another file"):
        open_storage(path, {"model": "m", "threads": 2})
    with pytest.raises(LutraError, match=r"folder .* does not exist"):
        open_storage(tmp_path / "none" / "study.log", settings)
    (tmp_path / "text").write_text("no journal\n")
    with pytest.raises(LutraError, match="is no journal of Optuna"):
        open_storage(tmp_path / "text", settings)


def test_half_a_line_is_cut(tmp_path: Path) -> None:
    path = tmp_path / "lines"
    for text, left in (
        (b"", b""), (b"half", b""), (b"one\n", b"one\n"), (b"one\nhalf", b"one\n"),
        (b"one\n" + b"x" * 200_000, b"one\n"),
    ):  # fmt: skip
        path.write_bytes(text)
        cut_half_line(str(path))
        assert path.read_bytes() == left
