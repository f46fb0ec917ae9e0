"""Batch normalisation together with what follows it: the residual and the activation."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from pnfs import kernels
from pnfs.kernels.checks import Activation

Statistics = tuple[Tensor, Tensor, float]  # mean and biased variance, (C,) each, of how many values


class BatchNormAct2d(nn.BatchNorm2d):
    """`nn.BatchNorm2d` → plus a residual → activation, in one pass; the same state dict.

    Attributes:
        activation: "none", "relu" or "relu6".
    """

    def __init__(self, channels: int, activation: Activation = "none") -> None:
        super().__init__(channels)
        self.activation: Activation = activation
        self.deferred = False  # whether `deferred_statistics` will update the running statistics
        self.latest: Statistics | None = None  # what it will update them with

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        """(N, C, H, W), channels-last or else copied → act(BN(input) + residual), channels-last."""
        if not self.training:
            return self.normalise(input, residual, self.running_mean, self.running_var)[0]
        y, self.latest = self.normalise_batch(input, residual)
        if not self.deferred:
            update_running_statistics([self])
        return y

    def normalise_batch(self, x: Tensor, residual: Tensor | None) -> tuple[Tensor, Statistics]:
        """With the batch's statistics, and these; a subclass that synchronises overrides it."""
        y, mean, var = self.normalise(x, residual, None, None)
        return y, (mean, var, x.numel() / max(1, x.shape[1]))

    def gather(self, mean: Tensor, var: Tensor, count: float) -> Statistics:
        """Statistics over all processes; a subclass that synchronises them overrides this."""
        return mean, var, count

    def note(self, x: Tensor, mean: Tensor, var: Tensor) -> tuple[Tensor, Tensor]:
        """(mean, var) to normalise `x` (N, C, H, W) with in training mode, given its statistics
        (C,), `var` biased; the running ones are moved as `forward` moves them."""
        mean, var, count = self.gather(mean, var, x.numel() / max(1, x.shape[1]))
        self.latest = mean.detach(), var.detach(), count
        if not self.deferred:
            update_running_statistics([self])
        return mean, var

    def on_load(self, x: Tensor, mean: Tensor, var: Tensor) -> dict[str, Any]:
        """What a kernel that reads `x` (1, N, C, H, W) takes to normalise and activate it on load;
        mean and var (1, C) as for `note`."""
        # squeezed: the gradient of an indexed tensor would be copied
        mean, var = self.note(x.squeeze(0), mean.squeeze(0), var.squeeze(0))
        norm = {"mean": mean, "var": var, "gamma": self.weight, "beta": self.bias}
        stacked = {name: tensor[None] for name, tensor in norm.items()}
        return {**stacked, "activation": self.activation, "eps": self.eps}

    def normalise(
        self, x: Tensor, residual: Tensor | None, mean: Tensor | None, var: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        return kernels.batch_norm_act(
            x,
            self.weight,
            self.bias,
            mean=mean,
            var=var,
            residual=residual,
            activation=self.activation,
            eps=self.eps,
        )

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, activation={self.activation}"


@torch.no_grad()
def update_running_statistics(norms: list[BatchNormAct2d]) -> None:
    """Move the running statistics of all `norms` towards their latest batch's, three calls in all.

    As in torch the running variance is unbiased: M / (M - 1) times that of the M values.
    """
    norms = [norm for norm in norms if norm.latest is not None]
    if not norms:
        return
    latest, targets, counters = [], [], []
    for norm in norms:
        assert norm.latest is not None and norm.num_batches_tracked is not None
        assert norm.running_mean is not None and norm.running_var is not None
        latest.append(norm.latest)
        targets += [norm.running_mean, norm.running_var]
        counters.append(norm.num_batches_tracked)
        norm.latest = None
    corrections = [count / max(1.0, count - 1) for _, _, count in latest]
    variances = torch._foreach_mul([var for _, var, _ in latest], corrections)
    means = [mean for mean, _, _ in latest]
    values = [tensor for pair in zip(means, variances, strict=True) for tensor in pair]
    momentum = norms[0].momentum
    assert momentum is not None
    torch._foreach_lerp_(targets, values, momentum)
    torch._foreach_add_(counters, 1)


@contextmanager
def deferred_statistics(module: nn.Module) -> Iterator[None]:
    """Inside, the batch normalisations of `module` note their statistics; the running ones are
    updated at the end, all together. Every one of them may run once."""
    norms = [norm for norm in module.modules() if isinstance(norm, BatchNormAct2d)]
    for norm in norms:
        norm.deferred = True
    try:
        yield
    finally:
        for norm in norms:
            norm.deferred = False
    update_running_statistics(norms)
