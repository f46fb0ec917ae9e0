"""Eq. 1: skip and two normalised branches, forward and backward, against the reference."""

from __future__ import annotations

from typing import Any

import harness
import pytest
import torch
from torch import Tensor

from pnfs.kernels import mixed_sum
from pnfs.kernels.checks import as_stacked


@pytest.mark.parametrize("level", harness.FABRIC_LEVELS, ids=lambda level: f"c{level[0]}")
@pytest.mark.parametrize(("backend", "device"), harness.backends("mixed_sum"))
def bench_mixed_sum(measure: Any, backend: str, device: str, level: tuple[int, int, int]) -> None:
    parts, batch, (channels, height, width) = harness.PARTS, 8, level
    map_ = as_stacked(torch.randn(parts, batch, *level, device=device))
    maps = [map_, *(as_stacked(torch.randn_like(map_)) for _ in range(2))]
    per_channel = [torch.rand(parts, channels, device=device) + 0.5 for _ in range(4)]
    inputs = [*maps, *per_channel, torch.rand(parts, 3, device=device)]

    def run(*tensors: Tensor) -> Tensor:
        x, *branches = tensors[:3]
        return mixed_sum(x, branches, tensors[3:5], tensors[5:7], tensors[7], relu=[True, True])

    measure(
        harness.gradient_case(
            "mixed_sum",
            f"{parts}x{batch}x{channels}x{height}x{width}",
            run,
            inputs,
            backend=backend,
            device=device,
            tolerance=1e-3,
            bytes=11 * map_.nbytes,
        )
    )
