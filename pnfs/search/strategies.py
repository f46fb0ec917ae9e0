"""The search strategies, by the names of `search.strategy`; see `pnfs.search.strategy`."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from pnfs.architecture import randomize_
from pnfs.config import Config
from pnfs.errors import PnfsError, did_you_mean
from pnfs.search.start import level_heads
from pnfs.search.strategy import ParameterGroups, StepContext, Strategy, decay_gradients
from pnfs.search.unrolled import unrolled_adam


class Frozen(Strategy):
    """`none`: α and β keep their start: uniform mixes, or those of `search.architecture`."""

    name = "none"


class Random(Strategy):
    """`random`: α and β are drawn once from N(0, 1) by `search.seed` and frozen."""

    name = "random"

    def _start(self, model: nn.Module) -> None:
        randomize_(self.architecture, self.config.search.seed)
        level_heads(model, self.architecture, self.config.search.seed)


class Synchronous(Strategy):
    """`sync`: α and β are trained with the weights, by the same optimiser on the same batches."""

    name = "sync"

    @property
    def capturable(self) -> bool:
        return not self.config.search.macs_penalty

    def prepare(self, model: nn.Module, *, fresh: bool = True) -> ParameterGroups:
        groups = super().prepare(model, fresh=fresh)
        for parameter in self.architecture:
            parameter.requires_grad_(True)
        return ParameterGroups(groups.weights, self.architecture)

    def after_backward(self, context: StepContext) -> None:
        for parameter, extra in zip(self.architecture, self._penalty_gradients(), strict=False):
            if parameter.grad is not None:
                parameter.grad += extra


class Gumbel(Synchronous):
    """`gumbel`: SNAS. Mixes are samples softmax((logits + G) / τ), G from Gumbel(0, 1).

    One sample per step, the same on all ranks, a pure function of `search.seed` and the step. τ
    falls geometrically from the first to the second `search.temperature` over the share
    `search.sampled` of the run. After it the mean mixes are trained, those that the model is used
    with: SNAS derives a network and trains that; here the network stays continuous. The optimiser's
    moments start anew then: the second ones, which remember a thousand steps, are those of noisy
    gradients and would hold the weights back.
    """

    name = "gumbel"

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self._logits: list[Tensor] = []  # the true ones, while samples stand in their place

    @property
    def capturable(self) -> bool:
        return False

    def temperature(self, step: int, total: int) -> float | None:
        sampled = self.config.search.sampled * total
        if step >= sampled or (self.stopped_at is not None and step >= self.stopped_at):
            return None
        first, last = self.config.search.temperature
        return first * (last / first) ** (step / sampled)

    @torch.no_grad()
    def before_step(self, context: StepContext) -> bool:
        tau = self.temperature(context.step, context.total_steps)
        if tau is None:
            if context.step and self.temperature(context.step - 1, context.total_steps) is not None:
                for state in context.optimizer.state.values():
                    for value in state.values():
                        value.zero_()
            return True
        generator = np.random.default_rng([self.config.search.seed, context.step])
        self._logits = [parameter.detach().clone() for parameter in self.architecture]
        for parameter in self.architecture:
            noise = torch.from_numpy(generator.gumbel(size=tuple(parameter.shape)))
            parameter.add_(noise.to(parameter)).div_(tau)
        return True

    @torch.no_grad()
    def after_backward(self, context: StepContext) -> None:
        tau = self.temperature(context.step, context.total_steps)
        if tau is not None:
            for parameter, logits in zip(self.architecture, self._logits, strict=True):
                parameter.copy_(logits)
                if parameter.grad is not None:
                    parameter.grad /= tau
        with torch.enable_grad():
            super().after_backward(context)


class FirstOrder(Strategy):
    """`first-order`: DARTS with ξ = 0. α and β have an Adam of their own and half of the people.

    Before each weights step: one step along ∇_{α,β} L_held(w, α, β). Betas are DARTS's.
    """

    name = "first-order"
    BETAS = (0.5, 0.999)
    WEIGHT_DECAY = 1e-3

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.optimizer: Optimizer | None = None
        self._before: tuple[list[Tensor], dict[str, Any]] | None = None

    def prepare(self, model: nn.Module, *, fresh: bool = True) -> ParameterGroups:
        groups = super().prepare(model, fresh=fresh)
        if self.architecture:
            self.optimizer = torch.optim.Adam(self.architecture, betas=self.BETAS)
        return groups

    def before_step(self, context: StepContext) -> bool:
        self._before = None
        if self.optimizer is None or self.stopped_at is not None:
            return True
        gradients = self.hypergradient(context, [context.held() for _ in context.batches])
        for gradient, extra in zip(gradients, self._penalty_gradients(), strict=False):
            if gradient is not None:
                gradient += extra
        finite = [torch.isfinite(g).all() for g in gradients if g is not None]
        if not finite:
            return True
        if not torch.stack(finite).all():
            return False
        self._before = (
            [parameter.detach().clone() for parameter in self.architecture],
            copy.deepcopy(self.optimizer.state_dict()),
        )
        for parameter, gradient in zip(self.architecture, gradients, strict=True):
            parameter.grad = gradient
        decay = self.config.search.weight_decay
        decay_gradients(self.architecture, self.WEIGHT_DECAY if decay is None else decay)
        for group in self.optimizer.param_groups:
            group["lr"] = context.architecture_rate
        self.optimizer.step()
        return True

    @torch.no_grad()
    def undo(self) -> None:
        if self._before is None or self.optimizer is None:
            return
        logits, state = self._before
        for parameter, before in zip(self.architecture, logits, strict=True):
            parameter.copy_(before)
        self.optimizer.load_state_dict(state)

    def hypergradient(self, context: StepContext, held: Sequence[Any]) -> list[Tensor | None]:
        """What α and β descend along; equal on all ranks."""
        return context.gradients(held, self.architecture)

    def state_dict(self) -> dict[str, Any]:
        optimizer = None if self.optimizer is None else self.optimizer.state_dict()
        return {**super().state_dict(), "optimizer": optimizer}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        if self.optimizer is not None and state.get("optimizer") is not None:
            self.optimizer.load_state_dict(state["optimizer"])


class SecondOrder(FirstOrder):
    """`second-order`: DARTS unrolled through one step of the weights' Adam as it really is.

    With w' = w - Adam(g), g = ∇_w L_train(w, α), moments, weight decay and clipping included:

        dL_held(w', α)/dα = ∂L_held(w', α)/∂α + ∂²L_train(w, α)/∂α∂w · v,
        v = (∂w'/∂g)ᵀ ∇_{w'} L_held(w', α),

    and the product is (∇_α L_train(w + εv) - ∇_α L_train(w - εv)) / 2ε with ε = 0.01 / ‖v‖: kernels
    have first derivatives only. Weights alone are perturbed, and restored bit for bit.
    """

    name = "second-order"
    EPSILON = 0.01

    def hypergradient(self, context: StepContext, held: Sequence[Any]) -> list[Tensor | None]:
        trained = [p for g in context.optimizer.param_groups for p in g["params"]]
        all_gradients = context.gradients(context.batches, trained)
        pairs = [(p, g) for p, g in zip(trained, all_gradients, strict=True) if g is not None]
        weights = [p.detach() for p, _ in pairs]
        before = [weight.clone() for weight in weights]
        try:
            steps, slopes, clip = unrolled_adam(
                context.optimizer,
                [p for p, _ in pairs],
                [g for _, g in pairs],
                context.learning_rate,
                self.config.train.grad_clip,
            )
            torch._foreach_add_(weights, steps)
            parameters = [*self.architecture, *(p for p, _ in pairs)]
            gradients = context.gradients(held, parameters)
            count = len(self.architecture)
            direct, at_step = gradients[:count], gradients[count:]
            v = clip(
                [
                    torch.zeros_like(slope) if g is None else slope * g
                    for slope, g in zip(slopes, at_step, strict=True)
                ]
            )
            norm = math.sqrt(sum(float(x.double().square().sum()) for x in v))
            if not norm:
                return direct
            epsilon = self.EPSILON / norm
            sides = []
            for sign in (1, -1):
                torch._foreach_copy_(weights, before)
                torch._foreach_add_(weights, v, alpha=sign * epsilon)
                sides.append(context.gradients(context.batches, self.architecture))
        finally:
            torch._foreach_copy_(weights, before)
        return [
            d if d is None or plus is None or minus is None else d + (plus - minus) / (2 * epsilon)
            for d, plus, minus in zip(direct, *sides, strict=True)
        ]


STRATEGIES: dict[str, type[Strategy]] = {
    s.name: s for s in (Frozen, Random, Synchronous, FirstOrder, SecondOrder, Gumbel)
}


def build_strategy(config: Config) -> Strategy:
    """The strategy that `search.strategy` names.

    Raises:
        PnfsError: there is none of that name; the message lists those that exist.
    """
    name = config.search.strategy
    if name not in STRATEGIES:
        raise PnfsError(
            f"search.strategy: '{name}' is not available; use {', '.join(STRATEGIES)}"
            + did_you_mean(name, STRATEGIES)
        )
    return STRATEGIES[name](config)
