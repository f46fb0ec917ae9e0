"""3×3 convolution with stride 2 and the statistics of its result: against the reference."""

from __future__ import annotations

from typing import Any

import harness
import pytest
import torch
from torch import Tensor

from pnfs.kernels import strided_conv
from pnfs.kernels.checks import as_stacked


@pytest.mark.parametrize("level", harness.FABRIC_LEVELS[:2], ids=lambda level: f"c{level[0]}")
@pytest.mark.parametrize(("backend", "device"), harness.backends("strided_conv"))
def bench_strided_conv(
    measure: Any, backend: str, device: str, level: tuple[int, int, int]
) -> None:
    parts, batch, (channels, height, width) = harness.PARTS, 8, level
    map_ = as_stacked(torch.randn(parts, batch, *level, device=device))
    weight = torch.randn(parts, 2 * channels, channels, 3, 3, device=device) / (3 * channels**0.5)
    inputs = [map_, weight, torch.randn(parts, 2 * channels, device=device)]

    def run(x: Tensor, weight: Tensor, bias: Tensor) -> Any:
        return strided_conv(x, weight, bias)

    measure(
        harness.gradient_case(
            "strided_conv",
            f"{parts}x{batch}x{channels}x{height}x{width}",
            run,
            inputs,
            backend=backend,
            device=device,
            tolerance=2e-3,
            bytes=5 * map_.nbytes,
            flops=3 * 2 * weight.numel() * batch * height * width // 4,
        )
    )
