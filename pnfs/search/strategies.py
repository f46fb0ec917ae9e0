"""Search strategies: who updates the architecture parameters α and β, when, and with what.

The training loop knows strategies only through `Strategy`; α and β are those that
`model.architecture_parameters()` returns, found by identity, updated in place and never rebound.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import Tensor, nn
from torch.optim import Optimizer

from pnfs.architecture import randomize_
from pnfs.config import Config
from pnfs.errors import PnfsError, did_you_mean


@dataclass(frozen=True)
class ParameterGroups:
    """What the weights' optimiser trains. `architecture` is empty where α, β are not in it.

    Weight decay holds for `weights` alone: pulling logits to zero would pull mixes to uniform.
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
        optimizer: the weights' optimiser.
        loss: the training loss of a batch under the present weights, α and β, with its graph.
    """

    step: int
    total_steps: int
    learning_rate: float
    optimizer: Optimizer
    loss: Callable[[Any], Tensor]


class Strategy:
    """The base: α and β stay as they are. Subclasses override what they need.

    Every method is called on every rank, in the same order, with equal parameters.
    """

    name: ClassVar[str] = "none"

    def __init__(self, config: Config) -> None:
        self.config = config
        self.model: nn.Module | None = None
        self.architecture: list[nn.Parameter] = []

    def prepare(self, model: nn.Module) -> ParameterGroups:
        """Set α and β to their start, decide which are frozen, and say what the optimiser trains.

        Called once, with the model on its device, before a checkpoint (if any) is loaded.
        """
        self.model = model
        self.architecture = list(model.architecture_parameters())  # type: ignore[operator]
        for parameter in self.architecture:
            parameter.requires_grad_(False)
        return ParameterGroups(self._weights(model))

    def before_step(self, context: StepContext) -> None:
        """Before the gradients of a weights step: a strategy's own step is taken here."""

    def after_step(self, context: StepContext) -> None:
        """After a weights step."""

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs beside α and β themselves (they are in the model's state)."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""

    def _weights(self, model: nn.Module) -> list[nn.Parameter]:
        """All parameters but α and β, told apart by identity."""
        architecture = {id(parameter) for parameter in self.architecture}
        return [p for p in model.parameters() if id(p) not in architecture]


class Frozen(Strategy):
    """`none`: α and β keep their start, uniform mixes."""

    name = "none"


class Random(Strategy):
    """`random`: α and β are drawn once from N(0, 1) by `search.seed` and frozen."""

    name = "random"

    def prepare(self, model: nn.Module) -> ParameterGroups:
        groups = super().prepare(model)
        randomize_(self.architecture, self.config.search.seed)
        return groups


class Synchronous(Strategy):
    """`sync`: α and β are trained with the weights, by the same optimiser on the same batches."""

    name = "sync"

    def prepare(self, model: nn.Module) -> ParameterGroups:
        groups = super().prepare(model)
        for parameter in self.architecture:
            parameter.requires_grad_(True)
        return ParameterGroups(groups.weights, self.architecture)


STRATEGIES: dict[str, type[Strategy]] = {s.name: s for s in (Frozen, Random, Synchronous)}


def build_strategy(config: Config) -> Strategy:
    """The strategy that `search.strategy` names.

    Raises:
        PnfsError: this version does not have it; the message lists those that exist.
    """
    name = config.search.strategy
    if name not in STRATEGIES:
        raise PnfsError(
            f"search.strategy: '{name}' is not available; use {', '.join(STRATEGIES)}"
            + did_you_mean(name, STRATEGIES)
        )
    return STRATEGIES[name](config)
