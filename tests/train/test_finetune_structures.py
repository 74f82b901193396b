"""Batches and outputs of any structure, and settings in either form."""

from __future__ import annotations

import json
from collections import UserDict, namedtuple
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

from lutra.errors import LutraError
from lutra.train import PQ, Checkpoints, Distillation, Schedule, convert, finetune
from lutra.train.batches import BatchReader
from lutra.train.finetuning import checkpoint

SAMPLES, BATCH, CLASSES = 24, 8, 3


def numbers() -> tuple[Tensor, Tensor]:
    x = torch.randn(SAMPLES, 6, generator=torch.Generator().manual_seed(2))
    return x, torch.arange(SAMPLES) % CLASSES


class Net(nn.Module):
    """Takes a tensor, gives what `shape` makes of its scores."""

    def __init__(self, shape: Callable[[Tensor], Any] = lambda y: y) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(6, 8), nn.Linear(8, CLASSES)
        self.shape = shape

    def forward(self, x: Tensor) -> Any:
        return self.shape(self.second(F.relu(self.first(x))))


def converted(net: nn.Module | None = None, data: Any = None) -> Any:
    found = [numbers()[0]] if data is None else data
    recipe = {"second": PQ(v=4, k=8)}
    return convert(net or Net(), recipe, found, kmeans_steps=3, progress=False)[0]


def batches(make: Callable[[Tensor, Tensor], Any], **settings: Any) -> DataLoader[Any]:
    x, y = numbers()
    return DataLoader(
        range(SAMPLES),  # type: ignore[arg-type]
        batch_size=BATCH,
        collate_fn=lambda index: make(x[index], y[index]),
        shuffle=True,
        **settings,
    )


def trained(model: Any, data: DataLoader[Any], **settings: Any) -> Any:
    finetune(model, data, progress=False, **{"steps": 5, "lr": 1e-2, **settings})
    return model


def same(a: nn.Module, b: nn.Module) -> None:
    for (name, got), want in zip(a.state_dict().items(), b.state_dict().values(), strict=True):
        assert torch.equal(got, want), name


def refused(message: str, model: nn.Module, data: Any, **settings: Any) -> None:
    with pytest.raises(LutraError, match=message):
        trained(model, data, **settings)


@pytest.fixture(scope="module")
def plain() -> Any:
    return trained(converted(), batches(lambda x, y: (x, y)))


# Settings


