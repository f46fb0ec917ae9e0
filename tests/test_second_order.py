"""Strategy second-order: the gradient through one step of the run's own optimiser."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import small_config
from torch import nn

from pnfs.config import Config
from pnfs.data import Batch
from pnfs.data.training import TrainingData
from pnfs.kernels import use_backend
from pnfs.model import build_model
from pnfs.search import StepContext, build_strategy
from pnfs.search.strategies import SecondOrder
from pnfs.search.unrolled import unrolled_adam
from pnfs.steps import Stepper


class Bilevel:
    """A second-order step of a run under way: three steps of the real optimiser are behind it."""

    def __init__(self, people: Path, *settings: str) -> None:
        decay = "train.weight_decay=0.01"
        self.config = small_config(people, "search.strategy=second-order", decay, *settings)
        data = TrainingData(self.config)
        torch.manual_seed(0)
        model = build_model(self.config.model)
        self.stepper = self._stepper(model)
        batches = iter(data.loader)
        self.stepper.strategy.stop(0)  # weights alone
        for step in range(3):
            self.stepper.step(batches, 1, index=step, total=10, learning_rate=1e-3, held=data.held)
        with torch.no_grad():  # away from the flat start
            for parameter in model.architecture_parameters():
                parameter.normal_(std=0.5)
        self.seen, self.held = next(batches), data.held()

    def _stepper(self, model: nn.Module) -> Stepper:
        return Stepper(self.config, model, build_strategy(self.config), torch.device("cpu"))

    def in_float64(self) -> Stepper:
        """The same model, optimiser and moments in float64."""
        torch.set_default_dtype(torch.float64)
        try:
            double = self._stepper(copy.deepcopy(self.stepper.model).double())
        finally:
            torch.set_default_dtype(torch.float32)
        double.optimizer.load_state_dict(copy.deepcopy(self.stepper.optimizer.state_dict()))
        return double

    def hypergradient(
        self, stepper: Stepper, batches: Sequence[Any], epsilon: float | None = None
    ) -> torch.Tensor:
        strategy, (seen, held) = stepper.strategy, batches
        assert isinstance(strategy, SecondOrder)
        if epsilon is not None:
            strategy.EPSILON = epsilon  # type: ignore[misc]
        context = StepContext(
            3, 10, 1e-3, 1e-3, stepper.optimizer, [seen], lambda: held, stepper.gradients
        )
        return flat(strategy.hypergradient(context, [held]))


def flat(gradients: Sequence[torch.Tensor | None]) -> torch.Tensor:
    """Of α and β of the backbone and of the parts, those that the loss depends on."""
    return torch.cat([g.flatten().double() for g in gradients if g is not None])


class Inputs:
    """A batch in float64, on the device already."""

    def __init__(self, batch: Batch, config: Config) -> None:
        size, profile = config.model.input_size, config.data.profile
        self.pixels = batch.images(size=size, profile=profile, dtype=torch.float32).double()
        self.joints, self.weights = batch.joints.double(), batch.weights.double()

    def images(self, **_: object) -> torch.Tensor:
        return self.pixels


def gradient_through_adam(stepper: Stepper, seen: Inputs, held: Inputs) -> torch.Tensor:
    """Autograd through the forward pass, clipping and torch's own differentiable Adam, which starts
    from the state of the run's fused one."""
    limit, names = stepper.config.train.grad_clip, parameter_names(stepper.loss_module)

    def loss(batch: Inputs, values: dict[str, torch.Tensor]) -> torch.Tensor:
        arguments = (batch.pixels, batch.joints, batch.weights)
        return torch.func.functional_call(stepper.loss_module, values, arguments)

    alpha = stepper.strategy.architecture
    for parameter in alpha:
        parameter.requires_grad_(True)
    first = loss(seen, {})
    all_gradients = torch.autograd.grad(
        first, stepper.trained, create_graph=True, allow_unused=True
    )
    used = [(p, g) for p, g in zip(stepper.trained, all_gradients, strict=True) if g is not None]
    if limit is not None:
        norm = torch.stack([g.square().sum() for _, g in used]).sum().sqrt()
        assert norm > limit
        used = [(p, g * limit / (norm + 1e-6)) for p, g in used]
    moved = {names[p]: p.detach().requires_grad_(True).clone() for p, _ in used}
    fused = stepper.optimizer
    settings = {key: fused.param_groups[0][key] for key in ("betas", "eps", "weight_decay")}
    adam = torch.optim.Adam(moved.values(), lr=1e-3, differentiable=True, **settings)
    for (parameter, gradient), copied in zip(used, moved.values(), strict=True):
        copied.grad = gradient
        state = fused.state[parameter]
        assert float(state["step"]) == 3
        adam.state[copied] = {key: value.clone() for key, value in state.items()}
        adam.state[copied]["exp_avg_sq"].clamp_(min=1e-30)  # autograd's slope of √0 is NaN
    adam.step()
    return flat(torch.autograd.grad(loss(held, moved), alpha, allow_unused=True))


