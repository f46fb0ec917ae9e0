"""What a search strategy is: who updates the architecture parameters α and β, when, and with what.

The training loop knows strategies only through `Strategy`; α and β are those that
`model.architecture_parameters()` returns, found by identity, updated in place and never rebound.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from pnfs.config import Config
from pnfs.search.files import load_architecture
from pnfs.search.macs import expected_macs
from pnfs.search.start import level_heads


@dataclass(frozen=True)
class ParameterGroups:
    """What the weights' optimiser trains. `architecture` is empty where α, β are not in it.

    `train.weight_decay` holds for `weights` alone: pulling logits to zero would pull mixes to
    uniform. α and β have `search.weight_decay`, through `decay_gradients`.
    """

    weights: list[nn.Parameter]
    architecture: list[nn.Parameter] = field(default_factory=list)


@dataclass(frozen=True)
class StepContext:
    """What a strategy may use around one step of the weights' optimiser.

    Attributes:
        step: optimiser steps taken before this one.
        total_steps: of the whole run.
        learning_rate: of the weights in this step.
        architecture_rate: of α and β.
        optimizer: the weights' optimiser.
        batches: those of this step, on the device.
        held: the next batch of the people kept for α and β, on the device.
        gradients: (batches, parameters) → their gradients of the mean training loss over the
            batches of all ranks, None where the loss does not depend on one. It leaves `.grad` and
            the running statistics as they were.
    """

    step: int
    total_steps: int
    learning_rate: float
    architecture_rate: float
    optimizer: Optimizer
    batches: Sequence[Any]
    held: Callable[[], Any]
    gradients: Callable[[Sequence[Any], Sequence[Tensor]], list[Tensor | None]]


@torch.no_grad()
def decay_gradients(parameters: Sequence[Tensor], weight: float) -> None:
    """Add weight · logit to the gradients of α and β, as Adam's own weight decay does.

    A logit of −∞ masks its operation or input for good: its gradient stays zero, so that moments
    and logit stay as they are. Adam's own decay would make it −∞ - ∞/∞, and the run NaN.
    """
    for parameter in parameters if weight else ():
        if parameter.grad is not None:
            parameter.grad.add_(parameter.masked_fill(parameter.isneginf(), 0.0), alpha=weight)


class Strategy:
    """The base: α and β stay as they are. Subclasses override what they need.

    Every method is called on every rank, in the same order, with equal parameters.

    Attributes:
        stopped_at: the step after which α and β were frozen (see `stop`), or None.
    """

    name: ClassVar[str] = "none"

    def __init__(self, config: Config) -> None:
        self.config = config
        self.model: nn.Module | None = None
        self.architecture: list[nn.Parameter] = []
        self.stopped_at: int | None = None

    @property
    def capturable(self) -> bool:
        """Whether `after_backward` may be recorded in a CUDA graph with the rest of a step: it
        launches the same kernels on the same memory in every step."""
        return True

    def prepare(self, model: nn.Module, *, fresh: bool = True) -> ParameterGroups:
        """Decide whether α and β are frozen, and say what the optimiser trains.

        Called once, with the model on its device, before a checkpoint (if any) is loaded.

        Args:
            fresh: set α and β to their start; false where a checkpoint will give them.

        Raises:
            PnfsError: `search.architecture` cannot be read or is of another topology.
        """
        self.model = model
        self.architecture = list(model.architecture_parameters())  # type: ignore[operator]
        if fresh:
            self._start(model)
        for parameter in self.architecture:
            parameter.requires_grad_(False)
        return ParameterGroups(self._weights(model))

    def before_step(self, context: StepContext) -> bool:
        """Before the gradients of a weights step: a strategy's own step is taken here.

        Returns:
            False, on all ranks, where its loss or gradient is not finite: nothing was updated, and
            the weights' step must not be made either.
        """
        return True

    def undo(self) -> None:
        """Take back what `before_step` updated: the weights' step was not finite."""

    def after_backward(self, context: StepContext) -> None:
        """When every `.grad` is complete, before clipping and the step."""

    def stop(self, step: int) -> None:
        """Freeze α and β as they are after `step`; the weights train on."""
        self.stopped_at = step

    def temperature(self, step: int, total: int) -> float | None:
        """Of the mixes in optimiser step `step`; None where they are not sampled."""
        return None

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs beside α and β themselves (they are in the model's state)."""
        return {"stopped_at": self.stopped_at}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self.stopped_at = state.get("stopped_at")

    def _start(self, model: nn.Module) -> None:
        """Set α and β to their start; where that is not uniform, heads are scaled to it."""
        if self.config.search.architecture is not None:
            load_architecture(model, self.config.search.architecture)
            level_heads(model, self.architecture, self.config.search.seed)

    def _weights(self, model: nn.Module) -> list[nn.Parameter]:
        """All parameters but α and β, told apart by identity."""
        architecture = {id(parameter) for parameter in self.architecture}
        return [p for p in model.parameters() if id(p) not in architecture]

    def _penalty_gradients(self) -> list[Tensor]:
        """∂(λ·E[MACs]/10⁹)/∂(α, β), λ = `search.macs_penalty`; empty without a penalty."""
        weight = self.config.search.macs_penalty
        if not weight or not self.architecture:
            return []
        assert self.model is not None
        flags = [parameter.requires_grad for parameter in self.architecture]
        try:
            for parameter in self.architecture:
                parameter.requires_grad_(True)
            cost = weight * expected_macs(self.model, self.config.model.input_size) / 1e9
            return list(torch.autograd.grad(cost, self.architecture))
        finally:
            for parameter, flag in zip(self.architecture, flags, strict=True):
                parameter.requires_grad_(flag)
