"""Several stencils of one read of x, with their statistics, against the reference: the pools of a
fabric's edge, an edge with all stencils, and MobileNetV2's depthwise layers."""

from __future__ import annotations

from typing import Any

import harness
import pytest
import torch
from torch import Tensor

from pnfs.kernels import depthwise_fanout
from pnfs.kernels.checks import as_stacked

POOLS = ("avg_pool", "max_pool")
FANOUT = ("conv", "conv", *POOLS)
# name: parts, batch, channels, height, width, stencils, stride, whether x is normalised with ReLU6
CASES = {
    "pools": (harness.PARTS, 8, *harness.FABRIC_LEVELS[0], POOLS, 1, False),
    "fanout": (harness.PARTS, 8, *harness.FABRIC_LEVELS[0], FANOUT, 1, False),
    "mobilenet-stride1": (1, 8, 144, 64, 48, ("conv",), 1, True),
    "mobilenet-stride2": (1, 8, 96, 128, 96, ("conv",), 2, True),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("backend", "device"), harness.backends("depthwise_fanout"))
def bench_depthwise_fanout(measure: Any, backend: str, device: str, case: str) -> None:
    parts, batch, channels, height, width, kinds, stride, normalised = CASES[case]
    map_ = as_stacked(torch.randn(parts, batch, channels, height, width, device=device))
    convolutions = kinds.count("conv")
    weights = [torch.randn(parts, channels, 3, 3, device=device) / 3 for _ in range(convolutions)]
    norm = [torch.rand(parts, channels, device=device) + 0.5 for _ in range(4 * normalised)]

    def run(x: Tensor, *rest: Tensor) -> Any:
        mean, var, gamma, beta = rest[convolutions:] or (None,) * 4
        results = depthwise_fanout(
            x, kinds, rest[:convolutions], range(1, convolutions + 1), stride=stride, mean=mean,
            var=var, gamma=gamma, beta=beta, activation="relu6" if normalised else "none",
        )  # fmt: skip
        return tuple(tensor for result in results for tensor in result)

    measure(
        harness.gradient_case(
            "depthwise_fanout",
            f"{case} {parts}x{batch}x{channels}x{height}x{width}",
            run,
            [map_, *weights, *norm],
            backend=backend,
            device=device,
            tolerance=2e-3,
            # x twice and its gradient, each result written, read, and its gradient read.
            bytes=3 * map_.nbytes + 3 * len(kinds) * map_.nbytes // stride**2,
            # Of the convolutions alone: forward, the input's gradient and the weight's.
            flops=3 * 2 * 9 * convolutions * map_.numel() // stride**2,
        )
    )
