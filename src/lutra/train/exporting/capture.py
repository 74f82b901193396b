"""From a torch module to a functional `torch.export` program with dynamic axes."""

from __future__ import annotations

import inspect
import io
import logging
import re
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr
from typing import Any, Final

import torch
from torch import Tensor, fx, nn
from torch.export import Dim, ExportedProgram
from torch.nn.modules import transformer

from lutra.errors import InputError, LutraError, UnsupportedModelError
from lutra.train.exporting.experts import every_expert
from lutra.train.exporting.functional import functional
from lutra.train.layers.attention import plain_attention
from lutra.train.layers.dropin import copy_model
from lutra.train.operators.recurrent import whole_recurrent_layers

ExampleInput = Tensor | Sequence[Tensor]
#: The torch operator of the layers that compute in integers.
FROZEN_OP = "lutra.frozen.default"
#: Samples of the example that a model is traced with.
_TRACED: Final = 2


def example_tensors(example_input: ExampleInput) -> tuple[Tensor, ...]:
    """Check an example input and return it as a tuple of tensors on the CPU.

    Args:
        example_input: One tensor, or one per positional argument of the model's `forward`. Axis 0
            of each is the batch. Floating types become float32; integers and bool stay.

    Raises:
        InputError: No tensors, a tensor without a batch, or batches of different size.
    """
    tensors = (example_input,) if isinstance(example_input, Tensor) else tuple(example_input)
    if not tensors:
        raise InputError(
            "export: example_input is empty; give one tensor per argument of the model's forward."
        )
    for index, tensor in enumerate(tensors):
        if not isinstance(tensor, Tensor):
            raise InputError(
                f"export: example_input[{index}] is a {type(tensor).__name__} but must be a "
                "torch.Tensor; give one tensor per argument of the model's forward."
            )
        if tensor.ndim < 1 or tensor.shape[0] == 0:
            raise InputError(
                f"export: example_input[{index}] has shape {tuple(tensor.shape)} but must be "
                "(N, ...) with N >= 1; give at least one sample with a batch axis in front."
            )
    sizes = [tensor.shape[0] for tensor in tensors]
    if len(set(sizes)) > 1:
        raise InputError(
            f"export: the tensors of example_input have batch sizes {sizes} but must share one; "
            "give each the same number of samples in axis 0."
        )
    return tuple(
        tensor.detach()
        .to("cpu", torch.float32 if tensor.is_floating_point() else tensor.dtype)
        .contiguous()
        for tensor in tensors
    )


def prepare_copy(model: nn.Module) -> nn.Module:
    """Return a deep copy of `model` in eval mode, float32, on the CPU; `model` stays as it is.

    The wrappers of data parallelism and of `torch.compile` are taken off.

    Raises:
        LutraError: The model cannot be copied.
    """
    parallel = (nn.DataParallel, nn.parallel.DistributedDataParallel)
    while isinstance(model, parallel) or isinstance(getattr(model, "_orig_mod", None), nn.Module):
        model = model.module if isinstance(model, parallel) else model._orig_mod  # type: ignore[assignment]
    try:
        clone = copy_model(model)
    except Exception as error:
        raise LutraError(
            f"export: the {type(model).__name__} cannot be copied ({_first_line(error)}); make "
            "every tensor it holds a parameter or a buffer so that copy.deepcopy works."
        ) from error
    return clone.to("cpu").float().eval()  # which leaves complex numbers alone


def argument_names(model: nn.Module, count: int) -> tuple[str, ...]:
    """Return the names under which `forward` takes its first `count` positional arguments."""
    bound = inspect.signature(model.forward).bind(*range(count)).arguments
    names: list[str] = []
    for name, value in bound.items():
        # *args collects the rest in one tuple: x -> x_0, x_1, ...
        names += [f"{name}_{i}" for i in range(len(value))] if isinstance(value, tuple) else [name]
    return tuple(names)


def _of_vectors(example: Sequence[Tensor]) -> str:
    """Advice for what may be one sample without its batch axis; nothing where there is none."""
    vectors = [tensor for tensor in example if tensor.ndim == 1]
    if not vectors:
        return ""
    shape = tuple(vectors[0].shape)
    return (
        f"; or, if the example of shape {shape} is one sample, give it a batch axis in front: "
        f"{(1, *shape)}"
    )


