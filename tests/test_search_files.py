"""Architectures as files: exact, complete or refused, and trained under."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from runs import PARTIAL, assert_same_run, config_for, prepared, small_config

from pnfs.checkpoint import load_model
from pnfs.errors import PnfsError
from pnfs.folding import fold
from pnfs.model import build_model
from pnfs.search import build_strategy, load_architecture, save_architecture
from pnfs.train import train


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


@pytest.mark.parametrize("row", [["-inf", "-inf", "-inf"], ["inf", 0.0, 0.0], ["nan", 0.0, 0.0]])
def test_an_architecture_without_any_mix_is_refused(tmp_path: Path, row: list[object]) -> None:
    model, path = build_model(config_for("none").model), tmp_path / "file.json"
    save_architecture(model, path, {})
    tree = json.loads(path.read_text())
    part = next(iter(model.config.part_table))
    tree["fabrics"]["parts"]["parts"][part]["beta"][0] = row
    path.write_text(json.dumps(tree))
    with pytest.raises(
        PnfsError, match=rf"{part}.beta must be numbers of shape .* not a whole row"
    ):
        load_architecture(model, path)


def test_an_architecture_searched_with_partial_channels_is_trained_with_all(tmp_path: Path) -> None:
    config = small_config(tmp_path / "people", *PARTIAL)
    result = train(config, tmp_path / "search", quiet=True)
    searched = load_model(result.run)
    with pytest.raises(PnfsError, match="partial channels cannot be folded"):
        fold(searched)
    file = f"search.architecture={result.run / 'architecture.json'}"
    settings = ["search.strategy=none", file, "model.fabric.partial=1"]
    whole = small_config(tmp_path / "people", *PARTIAL, *settings)
    trained = load_model(train(whole, tmp_path / "whole", quiet=True).run)
    pairs = zip(searched.architecture_parameters(), trained.architecture_parameters(), strict=True)
    assert all(torch.equal(x, y) and x.any() for x, y in pairs)
    counts = [sum(p.numel() for p in model.parameters()) for model in (searched, trained)]
    assert counts[0] < counts[1]


def test_partial_channels_divide_the_channels() -> None:
    with pytest.raises(PnfsError, match="partial 3 does not divide 4 channels"):
        config_for("sync", "model.fabric.channels=4", "model.fabric.partial=3")


def test_a_run_under_an_architecture_file_resumes_without_the_file(tmp_path: Path) -> None:
    file = tmp_path / "file.json"
    model, _ = prepared("random", "search.seed=3")
    save_architecture(model, file, {})
    config = small_config(
        tmp_path / "people", "search.strategy=none", f"search.architecture={file}"
    )
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train(config, whole, quiet=True)
    train(config, parts, quiet=True, stop_at=3)
    file.unlink()
    train(config, parts, quiet=True, resume=True)
    assert_same_run(whole, parts)
    with pytest.raises(PnfsError, match=r"file.json: cannot be read"):
        train(config, tmp_path / "fresh", quiet=True)
