"""SimpleBaseline, HRNet and Branchnet: PoseNet's interface, scalar heatmaps, vectors in pixels."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from pnfs.backbones.base import Backbone
from pnfs.baselines import Baseline, Branchnet, HRNet, SimpleBaseline
from pnfs.config import BranchnetConfig, ModelConfig
from pnfs.errors import PnfsError
from pnfs.head import squash_score
from pnfs.model import build_model

FAMILIES: dict[str, tuple[type[Baseline], dict[str, Any]]] = {
    "simplebaseline": (SimpleBaseline, {"parts": 1, "backbone": "resnet50"}),
    "hrnet": (HRNet, {"parts": 1, "backbone": "hrnet_w32"}),
    "branchnet": (
        Branchnet,
        {"parts": 8, "backbone": "mobilenet_v2", "branchnet": BranchnetConfig(width=32, blocks=2)},
    ),
}


def config(family: str, d: int) -> ModelConfig:
    return ModelConfig(family=family, vector_dim=d, **FAMILIES[family][1])


def as_baseline(model: nn.Module) -> Baseline:
    assert isinstance(model, Baseline)
    return model


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("d", [1, 8])
def test_interface_and_shapes_are_those_of_pose_net(family: str, d: int) -> None:
    cfg = config(family, d)
    with torch.device("meta"):
        model = as_baseline(build_model(cfg))
        images = torch.empty(2, 3, 64, 96)
    assert type(model) is FAMILIES[family][0]
    assert model.config == cfg and model.architecture_parameters() == []
    assert isinstance(model.backbone, Backbone)
    assert model(images).shape == (2, 17, 16, 24)
    counts = [len(keypoints) for keypoints in cfg.part_table.values()]
    assert [tuple(v.shape) for v in model.vectors(images)] == [(2, k, d, 16, 24) for k in counts]


@pytest.mark.parametrize("family", FAMILIES)
def test_scores_are_linear_for_d_1_and_squashed_lengths_for_d_8(family: str) -> None:
    images = torch.randn(1, 3, 64, 64)
    for d in (1, 8):
        model = as_baseline(build_model(config(family, d))).eval()
        with torch.no_grad():
            scores, vectors = model(images), model.vectors(images)
        part_scores = [v[:, :, 0] if d == 1 else squash_score(v) for v in vectors]
        expected = torch.zeros_like(scores)
        for part, keypoints in zip(part_scores, model.config.part_table.values(), strict=True):
            for column, keypoint in enumerate(keypoints):
                expected[:, keypoint] += part[:, column]
        torch.testing.assert_close(scores, expected)
        assert (scores.min() < 0) == (d == 1)


def test_output_channels_are_keypoint_major() -> None:
    """Channel = keypoint · d + component, as in published checkpoints."""
    model = as_baseline(build_model(config("simplebaseline", 8))).eval()
    conv = model.head.convs[0]
    assert isinstance(conv, nn.Conv2d)
    with torch.no_grad():
        conv.weight.zero_()
        assert conv.bias is not None
        conv.bias.copy_(torch.arange(17 * 8))
        vectors = model.vectors(torch.zeros(1, 3, 32, 32))[0]
    assert vectors[0, 5, 3, 0, 0] == 5 * 8 + 3


@pytest.mark.parametrize("family", FAMILIES)
def test_every_weight_learns(family: str) -> None:
    model = build_model(config(family, 8)).train()
    (model(torch.randn(2, 3, 64, 64)) - 0.5).square().mean().backward()
    for name, parameter in model.named_parameters():
        gradient = parameter.grad
        assert gradient is not None and gradient.isfinite().all() and gradient.any(), name


def test_branches_of_branchnet_are_separate() -> None:
    model = build_model(config("branchnet", 1)).eval()
    assert isinstance(model, Branchnet)
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        before = model.vectors(images)
        for parameter in model.branches[0].parameters():
            parameter.add_(0.1)
        after = model.vectors(images)
    assert not torch.equal(before[0], after[0])
    for unchanged, same in zip(before[1:], after[1:], strict=True):
        assert torch.equal(unchanged, same)


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"family": "hrnet", "backbone": "hrnet_w32", "parts": 3}, "model.parts"),
        ({"family": "simplebaseline", "backbone": "resnet50", "parts": 3}, "model.parts"),
        ({"family": "branchnet", "branchnet": {"width": 30}}, "model.branchnet.width"),
    ],
)
def test_what_a_family_cannot_do_is_one_line(changes: dict[str, Any], key: str) -> None:
    with torch.device("meta"), pytest.raises(PnfsError) as caught:
        build_model(ModelConfig(**changes))
    assert str(caught.value).startswith(f"{key}: ") and "\n" not in str(caught.value)
