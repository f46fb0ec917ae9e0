"""Batch normalisation together with what follows it: the residual and the activation."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from pnfs import kernels
from pnfs.kernels.checks import Activation
from pnfs.running import move_running_statistics

Statistics = tuple[Tensor, Tensor, float]  # mean and biased variance, (C,) each, of how many values


class BatchNormAct2d(nn.BatchNorm2d):
    """`nn.BatchNorm2d` → plus a residual → activation, in one pass; the same state dict.

    Attributes:
        activation: "none", "relu" or "relu6".
    """

    def __init__(self, channels: int, activation: Activation = "none") -> None:
        super().__init__(channels)
        self.activation: Activation = activation

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        """(N, C, H, W), channels-last or else copied → act(BN(input) + residual), channels-last."""
        if not self.training:
            return self.normalise(input, residual, self.running_mean, self.running_var)[0]
        y, statistics = self.normalise_batch(input, residual)
        self.move_running(statistics)
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
        self.move_running((mean, var, count))
        return mean, var

    def move_running(self, statistics: Statistics) -> None:
        """Move the running statistics towards a batch's."""
        assert self.running_mean is not None and self.running_var is not None
        assert self.momentum is not None
        move_running_statistics(
            self.running_mean,
            self.running_var,
            *statistics,
            momentum=self.momentum,
            batches=self.num_batches_tracked,
        )

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
