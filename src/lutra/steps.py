"""The step of each operator: what calls the native engine for a node.

A new operator needs one function here and an entry in ``STEPS``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final, TypeAlias, TypedDict

from lutra import _engine
from lutra.graph import Node, Value
from lutra.ops.elementwise import limits
from lutra.ops.lookup import unpack_weights
from lutra.ops.registry import Array, flag, integer, ints, number, pair, text
from lutra.ops.rows import row_length
from lutra.ops.shape import REST, TO_THE_END
from lutra.text import shape_text

__all__ = ["STEPS", "Job", "StepFn"]


@dataclass(frozen=True)
class Job:
    """What a function of ``STEPS`` has to work with.

    Attributes:
        node: The node.
        ids: The numbers of its inputs in the plan.
        inputs: Its inputs.
        output: Its output.
        tensors: Its tensors by role, C-contiguous.
        residual: Number of the value to add, or -1.
        clamp: The limits to clamp to, or None.
    """

    node: Node
    ids: tuple[int, ...]
    inputs: tuple[Value, ...]
    output: Value
    tensors: Mapping[str, Array]
    residual: int = -1
    clamp: tuple[float, float] | None = None


#: ``step(plan, job)`` adds the step of a node and returns the number of its output.
StepFn: TypeAlias = Callable[[_engine.Plan, Job], int]


class _Grid(TypedDict):
    act_scale: float
    act_zero: int
    act_bits: int


def _grid(node: Node) -> _Grid:
    return {
        "act_scale": number(node, "act_scale"),
        "act_zero": integer(node, "act_zero"),
        "act_bits": integer(node, "act_bits"),
    }


class _Window(TypedDict):
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]


def _window(node: Node) -> _Window:
    return {
        "stride": pair(node, "stride"),
        "padding": pair(node, "padding"),
        "dilation": pair(node, "dilation"),
    }


def _pq_conv2d(plan: _engine.Plan, job: Job) -> int:
    node, tensors = job.node, job.tensors
    return plan.pq_conv2d(
        job.ids[0],
        tables=tensors["tables"],
        scale=tensors["scale"],
        bias=tensors["bias"],
        centroids=tensors.get("centroids"),
        splits=tensors.get("splits"),
        thresholds=tensors.get("thresholds"),
        **_grid(node),
        channels=integer(node, "in_channels"),
        kernel=pair(node, "kernel"),
        **_window(node),
        residual=job.residual,
        clamp=job.clamp,
    )


def _pq_linear(plan: _engine.Plan, job: Job) -> int:
    node, tensors = job.node, job.tensors
    return plan.pq_linear(
        job.ids[0],
        tables=tensors["tables"],
        scale=tensors["scale"],
        bias=tensors["bias"],
        centroids=tensors.get("centroids"),
        splits=tensors.get("splits"),
        thresholds=tensors.get("thresholds"),
        **_grid(node),
        features=integer(node, "in_features"),
        residual=job.residual,
        clamp=job.clamp,
    )


def _lookup_conv2d(plan: _engine.Plan, job: Job) -> int:
    node, tensors = job.node, job.tensors
    return plan.lookup_conv2d(
        job.ids[0],
        _weight_index(job),
        tensors["table"],
        tensors["scale"],
        tensors["bias"],
        **_grid(node),
        channels=integer(node, "in_channels"),
        kernel=pair(node, "kernel"),
        **_window(node),
        residual=job.residual,
        clamp=job.clamp,
    )


def _lookup_linear(plan: _engine.Plan, job: Job) -> int:
    node, tensors = job.node, job.tensors
    return plan.lookup_linear(
        job.ids[0],
        _weight_index(job),
        tensors["table"],
        tensors["scale"],
        tensors["bias"],
        **_grid(node),
        residual=job.residual,
        clamp=job.clamp,
    )


def _weight_index(job: Job) -> Array:
    """One weight index a byte, uint8 (M, D)."""
    node = job.node
    return unpack_weights(job.tensors["weight"], integer(node, "weight_bits"), row_length(node))


def _int8_conv2d(plan: _engine.Plan, job: Job) -> int:
    node, tensors = job.node, job.tensors
    return plan.int8_conv2d(
        job.ids[0],
        tensors["weight"],
        tensors["scale"],
        tensors["bias"],
        **_grid(node),
        **_window(node),
        groups=integer(node, "groups"),
        residual=job.residual,
        clamp=job.clamp,
    )


def _int8_linear(plan: _engine.Plan, job: Job) -> int:
    node, tensors = job.node, job.tensors
    return plan.int8_linear(
        job.ids[0],
        tensors["weight"],
        tensors["scale"],
        tensors["bias"],
        **_grid(node),
        residual=job.residual,
        clamp=job.clamp,
    )


def _conv2d(plan: _engine.Plan, job: Job) -> int:
    return plan.conv2d(
        job.ids[0],
        job.tensors["weight"],
        job.tensors["bias"],
        **_window(job.node),
        groups=integer(job.node, "groups"),
        residual=job.residual,
        clamp=job.clamp,
    )


def _linear(plan: _engine.Plan, job: Job) -> int:
    weight, bias = job.tensors["weight"], job.tensors["bias"]
    return plan.linear(job.ids[0], weight, bias, residual=job.residual, clamp=job.clamp)


def _clamp(plan: _engine.Plan, job: Job) -> int:
    return plan.clamp(job.ids[0], *limits(job.node))


def _add(plan: _engine.Plan, job: Job) -> int:
    a, b = job.ids
    return plan.add(a, b)


def _mul(plan: _engine.Plan, job: Job) -> int:
    a, b = job.ids
    return plan.mul(a, b)


def _affine(plan: _engine.Plan, job: Job) -> int:
    return plan.affine(job.ids[0], job.tensors["scale"], job.tensors["bias"])


def _softmax(plan: _engine.Plan, job: Job) -> int:
    return plan.softmax(job.ids[0], integer(job.node, "axis"))


def _mean(plan: _engine.Plan, job: Job) -> int:
    return plan.mean(job.ids[0], ints(job.node, "axes"), flag(job.node, "keepdims"))


def _max(plan: _engine.Plan, job: Job) -> int:
    return plan.max(job.ids[0], ints(job.node, "axes"), flag(job.node, "keepdims"))


def _pixel_shuffle(plan: _engine.Plan, job: Job) -> int:
    return plan.pixel_shuffle(job.ids[0], integer(job.node, "factor"))


def _upsample(plan: _engine.Plan, job: Job) -> int:
    height, width = ints(job.node, "size") or (0, 0)
    return plan.upsample(
        job.ids[0],
        text(job.node, "mode"),
        size=(height, width),
        scale=(number(job.node, "scale_h"), number(job.node, "scale_w")),
        align_corners=flag(job.node, "align_corners"),
        like=job.ids[1] if len(job.ids) > 1 else -1,
    )


def _reshape(plan: _engine.Plan, job: Job) -> int:
    sizes = job.output.shape[1:]
    if sizes.count(None) > 1:
        raise ValueError(
            f"its output has the shape {shape_text(job.output.shape)}, but only one size of it may "
            "be known at run time only"
        )
    return plan.reshape(job.ids[0], [REST if size is None else size for size in sizes])


def _pad(plan: _engine.Plan, job: Job) -> int:
    pads = ints(job.node, "pads")
    return plan.pad(job.ids[0], pads[::2], pads[1::2], number(job.node, "value"))


def _slice(plan: _engine.Plan, job: Job) -> int:
    axis, start, stop, step = (
        integer(job.node, name) for name in ("axis", "start", "stop", "step")
    )
    return plan.slice(job.ids[0], axis, start, -1 if stop == TO_THE_END else stop, step)


def _concat(plan: _engine.Plan, job: Job) -> int:
    return plan.concat(job.ids, integer(job.node, "axis"))


def _max_pool2d(plan: _engine.Plan, job: Job) -> int:
    return _pool(plan, job, False, pair(job.node, "dilation"), False)


def _avg_pool2d(plan: _engine.Plan, job: Job) -> int:
    return _pool(plan, job, True, (1, 1), flag(job.node, "count_include_pad"))


def _pool(
    plan: _engine.Plan, job: Job, average: bool, dilation: tuple[int, int], count_pad: bool
) -> int:
    return plan.pool(
        job.ids[0],
        average,
        kernel=pair(job.node, "kernel"),
        stride=pair(job.node, "stride"),
        padding=pair(job.node, "padding"),
        dilation=dilation,
        ceil_mode=flag(job.node, "ceil_mode"),
        count_include_pad=count_pad,
    )


def _adaptive_pool(plan: _engine.Plan, job: Job) -> int:
    average = job.node.op == "adaptive_avg_pool2d"
    return plan.adaptive_pool(job.ids[0], average, pair(job.node, "output_size"))


#: What adds the step of each operator.
STEPS: Final[dict[str, StepFn]] = {
    "pq_conv2d": _pq_conv2d,
    "pq_linear": _pq_linear,
    "lookup_conv2d": _lookup_conv2d,
    "lookup_linear": _lookup_linear,
    "int8_conv2d": _int8_conv2d,
    "int8_linear": _int8_linear,
    "conv2d": _conv2d,
    "linear": _linear,
    "relu": _clamp,
    "relu6": _clamp,
    "clamp": _clamp,
    "add": _add,
    "mul": _mul,
    "affine": _affine,
    "softmax": _softmax,
    "max_pool2d": _max_pool2d,
    "avg_pool2d": _avg_pool2d,
    "adaptive_avg_pool2d": _adaptive_pool,
    "adaptive_max_pool2d": _adaptive_pool,
    "mean": _mean,
    "max": _max,
    "pixel_shuffle": _pixel_shuffle,
    "upsample": _upsample,
    "flatten": _reshape,
    "reshape": _reshape,
    "pad": _pad,
    "slice": _slice,
    "concat": _concat,
}
