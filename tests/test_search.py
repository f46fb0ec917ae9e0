"""Strategies decide who trains α and β; they find them by identity and never rebind them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from runs import PARTIAL, config_for, prepared, rows_of, small_config, state_of
from torch import nn

from pnfs.checkpoint import load_model
from pnfs.config import load_config
from pnfs.costs import count_costs
from pnfs.data.training import TrainingData
from pnfs.model import PoseNet, build_model
from pnfs.pruning import prune
from pnfs.schedule import architecture_learning_rate, learning_rate
from pnfs.search import (
    STRATEGIES,
    Monitor,
    StepContext,
    build_strategy,
    decay_gradients,
    expected_macs,
    find_fabrics,
    save_architecture,
)
from pnfs.steps import Stepper
from pnfs.train import train


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


def test_heads_start_as_long_as_under_uniform_mixes_whatever_the_draw() -> None:
    """A head's vectors on noise; nothing else of the model is changed."""
    settings = ("model.fabric.channels=4", "model.vector_dim=8", "search.seed=2")
    uniform, _ = prepared("none", *settings)
    drawn, _ = prepared("random", *settings)
    images = torch.randn(8, 3, 64, 64, generator=torch.Generator().manual_seed(2))

    def lengths(model: nn.Module) -> torch.Tensor:
        with torch.no_grad():
            vectors = model.train().vectors(images)
        return torch.stack([v.square().sum(2).sqrt().mean() for v in vectors])

    heads = {f"head.convs.{part}.weight" for part in range(3)}
    known = {id(parameter) for parameter in drawn.architecture_parameters()}
    same = {
        name
        for (name, x), y in zip(
            drawn.state_dict().items(), uniform.state_dict().values(), strict=True
        )
        if torch.equal(x, y)
    }
    other = {name for name, p in drawn.named_parameters(remove_duplicate=False) if id(p) in known}
    assert set(drawn.state_dict()) - same == heads | other
    assert torch.allclose(lengths(drawn), lengths(uniform), rtol=1e-4)
    stacked = drawn.head.convs[0].weight.std() / uniform.head.convs[0].weight.std()
    assert not 0.9 < stacked < 1.1  # it was needed


@pytest.mark.parametrize("name", STRATEGIES)
def test_training_moves_architecture_parameters_only_where_it_should(
    tmp_path: Path, name: str
) -> None:
    config = small_config(tmp_path / "people", f"search.strategy={name}", "train.weight_decay=0.1")
    train(config, tmp_path / "a", quiet=True, stop_at=1)
    train(config, tmp_path / "b", quiet=True, stop_at=3)
    early, late = (
        [p.detach() for p in load_model(tmp_path / run).architecture_parameters()]
        for run in ("a", "b")
    )
    moved = [not torch.equal(x, y) for x, y in zip(early, late, strict=True)]
    # In the order of the part fabrics and the backbone: α, β, α, β.
    assert moved == [name not in ("none", "random")] * 4
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


@pytest.mark.parametrize("stop_at", [None, 4])
def test_moments_start_anew_when_sampling_ends(stop_at: int | None) -> None:
    """Of the whole optimiser, once, whether the schedule or the rule against a collapse ends it."""
    config = config_for("gumbel", "search.sampled=0.6")
    model = build_model(config.model)
    stepper = Stepper(config, model, build_strategy(config), torch.device("cpu"))
    strategy, counts = stepper.strategy, []
    for step in range(10):
        if step == stop_at:
            strategy.stop(step)
        context = StepContext(
            step, 10, 1e-3, 1e-3, stepper.optimizer, [], lambda: None, stepper.gradients
        )
        strategy.before_step(context)
        for parameter in stepper.trained:
            parameter.grad = torch.ones_like(parameter)
        strategy.after_backward(context)
        stepper.optimizer.step()
        states = stepper.optimizer.state.values()
        (count,) = {float(state["step"]) for state in states}
        counts.append(count)
    last = stop_at or 6
    assert counts == [*range(1, last + 1), *range(1, 11 - last)]


def test_a_collapse_to_skip_freezes_the_architecture(tmp_path: Path) -> None:
    settings = ["search.stop_at_skip=0.01", "search.log_every=1"]
    run = tmp_path / "run"
    train(small_config(tmp_path / "people", *settings), run, quiet=True)
    mixes = [row["fabrics"] for row in rows_of(run, "search")]
    assert len(mixes) > 2 and all(mix == mixes[0] for mix in mixes)


def pruned_to(operation: str, *settings: str) -> PoseNet:
    """One operation in all edges, one input for every cell."""
    model = build_model(small_config(Path("unused"), *settings).model).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for fabric in find_fabrics(model).values():
            column = fabric.topology.operations.index(operation)
            fabric.alpha.fill_(-torch.inf)[..., column] = 0.0
            kept = torch.rand(fabric.beta.shape, generator=generator).argmax(-1, keepdim=True)
            fabric.beta.fill_(-torch.inf).scatter_(-1, kept, 0.0)
    assert isinstance(model, PoseNet)
    return prune(model, images=torch.randn(1, 3, 64, 64))[0]


