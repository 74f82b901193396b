"""The rules of a graph."""

from __future__ import annotations

import copy
from dataclasses import FrozenInstanceError, replace
from typing import Any

import numpy as np
import pytest
from graphs import Builder, every_op_graph, random_inputs, tied_graph, tiny_graph, with_golden
from sequences import (
    every_decoder_graph,
    every_pointwise_op_graph,
    every_selection_graph,
    every_sequence_op_graph,
)

from lutra.errors import GraphError, LutraError
from lutra.graph import Graph, Node, Value, make_node
from lutra.ops import OPS
from lutra.reference import run_reference


def one(op: str, *shapes: tuple[int | None, ...], tensors: Any = None, **attrs: Any) -> Graph:
    """A graph of one node."""
    names = [f"x{i}" for i in range(len(shapes))]
    b = Builder(*zip(names, shapes, strict=True))
    b.add(op, *names, name="n", tensors=tensors, **attrs)
    return b.graph()


def shape_of(graph: Graph) -> tuple[int | None, ...]:
    return graph.values[graph.outputs[0]].shape


def pq_graph(**changes: Any) -> Graph:
    """A pq_conv2d of 5 channels, 2x2, in sub-vectors of 8: three codebooks, the last one of 4."""
    b = Builder(("x", (None, 5, 6, 6)))
    b.pq_conv2d("x", 5, 7, (2, 2), width=8, act_bits=6)
    node = b.nodes[0]
    tensors = dict(b.tensors)
    for name, value in changes.items():
        if name in node.attrs:
            node = replace(node, attrs={**node.attrs, name: value})
        else:
            tensors[node.tensors[name]] = value
    return replace(b.graph(), nodes=(node,), tensors=tensors)


def zeros(dtype: str, *shape: int) -> Any:
    return np.zeros(shape, dtype)


def test_every_op_is_covered_by_the_test_graph():
    graph = every_op_graph()
    nodes = graph.nodes + every_sequence_op_graph().nodes + every_pointwise_op_graph().nodes
    nodes += every_selection_graph().nodes + every_decoder_graph().nodes
    assert {node.op for node in nodes} == set(OPS)
    assert [shape_of(graph), graph.values[graph.outputs[1]].shape] == [(None, 5), (None, 10)]


def test_inferred_shapes_are_what_the_reference_gives():
    graph = every_op_graph()
    values = run_reference(graph, random_inputs(graph, batch=3), intermediates=True)
    assert list(values) == list(graph.values)
    for name, value in graph.values.items():
        assert values[name].shape == (3, *value.shape[1:]), name
        assert values[name].dtype == np.float32, name


def test_a_fixed_batch_stays_fixed():
    assert shape_of(every_op_graph(batch=4)) == (4, 5)


def test_graphs_are_frozen_and_can_be_copied():
    graph = every_op_graph()
    with pytest.raises(FrozenInstanceError):
        graph.nodes = ()  # type: ignore[misc]
    assert copy.deepcopy(graph).nodes == graph.nodes


def test_make_node_fills_in_defaults_and_names_a_likely_operator():
    node = make_node("conv2d", "c", ["x"], "y")
    assert node.attrs == {"stride": (1, 1), "padding": (0, 0), "dilation": (1, 1), "groups": 1}
    with pytest.raises(GraphError, match="did you mean 'conv2d'"):
        make_node("conv3d", "c", ["x"], "y")


def test_lists_become_tuples():
    node = Node("reshape", "r", ["x"], "y", {"shape": [2, 3]})  # type: ignore[arg-type, dict-item]
    assert node.attrs["shape"] == (2, 3)
    assert node.inputs == ("x",)


def test_cost_of_a_pq_convolution():
    graph = pq_graph()
    (cost,) = graph.cost().values()
    rows, codebooks, count, width, outputs = 25, 3, 16, 8, 7
    assert cost.lookups == rows * codebooks * outputs
    assert cost.encode_ops == rows * codebooks * count * width
    assert cost.dense_macs == rows * 20 * outputs
    assert cost.macs == 0
    assert cost.table_bytes == codebooks * count * outputs
    assert (
        cost.weight_bytes
        == graph.parameter_bytes()
        == sum(array.nbytes for array in graph.tensors.values())
    )