def parameter_names(module: nn.Module) -> dict[nn.Parameter, str]:
    return {parameter: name for name, parameter in module.named_parameters()}


@pytest.mark.parametrize("clip", ["null", "1e-4"])
def test_second_order_is_the_gradient_through_one_step_of_the_optimiser(
    tmp_path: Path, clip: str
) -> None:
    run = Bilevel(tmp_path, f"train.grad_clip={clip}")
    double = run.in_float64()
    seen, held = Inputs(run.seen, run.config), Inputs(run.held, run.config)
    with use_backend("torch"):
        # So near that no ReLU changes sign between the two sides: the derivation itself.
        near = run.hypergradient(double, (seen, held), 1e-7)
        direct = flat(double.gradients([held], double.strategy.architecture))
        true = gradient_through_adam(double, seen, held)
    assert (near - true).norm() < 1e-5 * true.norm()
    term = (true - direct).norm()
    assert term > 0.1 * true.norm()
    # As shipped: ε = 0.01 / ‖v‖, float32, kernels. What is left is ReLUs that change sign between
    # the two sides; a smaller ε weighs each of them more.
    shipped = run.hypergradient(run.stepper, (run.seen, run.held))
    assert (shipped - true).norm() < 0.5 * term


def test_second_order_perturbs_the_weights_alone_and_restores_them_bit_for_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Bilevel(tmp_path)
    stepper, strategy = run.stepper, run.stepper.strategy
    own = {id(parameter) for parameter in strategy.architecture}
    weights = [p for p in stepper.model.parameters() if id(p) not in own]
    kept = [*stepper.model.buffers(), *strategy.architecture]
    kept += [value for state in stepper.optimizer.state.values() for value in state.values()]
    before, weights_before = [x.clone() for x in kept], [x.detach().clone() for x in weights]
    gradients, moves = stepper.gradients, []

    def watched(batches: Any, parameters: Any) -> Any:
        assert all(map(torch.equal, kept, before))
        difference = [a.detach() - b for a, b in zip(weights, weights_before, strict=True)]
        moves.append(torch.cat([d.flatten() for d in difference]).double())
        return gradients(batches, parameters)

    monkeypatch.setattr(stepper, "gradients", watched)
    run.hypergradient(stepper, (run.seen, run.held))
    assert all(map(torch.equal, kept, before))
    assert all(map(torch.equal, weights, weights_before))
    at_start, at_step, plus, minus = moves
    assert not at_start.any() and at_step.any()
    assert plus.norm() == pytest.approx(SecondOrder.EPSILON, rel=1e-3)
    assert torch.allclose(plus, -minus, atol=1e-6)


def test_the_unrolled_step_is_the_one_that_the_optimiser_takes(tmp_path: Path) -> None:
    """Weight decay and moments included; the fused Adam of the run against what is unrolled."""
    double = Bilevel(tmp_path).in_float64()
    generator = torch.Generator().manual_seed(0)
    gradients = [
        1e-3 * torch.randn(p.shape, generator=generator, dtype=p.dtype) for p in double.trained
    ]
    changes, _, _ = unrolled_adam(double.optimizer, double.trained, gradients, 2e-3, None)
    before = [p.detach().clone() for p in double.trained]
    for parameter, gradient in zip(double.trained, gradients, strict=True):
        parameter.grad = gradient
    for group in double.optimizer.param_groups:
        assert group["fused"]
        group["lr"] = 2e-3
    double.optimizer.step()
    for parameter, old, change in zip(double.trained, before, changes, strict=True):
        torch.testing.assert_close(parameter.detach() - old, change, rtol=1e-9, atol=1e-14)
