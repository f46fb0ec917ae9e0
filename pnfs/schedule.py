"""The learning rate as a pure function of the step: nothing to save, nothing to restore."""

from __future__ import annotations

import math

from pnfs.config import TrainConfig


def learning_rate(config: TrainConfig, step: int, steps_per_epoch: int) -> float:
    """Learning rate of the weights in optimiser step `step` (from 0).

    `step`: `lr · lr_factor^(number of lr_steps reached)`, with `lr_steps` in epochs. `cosine`: half
    a cosine from `lr` to 0 over the run. Either begins with `warmup_steps` steps of linear growth.
    """
    if config.lr_schedule == "step":
        reached = sum(step >= epoch * steps_per_epoch for epoch in config.lr_steps)
        factor = config.lr_factor**reached
    else:
        total = config.epochs * steps_per_epoch
        done = (step - config.warmup_steps) / max(1, total - config.warmup_steps)
        factor = 0.5 * (1 + math.cos(math.pi * min(1.0, max(0.0, done))))
    if step < config.warmup_steps:
        factor *= (step + 1) / (config.warmup_steps + 1)
    return config.lr * factor