def test_cost_of_dense_layers():
    b = Builder(("x", (None, 4, 5, 5)))
    b.conv2d("x", 4, 6, groups=2)
    assert b.graph().total_cost().macs == 9 * 6 * 2 * 9
    b = Builder(("x", (None, 7, 4)))
    b.linear("x", 4, 3)
    assert b.graph().total_cost().dense_macs == 7 * 4 * 3


def test_tied_tensors_count_once():
    graph = tied_graph()
    assert graph.parameter_bytes() == (16 + 4) * 4
    assert graph.total_cost().weight_bytes == 2 * graph.parameter_bytes()


def test_printing():
    text = str(every_op_graph())
    assert "x (N, 3, 12, 12)" in text
    assert "pq_conv2d" in text
    assert "total" in text
    assert "2 nodes" in repr(tiny_graph())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"act_zero": 64}, r"act_zero=64 with act_bits=6; it must be in 0..63"),
        ({"act_zero": -1}, "at least 0"),
        ({"act_bits": 8}, "at most 7"),
        ({"act_bits": 0}, "at least 1"),
        ({"act_bits": True}, "type int"),
        ({"act_bits": 5}, r"centroids must be in 0..31"),
        ({"act_scale": 0.0}, "act_scale=0.0"),
        ({"act_scale": -1.0}, "act_scale"),
        ({"act_scale": 1e-40}, "act_scale"),
        ({"act_scale": 1e39}, "act_scale"),
        ({"act_scale": float("nan")}, "finite"),
        ({"act_scale": float("inf")}, "finite"),
        ({"act_scale": 1}, "type float"),
        ({"encoder": "forest"}, "one of nearest, tree"),
        ({"encoder": 3}, "type str"),
        ({"kernel": (2, 0)}, "at least 1"),
        ({"kernel": (2, 4097)}, "at most 4096"),
        ({"kernel": (2,)}, "2 entries"),
        ({"kernel": (2, 2.0)}, "tuple of ints"),
        ({"kernel": (2, True)}, "tuple of ints"),
        ({"kernel": 2}, "tuple of ints"),
        ({"kernel": (2, 3)}, "3 codebooks for rows of 30 in sub-vectors of 8; it needs 4"),
        ({"stride": (0, 1)}, "at least 1"),
        ({"dilation": (1, 0)}, "at least 1"),
        ({"dilation": (6, 1)}, "spans 7 over an axis of 6"),
        ({"padding": (-1, 0)}, "at least 0"),
        ({"padding": (4097, 0)}, "at most 4096"),
        ({"in_channels": 6}, "in_channels=6"),
        ({"in_channels": 10**400}, "at most"),
        ({"centroids": zeros("uint8", 3, 12, 8)}, "12 centroids"),
        ({"centroids": zeros("uint8", 3, 128, 8)}, "128 centroids"),
        ({"centroids": zeros("uint8", 1, 16, 65)}, "of 65 values"),
        ({"centroids": zeros("uint8", 2, 16, 8)}, "2 codebooks for rows of 20"),
        ({"centroids": zeros("uint8", 4, 16, 8)}, "4 codebooks for rows of 20"),
        ({"centroids": zeros("int8", 3, 16, 8)}, "dtype int8"),
        ({"centroids": zeros("uint8", 3, 16)}, "3 axes"),
        ({"centroids": zeros("uint8", 3, 16, 0)}, "axes, none empty"),
        ({"centroids": np.full((3, 16, 8), 64, np.uint8)}, r"a centroid value of 64"),
        ({"centroids": np.full((3, 16, 8), 63, np.uint8)}, "other than 0 beyond entry 20"),
        ({"tables": zeros("int8", 3, 8, 7)}, r"need \(3, 16, outputs\)"),
        ({"tables": zeros("uint8", 3, 16, 7)}, "must be int8"),
        ({"tables": zeros("int8", 3, 16, 8)}, r"scale of shape \(7,\)"),
        ({"scale": zeros("float32", 6)}, r"need \(7,\)"),
        ({"bias": zeros("float32", 6)}, r"need \(7,\)"),
        ({"bias": zeros("float64", 7)}, "float64|<f8"),
        ({"bias": np.full(7, np.nan, np.float32)}, "7 values that are NaN"),
        ({"scale": np.full(7, np.inf, np.float32)}, "NaN or infinite"),
    ],
)
def test_rules_of_pq(changes: dict[str, Any], message: str):
    pq_graph().validate()
    with pytest.raises(GraphError, match=message) as caught:
        pq_graph(**changes).validate()
    assert "n" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_too_many_codebooks():
    codebooks = 2**17 + 1
    graph = one(
        "pq_linear",
        (None, codebooks),
        in_features=codebooks,
        act_scale=1.0,
        act_zero=0,
        act_bits=7,
        tensors={
            "centroids": zeros("uint8", codebooks, 8, 1),
            "tables": zeros("int8", codebooks, 8, 1),
            "scale": zeros("float32", 1),
            "bias": zeros("float32", 1),
        },
    )
    with pytest.raises(GraphError, match="at most 131072"):
        graph.validate()