@pytest.mark.parametrize("settings", [(), PARTIAL])
def test_expected_macs_of_certain_mixes_are_those_that_are_made(settings: tuple[str, ...]) -> None:
    few, many = (pruned_to(operation, *settings) for operation in ("skip", "separable"))
    made = [count_costs(model, (64, 64)).conv_macs for model in (few, many)]
    expected = [expected_macs(model, (64, 64)).item() for model in (few, many)]
    assert made[1] - made[0] == expected[1] - expected[0] > 0


def test_rows_about_a_pruned_model_know_its_live_cells_alone() -> None:
    model = pruned_to("skip")
    assert any(len(f.cells) < len(f.topology.cells) for f in find_fabrics(model).values())
    row = Monitor(model).row()
    assert row["alpha_entropy"] == row["beta_entropy"] == 0
    assert row["skip_share"] == 1 and row["zero_share"] == 0


@pytest.mark.parametrize("decay", ["null", "0.01"])
@pytest.mark.parametrize("name", [name for name in STRATEGIES if name != "random"])
def test_masked_operations_and_inputs_stay_masked_and_the_rest_is_trained(
    tmp_path: Path, name: str, decay: str
) -> None:
    """A logit of minus infinity, as pruning writes it, under every optimiser and the noise."""
    model, path = build_model(config_for("none").model), tmp_path / "masked.json"
    with torch.no_grad():
        for fabric in find_fabrics(model).values():
            if fabric.alpha.shape[-1] > 2:  # of two, one alone would be left and nothing to train
                fabric.alpha[..., -1] = -torch.inf
            fabric.beta[:, 0::2, 1] = -torch.inf
    save_architecture(model, path, {})
    settings = [f"search.strategy={name}", f"search.architecture={path}", "train.grad_clip=1"]
    settings += [f"search.weight_decay={decay}", "search.macs_penalty=0.1"]
    config = small_config(tmp_path / "people", *settings)
    result = train(config, tmp_path / "run", quiet=True)
    assert rows_of(result.run, "train")[-1]["skipped_steps"] == 0
    trained = load_model(result.run)
    assert all(parameter.isfinite().all() for parameter in weights_of(trained))
    pairs = zip(trained.architecture_parameters(), model.architecture_parameters(), strict=True)
    for after, before in pairs:
        masked = before.isneginf()
        assert torch.equal(after.isneginf(), masked)
        assert after[~masked].isfinite().all()
        assert (name == "none") or not torch.equal(after[~masked], before[~masked])
    state = state_of(result.run)[0]
    moments = [value for key, value in state.items() if "exp_avg" in key]
    assert moments and all(value.isfinite().all() for value in moments)


def weights_of(model: nn.Module) -> list[nn.Parameter]:
    known = set(ids(model.architecture_parameters()))  # type: ignore[operator]
    return [parameter for parameter in model.parameters() if id(parameter) not in known]


@pytest.mark.parametrize("weight", [0.0, 0.3])
def test_decay_of_the_architecture_is_that_of_adam(weight: float) -> None:
    torch.manual_seed(0)
    start, gradients = torch.randn(3, 4), torch.randn(5, 3, 4)
    ours, theirs = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    plain, decaying = torch.optim.Adam([ours]), torch.optim.Adam([theirs], weight_decay=weight)
    for gradient in gradients:
        ours.grad, theirs.grad = gradient.clone(), gradient.clone()
        decay_gradients([ours], weight)
        plain.step()
        decaying.step()
    assert torch.equal(ours, theirs)


def test_weights_and_architecture_see_other_people_and_the_latters_loader_runs_on(
    tmp_path: Path,
) -> None:
    """It is not restarted in each step, nor with an epoch of the weights."""
    data = TrainingData(small_config(tmp_path, "search.strategy=first-order"))
    held_loader = data.architecture_loader
    assert held_loader is not None
    count = len(held_loader)
    assert count > 2
    trained = [i for batch in data.loader for i in batch.indices.tolist()]
    held, further = (
        [i for _ in range(count) for i in data.held().indices.tolist()] for _ in range(2)
    )
    images = [{data.people.people[i].image_id for i in people} for people in (trained, held)]
    assert not images[0] & images[1]
    for epoch in (held, further):  # nobody twice before everybody once
        assert len(set(epoch[: len(set(epoch))])) == len(set(epoch)) > count
    assert held != further


def test_the_rate_of_the_architecture_may_stay_while_the_weights_falls() -> None:
    """Of ours-3, as in the paper; any strategy's can be set."""
    ours = load_config("ours-3")
    last = ours.train.epochs * 10 - 1
    assert learning_rate(ours.train, last, 10) < 0.1 * ours.train.lr
    assert architecture_learning_rate(ours, last, 10) == ours.train.lr
    follows = config_for("sync")
    assert architecture_learning_rate(follows, 7, 10) == learning_rate(follows.train, 7, 10)
    own = config_for("sync", "search.lr=0.5", "search.lr_schedule=cosine", "train.warmup_steps=0")
    assert architecture_learning_rate(own, 10, 10) == pytest.approx(0.25)
    darts = config_for("first-order")
    assert architecture_learning_rate(darts, 19, 10) == 3e-3


def test_the_rule_against_a_collapse_is_off_by_default() -> None:
    assert all(config_for(name).search.stop_at_skip is None for name in STRATEGIES)
