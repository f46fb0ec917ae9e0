"""Strategies decide who trains α and β; they find them by identity and never rebind them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from runs import rows_of, small_config, state_of
from torch import nn

from pnfs.config import Config
from pnfs.costs import count_costs
from pnfs.errors import PnfsError
from pnfs.kernels import use_backend
from pnfs.model import PoseNet, build_model
from pnfs.pruning import prune
from pnfs.search import (
    STRATEGIES,
    Monitor,
    StepContext,
    build_strategy,
    expected_macs,
    find_fabrics,
    load_architecture,
    save_architecture,
)
from pnfs.steps import Stepper
from pnfs.train import train


def config_for(strategy: str, *settings: str) -> Config:
    return small_config(Path("unused"), f"search.strategy={strategy}", *settings)


def prepared(strategy: str, *settings: str):  # type: ignore[no-untyped-def]
    config = config_for(strategy, *settings)
    torch.manual_seed(0)
    model = build_model(config.model)
    return model, build_strategy(config).prepare(model)


def ids(parameters: list[nn.Parameter]) -> list[int]:
    return [id(parameter) for parameter in parameters]


@pytest.mark.parametrize("name", STRATEGIES)
def test_groups_hold_every_parameter_once_and_keep_identity(name: str) -> None:
    config = config_for(name)
    model = build_model(config.model)
    before = ids(list(model.parameters()))
    architecture = ids(model.architecture_parameters())
    assert len(architecture) == 4  # α and β of the part fabrics and of the backbone
    groups = build_strategy(config).prepare(model)
    assert ids(list(model.parameters())) == before
    assert ids(model.architecture_parameters()) == architecture
    assert set(ids(groups.weights)) == set(before) - set(architecture)
    joint = name in ("sync", "gumbel")
    assert ids(groups.architecture) == (architecture if joint else [])
    frozen = [not p.requires_grad for p in model.architecture_parameters()]
    assert frozen == [not joint] * 4
    assert all(parameter.requires_grad for parameter in groups.weights)


def test_none_and_sync_start_uniform() -> None:
    for name in ("none", "sync"):
        model, _ = prepared(name)
        assert all(not p.any() for p in model.architecture_parameters())


def test_random_is_drawn_from_a_normal_by_its_own_seed() -> None:
    model, _ = prepared("random", "search.seed=3")
    torch.manual_seed(99)
    again = build_model(config_for("random").model)
    build_strategy(config_for("random", "search.seed=3")).prepare(again)
    other, _ = prepared("random", "search.seed=4")
    drawn = [p.detach() for p in model.architecture_parameters()]
    assert all(map(torch.equal, drawn, again.architecture_parameters()))
    assert not any(map(torch.equal, drawn, other.architecture_parameters()))
    values = torch.cat([p.flatten() for p in drawn])
    assert abs(values.mean()) < 0.5 and 0.7 < values.std() < 1.3


@pytest.mark.parametrize("name", STRATEGIES)
def test_training_moves_architecture_parameters_only_where_it_should(
    tmp_path: Path, name: str
) -> None:
    config = small_config(tmp_path / "people", f"search.strategy={name}", "train.weight_decay=0.1")
    train(config, tmp_path / "a", quiet=True, stop_at=1)
    train(config, tmp_path / "b", quiet=True, stop_at=3)
    from pnfs.checkpoint import load_model

    early, late = (
        [p.detach() for p in load_model(tmp_path / run).architecture_parameters()]
        for run in ("a", "b")
    )
    moved = [not torch.equal(x, y) for x, y in zip(early, late, strict=True)]
    # β of the cut fabric may be without effect at first; α of both fabrics is not.
    assert any(moved) != (name in ("none", "random"))
    if name == "random":
        assert all(p.any() for p in late)


def test_a_baseline_has_no_architecture_and_trains_with_any_strategy() -> None:
    config = config_for("sync", "model={family: simplebaseline, backbone: resnet50, parts: 1}")
    model = build_model(config.model)
    groups = build_strategy(config).prepare(model)
    assert groups.architecture == []
    assert len(groups.weights) == len(list(model.parameters()))


@pytest.mark.parametrize(
    ("name", "workers"), [("first-order", 2), ("second-order", 0), ("gumbel", 0)]
)
def test_a_resumed_search_equals_an_uninterrupted_one_bit_for_bit(
    tmp_path: Path, name: str, workers: int
) -> None:
    settings = [f"search.strategy={name}", f"data.workers={workers}", "search.log_every=1"]
    config = small_config(tmp_path / "people", *settings)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train(config, whole, quiet=True)
    train(config, parts, quiet=True, stop_at=3)
    torch.rand(3)
    train(config, parts, quiet=True, resume=True)
    (tensors, tree), (others, other_tree) = state_of(whole), state_of(parts)
    assert tensors.keys() == others.keys() and tree == other_tree
    assert [key for key in tensors if not torch.equal(tensors[key], others[key])] == []
    assert rows_of(whole) == rows_of(parts)


class Inputs:
    """A float64 batch that is on the device already."""

    def __init__(self, size: tuple[int, int]) -> None:
        self.pixels = torch.randn(3, 3, *size, dtype=torch.float64)
        self.joints = torch.rand(3, 17, 2, dtype=torch.float64) * 64
        self.weights = torch.ones(3, 17, dtype=torch.float64)

    def images(self, **_: object) -> torch.Tensor:
        return self.pixels


@pytest.mark.parametrize("clip", ["null", "1e-4"])
def test_second_order_is_the_gradient_through_one_step_of_adam(clip: str) -> None:
    settings = [f"train.grad_clip={clip}", "train.weight_decay=0.01"]
    config = config_for("second-order", *settings)
    torch.set_default_dtype(torch.float64)
    try:
        model = build_model(config.model).double()
        strategy = build_strategy(config)
        strategy.EPSILON = 1e-4  # type: ignore[attr-defined]
        stepper = Stepper(config, model, strategy, torch.device("cpu"))
    finally:
        torch.set_default_dtype(torch.float32)
    with torch.no_grad():  # away from the flat start
        for parameter in strategy.architecture:
            parameter.normal_()
    seen, held = Inputs(config.model.input_size), Inputs(config.model.input_size)
    rate, limit, group = 1e-3, config.train.grad_clip, stepper.optimizer.param_groups[0]
    (b1, b2), eps, decay = group["betas"], group["eps"], group["weight_decay"]
    m, v = {}, {}
    for p in stepper.trained:  # moments as of a run under way, three steps old
        m[p], v[p] = torch.randn_like(p) * 1e-3, torch.rand_like(p) * 1e-5 + 1e-7
        stepper.optimizer.state[p] = {
            "step": torch.tensor(3.0), "exp_avg": m[p].clone(), "exp_avg_sq": v[p].clone()
        }  # fmt: skip
    before = [p.detach().clone() for p in model.parameters()]
    buffers = [b.clone() for b in model.buffers()]
    with use_backend("torch"):
        context = StepContext(
            3, 10, rate, rate, stepper.optimizer, [seen], lambda: held, stepper.gradients
        )
        ours = strategy.hypergradient(context, [held])  # type: ignore[attr-defined]
        assert all(map(torch.equal, before, model.parameters()))
        assert all(map(torch.equal, buffers, model.buffers()))

        alpha = strategy.architecture
        for p in alpha:
            p.requires_grad_(True)
        names = {p: n for n, p in stepper.loss_module.named_parameters()}

        def loss(batch: Inputs, values: dict[str, torch.Tensor]) -> torch.Tensor:
            arguments = (batch.pixels, batch.joints, batch.weights)
            return torch.func.functional_call(stepper.loss_module, values, arguments)

        grads = torch.autograd.grad(
            loss(seen, {}), stepper.trained, create_graph=True, allow_unused=True
        )
        used = [(p, g) for p, g in zip(stepper.trained, grads, strict=True) if g is not None]
        if limit is not None:
            norm = torch.stack([g.square().sum() for _, g in used]).sum().sqrt()
            assert norm > limit
            used = [(p, g * limit / (norm + 1e-6)) for p, g in used]
        moved = {}
        for p, g in used:
            g = g + decay * p.detach()
            first, second = b1 * m[p] + (1 - b1) * g, b2 * v[p] + (1 - b2) * g * g
            denominator = (second / (1 - b2**4)).sqrt() + eps
            moved[names[p]] = p.detach() - rate * first / (1 - b1**4) / denominator
        true = torch.autograd.grad(loss(held, moved), alpha, allow_unused=True)
        direct = stepper.gradients([held], alpha)
    pairs = [(x, y, z) for x, y, z in zip(ours, true, direct, strict=True) if y is not None]
    assert pairs
    x, y, z = (torch.cat([group[i].flatten() for group in pairs]) for i in range(3))
    assert (x - y).norm() < 1e-4 * y.norm()
    assert (y - z).norm() > 10 * (x - y).norm()  # the second-order term is in it


def test_an_architecture_goes_to_a_file_and_back_exactly(tmp_path: Path) -> None:
    model, _ = prepared("random", "search.seed=3")
    path = tmp_path / "architecture.json"
    save_architecture(model, path, {"run": "a"})
    config = config_for("none", f"search.architecture={path}")
    other = build_model(config.model)
    groups = build_strategy(config).prepare(other)
    assert groups.architecture == []
    assert all(map(torch.equal, model.architecture_parameters(), other.architecture_parameters()))
    third = build_model(config_for("none", "model.fabric.operations=[zero, skip]").model)
    with pytest.raises(PnfsError, match=r"another topology: fabrics.parts.topology.operations is"):
        load_architecture(third, path)
    assert not any(p.any() for p in third.architecture_parameters())


def test_a_collapse_to_skip_freezes_the_architecture(tmp_path: Path) -> None:
    settings = ["search.stop_at_skip=0.01", "search.log_every=1"]
    run = tmp_path / "run"
    train(small_config(tmp_path / "people", *settings), run, quiet=True)
    mixes = [row["fabrics"] for row in rows_of(run, "search")]
    assert len(mixes) > 2 and all(mix == mixes[0] for mix in mixes)


def pruned_to(operation: str) -> PoseNet:
    """One operation in all edges, one input for every cell."""
    model = build_model(small_config(Path("unused")).model).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for fabric in find_fabrics(model).values():
            column = fabric.topology.operations.index(operation)
            fabric.alpha.fill_(-torch.inf)[..., column] = 0.0
            kept = torch.rand(fabric.beta.shape, generator=generator).argmax(-1, keepdim=True)
            fabric.beta.fill_(-torch.inf).scatter_(-1, kept, 0.0)
    assert isinstance(model, PoseNet)
    return prune(model, images=torch.randn(1, 3, 64, 64))[0]


def test_expected_macs_of_certain_mixes_are_those_that_are_made() -> None:
    few, many = pruned_to("skip"), pruned_to("separable")
    made = [count_costs(model, (64, 64)).conv_macs for model in (few, many)]
    expected = [expected_macs(model, (64, 64)).item() for model in (few, many)]
    assert made[1] - made[0] == expected[1] - expected[0] > 0


def test_rows_about_a_pruned_model_know_its_live_cells_alone() -> None:
    model = pruned_to("skip")
    assert any(len(f.cells) < len(f.topology.cells) for f in find_fabrics(model).values())
    row = Monitor(model).row()
    assert row["alpha_entropy"] == row["beta_entropy"] == 0
    assert row["skip_share"] == 1 and row["zero_share"] == 0