@pytest.mark.parametrize(
    ("op", "shape", "attrs", "want"),
    [
        ("max_pool2d", (None, 2, 7, 7), {"kernel": (3, 3), "stride": (2, 2)}, (None, 2, 3, 3)),
        (
            "max_pool2d",
            (None, 2, 8, 5),
            {"kernel": (3, 2), "stride": (2, 2), "ceil_mode": True},
            (None, 2, 4, 3),
        ),
        # the last window would begin in the padding behind the image
        (
            "avg_pool2d",
            (None, 1, 4, 4),
            {"kernel": (2, 2), "stride": (3, 3), "padding": (1, 1), "ceil_mode": True},
            (None, 1, 2, 2),
        ),
        ("adaptive_avg_pool2d", (None, 2, 7, 7), {"output_size": (9, 1)}, (None, 2, 9, 1)),
        ("mean", (None, 2, 7, 7), {"axes": (1, 3), "keepdims": True}, (None, 1, 7, 1)),
        ("mean", (5, 2), {"axes": (1,)}, (5,)),
        ("flatten", (None, 2, 3, 4), {"start_axis": 2}, (None, 2, 12)),
        ("reshape", (None, 2, 3, 4), {"shape": (8, 3)}, (None, 8, 3)),
        ("reshape", (3, 1), {"shape": ()}, (3,)),
        ("reshape", (None, 2, 3, 4), {"shape": (8, -1)}, (None, 8, 3)),
        ("pad", (None, 2), {"pads": (0, 0, 1, 4)}, (None, 7)),
        ("slice", (None, 7), {"axis": 1, "start": 1, "stop": 7, "step": 4}, (None, 2)),
    ],
)
def test_shapes(op: str, shape: Any, attrs: dict[str, Any], want: Any):
    assert shape_of(one(op, shape, **attrs)) == want


