"""Mean and variance of a stacked map, with their gradient, against the reference."""

from __future__ import annotations

from typing import Any

import harness
import pytest
import torch
from torch import Tensor

from pnfs.kernels import batch_stats
from pnfs.kernels.checks import as_stacked


@pytest.mark.parametrize("level", harness.FABRIC_LEVELS, ids=lambda level: f"c{level[0]}")
@pytest.mark.parametrize(("backend", "device"), harness.backends("batch_stats"))
def bench_batch_stats(measure: Any, backend: str, device: str, level: tuple[int, int, int]) -> None:
    parts, batch, (channels, height, width) = harness.PARTS, 8, level
    map_ = as_stacked(torch.randn(parts, batch, *level, device=device))
    inputs = [map_]

    def run(x: Tensor) -> tuple[Tensor, Tensor]:
        return batch_stats(x)

    def call(dtype: torch.dtype, backend: str) -> Any:
        return harness.forward_backward(
            harness.on_backend(backend, run), [x.to(dtype) for x in inputs]
        )

    measure(
        harness.Case(
            op="batch_stats",
            name=f"{parts}x{batch}x{channels}x{height}x{width} float32 forward+backward",
            backend=backend,
            device=device,
            call=call(torch.float32, backend),
            want=call(torch.float64, "torch")(),
            tolerance=1e-4,
            bytes=3 * map_.nbytes,
            against=harness.references(run, inputs),
        )
    )
