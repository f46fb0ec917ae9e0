"""Folded models give the scores of the models, whatever their fabric, α, β and backbone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numerics import ISAS
from torch import Tensor, nn

import pnfs
from pnfs.config import load_config
from pnfs.costs import count_costs
from pnfs.errors import PnfsError
from pnfs.fabric import Fabric
from pnfs.folding import FoldedPoseNet, fold, for_evaluation
from pnfs.kernels import native, use_backend
from pnfs.kernels.folded_program import parse
from pnfs.model import PoseNet, build_model

needs_cpp = pytest.mark.skipif(
    not native.has_function("_cpu", "folded_network")[0],
    reason=native.has_function("_cpu", "folded_network")[1] or "-",
)
OPERATIONS = ("zero", "skip", "separable", "atrous", "avg_pool", "max_pool")


def model_of(preset: str = "ours-1", seed: int = 0, **settings_: Any) -> PoseNet:
    """A model with statistics, biases and architecture as after training, and medium scores."""
    torch.manual_seed(seed)
    model = build_model(load_config(preset, [f"model.{k}={v}" for k, v in settings_.items()]).model)
    assert isinstance(model, PoseNet)
    with torch.no_grad():
        for name, value in [*model.named_parameters(), *model.named_buffers()]:
            if name.endswith("running_var"):
                value.uniform_(0.5, 1.5)
            elif name.endswith(("running_mean", "bias")):
                value.normal_(std=0.1)
            elif name.endswith(("alpha", "beta")):
                value.normal_()
    return model.eval()


@torch.no_grad()
def medium_scores(model: PoseNet, images: Tensor) -> PoseNet:
    """Scales the heads so that vectors have lengths about 1: squashed scores near 0 or 1 would hide
    differences."""
    vectors = model.vectors(images)
    for conv, v in zip(model.head.convs, vectors, strict=True):
        assert isinstance(conv, nn.Conv2d)
        conv.weight /= v.norm(dim=2).mean()
    return model


def check(model: PoseNet, size: tuple[int, int] = (64, 32), batch: int = 2) -> FoldedPoseNet:
    """Folded = model: 1e-5 in float32, 1e-10 in float64."""
    images = torch.randn(batch, 3, *size)
    with torch.no_grad():
        medium_scores(model, torch.randn(1, 3, *size))
        folded = fold(model)
        model.double()
        with use_backend("torch"):
            want = model(images.double())
        exact = fold(model)
        torch.testing.assert_close(exact(images.double()), want, atol=1e-10, rtol=1e-9)
        torch.testing.assert_close(folded(images), want.float(), atol=1e-5, rtol=1e-5)
    return folded


@needs_cpp
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_folded_equals_model(data: st.DataObject) -> None:
    layers = data.draw(st.integers(4, 6))
    fabric = {
        "layers": layers,
        "cut": data.draw(st.integers(1, layers - 1)),
        "hidden": data.draw(st.integers(1, 3)),
        "channels": data.draw(st.sampled_from([4, 5, 7])),
        "profile": data.draw(st.sampled_from(["posenfs", "paper"])),
        "operations": data.draw(st.permutations(OPERATIONS))[: data.draw(st.integers(1, 6))],
    }
    text = ", ".join(
        f"{k}: [{', '.join(v)}]" if isinstance(v, list) else f"{k}: {v}" for k, v in fabric.items()
    )
    model = model_of(
        fabric="{" + text + "}",
        parts=data.draw(st.sampled_from([1, 3, 5, 8])),
        vector_dim=data.draw(st.sampled_from([1, 4, 8])),
        seed=data.draw(st.integers(0, 9)),
    )
    extreme = data.draw(st.sampled_from(["", "alpha", "beta", "both"]))
    with torch.no_grad():  # one-hot mixes: everything else is dead
        if extreme in ("alpha", "both"):
            model.fabric.alpha *= 1e4
        if extreme in ("beta", "both"):
            model.fabric.beta *= 1e4
    size = data.draw(st.sampled_from([(32, 32), (64, 32), (96, 160)]))
    check(model, size, data.draw(st.integers(1, 3)))


@needs_cpp
@pytest.mark.parametrize("preset", ["tiny", "fabric-1", "fabric-2", "ours-1", "ours-2"])
def test_presets_and_their_backbones(preset: str) -> None:
    folded = check(model_of(preset))
    assert (folded.backbone is None) == (preset != "ours-2")


@needs_cpp
@pytest.mark.parametrize("preset", ["tiny", "ours-1"])
def test_pruned_models(preset: str) -> None:
    model = model_of(preset)
    with torch.no_grad():
        for fabric in (m for m in model.modules() if isinstance(m, Fabric)):
            fabric.alpha *= 4
            fabric.beta *= 4
    pruned, report = pnfs.prune(model, 0.05, torch.randn(1, 3, 64, 64))
    assert report.removed_operations
    assert isinstance(pruned, PoseNet)
    check(pruned.eval())


@needs_cpp
@pytest.mark.slow
def test_hrnet_backbone() -> None:
    check(model_of("ours-3"))


@needs_cpp
@pytest.mark.parametrize("isa", ISAS)
def test_instruction_sets(isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PNFS_ISA", isa)
    check(model_of(), (96, 128), 3)


@needs_cpp
@pytest.mark.parametrize("preset", ["ours-1", "ours-2"])
def test_products_in_bfloat16_are_near(preset: str) -> None:
    """With a backbone of its own (ours-2), which autocast runs in bfloat16, too."""
    model, images = model_of(preset), torch.randn(2, 3, 64, 96)
    with torch.no_grad():
        medium_scores(model, images)
        want = model(images)
        with torch.autocast("cpu", torch.bfloat16):
            have = fold(model, bfloat16=True)(images)
    assert have.dtype == torch.float32
    assert 0 < (have - want).abs().max() < 0.03
    assert (have - want).square().mean().sqrt() < 0.005


@needs_cpp
@pytest.mark.parametrize("isa", [*ISAS[-1:], None])
def test_autocast_with_a_backbone_of_its_own(
    isa: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As `pnfs eval --precision bf16` calls it, on CPUs with and without units for bfloat16."""
    if isa is not None:
        monkeypatch.setenv("PNFS_ISA", isa)
    model, images = model_of("ours-2"), torch.randn(1, 3, 64, 64)
    network = for_evaluation(model, torch.device("cpu"), "bf16")
    assert isinstance(network, FoldedPoseNet)
    with torch.no_grad():
        want = model(images)
        with torch.autocast("cpu", torch.bfloat16):
            have = network(images)
    assert (have - want).abs().max() < (0.03 if network.rounded_products else 1e-4)