@pytest.mark.parametrize(
    ("op", "shapes", "attrs", "message"),
    [
        ("relu", [(None, 2), (None, 2)], {}, "has 2 inputs; give it 1"),
        ("add", [(None, 2)], {}, "has 1 inputs; give it 2"),
        ("add", [(None, 2), (None, 3)], {}, "shapes must be the same"),
        ("add", [(None, 2), (4, 2)], {}, "shapes must be the same"),
        ("concat", [(None, 2, 3), (None, 2, 4)], {"axis": 1}, "all other axes"),
        ("concat", [(None, 2, 3), (None, 2)], {"axis": 1}, "all other axes"),
        ("concat", [(None, 2)], {"axis": 2}, r"in 1\.\.1"),
        ("softmax", [(None, 2)], {"axis": 0}, "at least 1"),
        ("softmax", [(None, 2)], {"axis": 2}, r"in 1\.\.1"),
        ("softmax", [(None, 2)], {}, "lacks the attribute 'axis'"),
        ("relu", [(None, 2)], {"slope": 1.0}, "unknown attribute 'slope'; known: none"),
        ("flatten", [(None,)], {}, "start_axis=1"),
        ("reshape", [(None, 6)], {"shape": (4, 2)}, "6 elements"),
        ("reshape", [(None, 6)], {"shape": (6, 0)}, "at least 1"),
        ("reshape", [(None, 6)], {"shape": (-2,)}, "at least -1"),
        ("reshape", [(None, 6)], {"shape": (-1, 2, -1)}, "-1 for one of them"),
        ("reshape", [(None, 6)], {"shape": (4, -1)}, "6 elements"),
        ("reshape", [(None, 2, None)], {"shape": (2, 3)}, r"'x0'.*\(N, 2, \?\).*run time only"),
        ("pad", [(None, 6)], {"pads": (1, 0, 0, 0)}, "0 for the batch"),
        ("pad", [(None, 6)], {"pads": (0, 0, 1)}, "4 entries"),
        ("pad", [(None, 6)], {"pads": (0, 0, 5000, 0)}, "at most 4096"),
        ("pad", [(None, 6)], {"pads": (0, 0, 1, 0), "value": float("inf")}, "finite"),
        ("slice", [(None, 6)], {"axis": 1, "start": 3, "stop": 3}, "something is left"),
        ("slice", [(None, 6)], {"axis": 1, "start": 0, "stop": 7}, "stop <= 6"),
        ("slice", [(None, 6)], {"axis": 1, "start": 0, "stop": 6, "step": 0}, "at least 1"),
        ("mean", [(None, 6)], {"axes": ()}, "each once"),
        ("mean", [(None, 6, 2)], {"axes": (2, 1)}, "rising"),
        ("mean", [(None, 6, 2)], {"axes": (1, 1)}, "each once"),
        ("mean", [(None, 6, 2)], {"axes": (0, 1)}, "at least 1"),
        ("mean", [(None, 6)], {"axes": (1,), "keepdims": 1}, "type bool"),
        (
            "max_pool2d",
            [(None, 2, 2, 9)],
            {"kernel": (3, 3), "stride": (1, 1)},
            "no window fits",
        ),
        (
            "avg_pool2d",
            [(None, 2, 9, 9)],
            {"kernel": (3, 3), "stride": (1, 1), "padding": (2, 0)},
            "half of the span",
        ),
        ("max_pool2d", [(None, 2, 9)], {"kernel": (3, 3), "stride": (1, 1)}, "4 axes"),
        ("adaptive_avg_pool2d", [(None, 2, 9, 9)], {"output_size": (0, 1)}, "at least 1"),
        ("relu", [()], {}, "0 axes"),
        ("relu", [(None, -1)], {}, "or None for any size"),
        ("relu", [(None, 0)], {}, "at least 1"),
        ("relu", [(None, 2.0)], {}, "must be an int"),
        ("relu", [(None, 2**16, 2**15)], {}, "2147483647 elements"),
        ("relu", [(None, *[1] * 8)], {}, "1 to 8 axes"),
    ],
)
def test_rules_of_other_operators(op: str, shapes: Any, attrs: dict[str, Any], message: str):
    with pytest.raises(GraphError, match=message):
        one(op, *shapes, **attrs).validate()


