"""A whole training step through the kernels is the reference's step."""

from __future__ import annotations

import copy

import pytest
import torch
from runs import SETTINGS
from torch import Tensor, nn

from pnfs import kernels
from pnfs.config import load_config
from pnfs.head import pose_loss
from pnfs.model import build_model

PRESETS = {
    "small": list(SETTINGS),
    "tiny": ["model.input_size=[64, 64]"],
    "ours-1": ["model.input_size=[64, 64]"],
}


def step(model: nn.Module, dtype: torch.dtype, backend: str) -> tuple[Tensor, list[Tensor]]:
    """Loss and gradients of one batch, in float64, from a fresh copy of the model."""
    own = copy.deepcopy(model).to(dtype).train()
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(6, 3, 64, 64, generator=generator).to(dtype)
    joints = torch.rand(6, 17, 2, generator=generator).to(dtype) * 64
    weights = (torch.rand(6, 17, generator=generator) > 0.2).to(dtype)
    with kernels.use_backend(backend):
        loss = pose_loss(own, images, joints, weights, sigma=2.0)
        gradients = torch.autograd.grad(loss, list(own.parameters()), materialize_grads=True)
    return loss.double(), [gradient.double() for gradient in gradients]


def random_model(preset: str) -> nn.Module:
    source = "tiny" if preset == "small" else preset
    torch.manual_seed(0)
    model = build_model(load_config(source, PRESETS[preset]).model)
    for parameter in model.architecture_parameters():  # type: ignore[operator]
        nn.init.normal_(parameter)
    return model


def errors(gradients: list[Tensor], right: list[Tensor]) -> Tensor:
    """Per tensor, the norm of the error over that of the gradient, or of all gradients' thousandth
    where a gradient is zero but for rounding (a bias before a batch normalisation)."""
    floor = 1e-3 * torch.stack([g.norm() for g in right]).norm()
    pairs = zip(gradients, right, strict=True)
    return torch.stack([(a - b).norm() / torch.maximum(b.norm(), floor) for a, b in pairs])


@pytest.mark.parametrize("preset", PRESETS)
def test_a_training_step_through_kernels_is_the_references(preset: str) -> None:
    """In float32 either way is off: the sign of a value near a ReLU's kink follows the order of a
    sum, and with it the path of a gradient. Kernels must be as near the float64 step as float32
    lets the reference be."""
    model = random_model(preset)
    right_loss, right = step(model, torch.float64, "torch")
    loss, ours = step(model, torch.float32, "auto")
    _, reference = step(model, torch.float32, "torch")
    assert abs(loss / right_loss - 1) < 1e-6
    mine, theirs = errors(ours, right), errors(reference, right)
    assert mine.median() <= 2 * theirs.median()
    assert mine.max() <= max(1e-4, 3 * float(theirs.max()))
