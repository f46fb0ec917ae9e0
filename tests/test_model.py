"""PoseNet and the model factory: shapes, shared interface, no dead weight, learning."""

from __future__ import annotations

import pytest
import torch

import pnfs
from pnfs.head import pose_loss


def _model(preset: str = "tiny", *overrides: str) -> torch.nn.Module:
    return pnfs.build_model(pnfs.load_config(preset, overrides).model)


@pytest.mark.parametrize("parts", [1, 3, 5, 8])
@pytest.mark.parametrize("vector_dim", [1, 8])
def test_scores_have_one_map_per_keypoint_at_a_quarter_of_the_input(parts, vector_dim):
    model = _model("tiny", f"model.parts={parts}", f"model.vector_dim={vector_dim}").eval()
    images = torch.randn(2, 3, 64, 32)
    vectors = model.vectors(images)
    table = model.config.part_table
    assert [tuple(v.shape) for v in vectors] == [
        (2, len(ks), vector_dim, 16, 8) for ks in table.values()
    ]
    scores = model(images)
    assert scores.shape == (2, 17, 16, 8)
    if vector_dim > 1 and parts in (1, 3):  # every keypoint in one part
        assert scores.min() >= 0 and scores.max() < 1


def test_every_parameter_gets_a_gradient():
    model = _model(
        "tiny", "model.backbone.operations=[zero, skip, separable, atrous, avg_pool, max_pool]"
    )
    joints = torch.rand(2, 17, 2) * 32
    pose_loss(model, torch.randn(2, 3, 64, 32), joints, torch.ones(2, 17), sigma=2.0).backward()
    without = [name for name, parameter in model.named_parameters() if parameter.grad is None]
    assert not without


def test_architecture_parameters_are_those_of_the_parts_then_of_a_fabric_backbone():
    model = _model()
    wanted = [
        model.fabric.alpha,
        model.fabric.beta,
        model.backbone.fabric.alpha,
        model.backbone.fabric.beta,
    ]
    assert [id(p) for p in model.architecture_parameters()] == [id(p) for p in wanted]


@pytest.mark.parametrize("preset", ["simplebaseline-r50", "hrnet-w32", "branchnet-1"])
def test_baselines_share_the_interface(preset):
    model = _model(preset).eval()
    with torch.no_grad():
        scores = model(torch.randn(1, 3, 64, 64))
    assert scores.shape == (1, 16, 16, 16)
    assert model.architecture_parameters() == []
    assert model.config.family == pnfs.load_config(preset).model.family


def test_a_few_steps_on_one_batch_lower_the_loss():
    model = _model("tiny", "model.backbone.operations=[skip, separable]")
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    images, joints = torch.randn(4, 3, 64, 32), torch.rand(4, 17, 2) * torch.tensor([32.0, 64.0])
    losses = []
    for _ in range(8):
        loss = pose_loss(model, images, joints, torch.ones(4, 17), sigma=2.0)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
