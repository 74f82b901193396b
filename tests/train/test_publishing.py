"""Models as folders of the hub: what is loaded again has the bits of what was saved."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_architectures import ALL
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import lutra
from lutra.errors import InputError, LutraError
from lutra.hub import find_file
from lutra.train import (
    PQ,
    Function,
    Int8,
    Keep,
    Lookup,
    SpeedGate,
    auto_recipe,
    convert,
    export,
    finetune,
    from_graph,
    from_pretrained,
    load_onnx,
    push_to_hub,
    save_pretrained,
)
from lutra.train.conversion.structure import Structure, structure_of

X = torch.randn(64, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def convnet() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(8, 5),
    ).eval()  # fmt: skip


class Causal(nn.Conv2d):
    """A convolution with a forward of its own."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(nn.functional.pad(input, (2, 0, 2, 0)))


class Own(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.own = Causal(3, 6, 3)
        self.up = nn.ConvTranspose2d(6, 4, 2, stride=2)
        self.norm = nn.utils.parametrizations.weight_norm(nn.Conv2d(4, 5, 3))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.norm(self.up(self.own(x).relu()).relu()).mean((2, 3))
        return y


class Tokens(nn.Module):
    """An embedding that is tied to the head, attention, a GRU, norms and functions."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(20, 16)
        self.block = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, activation="gelu")
        self.rnn = nn.GRU(16, 8, batch_first=True)
        self.norm = nn.LayerNorm(8)
        self.out = nn.Linear(8, 16)
        self.head = nn.Linear(16, 20)
        self.head.weight = self.table.weight

    def forward(self, ids: Tensor) -> Tensor:
        x, _ = self.rnn(self.block(self.table(ids)))
        y: Tensor = self.head(torch.tanh(self.out(self.norm(x)))).softmax(-1)
        return y


def own() -> nn.Module:
    torch.manual_seed(1)
    return Own().eval()


def token_model() -> nn.Module:
    torch.manual_seed(2)
    return Tokens().eval()


def ids() -> Tensor:
    return torch.randint(0, 20, (64, 7), generator=torch.Generator().manual_seed(0))


CASES: dict[str, tuple[Callable[[], nn.Module], Any, Tensor]] = {
    "nothing": (convnet, {}, X),
    "int8": (convnet, {"*": Int8()}, X),
    "pq": (convnet, {"0": Int8(), "*": PQ(v=4)}, X),
    "average": (convnet, {"*": PQ(k=8, centroids="average")}, X),
    "soft": (convnet, {"*": PQ(k=8, gradient="soft")}, X),
    "tree": (convnet, {"*": PQ(encoder="tree")}, X),
    "rows": (convnet, {"*": PQ(encoder="tree", group="row")}, X),
    "pixel": (convnet, {"3": PQ(group="pixel", free_tables=True)}, X),
    "lookup": (convnet, {"*": Lookup()}, X),
    "free lookup": (convnet, {"*": Lookup(8, 7, table="free")}, X),
    "rank": (convnet, {"*": Lookup(rank=2)}, X),
    "own forward": (own, {"*": PQ(v=4, otherwise=Int8())}, X),
    "own forward in part": (own, {"up": Int8(), "own": Keep(), "norm": Lookup()}, X),
    "tokens": (token_model, {"block.*": PQ(v=4), "*": Int8()}, ids()),
    "shared codes": (token_model, {"block.self_attn": PQ(v=4), "out": Lookup()}, ids()),
    "functions": (token_model, {"block.linear?": Int8(), "**": Function()}, ids()),
    "few functions": (
        token_model,
        {"norm": Function(8), "block": Function(16, functions=("gelu", "softmax", "attention"))},
        ids(),
    ),
    "a module that is a layer": (lambda: nn.Linear(8, 4), {"*": PQ(v=4)}, X),
}


def converted(name: str) -> tuple[Callable[[], nn.Module], nn.Module, Tensor]:
    build, recipe, x = CASES[name]
    model = build()
    if recipe:
        model, _ = convert(build(), recipe, [x])
    return build, model.eval(), x


@pytest.mark.parametrize("name", CASES)
def test_a_loaded_model_is_the_saved_one_to_the_bit(name: str, tmp_path: Path) -> None:
    build, model, x = converted(name)
    save_pretrained(model, tmp_path / "m")
    with torch.no_grad():
        wanted = model(x)
    dense = build()
    before = copy.deepcopy(dense.state_dict())
    for parameter in dense.parameters():  # any weights do
        nn.init.normal_(parameter)
    start = copy.deepcopy(dense.state_dict())
    again = from_pretrained(tmp_path / "m", dense)
    with torch.no_grad():
        assert torch.equal(again(x), wanted)
    assert all(torch.equal(v, start[n]) for n, v in dense.state_dict().items())
    assert list(before) == list(dense.state_dict())
    assert not again.training
    assert structure_of(again) == structure_of(model)
    assert [(n, type(m).__name__) for n, m in again.named_modules()] == [
        (n, type(m).__name__) for n, m in model.named_modules()
    ]
    assert [(n, p.requires_grad) for n, p in again.named_parameters()] == [
        (n, p.requires_grad) for n, p in model.named_parameters()
    ]


@pytest.mark.parametrize("name", ["pq", "tree", "lookup", "shared codes", "average"])
def test_a_loaded_model_trains_as_the_saved_one(name: str, tmp_path: Path) -> None:
    build, model, x = converted(name)
    save_pretrained(model, tmp_path / "m")
    again = from_pretrained(tmp_path / "m", build)
    classes = torch.arange(64) % 5

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        return nn.functional.cross_entropy(outputs.flatten(1), targets)

    for each in (model, again):
        loader = DataLoader(TensorDataset(x[:64], classes), batch_size=16)
        finetune(each, loader, steps=6, lr=1e-2, loss=loss, progress=False)
    first, second = model.state_dict(), again.state_dict()
    assert list(first) == list(second)
    assert all(torch.equal(first[n], second[n]) for n in first)


def test_layers_that_the_speed_gate_kept_stay_as_they_are(tmp_path: Path) -> None:
    gate = SpeedGate(measure=lambda graphs, gate: {n: float(n == "lookup") + 1.0 for n in graphs})
    model, report = convert(token_model(), {"block.*": PQ(v=4)}, [ids()], speed_gate=gate)
    assert not report.replaced or all(layer.method == "int8" for layer in report.replaced)
    save_pretrained(model, tmp_path / "m", report=report)
    again = from_pretrained(tmp_path / "m", token_model)
    with torch.no_grad():
        assert torch.equal(again(ids()), model.eval()(ids()))
    graph = export(again, tmp_path / "again.lutra", ids()[:8])
    assert graph.metadata["speed_gate"]["layers"]


@pytest.mark.slow
def test_half_and_compiled_models(tmp_path: Path) -> None:
    half, _ = convert(convnet().half(), {"*": Int8()}, [X.half()])
    save_pretrained(half, tmp_path / "h")
    again = from_pretrained(tmp_path / "h", lambda: convnet().half())
    with torch.no_grad():
        assert torch.equal(again(X), half.eval()(X))
    compiled, _ = convert(torch.compile(convnet()), {"*": Int8()}, [X])
    save_pretrained(compiled, tmp_path / "c")
    with torch.no_grad():
        assert torch.equal(from_pretrained(tmp_path / "c", convnet)(X), compiled.eval()(X))


def test_the_folder_runs_without_pytorch_and_says_so(tmp_path: Path) -> None:
    model, report = convert(convnet(), {"0": Int8(), "*": PQ(v=4)}, [X])
    folder = save_pretrained(
        model, tmp_path / "small-net", example_input=X[:4], report=report,
        recipe={"0": Int8(), "*": PQ(v=4)}, description="Trained on **noise**.",
        metrics={"accuracy | %": {"float32": 91.25, "lutra": 90.5}, "epochs": 3},
        card={"license": "mit", "tags": ["vision"], "datasets": ["noise"]},
    )  # fmt: skip
    session = lutra.Session.from_pretrained(folder, threads=1)
    with torch.no_grad():
        np.testing.assert_allclose(session(X.numpy()), model.eval()(X), rtol=1e-4, atol=1e-5)
    text = (folder / "README.md").read_text()
    head = text.split("---\n")[1]
    assert '"license": "mit"' in head
    assert '"tags": ["lutra", "lookup-table", "cpu", "vision"]' in head
    assert "# small-net" in text
    assert "| accuracy \\| % | 91.25 | 90.5 |  |" in text
    assert "| epochs |  |  | 3 |" in text
    assert f"| model.lutra | {(folder / 'model.lutra').stat().st_size:,} |" in text
    # and the bias that calibration gives the first layer
    floats = sum(p.numel() for p in convnet().parameters()) * 4 + 8 * 4
    assert f"| {floats:,} | 1.00 |" in text
    assert "| `pq`, v=4 | 2 |" in text
    assert "Trained on **noise**." in text
    assert "Session.from_pretrained" in text
    assert "model=build_the_dense_model" in text
    config = json.loads((folder / "config.json").read_text())
    assert config["recipe"] == {"0": {"method": "int8", "act_bits": 7}, "*": config["recipe"]["*"]}
    assert config["report"]["layers"][0]["method"] == "int8"
    assert config["metrics"]["epochs"] == 3


def test_the_head_of_the_card_is_what_the_hub_reads(tmp_path: Path) -> None:
    hub = pytest.importorskip("huggingface_hub", reason="needs huggingface_hub")
    save_pretrained(convnet(), tmp_path, card={"license": "mit", "language": "en"}, title="A: b")
    card = hub.ModelCard.load(tmp_path / "README.md")
    assert card.data.library_name == "lutra"
    assert card.data.license == "mit"
    assert card.data.language == "en"
    assert "lookup-table" in card.data.tags


def test_a_file_that_is_exported_already(tmp_path: Path) -> None:
    model, _ = convert(convnet(), {"*": Int8()}, [X])
    graph = export(model, tmp_path / "net.lutra", X[:4], metadata={"classes": list("abcde")})
    for number, file in enumerate((tmp_path / "net.lutra", graph)):
        folder = save_pretrained(model, tmp_path / str(number), file=file)
        session = lutra.Session.from_pretrained(folder)
        assert session.graph.metadata["classes"] == list("abcde")
    (tmp_path / "bad.lutra").write_bytes(b"no model")
    with pytest.raises(LutraError):
        save_pretrained(model, tmp_path / "m", file=tmp_path / "bad.lutra")


def test_files_of_an_earlier_save_do_not_stay(tmp_path: Path) -> None:
    save_pretrained(convnet(), tmp_path, example_input=X[:4])
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "README.md").write_text("my own card")
    save_pretrained(convnet(), tmp_path, card=None)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "README.md", "config.json", "model.safetensors", "notes.txt",
    ]  # fmt: skip
    assert (tmp_path / "README.md").read_text() == "my own card"
    with pytest.raises(InputError, match=r"has no file 'model\.lutra', only README\.md"):
        lutra.Session.from_pretrained(tmp_path)


def test_a_failed_save_changes_nothing(tmp_path: Path) -> None:
    save_pretrained(convnet(), tmp_path, example_input=X[:4])
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(LutraError):
        save_pretrained(convnet(), tmp_path, example_input=torch.rand(4, 2, 8, 8))
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_graph_in_the_folder_is_its_dense_model(tmp_path: Path) -> None:
    export(convnet(), tmp_path / "float.lutra", X[:4])
    dense = from_graph(lutra.load_graph(tmp_path / "float.lutra"))
    model, _ = convert(dense, {"*": Int8()}, [X])
    for number, given in enumerate(
        (tmp_path / "float.lutra", lutra.load_graph(tmp_path / "float.lutra"))
    ):
        folder = save_pretrained(model, tmp_path / str(number), dense=given)
        again = from_pretrained(folder)
        with torch.no_grad():
            assert torch.equal(again(X), model.eval()(X))
        assert (folder / "model.lutra").exists()  # imported models know their inputs
        assert "model=" not in (folder / "README.md").read_text().split("## Use")[1]


def test_an_onnx_file_in_the_folder_is_its_dense_model(tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx", reason="needs onnx: pip install 'lutra[onnx]'")
    helper, weight = onnx.helper, np.random.default_rng(0).normal(size=(8, 4)).astype(np.float32)
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        [
            helper.make_node("MatMul", ["x", "w"], ["p"], name="product"),
            helper.make_node("Mul", ["p", "gain"], ["y"], name="scaled"),
        ],
        "net",
        [value("x", 1, ["n", "t", 8]), value("gain", 1, [1])],
        [value("y", 1, None)],
        [onnx.numpy_helper.from_array(weight, "w")],
    )
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    onnx.save(made, tmp_path / "net.onnx")
    dense = load_onnx(
        tmp_path / "net.onnx", shapes={"x": (None, 5, 8)}, constants={"gain": np.float32([2.5])}
    )
    x = torch.randn(64, 5, 8)
    model, _ = convert(dense, {"*": Int8()}, [x])
    folder = save_pretrained(model, tmp_path / "m", dense=tmp_path / "net.onnx")
    with torch.no_grad():
        assert torch.equal(from_pretrained(folder)(x), model.eval()(x))


def test_the_wrong_file_of_the_dense_model_is_found_when_it_is_saved(tmp_path: Path) -> None:
    export(nn.Sequential(nn.Linear(3, 4)), tmp_path / "other.lutra", torch.rand(4, 3))
    model, _ = convert(convnet(), {"*": Int8()}, [X])
    with pytest.raises(LutraError, match=r"cannot be built from its dense model again .* as dense"):
        save_pretrained(model, tmp_path / "m", dense=tmp_path / "other.lutra")
    assert list((tmp_path / "m").iterdir()) == []


def test_models_of_transformers_need_no_code(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="needs transformers")
    config = transformers.BertConfig(
        vocab_size=20, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=32, max_position_embeddings=16, num_labels=3,
    )  # fmt: skip
    torch.manual_seed(0)
    bert = transformers.BertForSequenceClassification(config).eval()
    batch = {"input_ids": ids(), "attention_mask": torch.ones_like(ids())}
    model, _ = convert(bert, {"bert.encoder.*": PQ(v=4), "*": Int8()}, [batch])
    folder = save_pretrained(model, tmp_path / "m")
    again = from_pretrained(folder)
    assert type(again) is type(bert)
    with torch.no_grad():
        assert torch.equal(again(**batch).logits, model.eval()(**batch).logits)
    config = json.loads((folder / "config.json").read_text())
    config["dense"]["transformers"]["class"] = "pipeline"
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(LutraError, match="'pipeline', which is no class of models"):
        from_pretrained(folder)


def test_a_missing_or_wrong_dense_model_is_refused(tmp_path: Path) -> None:
    model, _ = convert(convnet(), {"*": PQ(v=4)}, [X])
    save_pretrained(model, tmp_path / "m")
    with pytest.raises(InputError, match=r"weights of a Sequential and no code; give the dense"):
        from_pretrained(tmp_path / "m")
    with pytest.raises(InputError, match="model is a int; give the dense model"):
        from_pretrained(tmp_path / "m", lambda: 3)  # type: ignore[arg-type, return-value]
    with pytest.raises(LutraError, match=r"no module '3'|no module '7'"):
        from_pretrained(tmp_path / "m", nn.Sequential(nn.Conv2d(3, 8, 3)))
    wide = convnet()
    wide[3] = nn.Conv2d(8, 9, 3, padding=1)  # type: ignore[operator]
    with pytest.raises(LutraError, match="do not fit the dense model, a Sequential"):
        from_pretrained(tmp_path / "m", wide)
    other = convnet()
    other[3] = nn.ReLU()  # type: ignore[operator]
    with pytest.raises(LutraError, match="a ReLU at '3', which cannot be 'pq'"):
        from_pretrained(tmp_path / "m", other)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model, _ = convert(convnet(), {"0": Int8(), "*": PQ(v=4)}, [X])
    return save_pretrained(model, tmp_path_factory.mktemp("saved"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.update(format=2), "has the format 2, and this version"),
        (lambda c: c.pop("structure"), "is not of lutra.train.save_pretrained"),
        (lambda c: c.update(structure=[]), "is a list; it must be an object"),
        (lambda c: c["structure"].update(layers=3), "no sound layers: 3"),
        (lambda c: c["structure"].update(split=[4]), r"no sound split: \[4\]"),
        (lambda c: c["structure"].update(shared={"3": 1}), "no sound shared"),
        (lambda c: c["structure"].update(tables={"3": 1}), "no sound tables"),
        (lambda c: c["structure"].update(speed_gate=1), "no sound speed_gate"),
        (lambda c: c["structure"]["layers"].update({"3": {"method": "exec"}}), "method 'exec'"),
        (lambda c: c["structure"]["layers"].update({"9": {"method": "int8"}}), "no module '9'"),
        (lambda c: c["structure"].update(norms={"2": "0"}), "ReLU at '2'"),
        (lambda c: c["structure"].update(shared={"3": "0"}), "cannot hold the codebooks"),
        (lambda c: c["structure"].update(tables={"2": {"kind": "sum"}}), "table at '2'"),
        (lambda c: c.update(dense={"file": "../../etc/passwd"}), "cannot read; give it as model"),
    ],
)
def test_damaged_configurations_are_refused(
    change: Callable[[Any], Any], message: str, saved: Path, tmp_path: Path
) -> None:
    shutil.copytree(saved, tmp_path, dirs_exist_ok=True)
    config = json.loads((tmp_path / "config.json").read_text())
    change(config)
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(LutraError, match=message) as error:
        from_pretrained(tmp_path, None if "file" in str(config["dense"]) else convnet)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_truncated_files_are_refused(name: str, tmp_path: Path) -> None:
    save_pretrained(convnet(), tmp_path)
    data = (tmp_path / name).read_bytes()
    for end in (0, 7, len(data) // 2):
        (tmp_path / name).write_bytes(data[:end])
        with pytest.raises(LutraError, match="cannot read"):
            from_pretrained(tmp_path, convnet)


def test_what_cannot_be_saved_is_refused(tmp_path: Path) -> None:
    from lutra.train.exporting.export import freeze_lookup_layers

    model, _ = convert(convnet(), {"*": Int8()}, [X])
    with pytest.raises(LutraError, match="layer '0' is frozen"):
        save_pretrained(freeze_lookup_layers(copy.deepcopy(model)), tmp_path / "m")
    for metrics in (3, {"a": None}, {"a": float("nan")}, {"a": {"b": True}}):
        with pytest.raises(InputError, match="metrics"):
            save_pretrained(model, tmp_path / "m", metrics=metrics)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="give one of them"):
        save_pretrained(model, tmp_path / "m", example_input=X, file="model.lutra")
    with pytest.raises(InputError, match=r"neither a \.lutra nor an \.onnx"):
        save_pretrained(model, tmp_path / "m", dense="model.pt")
    with pytest.raises(InputError, match=r"cannot read dense='none\.lutra'"):
        save_pretrained(model, tmp_path / "m", dense="none.lutra")
    with pytest.raises(InputError, match="cannot be written"):
        save_pretrained(model, tmp_path / "m", card={"license": {1, 2}})
    (tmp_path / "file").write_text("")
    with pytest.raises(LutraError, match="cannot write"):
        save_pretrained(model, tmp_path / "file")


def test_an_empty_structure_is_that_of_a_dense_model() -> None:
    assert structure_of(convnet()) == Structure()
    assert Structure.from_dict(json.loads(json.dumps(Structure().to_dict()))) == Structure()


class Hub:
    """Stands for the package: what would be sent to or asked of the network."""

    def __init__(self, folder: Path | None = None) -> None:
        self.folder, self.calls = folder, []  # type: ignore[var-annotated]

    def HfApi(self, token: Any = None) -> Hub:
        self.calls.append(("api", token))
        return self

    def create_repo(self, repository: str, **settings: Any) -> None:
        self.calls.append(("create", repository, settings))

    def upload_folder(self, **settings: Any) -> str:
        if settings["repo_id"] == "someone/closed":
            raise OSError("403\nForbidden")
        self.calls.append(("upload", settings))
        return "https://hub/commit"

    def hf_hub_download(self, repository: str, name: str, **settings: Any) -> str:
        self.calls.append(("get", repository, name, settings["revision"]))
        if self.folder is None or not (self.folder / name).exists():
            raise FileNotFoundError(f"404 for\n{name}")
        return str(self.folder / name)


def test_a_folder_is_pushed_and_a_repository_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, _ = convert(convnet(), {"*": Int8()}, [X])
    folder = save_pretrained(model, tmp_path / "m", example_input=X[:4])
    hub = Hub(folder)
    monkeypatch.setitem(__import__("sys").modules, "huggingface_hub", hub)  # type: ignore[arg-type]
    assert push_to_hub(folder, "me/net", private=True, token="t") == "https://hub/commit"
    assert hub.calls[1] == ("create", "me/net", {"private": True, "exist_ok": True})
    assert hub.calls[2][1]["folder_path"] == folder
    with pytest.raises(LutraError, match="OSError: 403 Forbidden; check the name"):
        push_to_hub(folder, "someone/closed")
    with pytest.raises(InputError, match=r"holds no config\.json"):
        push_to_hub(tmp_path, "me/net")
    monkeypatch.chdir(tmp_path)
    again = from_pretrained("me/net", convnet, revision="v1")
    assert ("get", "me/net", "config.json", "v1") in hub.calls
    with torch.no_grad():
        assert torch.equal(again(X), model.eval()(X))
    assert lutra.Session.from_pretrained("me/net")(X[:2].numpy()).shape == (2, 5)
    with pytest.raises(LutraError, match=r"cannot fetch 'other' .* 404 for other; check the name"):
        find_file("me/net", "other")


def test_names_that_are_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("/no/such/folder", "a/b/c", "../up", "me/..", ""):
        with pytest.raises(LutraError, match=r"neither a folder nor the name of a repo|no file"):
            find_file(name, "model.lutra")
    monkeypatch.setitem(__import__("sys").modules, "huggingface_hub", None)  # type: ignore[arg-type]
    with pytest.raises(LutraError, match=r"pip install 'lutra\[hub\]'"):
        find_file("me/net", "model.lutra")


MIXED = (PQ(k=8, v=4, otherwise=Int8()), Lookup(otherwise=Int8()), Int8(), Keep())


@pytest.mark.slow
@pytest.mark.parametrize("name", ALL)
def test_networks_that_people_have(name: str, tmp_path: Path) -> None:
    case = ALL[name]
    if name.startswith("hf-"):
        pytest.importorskip("transformers", reason="needs transformers")

    def build() -> nn.Module:
        torch.manual_seed(0)
        return case.make().eval()

    inputs = case.inputs(4, 1, 0)
    recipe = {path: MIXED[i % len(MIXED)] for i, path in enumerate(auto_recipe(build()))}
    try:
        model, _ = convert(build(), {**recipe, "**": Function()}, [(inputs,)])
    except LutraError:  # it calls no function that has a table
        model, _ = convert(build(), recipe, [(inputs,)])
    save_pretrained(model, tmp_path)
    again = from_pretrained(tmp_path, build)
    with torch.no_grad():
        assert torch.equal(again(*inputs), model.eval()(*inputs))
