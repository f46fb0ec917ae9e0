"""Eq. 2: the same scale, a strided convolution and an upsampled one, against the reference."""

from __future__ import annotations

from typing import Any

import harness
import pytest
import torch
from torch import Tensor

from pnfs.kernels import scale_mix
from pnfs.kernels.checks import as_stacked


@pytest.mark.parametrize("level", harness.FABRIC_LEVELS, ids=lambda level: f"c{level[0]}")
@pytest.mark.parametrize(("backend", "device"), harness.backends("scale_mix"))
def bench_scale_mix(measure: Any, backend: str, device: str, level: tuple[int, int, int]) -> None:
    parts, batch, (channels, height, width) = harness.PARTS, 8, level
    map_ = as_stacked(torch.randn(parts, batch, *level, device=device))
    half = torch.randn(parts, batch, channels, height // 2, width // 2, device=device)
    maps = [map_, as_stacked(torch.randn_like(map_)), as_stacked(half)]
    per_channel = [torch.rand(parts, channels, device=device) + 0.5 for _ in range(8)]
    inputs = [*maps, *per_channel, torch.rand(parts, 3, device=device)]

    def run(*tensors: Tensor) -> Tensor:
        means, variances, gammas, betas = (tensors[i : i + 2] for i in (3, 5, 7, 9))
        return scale_mix(
            tensors[:3], ["same", "down", "up"], means, variances, gammas, betas, tensors[11],
            relu=True,
        )  # fmt: skip

    measure(
        harness.gradient_case(
            "scale_mix",
            f"{parts}x{batch}x{channels}x{height}x{width}",
            run,
            inputs,
            backend=backend,
            device=device,
            tolerance=2e-3,
            bytes=8 * map_.nbytes,
        )
    )
