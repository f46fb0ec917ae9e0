"""What the tests of vector_heatmap_loss share: its calls and the check of one."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from keypoint_vectors import ROUNDING, Parts, assert_close_to, backends, doubled, random_vectors
from torch import Tensor

from pnfs.kernels import native, use_backend, vector_heatmap_loss

on_every_backend = backends("vector_heatmap_loss")
needs_cpp = pytest.mark.skipif(
    not native.has_function("_cpu", "vector_heatmap_loss")[0], reason="pnfs._cpu is not built"
)


@dataclass
class Case:
    """The arguments of one call."""

    vectors: list[Tensor]
    parts: Parts
    joints: Tensor
    weights: Tensor
    options: dict[str, float] = field(default_factory=lambda: {"sigma": 2.0})

    def loss(self, vectors: list[Tensor] | None = None) -> Tensor:
        given = self.vectors if vectors is None else vectors
        device = given[0].device
        joints, weights = self.joints.to(device), self.weights.to(device)
        return vector_heatmap_loss(given, self.parts, joints, weights, **self.options)


def random_case(
    parts: Parts, shape: tuple[int, int, int, int], *, seed: int = 0, **options: Any
) -> Case:
    """Joints inside and up to two cells outside of the map, on multiples of 1/8 pixel; one keypoint
    in three is masked, others have weights of any size."""
    n, _, h, w = shape
    k = 1 + max(k for part in parts for k in part)
    generator = torch.Generator().manual_seed(seed)
    joints = torch.rand(n, k, 2, generator=generator) * torch.tensor([w + 4, h + 4]) * 4 - 8
    weights = torch.rand(n, k, generator=generator) * 2
    weights[torch.rand(n, k, generator=generator) < 0.33] = 0
    return Case(
        random_vectors(parts, shape, seed=seed, **options), parts, (joints * 8).round() / 8, weights
    )


def loss_and_gradients(
    case: Case, vectors: list[Tensor] | None = None, factor: float = 1.0
) -> tuple[Tensor, tuple[Tensor, ...]]:
    vectors = case.vectors if vectors is None else vectors
    loss = case.loss(vectors)
    return loss, torch.autograd.grad(loss * factor, vectors)


def check(case: Case, backend: str, factor: float = 1.0) -> None:
    dtype = case.vectors[0].dtype
    with use_backend(backend):
        loss, gradients = loss_and_gradients(case, factor=factor)
        with torch.no_grad():
            alone = case.loss()
    with use_backend("torch"):
        want, want_gradients = loss_and_gradients(case, doubled(case.vectors), factor)
    assert loss.dtype == torch.float32
    assert loss.shape == ()
    assert alone.item() == loss.item()
    assert loss.item() == pytest.approx(want.item(), rel=1e-6)
    assert all(g.dtype == dtype for g in gradients)
    rounded_twice = 2 if factor != 1 else 1
    # A part without a visible keypoint has no gradient to compare with; hence the loss's scale.
    scale = max((g.abs().max().item() for g in want_gradients if g.numel()), default=0)
    assert_close_to(
        [torch.cat([g.detach().cpu().double().flatten() for g in gradients])],
        [torch.cat([g.flatten() for g in want_gradients])],
        rounded_twice * ROUNDING[dtype] + (6e-8 / scale if dtype == torch.float16 and scale else 0),
    )
