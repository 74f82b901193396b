"""Decoders: see ``lutra.ops.decoder`` for the equations. Sums are of float64."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from lutra.errors import InputError
from lutra.node import Array, Node
from lutra.ops.spec import integer
from lutra.reference.sequence import attention

#: Keys and values of each sequence, float32 (tokens, G d), that a ``cached_attention`` remembers.
Past = list[tuple[Array, Array]]


def cached_attention(
    node: Node,
    inputs: Sequence[Array],
    tensors: Mapping[str, Array],
    past: Past | None = None,
) -> Array:
    """(N, T, H d), twice (N, T, G d) and int32 (N,) to (N, T, H d).

    Args:
        node: The node.
        inputs: Queries, keys, values and starts.
        tensors: Its tensors by role.
        past: What earlier runs left, an entry for each sequence, which are replaced; an empty list
            before the first run, and None for a run without a cache.

    Raises:
        InputError: If a sequence starts behind what is there of it, or becomes too long.
    """
    q, k, v, start = inputs
    if past is not None and not past:
        past.extend((k[n, :0], v[n, :0]) for n in range(len(q)))
    results = []
    for n in range(len(q)):
        known = (k[n, :0], v[n, :0]) if past is None else past[n]
        _check_start(node, n, int(start[n]), q.shape[1], len(known[0]))
        keys, values = (
            np.concatenate([old[: start[n]], new[n]])
            for old, new in zip(known, (k, v), strict=True)
        )
        if past is not None:
            past[n] = keys, values
        results.append(_one(node, q[n], keys, values, int(start[n]), tensors))
    return np.stack(results)


def _one(
    node: Node, q: Array, k: Array, v: Array, start: int, tensors: Mapping[str, Array]
) -> Array:
    """One sequence: (T, H d) and (start + T, G d) to (T, H d)."""
    heads, groups = integer(node, "heads"), integer(node, "kv_heads")
    causal = dataclasses.replace(
        node, op="attention", attrs={"heads": heads, "scale": node.attrs["scale"], "causal": True}
    )
    repeated = (
        x.reshape(len(x), groups, -1).repeat(heads // groups, axis=1).reshape(1, len(x), -1)
        for x in (k, v)
    )
    # Queries in the place of the tokens before them do no harm: nobody looks at their results.
    queries = np.concatenate([np.zeros((start, q.shape[1]), np.float32), q])
    return attention(causal, (queries[None], *repeated), tensors)[0, start:]


def _check_start(node: Node, sequence: int, start: int, tokens: int, known: int) -> None:
    if not 0 <= start <= known:
        raise InputError(
            f"run_reference: node {node.name!r}: sequence {sequence} starts at token {start}, but "
            f"{known} tokens of it are known; start at 0..{known}"
        )
    length = integer(node, "length")
    if start + tokens > length:
        raise InputError(
            f"run_reference: node {node.name!r}: sequence {sequence} starts at token {start} and "
            f"gets {tokens} more, but may have {length} at most; cut it"
        )


def pick_tokens(node: Node, inputs: Sequence[Array], tensors: Mapping[str, Array]) -> Array:
    """(N, T, D) and int32 (N, P) to (N, P, D).

    Raises:
        InputError: If an index is beyond the tokens of the run.
    """
    x, index = inputs
    if index.size and not 0 <= index.min() <= index.max() < x.shape[1]:
        raise InputError(
            f"run_reference: node {node.name!r} picks the tokens {int(index.min())}.."
            f"{int(index.max())}, but the run has the tokens 0..{x.shape[1] - 1}"
        )
    return np.take_along_axis(x, index[:, :, None].astype(np.int64), axis=1)