def capture(
    model: nn.Module,
    example: tuple[Tensor, ...],
    dynamic_axes: Sequence[tuple[int, ...]] | None = None,
) -> ExportedProgram:
    """Trace an eval-mode CPU model into a functional program whose batch size is dynamic.

    Args:
        model: The module; it is traced as it stands, so put it in eval mode first.
        example: From `example_tensors`. One sample is enough.
        dynamic_axes: Further axes of each input that may have any size, see `dynamic_axes_of`.

    Returns:
        A program free of in-place operators; convolutions and lookup layers stay whole.

    Raises:
        InputError: The model does not run on the example.
        UnsupportedModelError: The model cannot be traced, or works for one batch size only, or for
            one size of a dynamic axis.
    """
    name = type(model).__name__
    batch = example[0].shape[0]
    whole, example = example, tuple(tensor[:_TRACED] for tensor in example)
    fixed = UnsupportedModelError(
        f"export: {name} works for one batch size only ({batch} in the example); write sizes that "
        "depend on the batch as x.size(0) or -1, for example x.flatten(1) in place of "
        f"x.reshape(8, -1){_of_vectors(whole)}."
    )
    try:
        dynamic = _dynamic_shapes(model, dynamic_axes or ((),) * len(example))
    except TypeError as error:
        raise InputError(
            f"export: example_input holds {len(example)} tensors, which {name}.forward does not "
            f"take ({_first_line(error)}); give one tensor per positional argument."
        ) from error
    failure = _run(model, example)
    if isinstance(failure, UnsupportedModelError):
        raise failure
    if failure is not None and batch > _TRACED and _run(model, whole) is None:
        raise (InputError(str(fixed)) if _of_vectors(whole) else fixed) from failure
    if failure is not None:
        raise InputError(
            f"export: {name} fails on example_input of shapes {[tuple(t.shape) for t in whole]} "
            f"({_first_line(failure)}); give an example that the model takes{_of_vectors(whole)}."
        ) from failure
    if batch == 1:
        # A batch of 1 would be taken for a constant (and for a broadcast) by torch.export.
        example = tuple(torch.cat([tensor, tensor]) for tensor in example)
        failure = _run(model, example)
        if failure is not None:
            raise fixed from failure
    try:
        with (
            quiet(),
            _without_listings(),
            plain_attention(),
            every_expert(),
            _masks_as_given(),
            _rounding_written_out(),
            whole_recurrent_layers(),
            torch.no_grad(),
        ):
            program = torch.export.export(model, example, dynamic_shapes=dynamic, strict=False)
            return functional(program)
    except Exception as error:
        if "Constraints violated" in str(error):
            others = sorted(set(re.findall(r"\.size\(\)\[([1-9])\]", str(error))))
            if others:
                raise UnsupportedModelError(
                    f"export: {name} works for one size of axis {', '.join(others)} only; use "
                    "operators that know sizes by themselves, such as F.adaptive_avg_pool2d(x, 1) "
                    "in place of F.avg_pool2d(x, x.shape[2:]), or take the axis out of "
                    "dynamic_axes."
                ) from error
            raise UnsupportedModelError(f"{fixed} PyTorch says: {_violated(error)}") from error
        raise UnsupportedModelError(
            f"export: torch.export could not trace {name} ({_first_line(error)}); remove control "
            "flow that depends on tensor values and calls that leave torch, such as .numpy()."
        ) from error


@contextmanager
def _masks_as_given() -> Iterator[None]:
    """Keeps encoders and decoders of torch.nn from looking into their masks for causal ones.

    What they find out is a hint to a kernel only, and a branch on values cannot be traced. The
    lowering of attention finds causal masks by itself.
    """
    detect = transformer._detect_is_causal_mask
    transformer._detect_is_causal_mask = lambda mask, is_causal=None, size=None: bool(is_causal)
    try:
        yield
    finally:
        transformer._detect_is_causal_mask = detect


