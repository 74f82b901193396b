"""ONNX files as modules: what exporters write, what is refused, and broken files."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from lutra import Session, cli
from lutra.errors import FormatError, InputError, LutraError, UnsupportedModelError
from lutra.train import Int8, convert, example_inputs, export, load_onnx

onnx = pytest.importorskip("onnx", reason="needs onnx: pip install 'lutra[onnx]'")
from onnx import TensorProto, helper, numpy_helper  # noqa: E402
from onnx.reference import ReferenceEvaluator  # noqa: E402

F32 = TensorProto.FLOAT
#: As `dimensions` of `make_tensor_value_info` takes them.
Sizes = list[int | str | None]


def tensor(name: str, *shape: int, seed: int = 0) -> Any:
    array = np.random.default_rng(seed).normal(size=shape).astype(np.float32)
    return numpy_helper.from_array(array, name)


def ints(name: str, *values: int) -> Any:
    return numpy_helper.from_array(np.array(values, np.int64), name)


def made(
    nodes: list[Any], inputs: dict[str, Sizes], outputs: list[str], tensors: list[Any] = [],  # noqa: B006
    opset: int = 17, dtype: int = F32,
) -> Any:  # fmt: skip
    graph = helper.make_graph(
        nodes,
        "graph",
        [helper.make_tensor_value_info(n, dtype, s) for n, s in inputs.items()],
        [helper.make_tensor_value_info(n, F32, None) for n in outputs],
        tensors,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)


def network(batch: int | str = "n", opset: int = 17) -> Any:
    """A convolution and a linear layer with a reshape of computed sizes between them."""
    node = helper.make_node
    nodes = [
        node("Conv", ["x", "body.0.weight", "body.0.bias"], ["a"], "/body/0/Conv", pads=[1] * 4),
        node("Relu", ["a"], ["b"], "/body/1/Relu"),
        node("GlobalAveragePool", ["b"], ["c"], "/pool"),
        node("Shape", ["c"], ["shape"]),
        node("Gather", ["shape", "zero"], ["size"], axis=0),
        node("Constant", [], ["rest"], value=ints("", -1)),
        node("Concat", ["size", "rest"], ["target"], axis=0),
        node("Reshape", ["c", "target"], ["d"], "/flat"),
        node("MatMul", ["d", "head"], ["e"], "/head/MatMul"),
        node("Add", ["e", "head.bias"], ["y"], "/head/Add"),
    ]
    tensors = [
        tensor("body.0.weight", 4, 3, 3, 3), tensor("body.0.bias", 4), ints("zero", 0),
        tensor("head", 4, 5), tensor("head.bias", 5, seed=1),
    ]  # fmt: skip
    return made(nodes, {"x": [batch, 3, 8, 8]}, ["y"], tensors, opset)


def test_layers_are_ordinary_modules_with_their_names(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    onnx.save(network(), path)
    module = load_onnx(path)
    kinds = {name: type(m).__name__ for name, m in module.named_modules()}
    assert kinds["body.0"] == "Conv2d"
    assert kinds["head"] == "Linear"
    assert module.get_submodule("head").bias is not None  # the Add behind it
    x = example_inputs(module, 3)
    graph = export(module, tmp_path / "model.lutra", x)
    assert [node.op for node in graph.nodes] == ["conv2d", "relu", "mean", "flatten", "linear"]
    assert graph.outputs == ("y",)
    got = Session(tmp_path / "model.lutra").run(None, {"x": x[0].numpy()})[0]
    want = ReferenceEvaluator(network()).run(None, {"x": x[0].numpy()})[0]
    np.testing.assert_allclose(got, want, atol=1e-5)
    small, report = convert(module, {"*": Int8()}, [torch.randn(16, 3, 8, 8)])
    assert {layer.name for layer in report.replaced} == {"body.0", "head"}
    export(small, tmp_path / "small.lutra", x)


def test_the_command_writes_the_float_model_and_int8(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, target = tmp_path / "model.onnx", tmp_path / "model.lutra"
    onnx.save(network(), source)
    assert cli.main(["convert", str(source), "-o", str(target)]) == 0
    assert "5 nodes in float32" in capsys.readouterr().out
    np.savez(tmp_path / "data.npz", x=np.random.default_rng(0).random((16, 3, 8, 8), np.float32))
    command = ["--method", "int8", "--data", str(tmp_path / "data.npz")]
    for model in (source, target):
        assert cli.main(["convert", str(model), *command, "-o", str(tmp_path / "i.lutra")]) == 0
        assert "2 of 2 layers replaced" in capsys.readouterr().out
    assert cli.main(["convert", str(source), "-o", str(target), "--shape", "x=1;2"]) == 2
    assert "write it like x=?,3,224,224" in capsys.readouterr().err
    assert cli.main(["convert", str(target), "-o", str(source), "--constant", "x=1"]) == 2
    assert cli.main(["convert", str(source), "-o", str(target), "--constant", "q=1"]) == 2
    assert "no input" in capsys.readouterr().err


def test_a_file_for_one_sample_takes_any_batch() -> None:
    module = load_onnx(network(batch=1))
    assert module(*example_inputs(module, 5)).shape == (5, 5)
    nodes = [helper.make_node("Reshape", ["x", "target"], ["y"])]
    mixed = made(nodes, {"x": [1, 6]}, ["y"], [ints("target", 3, 2)])
    module = load_onnx(mixed)  # no batch that could be told apart
    assert [x.shape for x in example_inputs(module, 5)] == [(1, 6)]


def test_a_state_with_the_batch_on_another_axis_is_turned() -> None:
    node = helper.make_node
    nodes = [
        node("Unsqueeze", ["x", "front"], ["steps"]),
        node("GRU", ["steps", "w", "r", "b", "", "h"], ["", "hn"], hidden_size=4,
             linear_before_reset=1),
    ]  # fmt: skip
    tensors = [ints("front", 0), tensor("w", 1, 12, 3), tensor("r", 1, 12, 4), tensor("b", 1, 24)]
    model = made(nodes, {"x": ["n", 3], "h": [1, "n", 4]}, ["hn"], tensors)
    module = load_onnx(model)
    assert [x.shape for x in example_inputs(module, 5)] == [(5, 3), (5, 1, 4)]
    assert module(*example_inputs(module, 5)).shape == (5, 1, 4)


def test_quantised_files_are_read_as_float() -> None:
    node = helper.make_node
    nodes = [
        node("QuantizeLinear", ["x", "sx", "zx"], ["xq"]),
        node("DequantizeLinear", ["xq", "sx", "zx"], ["xd"]),
        node("DequantizeLinear", ["w", "sw", "zw"], ["wd"], axis=0),
        node("Conv", ["xd", "wd"], ["c"], "conv"),
        node("QuantizeLinear", ["c", "sc", "zc"], ["cq"]),
        node("DequantizeLinear", ["cq", "sc", "zc"], ["y"]),
    ]
    rng = np.random.default_rng(0)
    arrays = {
        "sx": np.float32(0.05), "zx": np.uint8(128), "zw": np.zeros(4, np.int8),
        "w": rng.integers(-127, 127, (4, 2, 3, 3)).astype(np.int8),
        "sw": np.full(4, 0.01, np.float32), "sc": np.float32(0.1), "zc": np.uint8(0),
    }  # fmt: skip
    tensors = [numpy_helper.from_array(np.asarray(a), n) for n, a in arrays.items()]
    module = load_onnx(made(nodes, {"x": ["n", 2, 6, 6]}, ["y"], tensors, opset=21))
    conv = next(m for m in module.modules() if isinstance(m, nn.Conv2d))
    np.testing.assert_allclose(conv.weight.detach().numpy(), arrays["w"] * np.float32(0.01))
    y = module(torch.randn(2, 2, 6, 6))
    assert y.min() == 0  # the range of the integers holds a ReLU
    assert module.meta["lutra"]["ranges"]["cq"] == pytest.approx((0.0, 25.5))


def test_weights_beside_the_file_and_halves(tmp_path: Path) -> None:
    model = network()
    onnx.save(
        model, tmp_path / "m.onnx", save_as_external_data=True, location="w.bin", size_threshold=0
    )
    assert load_onnx(tmp_path / "m.onnx").get_submodule("head").weight.shape == (5, 4)
    (tmp_path / "w.bin").unlink()
    with pytest.raises(FormatError, match=r"m.onnx.* as ONNX"):
        load_onnx(tmp_path / "m.onnx")


def test_every_unsupported_operator_is_named() -> None:
    nodes = [
        helper.make_node("NonMaxSuppression", ["x", "x"], ["a"], "first"),
        helper.make_node("Mystery", ["a"], ["b"], "second", domain="com.example"),
        helper.make_node("Mystery", ["b"], ["y"], "third", domain="com.example"),
    ]
    with pytest.raises(UnsupportedModelError) as error:
        load_onnx(made(nodes, {"x": ["n", 3]}, ["y"]))
    for word in ("NonMaxSuppression", "com.example.Mystery", "'first'", "'second'", "'third'"):
        assert word in str(error.value)
    assert len(error.value.items) == 2


def test_a_node_that_differs_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    from lutra.train.importing.onnx_ops import OPS

    monkeypatch.setitem(OPS, ("", "Relu"), lambda b, op, x: b.call(torch.abs, x))
    with pytest.raises(LutraError, match=r"'b' of node '/body/1/Relu' \(Relu\) differs"):
        load_onnx(network())
    load_onnx(network(), check=False)


def test_arguments_that_do_not_fit() -> None:
    for arguments, words in (
        ({"shapes": {"q": (1, 2)}}, "no input"),
        ({"shapes": {"x": (1, 3, 9, 8)}}, "does not fit the file"),
        ({"constants": {"q": 1}}, "no input"),
        ({"constants": {"x": 1}}, "has 4 axes"),
        ({"batch_axes": {"x": 4}}, "axis 4"),
    ):
        with pytest.raises(InputError, match=words):
            load_onnx(network(), **arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize("opset", [7, 9, 11, 13, 21])
def test_old_and_new_operator_sets(opset: int) -> None:
    load_onnx(network(opset=opset))
    with pytest.raises(FormatError, match="reads 7 and newer"):
        load_onnx(network(opset=6))


def broken() -> dict[str, Any]:
    node = helper.make_node
    relu = node("Relu", ["x"], ["y"], "r")
    product = node("MatMul", ["x", "w"], ["y"], "p")
    inputs: dict[str, Sizes] = {"x": ["n", 3]}
    circle = [node("Add", ["x", "b"], ["a"], "p"), node("Relu", ["a"], ["b"], "q")]
    short = tensor("w", 4, 3)
    short.raw_data = short.raw_data[:7]
    huge = tensor("w", 1, 1)
    huge.dims[:] = [2**40, 2**20]
    vast = [node("ConstantOfShape", ["s"], ["c"]), node("Add", ["x", "c"], ["y"], "a")]
    return {
        "circle": made(circle, inputs, ["b"]),
        "missing": made([node("Add", ["x", "nothing"], ["y"], "a")], inputs, ["y"]),
        "no output": made([relu], inputs, ["z"]),
        "twice": made([relu, relu], inputs, ["y"]),
        "short tensor": made([product], inputs, ["y"], [short]),
        "huge tensor": made([product], inputs, ["y"], [huge]),
        "huge constant": made(vast, inputs, ["y"], [ints("s", 2**40)]),
        "huge input": made([relu], {"x": [2**40, 2**20]}, ["y"]),
        "wrong shapes": made([product], inputs, ["y"], [tensor("w", 9, 2)]),
        "no inputs": made([node("Relu", ["w"], ["y"])], {}, ["y"], [tensor("w", 3)]),
        "many inputs": made([node("Relu", ["x", "x", "x"], ["y"], "r")], inputs, ["y"]),
        "few inputs": made([node("Add", ["x"], ["y"], "r")], inputs, ["y"]),
    }


@pytest.mark.parametrize("name", broken())
def test_broken_files_are_refused_in_one_sentence(name: str) -> None:
    with pytest.raises(LutraError) as error:
        load_onnx(broken()[name])
    assert "\n" not in str(error.value)


def test_what_is_no_onnx_file(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    whole = network().SerializeToString()
    for data in (b"", b"hello", whole[: len(whole) // 2], whole[:-3], bytes(100)):
        path.write_bytes(data)
        with pytest.raises(FormatError, match=r"m\.onnx"):
            load_onnx(path)
    with pytest.raises(InputError, match="no such file"):
        load_onnx(tmp_path / "other.onnx")


@pytest.mark.slow
def test_changed_bytes_are_read_or_refused(tmp_path: Path) -> None:
    """Hundreds of files with a few bytes changed: an answer or one sentence, nothing else."""
    path, rng = tmp_path / "m.onnx", random.Random(0)
    whole = network().SerializeToString()
    refused: list[str] = []
    for _ in range(200):
        data = bytearray(whole)
        for _ in range(rng.randint(1, 4)):
            data[rng.randrange(len(data))] = rng.randrange(256)
        path.write_bytes(bytes(data))
        try:
            load_onnx(path, check=False)
        except LutraError as error:
            refused.append(str(error))
    assert not [text for text in refused if "\n" in text]
    assert len(refused) > 50


@pytest.mark.slow
def test_node_tests_of_onnx() -> None:
    """Of the tests of operators in the table most pass, and the others are refused by name."""
    from onnx_node_cases import cases, outcome

    outcomes = {case.name: outcome(case) for case in cases()}
    wrong = {name: text for name, text in outcomes.items() if text.startswith("wrong")}
    assert not wrong, wrong
    passed = sum(not text for text in outcomes.values())
    assert len(outcomes) > 900
    assert passed / len(outcomes) >= 0.9, f"{passed} of {len(outcomes)}"


def _either(tmp_path: Path) -> Path:
    """A file whose input `flag` decides between the double and the square of x."""
    node = helper.make_node
    branches = {
        name: helper.make_graph(
            [node(op, ["x", other], [f"{name}_y"])],
            name,
            [],
            [helper.make_tensor_value_info(f"{name}_y", F32, None)],
        )
        for name, op, other in (("then", "Add", "x"), ("else", "Mul", "x"))
    }
    choice = node("If", ["flag"], ["y"], then_branch=branches["then"], else_branch=branches["else"])
    graph = helper.make_graph(
        [choice],
        "graph",
        [
            helper.make_tensor_value_info("x", F32, ["n", 3]),
            helper.make_tensor_value_info("flag", TensorProto.BOOL, []),
        ],
        [helper.make_tensor_value_info("y", F32, None)],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(model, tmp_path / "either.onnx")
    return tmp_path / "either.onnx"


def test_a_branch_names_the_input_that_decides(tmp_path: Path) -> None:
    path = _either(tmp_path)
    with pytest.raises(UnsupportedModelError, match=r"inputs \('flag'\) decide .* --constant"):
        load_onnx(path)
    x = torch.randn(4, 3)
    for flag, want in ((True, x + x), (False, x * x)):
        assert torch.equal(load_onnx(path, constants={"flag": flag})(x), want)
