"""Running statistics move as torch's, together or at once, or not at all."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from pnfs.backbones import build_backbone
from pnfs.backbones.norm import BatchNormAct2d
from pnfs.config import load_config
from pnfs.running import left_alone, move_running_statistics, moved_together


def norms_of_torch_and_ours() -> tuple[nn.BatchNorm2d, BatchNormAct2d]:
    theirs, ours = nn.BatchNorm2d(5, momentum=0.3), BatchNormAct2d(5)
    ours.momentum = 0.3
    return theirs, ours


@pytest.mark.parametrize("together", [False, True])
def test_they_move_as_torchs(together: bool) -> None:
    theirs, ours = norms_of_torch_and_ours()
    for _ in range(2):
        x = torch.randn(3, 5, 4, 2)
        theirs(x)
        if together:
            before = ours.running_mean.clone()
            with moved_together():
                ours(x)
                assert torch.equal(ours.running_mean, before)
        else:
            ours(x)
    for (name, have), want in zip(ours.named_buffers(), theirs.buffers(), strict=True):
        torch.testing.assert_close(have, want, msg=name)


def test_together_and_one_by_one_are_equal() -> None:
    alone, whole = (build_backbone(load_config("tiny").model) for _ in range(2))
    whole.load_state_dict(alone.state_dict())
    images = torch.randn(2, 3, 64, 64)
    alone(images)
    with moved_together():
        whole(images)
    for have, want in zip(whole.buffers(), alone.buffers(), strict=True):
        assert torch.equal(have, want)


def test_a_context_inside_another_waits_for_its_end() -> None:
    _, norm = norms_of_torch_and_ours()
    untouched = copy.deepcopy(norm)
    with moved_together():
        with moved_together():
            norm(torch.randn(3, 5, 4, 2))
        assert torch.equal(norm.running_mean, untouched.running_mean)
    assert norm.num_batches_tracked == 1
    assert not torch.equal(norm.running_mean, untouched.running_mean)


def test_a_pass_that_is_left_alone_or_fails_moves_nothing() -> None:
    _, norm = norms_of_torch_and_ours()
    untouched = copy.deepcopy(norm)
    with left_alone(), moved_together():
        norm(torch.randn(3, 5, 4, 2))
    with pytest.raises(RuntimeError, match="cut off"), moved_together():
        norm(torch.randn(3, 5, 4, 2))
        raise RuntimeError("cut off")
    for have, want in zip(norm.buffers(), untouched.buffers(), strict=True):
        assert torch.equal(have, want)


def test_one_value_has_no_variance_to_correct() -> None:
    mean, var = torch.zeros(1), torch.ones(1)
    move_running_statistics(mean, var, torch.tensor([2.0]), torch.tensor([0.0]), 1.0)
    torch.testing.assert_close(torch.cat([mean, var]), torch.tensor([0.2, 0.9]))