def test_both_forms_of_the_settings_are_the_same(tmp_path: Path) -> None:
    teacher = Net()
    data = batches(lambda x, y: (x, y))
    old = trained(
        converted(), data, lr=1e-2, warmup=1, weight_decay=0.1, table_lr=1.0, temperature_lr=2.0,
        clip_norm=0.5, teacher=teacher, distillation=0.3, distillation_temperature=2.0,
        feature_layers=["first"], feature_weight=0.5, checkpoint_dir=tmp_path / "old",
        checkpoint_every=2, resume=False,
    )  # fmt: skip
    new = converted()
    finetune(
        new,
        data,
        steps=5,
        schedule=Schedule(1e-2, 1, 0.1, temperature_lr=2.0, table_lr=1.0, clip_norm=0.5),
        distillation=Distillation(teacher, 0.3, 2.0, ["first"], 0.5),
        checkpoints=Checkpoints(tmp_path / "new", every=2, resume=False),
        progress=False,
    )
    same(old, new)
    runs = [
        json.loads((checkpoint.checkpoints(tmp_path / name)[0] / "run.json").read_text())
        for name in ("old", "new")
    ]
    assert runs[0] == runs[1]
    assert {"lr", "table_lr", "distillation", "feature_layers", "clip_norm"} <= set(
        runs[0]["settings"]
    )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"schedule": Schedule(), "clip_norm": None}, r"clip_norm and schedule=Schedule\(...\)"),
        ({"distillation": Distillation(Net()), "teacher": Net()}, "teacher and distillation="),
        ({"distillation": Distillation(Net()), "feature_weight": 1.0}, "feature_weight and dist"),
        ({"checkpoints": Checkpoints("x"), "resume": True}, "resume and checkpoints=Checkpoints"),
    ],
)
def test_settings_given_twice_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(LutraError, match=message):
        finetune(converted(), batches(lambda x, y: (x, y)), steps=1, **settings)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Schedule(lr=-1.0), "lr=-1.0 is not"),
        (lambda: Schedule(warmup=-1), "warmup=-1 is not"),
        (lambda: Schedule(table_lr=float("nan")), "table_lr=nan is not"),
        (lambda: Schedule(clip_norm=0.0), "clip_norm=0 leaves no gradient"),
        (lambda: Distillation(Net(), 1.5), r"distillation=1.5 is not in 0..1"),
        (lambda: Distillation(Net(), temperature=0.0), "temperature=0.0 is not a positive"),
        (lambda: Distillation(Net(), feature_layers="first"), "is one string"),
        (lambda: Checkpoints("x", every=-2), "checkpoint_every=-2 is negative"),
    ],
)
def test_settings_out_of_range_are_refused(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(LutraError, match=message):
        make()


def test_unknown_keywords_are_refused() -> None:
    with pytest.raises(TypeError, match="unexpected keyword argument 'learning_rate'"):
        finetune(converted(), batches(lambda x, y: (x, y)), steps=1, learning_rate=1.0)  # type: ignore[call-arg]


# Batches

Pair = namedtuple("Pair", "x y")


@pytest.mark.parametrize(
    "make",
    [
        lambda x, y: [x, y],
        lambda x, y: Pair(x, y),
        lambda x, y: ((x,), y),
        lambda x, y: ({"x": x}, y),
        lambda x, y: {"x": x, "labels": y},
        lambda x, y: {"target": y, "x": x},
        lambda x, y: UserDict(x=x, labels=y),
    ],
    ids=["list", "named tuple", "nested", "dict in tuple", "dict", "target", "UserDict"],
)
def test_batches_of_every_structure(plain: Any, make: Any) -> None:
    same(trained(converted(), batches(make)), plain)


def test_several_inputs() -> None:
    class Two(Net):
        def forward(self, x: Tensor, scale: Tensor, shift: Tensor | None = None) -> Any:
            assert shift is not None
            return super().forward(x * scale[:, None] + shift)

    x, _ = numbers()
    scale, shift = torch.full((SAMPLES,), 2.0), torch.full((SAMPLES, 6), -0.5)
    data = [(x, scale, shift)]
    models = [
        trained(converted(Two(), data), batches(make))
        for make in (
            lambda x, y: (x, scale[: len(x)], shift[: len(x)], y),
            lambda x, y: {
                "x": x, "shift": shift[: len(x)], "scale": scale[: len(x)], "labels": y
            },
            lambda x, y: ((x, scale[: len(x)], shift[: len(x)]), y),
        )
    ]  # fmt: skip
    same(models[0], models[1])
    same(models[0], models[2])
    want = trained(converted(None, [2.0 * x - 0.5]), batches(lambda x, y: (2.0 * x - 0.5, y)))
    same(models[0], want)


def test_what_forward_does_not_take_is_a_target(plain: Any) -> None:
    def weighted(output: Tensor, targets: tuple[Tensor, Tensor]) -> Tensor:
        y, weight = targets
        assert weight.eq(1.0).all()
        return F.cross_entropy(output, y)

    data = batches(lambda x, y: (x, y, torch.ones(len(x))))
    same(trained(converted(), data, loss=weighted), plain)
    refused("targets that are a tuple.*a loss of your own", converted(), data)


def test_a_mapping_without_labels_is_the_target(plain: Any) -> None:
    def loss(output: Tensor, batch: dict[str, Tensor]) -> Tensor:
        assert sorted(batch) == ["kind", "x"]
        return F.cross_entropy(output, batch["kind"])

    same(trained(converted(), batches(lambda x, y: {"x": x, "kind": y}), loss=loss), plain)
    data = batches(lambda x, y: {"x": x, "kind": y})
    refused("has the entry 'kind', which forward of Net does not take .it takes x", converted(),
            data)  # fmt: skip
    refused("targets that are a dict", converted(), batches(lambda x, y: {"x": x}))
    misspelt = batches(lambda x, y: {"X": x, "labels": y})
    refused("has the entry 'X'", converted(), misspelt)
    refused("a batch is a str", converted(), batches(lambda x, y: "text"))
    refused("no targets, and the model returns no loss", converted(), batches(lambda x, y: x))


def test_distillation_needs_no_targets() -> None:
    """At weight 1; all structures lead to the same."""
    teacher = Net()
    models = [
        trained(converted(), batches(make), distillation=Distillation(teacher))
        for make in (
            lambda x, y: (x, y),
            lambda x, y: x,
            lambda x, y: (x,),
            lambda x, y: {"x": x},
            lambda x, y: {"x": x, "labels": y},
        )
    ]
    for model in models[1:]:
        same(model, models[0])


# Outputs


class Output(dict):  # type: ignore[type-arg]
    """As of transformers: a mapping whose entries are attributes too."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None


SHAPES: dict[str, Callable[[Tensor], Any]] = {
    "tuple": lambda y: (y, y.detach() * 7.0),
    "list": lambda y: [[y], y * 2.0],
    "dict": lambda y: {"scores": y, "hidden": None},
    "logits": lambda y: {"hidden": y * 3.0, "logits": y},
    "output": lambda y: Output(loss=None, hidden=y * 3.0, logits=y),
}


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_outputs_of_every_structure(plain: Any, shape: Any) -> None:
    data = batches(lambda x, y: (x, y))
    same(trained(converted(Net(shape)), data), plain)
    teachers = Net(), Net(shape)
    got, want = (
        trained(converted(Net(f)), data, distillation=Distillation(t, 0.5, 2.0, ["first"]))
        for f, t in zip((shape, Net().shape), teachers[::-1], strict=True)
    )
    same(got, want)


def test_a_loss_of_ones_own_sees_the_whole_output(plain: Any) -> None:
    def loss(output: Any, targets: Tensor) -> Tensor:
        assert isinstance(output, Output)
        return F.cross_entropy(output.logits, targets) + 0.0 * output.hidden.sum()

    data = batches(lambda x, y: (x, y))
    same(trained(converted(Net(SHAPES["output"])), data, loss=loss), plain)


def test_an_output_without_scores_is_refused() -> None:
    data = batches(lambda x, y: (x, y))
    refused("returns a str without a tensor of scores", converted(Net(lambda y: "text")), data)


class WithLoss(Net):
    """Returns a loss of its own where it gets labels, as the models of transformers do."""

    def __init__(self, as_tuple: bool = False) -> None:
        super().__init__()
        self.as_tuple = as_tuple

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Any:
        logits = super().forward(x)
        if labels is None:
            return Output(logits=logits)
        loss = F.cross_entropy(logits, labels, label_smoothing=0.3)
        return (loss, logits) if self.as_tuple else Output(loss=loss, logits=logits)


def smoothed(output: Any, targets: Tensor) -> Tensor:
    scores = output if isinstance(output, Tensor) else output.logits
    return F.cross_entropy(scores, targets, label_smoothing=0.3)


@pytest.mark.parametrize("as_tuple", [False, True])
def test_the_loss_of_the_model_is_used(plain: Any, as_tuple: bool) -> None:
    data = batches(lambda x, y: {"x": x, "labels": y})
    want = trained(converted(), data, loss=smoothed)
    x = [numbers()[0]]
    same(trained(converted(WithLoss(as_tuple), x), data), want)
    # Not with a loss of one's own, and not where the labels do not reach the model.
    hard = lambda output, y: F.cross_entropy(output.logits, y)  # noqa: E731
    same(trained(converted(WithLoss(), x), data, loss=hard), plain)
    same(trained(converted(WithLoss(), x), batches(lambda x, y: (x, y))), plain)
    teacher = WithLoss()
    got = trained(converted(WithLoss(), x), data, distillation=Distillation(teacher, 0.5))
    same(
        got,
        trained(converted(), data, loss=smoothed, distillation=Distillation(Net(), 0.5)),
    )


class Tagger(nn.Module):
    """A class for each of seven tokens, on the last axis."""

    def __init__(self, shape: Callable[[Tensor], Any] = lambda y: y) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.shape = nn.Linear(2, 8), nn.Linear(8, CLASSES), shape

    def forward(self, x: Tensor) -> Any:
        return self.shape(self.second(F.relu(self.first(x.view(len(x), 3, 2).repeat(1, 2, 1)))))


@pytest.mark.parametrize("shape", [lambda y: y, lambda y: {"logits": y}], ids=["tensor", "dict"])
def test_classes_of_tokens_are_on_the_last_axis(shape: Any) -> None:
    def tokens(y: Tensor) -> Tensor:
        labels = (y[:, None] + torch.arange(6)) % CLASSES
        labels[:, 4:] = -100
        return labels

    def loss(output: Any, y: Tensor) -> Tensor:
        scores = output if isinstance(output, Tensor) else output["logits"]
        return F.cross_entropy(scores.flatten(0, 1), y.flatten())

    def divergence(output: Any, y: Tensor) -> Tensor:
        """By hand, without the positions that do not count."""
        scores = output if isinstance(output, Tensor) else output["logits"]
        with torch.no_grad():
            wanted = teacher(inputs.pop(0))
        rows = [s[y != -100].log_softmax(1) for s in (scores, wanted)]
        return F.kl_div(rows[0], rows[1], log_target=True, reduction="batchmean")

    inputs: list[Tensor] = []
    teacher = Tagger()
    x = [numbers()[0]]
    data = batches(lambda x, y: (x, tokens(y)))
    same(
        trained(converted(Tagger(shape), x), data),
        trained(converted(Tagger(shape), x), data, loss=loss),
    )
    got = trained(
        converted(Tagger(shape), x), data, distillation=Distillation(teacher, temperature=1.0)
    )
    want = converted(Tagger(shape), x)
    handle = want.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    trained(want, data, loss=divergence)
    handle.remove()
    for a, b in zip(got.parameters(), want.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_features_may_be_in_tuples_and_must_be_called() -> None:
    class Pair(nn.Linear):
        def forward(self, x: Tensor) -> Any:
            return super().forward(x), None

    class Unused(Net):
        def __init__(self) -> None:
            super().__init__()
            self.unused = nn.Linear(2, 2)

    class Tuples(Unused):
        def __init__(self) -> None:
            super().__init__()
            layer = Pair(6, 8)
            layer.load_state_dict(self.first.state_dict())
            self.first = layer

        def forward(self, x: Tensor) -> Any:
            return self.second(F.relu(self.first(x)[0]))

    data = batches(lambda x, y: (x, y))
    got, want = (
        trained(converted(net()), data, teacher=net(), feature_layers=["first"], feature_weight=9)
        for net in (Tuples, Unused)
    )
    same(got, want)
    refused("feature layer 'unused' gave no tensor", converted(Unused()), data, teacher=Unused(),
            feature_layers=["unused"])  # fmt: skip


@pytest.mark.slow
def test_models_of_transformers(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=32, max_position_embeddings=16, num_labels=CLASSES,
    )  # fmt: skip
    torch.manual_seed(0)
    net = transformers.BertForSequenceClassification(config)
    ids = torch.randint(1, 50, (SAMPLES, 7))
    y = numbers()[1]

    def collate(index: list[int]) -> Any:
        return transformers.BatchEncoding(
            {
                "input_ids": ids[index],
                "attention_mask": torch.ones(len(index), 7, dtype=torch.long),
                "labels": y[index],
            }
        )

    data = DataLoader(range(SAMPLES), batch_size=BATCH, collate_fn=collate)  # type: ignore[arg-type]
    recipe = {"bert.encoder.*": PQ(v=8, k=8)}
    model, _ = convert(net, recipe, data, progress=False)
    before = finetune(model, data, steps=1, lr=0.0, progress=False).history[-1]["loss"]
    run = finetune(
        model,
        data,
        epochs=12,
        schedule=Schedule(lr=5e-3),
        distillation=Distillation(net, 0.3, feature_layers=["bert.encoder.layer.0"]),
        checkpoints=Checkpoints(tmp_path),
        progress=False,
    )
    assert run.steps == 36
    after = finetune(model, data, steps=1, lr=0.0, progress=False).history[-1]["loss"]
    assert after < before


# Iterable data sets


class Stream(IterableDataset[tuple[Tensor, Tensor]]):
    """Draws from the global generator for every sample; knows its epoch."""

    def __init__(self, samples: int = SAMPLES) -> None:
        self.samples, self.epochs = samples, list[int]()

    def set_epoch(self, epoch: int) -> None:
        self.epochs.append(epoch)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        x, y = numbers()
        for i in range(self.samples):
            yield x[i] + 0.1 * torch.randn(6), y[i]


@pytest.mark.parametrize("batch", [BATCH, pytest.param(None, marks=pytest.mark.slow)])
def test_iterable_data_sets_resume_bit_equal(tmp_path: Path, batch: int | None) -> None:
    """Three batches an epoch; the run stops in each of them."""

    class Batches(Stream):
        def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
            x, y = numbers()
            for part in torch.arange(SAMPLES).split(BATCH):
                yield x[part] + 0.1 * torch.randn(len(part), 6), y[part]

    make = Stream if batch else Batches
    stream = make()
    settings: dict[str, Any] = {"steps": 8, "checkpoint_every": 1}
    whole = trained(
        converted(), DataLoader(stream, batch), checkpoint_dir=tmp_path / "whole", **settings
    )
    assert stream.epochs == [0, 1, 2]
    for stop in (2, 3, 4):
        folder = tmp_path / str(stop)
        count = [0]

        def evaluate(_: nn.Module, count: list[int] = count, stop: int = stop) -> float:
            count[0] += 1
            if count[0] == stop + 1:
                raise KeyboardInterrupt
            return 0.0

        with pytest.raises(KeyboardInterrupt):
            trained(
                converted(), DataLoader(make(), batch), checkpoint_dir=folder, evaluate=evaluate,
                evaluate_every=1, **settings,
            )  # fmt: skip
        torch.rand(5)
        again = trained(converted(), DataLoader(make(), batch), checkpoint_dir=folder, **settings)
        same(again, whole)


def test_iterable_data_sets_need_steps_and_samples() -> None:
    refused("no known length; give steps", converted(), DataLoader(Stream(), BATCH), steps=None,
            epochs=2)  # fmt: skip
    refused("no batch in epoch 1", converted(), DataLoader(Stream(0), BATCH))
    workers = DataLoader(Stream(), BATCH, num_workers=2)
    assert finetune(converted(), workers, steps=3, progress=False).steps == 3


def test_streams_differ_between_epochs() -> None:
    seen: list[Tensor] = []
    model = converted()
    model.register_forward_pre_hook(lambda _, args: seen.append(args[0].clone()))
    trained(model, DataLoader(Stream(), BATCH), steps=6)
    assert not any(torch.equal(a, b) for a, b in zip(seen[:3], seen[3:], strict=True))


# Calibration


def reads(forward: Any, batch: Any) -> Any:
    net = nn.Module()
    net.forward = forward
    args, kwargs = BatchReader(net, "calibration data").inputs(batch, torch.device("cpu"))
    return kwargs or len(args)


X, IDS, Y = torch.zeros(4, 3), torch.zeros(4, 3).long(), torch.zeros(4).long()


@pytest.mark.parametrize(
    ("forward", "batch", "want"),
    [
        (lambda x: x, X, 1),
        (lambda x: x, (X, Y), 1),
        (lambda x: x, (X, Y, Y), 1),
        (lambda ids, mask: ids, (IDS, IDS), 2),
        (lambda ids, mask=None: ids, (IDS, IDS), 2),
        (lambda ids, mask=None, kinds=None: ids, (IDS, IDS, Y), 2),
        (lambda ids, mask=None: ids, (IDS, IDS, Y), 2),
        (lambda x, mask=None: x, (X, Y), 1),  # classes
        (lambda x, mask=None: x, (X, Y[:, None].float()), 1),
        (lambda x, mask=None: x, ((X, Y), Y), 2),  # said exactly
        (lambda x, lengths: x, (X, Y), 2),
        (lambda x, flag=False: x, (X, X), 1),
        (lambda x, flag=False, mask=None: x, (X, X), 1),
        (lambda *all_of_them: all_of_them, (X, X), 2),
        (lambda *all_of_them: all_of_them, (X, Y), 1),
        (lambda x, *, mask=None: x, (X, X), 1),
    ],
)  # fmt: skip
def test_tuples_in_calibration(forward: Any, batch: Any, want: int) -> None:
    assert reads(forward, batch) == want


def test_mappings_in_calibration() -> None:
    batch = UserDict(x=X, labels=Y)
    assert list(reads(lambda x: x, batch)) == ["x"]
    assert list(reads(lambda x, **more: x, batch)) == ["x"]
    assert list(reads(lambda x, labels=None: x, batch)) == ["x", "labels"]
    with pytest.raises(LutraError, match="calibration data: a batch has the entry 'y'"):
        reads(lambda x: x, {"x": X, "y": Y})
    with pytest.raises(LutraError, match="has the entries 'labels', and forward"):
        reads(lambda x: x, {"labels": Y})


def test_the_mask_reaches_the_model() -> None:
    class Masked(Net):
        def forward(self, x: Tensor, mask: Tensor | None = None) -> Any:
            return super().forward(x if mask is None else x * mask)

    x = numbers()[0]
    mask = (torch.arange(6) < 3).float().expand(SAMPLES, 6)
    models = [
        converted(Masked(), data)
        for data in ([(x, mask)], [{"mask": mask, "x": x}], [x * mask], [x])
    ]
    same(models[0], models[1])
    assert torch.equal(models[0].second.centroids, models[2].second.centroids)
    assert not torch.equal(models[0].second.centroids, models[3].second.centroids)
