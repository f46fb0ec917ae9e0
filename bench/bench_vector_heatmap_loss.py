"""The loss from vectors and joints, with its gradient, against the reference."""

from __future__ import annotations

from typing import Any

import harness
import pytest
import torch
from torch import Tensor

from pnfs.kernels import vector_heatmap_loss
from pnfs.skeleton import COCO


@pytest.mark.parametrize("count", [1, 24])
@pytest.mark.parametrize(("backend", "device"), harness.backends("vector_heatmap_loss"))
def bench_vector_heatmap_loss(measure: Any, backend: str, device: str, count: int) -> None:
    parts = list(COCO.resolve_parts(harness.PARTS).values())
    vectors = harness.keypoint_vectors(parts, count, device)
    joints = torch.rand(count, COCO.num_keypoints, 2, device=device) * 190
    weights = torch.ones(count, COCO.num_keypoints, device=device)

    def run(*tensors: Tensor) -> Tensor:
        return vector_heatmap_loss(tensors, parts, joints, weights, sigma=2.0)

    def call(dtype: torch.dtype, backend: str) -> Any:
        inputs = [v.to(dtype) for v in vectors]
        return harness.forward_backward(harness.on_backend(backend, run), inputs)

    measure(
        harness.Case(
            op="vector_heatmap_loss",
            name=f"{count} images float32 forward+backward",
            backend=backend,
            device=device,
            call=call(torch.float32, backend),
            want=call(torch.float64, "torch")(),
            tolerance=1e-5,
            bytes=2 * sum(v.nbytes for v in vectors),
            against=harness.references(run, vectors),
        )
    )
