"""Several processes: joining the group that torchrun starts, small reductions, synchronised BN.

Without torchrun everything here is the identity for one process.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from pnfs import kernels
from pnfs.backbones.norm import BatchNormAct2d, Statistics
from pnfs.errors import PnfsError
from pnfs.operations import PartBatchNorm2d

T = TypeVar("T")


def launched_by_torchrun() -> bool:
    """Whether this process is one of several (or one) that torchrun started."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def restarted() -> bool:
    """Whether torchrun (`--max-restarts`) started this process in place of one that died."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0


@contextlib.contextmanager
def group(device: torch.device) -> Iterator[torch.device]:
    """Be one of the processes that torchrun started: NCCL on CUDA, Gloo on the CPU.

    Yields this process's own device. A group that exists already is used, and left as it is.

    Raises:
        PnfsError: more processes than GPUs, or another process of the group is gone. One that is
            raised inside is marked as this process's own, where nobody has said whose it is.
    """
    if not launched_by_torchrun() and not dist.is_initialized():
        yield device
        return
    if device.type == "cuda":
        local = int(os.environ.get("LOCAL_RANK", 0))
        count = torch.cuda.device_count()
        if local >= count:
            raise PnfsError(
                f"torchrun: local rank {local} has no GPU ({count} visible); "
                "lower --nproc-per-node or use --device cpu",
                rank=int(os.environ.get("RANK", 0)) - local + count,
            )
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
    joined = not dist.is_initialized()
    if joined:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    own = rank()
    try:
        yield device
    except PnfsError as error:
        if error.rank is None:
            error.rank = own
        raise
    except RuntimeError as error:
        if not _is_lost_peer(error):
            raise
        raise PnfsError(
            f"rank {own}: another process of this run is gone; its own last lines say why", rank=0
        ) from None
    finally:
        if joined:
            dist.destroy_process_group()


def _is_lost_peer(error: RuntimeError) -> bool:
    """Whether a collective failed because a process at its other end has left."""
    return isinstance(error, dist.DistError) or "gloo" in str(error)


def rank() -> int:
    """This process's number, 0 without a group."""
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    """Number of processes, 1 without a group."""
    return dist.get_world_size() if dist.is_initialized() else 1


def from_first(make: Callable[[], T]) -> T:
    """What rank 0 makes, on every rank: any object that can be pickled; it never touches a file.

    Raises:
        PnfsError: the one that `make` raised on rank 0, on every rank.
    """
    if world() == 1:
        return make()
    box: list[Any] = [None, None]
    if rank() == 0:
        try:
            box[0] = make()
        except PnfsError as error:
            box[1] = str(error)
    dist.broadcast_object_list(box, src=0)
    if box[1] is not None:
        raise PnfsError(box[1], rank=0)
    return cast(T, box[0])


def on_first(action: Callable[[], object]) -> None:
    """Let rank 0 alone do something; if it raises a PnfsError, every rank does."""

    def act() -> None:
        action()

    from_first(act)


def together(make: Callable[[], T]) -> T:
    """What every rank makes for itself, rank 0 before the others.

    Raises:
        PnfsError: that of the first rank where `make` raised one, on every rank.
    """
    if world() == 1:
        return make()
    made: list[T] = []
    on_first(lambda: made.append(make()))
    own: str | None = None
    if rank() > 0:
        try:
            made.append(make())
        except PnfsError as error:
            own = str(error)
    errors: list[str | None] = [None] * world()
    dist.all_gather_object(errors, own)
    for number, message in enumerate(errors):
        if message is not None:
            raise PnfsError(message, rank=number)
    return made[0]


def copy_from_first(tensors: list[Tensor]) -> None:
    """Overwrite `tensors` with those of rank 0, in place."""
    if world() > 1:
        for tensor in tensors:
            dist.broadcast(tensor, src=0)


def sum_over_ranks(values: list[float], device: torch.device) -> list[float]:
    """Element-wise sums over all ranks, in float64."""
    if world() == 1:
        return values
    total = torch.tensor(values, dtype=torch.float64, device=device)
    add_over_ranks(total)
    return cast(list[float], total.tolist())


def add_over_ranks(tensor: Tensor) -> None:
    """Replace `tensor` by its sum over all ranks, in place."""
    if world() > 1:
        dist.all_reduce(tensor)


def average_over_ranks(tensors: list[Tensor]) -> None:
    """Replace `tensors` (of one dtype and device) by their means over all ranks, in place."""
    if world() == 1 or not tensors:
        return
    flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
    dist.all_reduce(flat)
    flat /= world()
    for tensor, mean in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
        tensor.copy_(mean.view(tensor.shape))


class _GatheredStatistics(torch.autograd.Function):
    """Mean and biased variance, (P, C) or (C,), of this process → those over all processes."""

    @staticmethod
    def forward(ctx: Any, mean: Tensor, var: Tensor, count: float) -> tuple[Tensor, Tensor, Tensor]:
        own = torch.stack([mean, var, torch.full_like(mean, count)])
        gathered = [torch.empty_like(own) for _ in range(world())]
        dist.all_gather(gathered, own)
        means, variances, counts = torch.stack(gathered).unbind(1)  # each (ranks, ...)
        total = counts.sum(0)
        all_mean = (counts * means).sum(0) / total
        all_var = (counts * (variances + (means - all_mean).square())).sum(0) / total
        ctx.save_for_backward(mean - all_mean, count / total)
        ctx.mark_non_differentiable(total)
        return all_mean, all_var, total

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, Tensor, None]:
        off_mean, share = ctx.saved_tensors
        sums = torch.stack([grads[0], grads[1]])
        dist.all_reduce(sums)  # every process's loss depends on these statistics
        return share * (sums[0] + 2 * off_mean * sums[1]), share * sums[1], None


def _gather(mean: Tensor, var: Tensor, count: float) -> tuple[Tensor, Tensor, float]:
    mean, var, total = _GatheredStatistics.apply(mean, var, count)
    return mean, var, float(total.flatten()[0])


class SyncedPartBatchNorm2d(PartBatchNorm2d):
    """`PartBatchNorm2d` with the statistics of all ranks while training."""

    def gather(self, mean: Tensor, var: Tensor, count: int) -> tuple[Tensor, Tensor, float]:
        return _gather(mean, var, float(count))


class SyncedBatchNormAct2d(BatchNormAct2d):
    """`BatchNormAct2d` with the statistics of all ranks while training.

    Works on every device, where torch's own SyncBatchNorm needs a GPU.
    """

    def normalise_batch(self, x: Tensor, residual: Tensor | None) -> tuple[Tensor, Statistics]:
        mean, var, count = self.gather(*kernels.batch_stats(x), x.numel() / max(1, x.shape[1]))
        y, _, _ = self.normalise(x, residual, mean, var)
        return y, (mean, var, count)

    def gather(self, mean: Tensor, var: Tensor, count: float) -> Statistics:
        return _gather(mean, var, count)


def synchronize_batch_norm(model: nn.Module) -> None:
    """Make every batch normalisation of `model` use the statistics of all ranks, in place.

    Modules change their class and nothing else: parameters keep their identity, state dicts their
    keys.
    """
    for module in model.modules():
        if type(module) is BatchNormAct2d:
            module.__class__ = SyncedBatchNormAct2d
        elif type(module) is PartBatchNorm2d:
            module.__class__ = SyncedPartBatchNorm2d
