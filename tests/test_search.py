"""Strategies decide who trains α and β; they find them by identity and never rebind them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from runs import small_config
from torch import nn

from pnfs.config import Config
from pnfs.errors import PnfsError
from pnfs.model import build_model
from pnfs.search import STRATEGIES, build_strategy
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
    assert ids(groups.architecture) == (architecture if name == "sync" else [])
    frozen = [not p.requires_grad for p in model.architecture_parameters()]
    assert frozen == [name != "sync"] * 4
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


@pytest.mark.parametrize("name", ["first-order", "second-order", "gumbel"])
def test_a_strategy_that_is_not_available_says_which_are(name: str) -> None:
    if name in STRATEGIES:
        pytest.skip("available")
    with pytest.raises(
        PnfsError, match=f"'{name}' is not available; use none, sync, random|random"
    ):
        build_strategy(config_for(name))


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
    assert any(moved) if name == "sync" else not any(moved)
    if name == "random":
        assert all(p.any() for p in late)


def test_a_baseline_has_no_architecture_and_trains_with_any_strategy() -> None:
    config = config_for("sync", "model={family: simplebaseline, backbone: resnet50, parts: 1}")
    model = build_model(config.model)
    groups = build_strategy(config).prepare(model)
    assert groups.architecture == []
    assert len(groups.weights) == len(list(model.parameters()))
