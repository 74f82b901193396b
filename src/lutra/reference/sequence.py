"""Sequences of tokens: see ``lutra.ops.sequence`` for the equations. Sums are of float64."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from lutra.errors import InputError
from lutra.inputs import check_ids
from lutra.node import Array, Node
from lutra.ops.spec import flag, integer, number
from lutra.reference.functions import exp_of_score, exp_table, reciprocal_table


def embedding(node: Node, inputs: Sequence[Array], tensors: Mapping[str, Array]) -> Array:
    """Ids (N, ...) to (N, ..., D); floats are rounded to whole numbers, NaN is no id.

    Raises:
        InputError: If an id has no row.
    """
    (ids,) = inputs
    weight = tensors["weight"]
    if ids.dtype == np.float32:
        whole = np.nan_to_num(np.rint(ids), nan=-1.0, posinf=2.0**31 - 1, neginf=-1.0)
        ids = whole.astype(np.int64)
    check_ids("run_reference", node.name, ids, weight.shape[0])
    picked: Array = weight[ids]
    if "scale" not in tensors:
        return picked
    return picked.astype(np.float32) * tensors["scale"][ids][..., None]


def position_embedding(node: Node, inputs: Sequence[Array], tensors: Mapping[str, Array]) -> Array:
    """(N, T, D), and perhaps starts int32 (N,), to (N, T, D).

    Raises:
        InputError: If a sequence goes beyond the table.
    """
    x, *starts = inputs
    result: Array = x + tensors["weight"][places_of(node, x, starts, len(tensors["weight"]))]
    return result


def places_of(node: Node, x: Array, starts: Sequence[Array], length: int) -> Array:
    """The position of every token, (T,), or (N, T) where sequences have starts (N,).

    Raises:
        InputError: If one is beyond the table of ``length`` positions.
    """
    places: Array = np.arange(x.shape[1]) + (starts[0][:, None] if starts else 0)
    if places.size and not 0 <= places.min() <= places.max() < length:
        raise InputError(
            f"run_reference: node {node.name!r} is given the positions {int(places.min())}.."
            f"{int(places.max())}, and its table has {length}; cut the sequence"
        )
    return places


def masked_mean(node: Node, inputs: Sequence[Array], tensors: Mapping[str, Array]) -> Array:
    """(N, T, D) and int32 (N, T) to (N, D)."""
    x, mask = (array.astype(np.float64) for array in inputs)
    count = np.maximum(mask.sum(axis=1), 1e-9)
    result: Array = (x * mask[:, :, None]).sum(axis=1) / count[:, None]
    return result.astype(np.float32)


def gather(node: Node, inputs: Sequence[Array], tensors: Mapping[str, Array]) -> Array:
    """Picks entries of one axis."""
    return np.take(inputs[0], tensors["index"], axis=integer(node, "axis"))


def attention(node: Node, inputs: Sequence[Array], tensors: Mapping[str, Array]) -> Array:
    """(N, T, H d), twice (N, S, H d) and perhaps a mask (N, S) to (N, T, H d)."""
    q, k, v, *mask = inputs
    heads = integer(node, "heads")
    (samples, tokens, width), keys = q.shape, k.shape[1]

    def by_head(x: Array) -> Array:  # (N, H, T, d)
        return x.reshape(*x.shape[:2], heads, width // heads).transpose(0, 2, 1, 3)

    seen = np.ones((samples, 1, tokens, keys), np.bool_)
    if mask:
        seen &= (mask[0] != 0)[:, None, None, :]
    if flag(node, "causal"):
        seen &= np.arange(keys) <= np.arange(tokens)[:, None]
    with np.errstate(all="ignore"):
        products = by_head(q).astype(np.float64) @ by_head(k).astype(np.float64).swapaxes(2, 3)
        scores = (products * np.float32(number(node, "scale"))).astype(np.float32)
        scores = np.where(seen, scores, np.float32(-np.inf))
        top = scores.max(axis=3, keepdims=True)
        distances = scores - np.where(np.isneginf(top), np.float32(0), top)
        if "exp_slope" in tensors:
            powers = exp_table(distances, tensors["exp_slope"], tensors["exp_intercept"])
            powers = np.where(seen, powers, np.float32(0)).astype(np.float64)
            sums = powers.sum(axis=3, keepdims=True).astype(np.float32)
            slope, intercept = tensors["reciprocal_slope"], tensors["reciprocal_intercept"]
            factors = reciprocal_table(sums, slope, intercept).astype(np.float64)
        else:
            powers = np.where(seen, exp_of_score(distances), np.float32(0)).astype(np.float64)
            factors = 1 / powers.sum(axis=3, keepdims=True)
        # a key that is not seen adds nothing, whatever it is
        made = np.where(seen.any(axis=3, keepdims=True), _weighted(powers, by_head(v)) * factors, 0)
    result: Array = made.transpose(0, 2, 1, 3).reshape(q.shape)
    return result.astype(np.float32)


def _weighted(powers: Array, v: Array) -> Array:
    """powers @ v; keys whose power is 0 for all tokens of a head add 0 even if they are NaN."""
    unseen = (powers == 0).all(axis=2)[..., None]
    result: Array = powers @ np.where(unseen, 0.0, v.astype(np.float64))
    return result
