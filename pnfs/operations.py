"""Candidate operations of Eq. 1 and the layers they are made of, for P parts at once.

Every weight carries the parts on its leading axis, and so does every feature map: `x_PNCHW` is
(P parts, N batch, C channels, H, W), channels-last inside each part. Layers define what they do to
one part (`forward_part`); `over_parts` walks the parts and stacks the results.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

BN_MOMENTUM = 0.1
BN_EPS = 1e-5


def stack_parts(parts: Sequence[Tensor]) -> Tensor:
    """P tensors (N, C, H, W) → one (P, N, C, H, W), channels-last inside."""
    return torch.stack([x.permute(0, 2, 3, 1) for x in parts]).permute(0, 1, 4, 2, 3)


class PartLayer(nn.Module):
    """A layer with separate weights for each of P parts."""

    def forward_part(self, x_NCHW: Tensor, part: int) -> Tensor:
        raise NotImplementedError

    def forward(self, x_PNCHW: Tensor) -> Tensor:
        return over_parts([self], x_PNCHW)


def over_parts(layers: Sequence[nn.Module], x_PNCHW: Tensor) -> Tensor:
    """Send each part through a chain of `PartLayer`s; one stack at the end, none in between."""
    outputs = []
    for part, x_NCHW in enumerate(x_PNCHW.unbind(0)):
        for layer in layers:
            x_NCHW = layer.forward_part(x_NCHW, part)  # type: ignore[operator]
        outputs.append(x_NCHW)
    return stack_parts(outputs)


class PartConv2d(PartLayer):
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

    def forward_part(self, x_NCHW: Tensor, part: int) -> Tensor:
        bias = None if self.bias is None else self.bias[part]
        return F.conv2d(
            x_NCHW, self.weight[part], bias, self.stride, self.padding, self.dilation, self.groups
        )

    def extra_repr(self) -> str:
        shape = tuple(self.weight.shape)
        return (
            f"weight={shape}, stride={self.stride}, dilation={self.dilation}, groups={self.groups}"
        )


class PartBatchNorm2d(PartLayer):
    """P batch normalisations, with or without scale and shift. Statistics and parameters (P, C)."""

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, parts: int, channels: int, *, affine: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(parts, channels)) if affine else None
        self.bias = nn.Parameter(torch.zeros(parts, channels)) if affine else None
        self.register_buffer("running_mean", torch.zeros(parts, channels))
        self.register_buffer("running_var", torch.ones(parts, channels))

    def forward_part(self, x_NCHW: Tensor, part: int) -> Tensor:
        return F.batch_norm(
            x_NCHW,
            self.running_mean[part],
            self.running_var[part],
            None if self.weight is None else self.weight[part],
            None if self.bias is None else self.bias[part],
            self.training,
            BN_MOMENTUM,
            BN_EPS,
        )

    def extra_repr(self) -> str:
        return f"{tuple(self.running_mean.shape)}, affine={self.weight is not None}"


class PartFunction(PartLayer):
    """A function without weights, the same for every part."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward_part(self, x_NCHW: Tensor, part: int) -> Tensor:
        return self.function(x_NCHW)


def depthwise_separable(parts: int, channels: int, *, dilation: int) -> list[nn.Module]:
    """Depthwise 3×3 → 1×1 → BN without scale and shift → ReLU."""
    return [
        PartConv2d(parts, channels, channels, 3, dilation=dilation, groups=channels),
        PartConv2d(parts, channels, channels, 1),
        PartBatchNorm2d(parts, channels, affine=False),
        PartFunction(F.relu),
    ]


def _average_pool(x: Tensor) -> Tensor:
    return F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)


def _max_pool(x: Tensor) -> Tensor:
    return F.max_pool2d(x, 3, stride=1, padding=1)


def _pool(function: Callable[[Tensor], Tensor], parts: int, channels: int) -> list[nn.Module]:
    return [PartFunction(function), PartBatchNorm2d(parts, channels, affine=False)]


class Operation(nn.Sequential):
    """One candidate operation of all P parts: a chain of `PartLayer`s, shape-preserving.

    An empty chain is the identity.
    """

    def forward(self, x_PNCHW: Tensor) -> Tensor:
        return over_parts(list(self), x_PNCHW) if len(self) else x_PNCHW


_BUILDERS: dict[str, Callable[[int, int], list[nn.Module]]] = {
    "skip": lambda parts, channels: [],
    "separable": lambda parts, channels: (
        depthwise_separable(parts, channels, dilation=1)
        + depthwise_separable(parts, channels, dilation=1)
    ),
    "atrous": lambda parts, channels: depthwise_separable(parts, channels, dilation=2),
    "avg_pool": lambda parts, channels: _pool(_average_pool, parts, channels),
    "max_pool": lambda parts, channels: _pool(_max_pool, parts, channels),
}


def build_operation(name: str, parts: int, channels: int) -> Operation | None:
    """The candidate operation `name`; None for `zero`, which is 0 and costs nothing."""
    return None if name == "zero" else Operation(*_BUILDERS[name](parts, channels))