def test_rules_of_dense_operators():
    def dense(op: str, shape: Any, weight: Any, bias: int, **attrs: Any) -> Graph:
        arrays = {"weight": zeros("float32", *weight), "bias": zeros("float32", bias)}
        return one(op, shape, tensors=arrays, **attrs)

    cases: list[tuple[Graph, str]] = [
        (dense("linear", (None, 4), (3, 5), 3), "5 values"),
        (dense("linear", (None, 5), (3, 5), 4), r"needs \(3,\)"),
        (dense("linear", (5,), (3, 5), 3), "at least 2 axes"),
        (dense("conv2d", (None, 4, 8, 8), (6, 3, 3, 3), 6), "3 channels"),
        (dense("conv2d", (None, 4, 8, 8), (6, 1, 3, 3), 6, groups=4), "divide"),
        (dense("conv2d", (None, 4, 8, 8), (6, 4, 9, 9), 6), "kernel that spans 9"),
        (dense("conv2d", (None, 4, 8, 8), (6, 4, 1, 4097), 6), "4096"),
        (one("linear", (None, 4)), "lacks the tensor 'weight'"),
        (one("relu", (None, 4), tensors={"w": zeros("float32", 1)}), "unknown tensor 'w'"),
        (
            one(
                "affine",
                (None, 4),
                tensors={"scale": zeros("float32", 3), "bias": zeros("float32", 3)},
            ),
            "one for each channel",
        ),
        (
            one(
                "affine",
                (None, 4),
                tensors={"scale": zeros("float32", 4), "bias": zeros("float32", 3)},
            ),
            "make them the same",
        ),
    ]
    for graph, message in cases:
        with pytest.raises(GraphError, match=message):
            graph.validate()


def test_rules_of_names_and_order():
    graph = tiny_graph()
    first, second = graph.nodes
    x = graph.inputs[0]
    extra = {**graph.tensors, "extra": zeros("float32", 1)}
    golden = {**graph.tensors, "golden.x": zeros("float32", 1)}
    cases: list[tuple[Graph, str]] = [
        (replace(graph, nodes=(second, first)), "no earlier node makes"),
        (replace(graph, nodes=(first, replace(second, name=first.name))), "two nodes"),
        (replace(graph, nodes=(first, replace(second, output="x"))), "two values"),
        (replace(graph, nodes=(first, replace(second, op="rely"))), "did you mean 'relu'"),
        (replace(graph, nodes=(first, replace(second, name=""))), "printable"),
        (replace(graph, nodes=(first, replace(second, name="a\nb"))), "printable"),
        (replace(graph, nodes=(first, replace(second, name="a" * 600))), "printable"),
        (replace(graph, inputs=(x, x)), "two inputs"),
        (replace(graph, inputs=()), "no input and no earlier node makes"),
        (replace(graph, inputs=(), nodes=(), tensors={}), "no inputs"),
        (replace(graph, inputs=(Value("x", "float64", (None, 3)),)), "float64"),
        (replace(graph, outputs=()), "no outputs"),
        (replace(graph, outputs=("nothing",)), "does not exist"),
        (replace(graph, outputs=("x",)), "is an input"),
        (replace(graph, outputs=graph.outputs * 2), "repeat"),
        (replace(graph, tensors=extra), "no node uses the tensors 'extra'"),
        (replace(graph, tensors=golden), "kept for golden"),
        (replace(graph, tensors={}), "which the graph does not have"),
        (replace(graph, tensors={**graph.tensors, "extra": [1.0]}), "list"),  # type: ignore[dict-item]
        (replace(graph, metadata={"a": float("nan")}), "JSON"),
        (replace(graph, metadata={"a": np.float32(1)}), "JSON"),
        (replace(graph, metadata={"a": "\ud800"}), "JSON"),
    ]
    for broken, message in cases:
        with pytest.raises(GraphError, match=message):
            broken.validate()


def test_rules_of_golden_data():
    graph = with_golden(tiny_graph())
    graph.validate()
    assert graph.golden is not None
    inputs, outputs = graph.golden
    bad = outputs[0].copy()
    bad[0, 0] = np.nan
    cases: list[tuple[Any, str]] = [
        (((), outputs), "0 inputs"),
        ((inputs, outputs * 2), "2 outputs"),
        ((inputs, (outputs[0][:1],)), r"must be \(2, 2\)"),
        ((inputs, (outputs[0].astype(np.float64),)), "f8"),
        ((inputs, (bad,)), "NaN"),
    ]
    for golden, message in cases:
        with pytest.raises(GraphError, match=message):
            replace(graph, golden=golden).validate()


def test_errors_are_lutra_errors_and_value_errors():
    assert issubclass(GraphError, LutraError)
    assert issubclass(GraphError, ValueError)
