"""The step of each operator: what calls the native engine for a node.

A new operator needs one function here and an entry in ``STEPS``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final, TypeAlias, TypedDict

from lutra import _engine
from lutra.formatting import shape_text
from lutra.node import Array, Node, Value
from lutra.ops.elementwise import limits
from lutra.ops.functions import FUNCTIONS, function_name
from lutra.ops.lookup import unpack_weights
from lutra.ops.rows import row_length
from lutra.ops.shape import REST, TO_THE_END
from lutra.ops.spec import flag, integer, ints, number, pair, text

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
        planes: Of each input, its first plane in the value that ``ids`` names: 0 but for those of
            ``lutra.runtime.plan.READS_PLANES``.
    """

    node: Node
    ids: tuple[int, ...]
    inputs: tuple[Value, ...]
    output: Value
    tensors: Mapping[str, Array]
    residual: int = -1
    clamp: tuple[float, float] | None = None
    planes: tuple[int, ...] = ()


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


def _pair(plan: _engine.Plan, job: Job) -> int:
    a, b = job.ids
    # two sizes of one value and its equal: the graph sees to it that they are the same in a run
    if job.inputs[0].shape == job.inputs[1].shape and job.node.op in ("add", "mul"):
        return plan.add(a, b) if job.node.op == "add" else plan.mul(a, b)
    return plan.pair(job.node.op, a, b)


def _cast(plan: _engine.Plan, job: Job) -> int:
    return plan.cast(job.ids[0])


def _affine_scalar(plan: _engine.Plan, job: Job) -> int:
    scale, bias = number(job.node, "scale"), number(job.node, "bias")
    return plan.affine_scalar(job.ids[0], scale, bias)


def _matmul(plan: _engine.Plan, job: Job) -> int:
    a, b = job.ids
    return plan.matmul(a, b, flag(job.node, "transpose_a"), flag(job.node, "transpose_b"))


def _function(plan: _engine.Plan, job: Job) -> int:
    return plan.function(job.ids[0], function_name(job.node))


def _piecewise(plan: _engine.Plan, job: Job) -> int:
    points, slope, intercept = (job.tensors[role] for role in ("breakpoint", "slope", "intercept"))
    return plan.piecewise(job.ids[0], points, slope, intercept)


def _table(job: Job, name: str) -> tuple[Array, Array] | None:
    """The table of a function whose range is reduced; None where it is computed."""
    if f"{name}_slope" not in job.tensors:
        return None
    return job.tensors[f"{name}_slope"], job.tensors[f"{name}_intercept"]


def _layer_norm(plan: _engine.Plan, job: Job) -> int:
    weight, bias = job.tensors["weight"], job.tensors["bias"]
    eps, rsqrt = number(job.node, "eps"), _table(job, "rsqrt")
    return plan.layer_norm(job.ids[0], weight, bias, eps, rsqrt=rsqrt)


def _rms_norm(plan: _engine.Plan, job: Job) -> int:
    weight, eps = job.tensors["weight"], number(job.node, "eps")
    return plan.rms_norm(job.ids[0], weight, eps, rsqrt=_table(job, "rsqrt"))


def _l2_norm(plan: _engine.Plan, job: Job) -> int:
    axes, keepdims = ints(job.node, "axes"), flag(job.node, "keepdims")
    return plan.l2_norm(job.ids[0], axes, keepdims)


def _embedding(plan: _engine.Plan, job: Job) -> int:
    weight, scale = job.tensors["weight"], job.tensors.get("scale")
    return plan.embedding(job.ids[0], weight, scale=scale)


def _position_embedding(plan: _engine.Plan, job: Job) -> int:
    return plan.position_embedding(job.ids[0], job.tensors["weight"])


def _masked_mean(plan: _engine.Plan, job: Job) -> int:
    value, mask = job.ids
    return plan.masked_mean(value, mask)


def _gather(plan: _engine.Plan, job: Job) -> int:
    index, axis = job.tensors["index"], integer(job.node, "axis")
    return plan.gather(job.ids[0], index, axis)


def _attention(plan: _engine.Plan, job: Job) -> int:
    first, second, third, *_ = job.planes
    return plan.attention(
        *job.ids,
        offsets=(first, second, third),
        widths=job.inputs[0].shape[-1],
        heads=integer(job.node, "heads"),
        scale=number(job.node, "scale"),
        causal=flag(job.node, "causal"),
        exp=_table(job, "exp"),
        reciprocal=_table(job, "reciprocal"),
    )


def _transpose(plan: _engine.Plan, job: Job) -> int:
    return plan.transpose(job.ids[0], ints(job.node, "axes"))


def _expand(plan: _engine.Plan, job: Job) -> int:
    return plan.expand(job.ids[0], ints(job.node, "shape"))


def _affine(plan: _engine.Plan, job: Job) -> int:
    return plan.affine(job.ids[0], job.tensors["scale"], job.tensors["bias"])


def _softmax(plan: _engine.Plan, job: Job) -> int:
    axis, exp, reciprocal = integer(job.node, "axis"), _table(job, "exp"), _table(job, "reciprocal")
    return plan.softmax(job.ids[0], axis, exp=exp, reciprocal=reciprocal)


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
    "add": _pair,
    "sub": _pair,
    "mul": _pair,
    "div": _pair,
    "cast": _cast,
    "affine_scalar": _affine_scalar,
    "matmul": _matmul,
    **dict.fromkeys(FUNCTIONS, _function),
    "piecewise": _piecewise,
    "layer_norm": _layer_norm,
    "rms_norm": _rms_norm,
    "l2_norm": _l2_norm,
    "embedding": _embedding,
    "position_embedding": _position_embedding,
    "masked_mean": _masked_mean,
    "gather": _gather,
    "attention": _attention,
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
    "transpose": _transpose,
    "expand": _expand,
}
