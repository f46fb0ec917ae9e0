"""Vector in pixel: squash, merging, targets and loss follow their equations."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from pnfs.config import load_config
from pnfs.head import (
    VectorHead,
    heatmap_loss,
    merge_parts,
    pose_loss,
    render_targets,
    squash_score,
)
from pnfs.kernels import native, use_backend
from pnfs.model import build_model


def test_the_score_is_the_length_of_the_squashed_vector():
    v = torch.randn(2, 3, 8, 4, 5, dtype=torch.float64)
    n = v.norm(dim=2, keepdim=True)
    squashed = n**2 / (1 + n**2) * v / n  # Eq. 4
    torch.testing.assert_close(squash_score(v), squashed.norm(dim=2))  # Eq. 5


def test_the_squash_has_a_finite_gradient_at_zero():
    v = torch.zeros(1, 1, 8, 2, 2, requires_grad=True)
    squash_score(v).sum().backward()
    assert torch.equal(v.grad, torch.zeros_like(v))


def test_keypoints_of_several_parts_are_summed():
    parts = {"upper": (0, 1), "lower": (1, 2)}
    vectors = [torch.randn(2, 2, 4, 3, 3) for _ in parts]
    scores = merge_parts(vectors, parts, 3)
    torch.testing.assert_close(
        scores[:, 1], squash_score(vectors[0])[:, 1] + squash_score(vectors[1])[:, 0]
    )
    torch.testing.assert_close(scores[:, 2], squash_score(vectors[1])[:, 1])


def test_one_component_is_a_plain_linear_map():
    vectors = [torch.randn(2, 3, 1, 4, 4)]
    assert torch.equal(merge_parts(vectors, {"all": (2, 0, 1)}, 3), vectors[0][:, [1, 2, 0], 0])


def test_head_channels_are_keypoint_times_d_plus_component():
    head = VectorHead(4, [2, 3], 5)
    features = [torch.randn(1, 4, 2, 2) for _ in range(2)]
    vectors = head(features)
    assert [tuple(v.shape) for v in vectors] == [(1, 2, 5, 2, 2), (1, 3, 5, 2, 2)]
    flat = head.convs[1](features[1].relu())
    assert torch.equal(vectors[1][:, 2, 4], flat[:, 2 * 5 + 4])
    for apart, together in zip(vectors, head(torch.stack(features)), strict=True):
        assert torch.equal(apart, together)


def test_targets_peak_at_one_in_the_published_cell_also_on_the_border():
    joints = torch.tensor([[[0.0, 0.0], [191.9, 255.9], [101.0, 50.0], [1.9, 2.1]]])
    target = render_targets(joints, (64, 48), sigma=2.0)
    peaks = [divmod(int(index), 48) for index in target[0].flatten(1).argmax(1)]
    assert peaks == [(0, 0), (63, 47), (13, 25), (1, 0)]
    assert torch.equal(target.amax((2, 3)), torch.ones(1, 4))
    assert target[0, 2, 13, 25 + 2].item() == pytest.approx(math.exp(-(2**2) / 8))


def test_targets_agree_with_the_published_ones_away_from_the_border(shared_dir):
    data = np.load(shared_dir / "reference" / "pipeline.npz")
    joints = torch.tensor(data["tgt_a_kp_out"][None, :, :2])
    target = render_targets(joints, (64, 48), sigma=2.0)[0].numpy()
    seen = 0
    for ours, theirs, visible in zip(target, data["tgt_a_heat"], data["tgt_a_vis"], strict=True):
        y, x = np.unravel_index(theirs.argmax(), theirs.shape)
        if not visible:
            continue
        assert (y, x) == np.unravel_index(ours.argmax(), ours.shape)
        if 9 <= y < 64 - 9 and 9 <= x < 48 - 9:  # the published blur is truncated at 4 sigma
            np.testing.assert_allclose(ours, theirs, atol=5e-4)
            seen += 1
    assert seen


def test_masked_joints_stay_in_the_denominator():
    scores, target = torch.rand(2, 4, 3, 5), torch.rand(2, 4, 3, 5)
    weight = torch.tensor([[1.0, 0, 1, 1], [0, 0, 1, 1]])
    by_hand = sum(
        0.5 * weight[n, k] * (scores[n, k] - target[n, k]).square().mean()
        for n in range(2)
        for k in range(4)
    )
    torch.testing.assert_close(heatmap_loss(scores, target, weight), by_hand / 8)


@pytest.mark.skipif(
    not native.has_function("_cpu", "vector_heatmap_loss")[0], reason="pnfs._cpu is not built"
)
@pytest.mark.parametrize("override", ["model.parts=3", "model.parts=8", "model.vector_dim=1"])
def test_a_training_step_through_the_kernels_equals_that_of_the_reference(override):
    """Loss and every gradient. The rest of the model runs on the reference both times."""
    model = build_model(load_config("tiny", [override]).model)
    images = torch.randn(2, 3, 128, 96)
    joints, weights = torch.rand(2, 17, 2) * 100 - 2, (torch.rand(2, 17) < 0.7).float()
    results = {}
    for backend in ("torch", "cpp"):
        ops = {"*": "torch", "vector_heatmap_loss": backend}
        with use_backend(ops):
            loss = pose_loss(model, images, joints, weights, sigma=2.0)
            gradients = torch.autograd.grad(loss, list(model.parameters()))
        results[backend] = loss.item(), gradients
    (want, reference), (have, gradients) = results["torch"], results["cpp"]
    assert have == pytest.approx(want, rel=1e-6)
    # A bias before a batch normalisation has gradient 0 and rounding errors, hence the floor.
    floor = 1e-4 * torch.stack([gradient.norm() for gradient in reference]).norm()
    for one, other in zip(gradients, reference, strict=True):
        assert (one - other).norm() < 1e-4 * other.norm().clamp(min=floor)


def test_the_loss_of_the_vectors_is_the_loss_of_the_score_maps():
    model = build_model(load_config("tiny", ["model.parts=5"]).model).eval()
    images, joints = torch.randn(2, 3, 64, 96), torch.rand(2, 17, 2) * 64
    weights = (torch.rand(2, 17) < 0.7).float()
    with torch.no_grad():
        target = render_targets(joints, (16, 24), sigma=3.0)
        want = heatmap_loss(model(images), target, weights)
        loss = pose_loss(model, images, joints, weights, sigma=3.0)
    torch.testing.assert_close(loss, want)
