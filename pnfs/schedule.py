"""The learning rates as pure functions of the step: nothing to save, nothing to restore."""

from __future__ import annotations

import math

from pnfs.config import Config, TrainConfig

BILEVEL_RATE = 3e-3  # of α, β where they have an optimiser of their own, as in the paper


def learning_rate(config: TrainConfig, step: int, steps_per_epoch: int) -> float:
    """Learning rate of the weights in optimiser step `step` (from 0).

    `step`: `lr · lr_factor^(number of lr_steps reached)`, with `lr_steps` in epochs. `cosine`: half
    a cosine from `lr` to 0 over the run. Either begins with `warmup_steps` steps of linear growth.
    """
    return config.lr * _factor(config, config.lr_schedule, step, steps_per_epoch)


def architecture_learning_rate(config: Config, step: int, steps_per_epoch: int) -> float:
    """Learning rate of α and β in optimiser step `step` (from 0).

    `search.lr` under `search.lr_schedule`: `weights` follows the weights' schedule, `step` and
    `cosine` are one of its own with the same settings, `constant` neither grows nor decays (the
    paper's Ours-3).
    """
    search, train = config.search, config.train
    base = search.lr or (BILEVEL_RATE if search.bilevel else train.lr)
    schedule = search.lr_schedule or ("constant" if search.bilevel else "weights")
    if schedule == "constant":
        return base
    kind = train.lr_schedule if schedule == "weights" else schedule
    return base * _factor(train, kind, step, steps_per_epoch)


def _factor(config: TrainConfig, schedule: str, step: int, steps_per_epoch: int) -> float:
    """What a base rate is multiplied with."""
    if schedule == "step":
        reached = sum(step >= epoch * steps_per_epoch for epoch in config.lr_steps)
        factor = config.lr_factor**reached
    else:
        total = config.epochs * steps_per_epoch
        done = (step - config.warmup_steps) / max(1, total - config.warmup_steps)
        factor = 0.5 * (1 + math.cos(math.pi * min(1.0, max(0.0, done))))
    if step < config.warmup_steps:
        factor *= (step + 1) / (config.warmup_steps + 1)
    return factor
