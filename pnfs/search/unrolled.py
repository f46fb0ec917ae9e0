"""One step of the weights' optimiser, unrolled for the gradient through it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.optim import Optimizer


def unrolled_adam(
    optimizer: Optimizer,
    parameters: Sequence[nn.Parameter],
    gradients: Sequence[Tensor],
    rate: float,
    limit: float | None,
) -> tuple[list[Tensor], list[Tensor], Callable[[list[Tensor]], list[Tensor]]]:
    """One step of Adam without taking it.

    Args:
        parameters: some of the optimiser's. gradients: theirs, unclipped.
        rate: the learning rate. limit: of the gradients' total norm, or None.

    Returns:
        The changes of the parameters; the derivatives of each entry's change by its own clipped
        gradient; and the transposed derivative of clipping, to apply to a list of tensors.
    """
    norm = math.sqrt(sum(float(g.double().square().sum()) for g in gradients))
    scale = 1.0 if limit is None else min(1.0, limit / (norm + 1e-6))
    group_of = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    changes, slopes = [], []
    for parameter, gradient in zip(parameters, gradients, strict=True):
        group, state = group_of[id(parameter)], optimizer.state.get(parameter, {})
        (b1, b2), eps = group["betas"], group["eps"]
        g = scale * gradient + group["weight_decay"] * parameter.detach()
        zero = torch.zeros_like(g)
        t = float(state.get("step", 0)) + 1
        m = b1 * state.get("exp_avg", zero) + (1 - b1) * g
        second = (b2 * state.get("exp_avg_sq", zero) + (1 - b2) * g * g).sqrt()
        root = math.sqrt(1 - b2**t)
        below = second / root + eps
        factor = rate / (1 - b1**t)
        changes.append(-factor * m / below)
        # d√v/dg = (1 - b2) g / √v, which stays bounded where g and √v vanish together.
        bend = torch.where(second > 0, (1 - b2) * g / second, zero) / root
        slopes.append(-factor * ((1 - b1) / below - m * bend / below.square()))

    def clip(v: list[Tensor]) -> list[Tensor]:
        if scale == 1.0:
            return v
        along = sum(float((x * g).double().sum()) for x, g in zip(v, gradients, strict=True))
        back = scale / (norm + 1e-6) / norm * along
        return [scale * x - back * g for x, g in zip(v, gradients, strict=True)]

    return changes, slopes, clip
