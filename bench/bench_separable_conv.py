"""BN and ReLU on load, depthwise 3×3, 1×1, statistics: against the reference."""

from __future__ import annotations

from typing import Any

import harness
import pytest
import torch
from torch import Tensor

from pnfs.kernels import separable_conv
from pnfs.kernels.checks import as_stacked


@pytest.mark.parametrize("level", harness.FABRIC_LEVELS, ids=lambda level: f"c{level[0]}")
@pytest.mark.parametrize(("backend", "device"), harness.backends("separable_conv"))
def bench_separable_conv(
    measure: Any, backend: str, device: str, level: tuple[int, int, int]
) -> None:
    parts, batch, (channels, height, width) = harness.PARTS, 8, level
    map_ = as_stacked(torch.randn(parts, batch, *level, device=device))
    per_channel = [torch.rand(parts, channels, device=device) + 0.5 for _ in range(2)]
    depthwise = torch.randn(parts, channels, 3, 3, device=device) / 3
    pointwise = torch.randn(parts, channels, channels, device=device) / channels**0.5
    inputs = [map_, pointwise, depthwise, *per_channel]

    def run(x: Tensor, pointwise: Tensor, depthwise: Tensor, *stats: Tensor) -> Any:
        mean, var = stats
        return separable_conv(x, pointwise, depthwise=depthwise, mean=mean, var=var)

    measure(
        harness.gradient_case(
            "separable_conv",
            f"{parts}x{batch}x{channels}x{height}x{width}",
            run,
            inputs,
            backend=backend,
            device=device,
            tolerance=2e-3,
            bytes=5 * map_.nbytes,
            # Each product forward, for the input's gradient and for the weight's.
            flops=3 * 2 * (9 + channels) * map_.numel(),
        )
    )
