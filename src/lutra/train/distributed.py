"""What the processes of torch.distributed tell each other; without them nothing changes."""

from __future__ import annotations

from typing import Literal

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


def all_reduce(t: Tensor, op: Literal["sum", "max"] = "sum") -> Tensor:
    """The sum or the maximum of `t` over the processes, in place."""
    if active():
        shared = _reachable(t)
        # not a default argument: builds of torch without distributed lack ReduceOp
        dist.all_reduce(shared, dist.ReduceOp.MAX if op == "max" else dist.ReduceOp.SUM)
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


def gather(t: Tensor, dim: int) -> Tensor:
    """The tensors of all processes, equal in shape, one after the other along an axis."""
    if not active():
        return t
    shared = _reachable(t)
    parts = [torch.empty_like(shared) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, shared)
    return torch.cat(parts, dim).to(t.device)


def mean(value: float) -> float:
    """The mean of a number over the processes."""
    if not active():
        return value
    total = all_reduce(torch.tensor([value, 1.0], dtype=torch.float64))
    return float(total[0] / total[1])


def mean_row(rows: Tensor) -> Tensor:
    """The mean (D) of rows (n, D) of all processes."""
    if not active():
        return rows.mean(0)
    count = all_reduce(torch.tensor(float(len(rows)), dtype=torch.float64, device=rows.device))
    total = all_reduce(rows.sum(0, dtype=torch.float64))
    return (total / count).to(rows.dtype)
