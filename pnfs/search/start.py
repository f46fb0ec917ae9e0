"""Where training begins when α and β are not uniform."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from pnfs.model import PoseNet
from pnfs.running import left_alone

IMAGES = 8  # of noise; batch normalisation makes them as good as real ones for this


@torch.no_grad()
def level_heads(model: nn.Module, architecture: Sequence[nn.Parameter], seed: int) -> None:
    """Scale each part's head so that its vectors start as long as they would under uniform mixes.

    A part has one α for all its cells, so that a mix with much `skip` magnifies from cell to cell,
    and one with much `zero` makes smaller. The heads' initial weights are made for uniform mixes:
    vectors ten times longer start a run with large gradients, and Adam's second moments, which
    remember a thousand steps, hold the weights back for long.

    Weights of `model` other than the heads', running statistics, α and β stay as they are.

    Args:
        model: with fresh weights; one that is not a PoseNet is left alone.
        architecture: its α and β.
        seed: of the noise, which is drawn on the CPU.
    """
    if not isinstance(model, PoseNet) or not any(map(torch.any, architecture)):
        return
    before, training = [tensor.clone() for tensor in architecture], model.training
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(IMAGES, 3, *model.config.input_size, generator=generator)
    images = noise.to(architecture[0])
    model.train()
    with left_alone():
        lengths = _lengths(model, images)
        for parameter in architecture:
            parameter.zero_()
        uniform = _lengths(model, images)
    model.train(training)
    for tensor, old in zip(architecture, before, strict=True):
        tensor.copy_(old)
    for conv, wanted, length in zip(model.head.convs, uniform, lengths, strict=True):
        if length > 0:  # a part whose mixes are `zero` alone predicts nothing
            cast(nn.Conv2d, conv).weight.mul_(wanted / length)


def _lengths(model: PoseNet, images: Tensor) -> list[Tensor]:
    """Mean length of each part's vectors."""
    return [v.float().square().sum(2).sqrt().mean() for v in model.vectors(images)]