@pytest.mark.parametrize("bfloat16", [False, True])
def test_a_backbone_of_its_own_on_a_device_without_autocast(bfloat16: bool) -> None:
    folded = fold(model_of("ours-2"), bfloat16=bfloat16).to("meta")
    assert folded(torch.empty(2, 3, 64, 64, device="meta")).shape == (2, 17, 16, 16)


def test_images_of_another_dtype_are_refused() -> None:
    with pytest.raises(PnfsError, match="float32"):
        fold(model_of("tiny"), bfloat16=True)(torch.randn(1, 3, 64, 64).double())


@needs_cpp
def test_a_batch_may_be_empty() -> None:
    folded = fold(model_of("tiny"))
    assert folded(torch.empty(0, 3, 64, 96)).shape == (0, 17, 16, 24)


def test_folding_does_not_change_the_model_and_shares_nothing_with_it() -> None:
    model = model_of("tiny")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    folded = fold(model)
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        want = folded(images)
        for parameter in model.parameters():
            parameter.fill_(float("nan"))
        assert torch.equal(folded(images), want)
    model.load_state_dict(before)
    assert all(torch.equal(v, before[name]) for name, v in model.state_dict().items())


def test_linear_chains_cost_less_and_dead_cells_nothing() -> None:
    model = model_of()
    size = (64, 64)
    with use_backend("auto"):
        plain, folded = (count_costs(m, size) for m in (model, fold(model)))
    with torch.no_grad():
        model.fabric.beta.zero_()
        model.fabric.beta[..., 0] = 1e4  # the parallel input alone: one row of cells
    row = fold(model)
    if native.has_function("_cpu", "folded_network")[0]:
        assert folded.launches == 1
        assert folded.conv_macs < 0.85 * plain.conv_macs
        assert count_costs(row, size).conv_macs < 0.75 * folded.conv_macs
    levels = {buffer.level for buffer in parse(row.program).buffers}
    assert max(levels) == 5  # the backbone's
    assert len(parse(row.program).steps) < len(parse(fold(model_of()).program).steps)


@needs_cpp
def test_evaluation_folds_what_it_can() -> None:
    cpu = torch.device("cpu")
    model = model_of("tiny")
    assert isinstance(for_evaluation(model, cpu, "fp32"), FoldedPoseNet)
    assert for_evaluation(model, cpu, "fp16") is model
    half = for_evaluation(model, cpu, "bf16")
    assert isinstance(half, FoldedPoseNet)
    assert half.rounded_products == native.module("_cpu").multiplies_bfloat16()
    with use_backend("torch"):
        assert for_evaluation(model, cpu, "fp32") is model
    other = nn.Linear(1, 1)
    assert for_evaluation(other, cpu, "fp32") is other
    double = model.double()
    assert for_evaluation(double, cpu, "fp32") is double


def test_refusals() -> None:
    with pytest.raises(PnfsError, match="takes a PoseNet, not Linear"):
        pnfs.fold(nn.Linear(1, 1))
    with pytest.raises(PnfsError, match="multiples of 32"):
        fold(model_of("tiny"))(torch.randn(1, 3, 48, 64))


def test_a_pruned_fabric_of_one_layer_folds() -> None:
    """Its only cell reads two of the pyramid's four levels."""
    model = model_of("tiny", fabric={"channels": 2, "cut": 5, "operations": ["skip", "separable"]})
    small, report = pnfs.prune(model, 0.3)
    assert small.config.pruning is not None and report.removed
    check(small)
