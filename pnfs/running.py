"""Running statistics of batch normalisations, moved together: a network has hundreds of these small
tensors, and a call for each costs more than the arithmetic."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

import torch
from torch import Tensor

MOMENTUM = 0.1


@dataclass(frozen=True)
class _Move:
    """What `move_running_statistics` was given, without a graph."""

    mean: Tensor
    var: Tensor
    batch_mean: Tensor
    batch_var: Tensor
    count: float
    momentum: float
    batches: Tensor | None


_waiting: ContextVar[list[_Move] | None] = ContextVar("waiting moves", default=None)


def move_running_statistics(
    mean: Tensor,
    var: Tensor,
    batch_mean: Tensor,
    batch_var: Tensor,
    count: float,
    *,
    momentum: float = MOMENTUM,
    batches: Tensor | None = None,
) -> None:
    """Move `mean` and `var`, in place, by `momentum` of the way to a batch's statistics, at once or
    at the end of `moved_together`.

    As in torch the running variance is unbiased: M / (M - 1) times that of the M values.

    Args:
        mean, var: running statistics, of any shape.
        batch_mean, batch_var: those of `count` values each, `batch_var` biased; the same shape.
        batches: a counter, which grows by one.
    """
    of_batch = batch_mean.detach().to(mean.dtype), batch_var.detach().to(var.dtype)
    move = _Move(mean, var, *of_batch, count, momentum, batches)
    waiting = _waiting.get()
    if waiting is None:
        _make([move])
    else:
        waiting.append(move)


@torch.no_grad()
def _make(moves: list[_Move]) -> None:
    """Three calls, however many there are."""
    if not moves:
        return
    corrections = [
        factor for move in moves for factor in (1.0, move.count / max(1, move.count - 1))
    ]
    of_batch = [tensor for move in moves for tensor in (move.batch_mean, move.batch_var)]
    targets = [tensor for move in moves for tensor in (move.mean, move.var)]
    momenta = [move.momentum for move in moves for _ in range(2)]
    torch._foreach_lerp_(targets, torch._foreach_mul(of_batch, corrections), momenta)
    counters = [move.batches for move in moves if move.batches is not None]
    if counters:
        torch._foreach_add_(counters, 1)


@contextmanager
def moved_together() -> Iterator[None]:
    """Inside, running statistics wait for the end, and are forgotten if that is an error. Within
    another such context they wait for the end of that."""
    if _waiting.get() is not None:
        yield
        return
    with _collected() as moves:
        yield
    _make(moves)


@contextmanager
def left_alone() -> Iterator[None]:
    """Inside, no running statistics are moved."""
    with _collected():
        yield


@contextmanager
def _collected() -> Iterator[list[_Move]]:
    moves: list[_Move] = []
    token = _waiting.set(moves)
    try:
        yield moves
    finally:
        _waiting.reset(token)
