"""Candidate operations of Eq. 1 and the layers they are made of, for P parts at once.

Every weight carries the parts on its leading axis, and so does every feature map: `x_PNCHW` is
(P parts, N batch, C channels, H, W), channels-last inside each part. Nothing is normalised where it
is produced: a branch gives its raw map and the statistics of a batch normalisation, (mean, var) of
shape (P, C), and whoever reads the map normalises it on load.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pnfs import kernels
from pnfs.kernels.shared import SharedMap, unshared
from pnfs.liveness import Parts
from pnfs.running import move_running_statistics

BN_EPS = 1e-5

Normalised = tuple[Tensor, Tensor, Tensor]  # raw map (P, N, C, H, W), mean (P, C), var (P, C)


class PartConv2d(nn.Module):
    """P convolutions. weight (P, out, in / groups, k, k); bias (P, out) or none.

    Weights start as N(0, gain / fan_in): gain 2 (He) before batch normalisation, where only
    gradients feel it; the smaller gain of `torch.nn.Conv2d`'s default for a convolution that
    nothing normalises, because the sums over inputs and operations enlarge its output from layer
    to layer.
    """

    def __init__(
        self,
        parts: int,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        *,
        stride: int = 1,
        dilation: int = 1,
        groups: int = 1,
        bias: bool = False,
        normalised: bool = True,
    ) -> None:
        super().__init__()
        self.stride, self.dilation, self.groups = stride, dilation, groups
        self.padding = dilation * (kernel_size // 2)
        fan_in = in_channels // groups * kernel_size**2
        gain = 2 if normalised else 1 / 3
        self.weight = nn.Parameter(
            torch.randn(parts, out_channels, in_channels // groups, kernel_size, kernel_size)
            * math.sqrt(gain / fan_in)
        )
        self.bias = nn.Parameter(torch.zeros(parts, out_channels)) if bias else None

    def forward(self, x_PNCHW: Tensor) -> Tensor:
        if self.weight.shape[-1] == 1:
            return kernels.separable_conv(
                x_PNCHW, self.weight.flatten(2), bias=self.bias, stats=False
            )[0]
        dtype = x_PNCHW.dtype
        biases = [None] * len(x_PNCHW) if self.bias is None else self.bias.to(dtype).unbind(0)
        parts = [
            F.conv2d(
                x_NCHW, weight, bias, self.stride, self.padding, self.dilation, self.groups
            ).permute(0, 2, 3, 1)
            for x_NCHW, weight, bias in zip(
                x_PNCHW.unbind(0), self.weight.to(dtype).unbind(0), biases, strict=True
            )
        ]
        return torch.stack(parts).permute(0, 1, 4, 2, 3)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PartConv2d:
        """`.to(memory_format=torch.channels_last)` takes 4-D tensors alone: the weights of all
        parts pass as one, and stay as the kernels read them."""

        def apply(tensor: Tensor) -> Tensor:
            if tensor.dim() != 5:
                return fn(tensor)
            return fn(tensor.flatten(0, 1)).unflatten(0, tensor.shape[:2]).contiguous()

        return super()._apply(apply, recurse)

    def extra_repr(self) -> str:
        shape = tuple(self.weight.shape)
        return (
            f"weight={shape}, stride={self.stride}, dilation={self.dilation}, groups={self.groups}"
        )


class PartBatchNorm2d(nn.Module):
    """The parameters and running statistics of P batch normalisations, (P, C) each.

    Whoever consumes the normalised map applies them (see `pnfs.kernels`).
    """

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, parts: int, channels: int, *, affine: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(parts, channels)) if affine else None
        self.bias = nn.Parameter(torch.zeros(parts, channels)) if affine else None
        self.register_buffer("running_mean", torch.zeros(parts, channels))
        self.register_buffer("running_var", torch.ones(parts, channels))

    def gather(self, mean: Tensor, var: Tensor, count: int) -> tuple[Tensor, Tensor, float]:
        """Statistics over all processes; a subclass that synchronises them overrides this."""
        return mean, var, float(count)

    def statistics(self, x_PNCHW: Tensor, mean: Tensor, var: Tensor) -> tuple[Tensor, Tensor]:
        """(mean, var) to normalise `x_PNCHW` with: the batch's while training, else the running.

        Args:
            x_PNCHW: the raw map.
            mean, var: its statistics, (P, C), biased; unused (and empty) in evaluation mode.
        """
        if not self.training:
            return self.running_mean, self.running_var
        mean, var, count = self.gather(mean, var, x_PNCHW.numel() // max(1, mean.numel()))
        move_running_statistics(self.running_mean, self.running_var, mean, var, count)
        return mean, var

    def extra_repr(self) -> str:
        return f"{tuple(self.running_mean.shape)}, affine={self.weight is not None}"


def select_parts(x: Tensor, have: Parts, want: Parts) -> Tensor:
    """The entries of `x` along its first axis, which stand for the parts `have`, for parts `want`.

    A part that `have` lacks gets those of another part: its mixing weight is zero. Without a copy
    where `have` and `want` agree.
    """
    if have == want:
        return x
    rows = [have.index(part) if part in have else 0 for part in want]
    if x.dim() < 5:
        return torch.stack([x[row] for row in rows])
    return torch.stack([x[row].permute(0, 2, 3, 1) for row in rows]).permute(0, 1, 4, 2, 3)


def convolve(
    x: Tensor | SharedMap | Normalised,
    pointwise: PartConv2d,
    norm: PartBatchNorm2d,
    depthwise: PartConv2d | None = None,
) -> Normalised:
    """[BN → ReLU →] [depthwise 3×3 →] 1×1, and what normalises the result.

    `x` with statistics is normalised and passed through a ReLU on load; a plain map is not.
    """
    raw, mean, var = x if isinstance(x, tuple) else (x, None, None)
    y, mean_y, var_y = kernels.separable_conv(
        raw,
        pointwise.weight.flatten(2),
        depthwise=None if depthwise is None else depthwise.weight.flatten(1, 2),
        bias=pointwise.bias,
        mean=mean,
        var=var,
        dilation=1 if depthwise is None else depthwise.dilation,
        stats=norm.training,
        eps=BN_EPS,
    )
    return y, *norm.statistics(y, mean_y, var_y)


def downsample(x: Tensor | SharedMap, conv: PartConv2d, norm: PartBatchNorm2d) -> Normalised:
    """3×3 convolution with stride 2, and what normalises the result."""
    y, mean, var = kernels.strided_conv(x, conv.weight, conv.bias, stats=norm.training)
    return y, *norm.statistics(y, mean, var)


def normalised(y: Tensor, norm: PartBatchNorm2d) -> Normalised:
    """A raw map that no kernel of ours produced, and what normalises it."""
    mean, var = kernels.batch_stats(y) if norm.training else (norm.running_mean, norm.running_var)
    return y, *norm.statistics(y, mean, var)


class Separable(nn.Sequential):
    """`count` times [depthwise 3×3 → 1×1 → BN without scale and shift → ReLU].

    The last ReLU is the consumer's (`relu`).
    """

    relu = True

    def __init__(self, parts: int, channels: int, *, count: int, dilation: int) -> None:
        layers: list[nn.Module] = []
        for _ in range(count):
            layers += [
                PartConv2d(parts, channels, channels, 3, dilation=dilation, groups=channels),
                PartConv2d(parts, channels, channels, 1),
                PartBatchNorm2d(parts, channels, affine=False),
                nn.ReLU(),
            ]
        super().__init__(*layers)

    def forward(self, x_PNCHW: Tensor | SharedMap) -> Normalised:
        """(P, N, C, H, W) → raw map of the same shape, mean and var (P, C)."""
        layers = list(self)
        result: Tensor | SharedMap | Normalised = x_PNCHW
        for depthwise, pointwise, norm in zip(layers[::4], layers[1::4], layers[2::4], strict=True):
            result = convolve(result, pointwise, norm, depthwise)  # type: ignore[arg-type]
        assert isinstance(result, tuple)
        return result


class Pool(nn.Sequential):
    """3×3 pooling with stride 1 → BN without scale and shift."""

    relu = False

    def __init__(self, pool: nn.Module, parts: int, channels: int) -> None:
        super().__init__(pool, PartBatchNorm2d(parts, channels, affine=False))

    def forward(self, x_PNCHW: Tensor | SharedMap) -> Normalised:
        """(P, N, C, H, W) → pooled map of the same shape, mean and var (P, C)."""
        return pool_together(x_PNCHW, [self])[0]


def pool_together(x_PNCHW: Tensor | SharedMap, pools: Sequence[Pool]) -> list[Normalised]:
    """The results of several pools of one map, which is read once."""
    norms = [cast(PartBatchNorm2d, pool[1]) for pool in pools]
    kinds = ["avg_pool" if isinstance(pool[0], nn.AvgPool2d) else "max_pool" for pool in pools]
    results = kernels.depthwise_fanout(unshared(x_PNCHW), kinds, stats=norms[0].training)
    return [
        (y, *norm.statistics(y, mean, var))
        for norm, (y, mean, var) in zip(norms, results, strict=True)
    ]


def _average_pool(parts: int, channels: int) -> Pool:
    return Pool(nn.AvgPool2d(3, stride=1, padding=1, count_include_pad=False), parts, channels)


def _max_pool(parts: int, channels: int) -> Pool:
    return Pool(nn.MaxPool2d(3, stride=1, padding=1), parts, channels)


_BRANCHES: dict[str, Callable[[int, int], nn.Module]] = {
    "separable": lambda parts, channels: Separable(parts, channels, count=2, dilation=1),
    "atrous": lambda parts, channels: Separable(parts, channels, count=1, dilation=2),
    "avg_pool": _average_pool,
    "max_pool": _max_pool,
}


def build_branch(name: str, parts: int, channels: int) -> Separable | Pool | None:
    """The candidate operation `name` as a branch: x → (raw map, mean, var), with `.relu`.

    None for `zero` and `skip`, which compute nothing.
    """
    return None if name in ("zero", "skip") else _BRANCHES[name](parts, channels)  # type: ignore[return-value]
