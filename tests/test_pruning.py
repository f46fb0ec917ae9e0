"""Pruning removes what mixing weights of zero make useless, and nothing else."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch

from pnfs.config import ModelConfig, load_config
from pnfs.errors import PnfsError
from pnfs.model import PoseNet, build_model
from pnfs.pruning import REMOVAL_LIMIT, prune, remove

COUNTS = Path(__file__).resolve().parents[2] / "shared" / "reference" / "counts.json"


@pytest.fixture(autouse=True)
def _timed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The times in a report are nothing that a test looks at."""
    monkeypatch.setattr("pnfs.pruning.TIMED_RUNS", 1)


def small_config(seed: int = 0, **changes: object) -> ModelConfig:
    """A model of random Θ, P, operations and profile, small enough to build in milliseconds."""
    draw = random.Random(seed)
    layers = draw.choice((6, 6, 7))
    operations = ["zero", "skip", "separable", "atrous", "avg_pool", "max_pool"]
    tree: dict[str, object] = {
        "parts": draw.choice((1, 3, 5, 8)),
        "backbone": {
            "layers": draw.choice((6, 7)),
            "reserve": 3,
            "hidden": draw.choice((1, 2)),
            "channels": 1,
            "operations": draw.sample(operations, draw.randint(1, 4)),
        },
        "fabric": {
            "layers": layers,
            "cut": draw.randint(3, layers - 1),
            "hidden": draw.choice((1, 1, 2, 3)),
            "channels": draw.choice((1, 2)),
            "operations": draw.sample(operations, draw.randint(1, 4)),
            "profile": draw.choice(("posenfs", "paper")),
        },
        "vector_dim": draw.choice((1, 3)),
        "input_size": [32, 32],
    }
    return ModelConfig.model_validate({**tree, **changes})


def random_model(config: ModelConfig, seed: int, spread: float = 3.0) -> PoseNet:
    torch.manual_seed(seed)
    model = build_model(config).eval()
    assert isinstance(model, PoseNet)
    with torch.no_grad():
        for parameter in model.architecture_parameters():
            parameter.normal_(0, spread)
            parameter[torch.rand_like(parameter) < 0.2] = -torch.inf  # exact zeros
            parameter[..., 0][parameter.isinf().all(-1)] = 0.0
        for name, buffer in model.named_buffers():
            if name.endswith("running_mean"):
                buffer.normal_(0, 0.1)
    return model


def check_removal(seed: int) -> None:
    model = random_model(small_config(seed), seed)
    threshold = random.Random(seed).choice((0.0, 0.01, 0.1, 0.3, 0.6))
    images = torch.randn(1, 3, 32, 32)
    _, masking, removal = remove(model, threshold, images)
    assert removal <= REMOVAL_LIMIT, (seed, removal)
    if threshold == 0:
        assert masking == 0, seed


@pytest.mark.parametrize("start", range(0, 40, 20))
def test_removing_changes_nothing(start: int) -> None:
    for seed in range(start, start + 20):
        check_removal(seed)


@pytest.mark.slow
def test_removing_changes_nothing_in_a_thousand_random_models() -> None:
    for seed in range(1000):
        check_removal(seed)


def figure_1_model() -> PoseNet:
    """ours-3 with the cells and the operation dropped that the paper's Fig. 1 shows as removed."""
    model = build_model(load_config("ours-3").model).eval()
    assert isinstance(model, PoseNet)
    fabric, parts = model.fabric, list(model.config.part_table)
    rows = {row.name: row.beta_row for row in fabric.topology.cells}
    atrous = fabric.topology.operations.index("atrous")
    with torch.no_grad():
        fabric.beta[:, rows["cell_5_0"], :2] = -torch.inf  # from below only: cell_4_0 is dead
        for part in ("left_lower_arm", "thigh"):  # and cell_3_0 in two parts
            fabric.beta[parts.index(part), rows["cell_4_1"], 1] = -torch.inf
        fabric.alpha[parts.index("thigh"), 0, atrous] = -torch.inf
    return model


@pytest.mark.skipif(not COUNTS.is_file(), reason="shared/reference is not here")
def test_ours_3_pruned_as_in_figure_1_has_the_published_counts() -> None:
    _, report = prune(figure_1_model(), images=torch.randn(1, 3, 128, 96))
    want = json.loads(COUNTS.read_text())["ours-3 pruned as in Fig. 1"]
    gone = [item for item in report.removed if item.kind in ("cell", "operation")]
    assert report.before.params - sum(item.params for item in gone) == want["params"]
    assert report.before.conv_macs - sum(item.conv_macs for item in gone) == want["conv_macs"]
    # Dead connections go as well, and are reported apart.
    rest = [item for item in report.removed if item not in gone]
    assert {item.kind for item in rest} == {"connection"}
    assert report.after.params == want["params"] - sum(item.params for item in rest)
    assert report.after.conv_macs == want["conv_macs"] - sum(item.conv_macs for item in rest)
    assert len(report.removed_cells) == 7 and "thigh cell_3_0" in report.removed_cells
    assert report.masking_error == 0 and report.removal_error <= REMOVAL_LIMIT


def test_the_report_accounts_for_every_parameter_and_multiply_add() -> None:
    for seed in range(4):
        model = random_model(small_config(seed), seed)
        small, report = prune(model, 0.2, torch.randn(1, 3, 32, 32))
        removed = sum(item.params for item in report.removed)
        held = [sum(p.numel() for p in m.parameters()) for m in (model, small)]
        assert held[0] - held[1] == removed
        macs = sum(item.conv_macs for item in report.removed)
        assert report.before.conv_macs - report.after.conv_macs == macs
        text = report.text()
        assert "masking error" in text and f"{report.after.params:,}" in text
        json.dumps(report.as_dict())


def test_a_pruned_model_trains_and_is_pruned_again() -> None:
    config = small_config(3, parts=3)
    small, _ = prune(random_model(config, 3), 0.2, torch.randn(1, 3, 32, 32))
    small.train()
    optimizer = torch.optim.Adam(small.parameters(), lr=1e-3)
    for _ in range(2):
        optimizer.zero_grad()
        small(torch.randn(4, 3, 64, 64)).sum().backward()
        optimizer.step()
    assert all(p.isfinite().all() or p.isinf().any() for p in small.parameters())
    assert not any(p.isnan().any() for p in small.parameters())
    again, second = prune(small, 0.0, torch.randn(1, 3, 32, 32))
    assert again.config == small.config and second.removed == ()
    assert again.state_dict().keys() == small.state_dict().keys()


def test_pruning_leaves_the_model_as_it_was() -> None:
    model = random_model(small_config(1), 1).train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    prune(model, 0.3, torch.randn(1, 3, 32, 32))
    assert model.training
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


def test_bad_requests_are_one_line() -> None:
    model = random_model(small_config(0), 0)
    with pytest.raises(PnfsError, match="threshold 1 must be"):
        prune(model, 1)
    with pytest.raises(PnfsError, match="needs a PoseNet"):
        prune(build_model(load_config("simplebaseline-r50").model))


def test_a_wrong_removal_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = random_model(small_config(2, parts=3), 2)

    def remove_wrongly(*arguments: object) -> tuple[PoseNet, float, float]:
        return model, 0.0, 1e-3

    monkeypatch.setattr("pnfs.pruning.remove", remove_wrongly)
    with pytest.raises(PnfsError, match=r"differ by 0\.001.*nothing was written"):
        prune(model)
