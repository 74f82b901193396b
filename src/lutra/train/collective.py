"""Sums and broadcasts over the processes of torch.distributed; without it they change nothing."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


def active() -> bool:
    """Whether this process is one of several."""
    return dist.is_available() and dist.is_initialized()


def rank() -> int:
    """Number of this process, from 0."""
    return dist.get_rank() if active() else 0


def _reachable(t: Tensor) -> Tensor:
    """`t`, or a copy of it on the GPU where the processes can talk through GPUs only."""
    return t.cuda() if dist.get_backend() == "nccl" and not t.is_cuda else t.contiguous()


def all_reduce(t: Tensor, op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM) -> Tensor:
    """Adds up (or, with `op`, otherwise combines) `t` over the processes, in place."""
    if active():
        shared = _reachable(t)
        dist.all_reduce(shared, op)
        if shared is not t:
            t.copy_(shared)
    return t


def broadcast(t: Tensor) -> Tensor:
    """Replaces `t` by that of process 0, in place; the shapes must be the same everywhere."""
    if active():
        shared = _reachable(t)
        dist.broadcast(shared, 0)
        if shared is not t:
            t.copy_(shared)
    return t


def mean(value: float) -> float:
    """The mean of a number over the processes."""
    if not active():
        return value
    total = all_reduce(torch.tensor([value, 1.0], dtype=torch.float64))
    return float(total[0] / total[1])