@contextmanager
def _rounding_written_out() -> Iterator[None]:
    """Has the rounding of fake quantisation traced as products, sums and limits; PyTorch's own
    operator cannot be traced."""

    def rounded(x: Tensor, scale: Any, zero: Any, low: int, high: int) -> Tensor:
        inverse = scale.reciprocal() if isinstance(scale, Tensor) else 1.0 / scale
        made: Tensor = ((x * inverse).round() + zero).clamp(low, high).sub(zero) * scale
        return made

    def by_channel(
        x: Tensor, scale: Tensor, zero: Tensor, axis: int, low: int, high: int
    ) -> Tensor:
        shape = [-1 if i == axis % x.ndim else 1 for i in range(x.ndim)]
        return rounded(x, scale.reshape(shape), zero.reshape(shape), low, high)

    forms = {
        "fake_quantize_per_tensor_affine": rounded,
        "fake_quantize_per_channel_affine": by_channel,
    }
    kept = {name: getattr(torch, name) for name in forms}
    for name, form in forms.items():
        setattr(torch, name, form)
    try:
        yield
    finally:
        for name, form in kept.items():
            setattr(torch, name, form)


def node_module(node: fx.Node) -> str:
    """Return the dotted path of the module whose forward made this node ('' is the root)."""
    stack = node.meta.get("nn_module_stack") or {}
    if not stack:
        return ""
    path = str(list(stack.values())[-1][0])
    # torch writes "conv@1" for the second call of a module, and a marker of its own for nodes
    # that belong to no module.
    return "" if path.startswith("_empty_nn_module_stack") else path.partition("@")[0]


def _run(model: nn.Module, example: tuple[Tensor, ...]) -> Exception | None:
    """Run a model as it is used, without tracing; return what it raises."""
    try:
        with torch.no_grad(), plain_attention():
            model(*(tensor.clone() for tensor in example))
    except Exception as error:
        return error
    return None


def dynamic_axes_of(
    given: Sequence[int] | Mapping[str, Sequence[int]],
    names: Sequence[str],
    example: Sequence[Tensor],
) -> list[tuple[int, ...]]:
    """Return the axes of each input that may have any size, besides axis 0, which always may.

    Args:
        given: Axes of every input, or axes by input name; inputs without a name have none.
        names: Of the inputs.
        example: The inputs.

    Raises:
        InputError: An axis or a name that does not exist, or an axis of one entry: torch takes
            that for a constant.
    """
    if isinstance(given, Mapping):
        unknown = [name for name in given if name not in names]
        if unknown:
            raise InputError(
                f"export: dynamic_axes names the inputs {unknown}; the model has {list(names)}."
            )
        axes = [tuple(given.get(name, ())) for name in names]
    else:
        axes = [tuple(given)] * len(names)
    result = []
    for name, tensor, mine in zip(names, example, axes, strict=True):
        for axis in mine:
            if type(axis) is not int or not 0 <= axis < tensor.ndim:
                raise InputError(
                    f"export: dynamic_axes has axis {axis!r} for the input {name!r} of shape "
                    f"{tuple(tensor.shape)}; it must be in 0..{tensor.ndim - 1}."
                )
            if axis and tensor.shape[axis] == 1:
                raise InputError(
                    f"export: axis {axis} of the input {name!r} is in dynamic_axes but has one "
                    "entry in example_input; give an example of at least 2, such as the size that "
                    "is used most."
                )
        result.append(tuple(sorted(set(mine) - {0})))
    return result


def _dynamic_shapes(model: nn.Module, axes: Sequence[tuple[int, ...]]) -> dict[str, Any]:
    batch = Dim("batch")
    dims = [{0: batch, **dict.fromkeys(mine, Dim.DYNAMIC)} for mine in axes]
    # *args collects the rest in one tuple, as forward does
    return inspect.signature(model.forward).bind(*dims).arguments


@contextmanager
def quiet() -> Iterator[None]:
    """Silence what torch says about its own internals; nothing a user could act on."""
    logger = logging.getLogger("torch.fx.experimental.symbolic_shapes")
    level = logger.level
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r".*LeafSpec.*", category=FutureWarning)
        warnings.filterwarnings("ignore", message=r".*(was|were) assigned during export.*")
        logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            logger.setLevel(level)


@contextmanager
def _without_listings() -> Iterator[None]:
    """Drop the listing of the whole program that torch.export prints where it fails; what a model
    that can be traced prints is kept."""
    stream, written = sys.stderr, io.StringIO()
    with redirect_stderr(written):
        yield
    stream.write(written.getvalue())


def _violated(error: BaseException) -> str:
    """The reasons of torch.export for a size that must be constant, in one line."""
    lines = [line.strip() for line in str(error).splitlines()]
    reasons = [line.lstrip("- ") for line in lines if line.startswith("-")]
    return " ".join(reasons or [_first_line(error)])


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__).rstrip(".")
