"""Published checkpoints load whole and give the published figures, gradients included."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from pnfs.compat import convert_posenfs, load_posenfs
from pnfs.config import ModelConfig
from pnfs.errors import PnfsError
from pnfs.head import heatmap_loss
from pnfs.model import PoseNet

COMMON = ("zero", "skip", "atrous", "separable")
MODELS: dict[str, dict[str, Any]] = {
    "mobilenet_cnf3_coco": {
        "skeleton": "coco", "parts": 3, "backbone": "mobilenet_v2", "vector_dim": 8,
        "fabric": {"channels": 16, "hidden": 1, "operations": ("skip", "separable", "atrous")},
    },
    "hrnet_cnf5_mpii": {
        "skeleton": "mpii", "parts": 5, "backbone": "hrnet_w32", "vector_dim": 1,
        "fabric": {"channels": 16, "hidden": 1, "operations": COMMON},
    },
    "resnet50_cnf3_h2_coco": {
        "skeleton": "coco", "parts": 3, "backbone": "resnet50", "vector_dim": 8,
        "fabric": {"channels": 10, "hidden": 2, "operations": COMMON},
    },
    "fabric1_cnf8_mpii": {
        "skeleton": "mpii", "parts": 8, "backbone": "fabric-1", "vector_dim": 8,
        "fabric": {"channels": 10, "operations": ("zero", "skip", "separable", "atrous")},
    },
}  # fmt: skip
GAINS = {
    "mobilenet_cnf3_coco": {"backbone": 1.0, "reduce": 0.5, "cnf": 0.5, "final": 0.1},
    "hrnet_cnf5_mpii": {"backbone": 0.7, "reduce": 0.05, "cnf": 0.5, "final": 0.1},
    "resnet50_cnf3_h2_coco": {"backbone": 0.5, "reduce": 0.5, "cnf": 0.5, "final": 0.003},
    "fabric1_cnf8_mpii": {"backbone": 0.3, "reduce": 0.5, "cnf": 0.3, "final": 0.003},
}


TRAINED = "mobilenet_cnf3_coco"  # the model whose training step is in the reference


def _config(name: str) -> ModelConfig:
    return ModelConfig.model_validate({**MODELS[name], "input_size": (128, 96)})


@pytest.fixture(scope="session")
def recipe(shared_dir: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("recipe", shared_dir / "reference" / "recipe.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def published(shared_dir: Path, recipe: ModuleType):
    """name -> the published state dict, filled by the deterministic recipe."""

    def fill(name: str) -> dict[str, Tensor]:
        shapes = json.loads((shared_dir / "reference" / f"{name}.keys.json").read_text())
        return {
            key: torch.from_numpy(np.asarray(recipe.fill(key, shape, GAINS[name])))
            for key, shape in shapes.items()
        }

    return fill


def _fixture(shared_dir: Path, name: str) -> dict[str, Tensor]:
    with np.load(shared_dir / "reference" / f"{name}.npz") as data:
        return {key: torch.from_numpy(data[key]) for key in data.files}


def test_the_published_forward_pass_is_reproduced(published, shared_dir):
    model = load_posenfs(published("mobilenet_cnf3_coco"), _config("mobilenet_cnf3_coco"))
    expected = _fixture(shared_dir, "mobilenet_cnf3_coco.io")
    with torch.no_grad():
        features = model.backbone(expected["input"])
        scores = model(expected["input"])
        double = model.double()(expected["input"].double())
    for level, feature in enumerate(features):
        torch.testing.assert_close(feature, expected[f"feature{level}"], rtol=0, atol=5e-6)
    torch.testing.assert_close(scores, expected["output"], rtol=0, atol=1e-5)
    torch.testing.assert_close(double, expected["output_f64"], rtol=0, atol=1e-7)


def test_the_published_loss_and_every_gradient_are_reproduced(published, shared_dir):
    """In float64: loss, α and β element by element, every other tensor by its norm."""
    state = published(TRAINED)
    model, loss = _train_step(state, shared_dir, torch.float64)
    data = _fixture(shared_dir, f"{TRAINED}.train")
    assert loss == pytest.approx(data["loss_f64"].item(), abs=1e-12)
    gradients = _published_view(model, {k: p.grad for k, p in model.named_parameters()}, state)
    for key, expected in data.items():
        if key.startswith("grad_f64/"):
            _close_to_maximum(gradients[key.removeprefix("grad_f64/")], expected, 1e-9)
    reference = json.loads(
        (shared_dir / "reference" / f"{TRAINED}.train.gradnorms.json").read_text()
    )
    norms = {
        k: norm for k, norm in reference["per_tensor_grad_norm_f64"].items() if norm is not None
    }
    assert len(norms) == 462 - len(reference["none_grad"])
    scale = max(norms.values())
    for key, norm in norms.items():
        # a bias before batch normalisation has gradient zero up to rounding: compare to the largest
        assert gradients[key].norm().item() == pytest.approx(norm, rel=1e-6, abs=1e-12 * scale), key
    statistics = _published_view(model, dict(model.named_buffers()), state)
    for key, expected in data.items():
        if key.startswith("after/"):
            actual = statistics[key.removeprefix("after/")].float()
            torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)


def test_published_float32_gradients_are_reproduced_element_by_element(
    published, shared_dir, one_thread
):
    """To 1e-3 of each tensor's maximum, beside the published figure's own rounding error.

    That error is its distance to the exact gradient, which the test above certifies: up to 5e-3,
    because a sum in another order flips a ReLU at its kink.
    """
    state = published(TRAINED)
    views = {}
    for dtype in (torch.float32, torch.float64):
        model, _ = _train_step(state, shared_dir, dtype)
        views[dtype] = _published_view(
            model, {k: p.grad for k, p in model.named_parameters()}, state
        )
    data = _fixture(shared_dir, f"{TRAINED}.train")
    compared = {k.removeprefix("grad/"): t for k, t in data.items() if k.startswith("grad/")}
    assert len(compared) == 11
    for key, expected in compared.items():
        rounding = (views[torch.float64][key] - expected).abs().max() / expected.abs().max()
        assert rounding < 6e-3
        _close_to_maximum(views[torch.float32][key], expected, 1e-3 + rounding.item())


@pytest.fixture
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def _train_step(
    state: dict[str, Tensor], shared_dir: Path, dtype: torch.dtype
) -> tuple[PoseNet, float]:
    model = load_posenfs(state, _config(TRAINED)).to(dtype).train()
    data = _fixture(shared_dir, f"{TRAINED}.train")
    loss = heatmap_loss(
        model(data["input"].to(dtype)), data["target"].to(dtype), data["weight"].to(dtype)
    )
    loss.backward()
    return model, loss.item()


def _close_to_maximum(gradient: Tensor, expected: Tensor, bound: float) -> None:
    atol = bound * expected.abs().max().item()
    torch.testing.assert_close(gradient, expected.to(gradient.dtype), rtol=0, atol=atol)


def _published_view(
    model: PoseNet, tensors: dict[str, Tensor | None], state: dict[str, Tensor]
) -> dict[str, Tensor]:
    """Our tensors under published names: translate every element's index there and back."""
    indices = {
        key: torch.arange(t.numel(), dtype=torch.float64).view(t.shape) for key, t in state.items()
    }
    offsets, start = {}, 0
    for key, tensor in indices.items():
        offsets[key] = start
        tensor += start
        start += tensor.numel()
    positions, _ = convert_posenfs(indices, model.double())
    flat = torch.full((start,), float("nan"), dtype=torch.float64)
    for key, where in positions.items():
        value = tensors.get(key)
        if value is not None:
            flat[where.long().flatten()] = value.double().flatten()
    return {
        key: flat[offsets[key] : offsets[key] + tensor.numel()].view(tensor.shape)
        for key, tensor in state.items()
    }


@pytest.mark.parametrize("name", MODELS)
def test_published_keys_load_without_a_missing_or_unexpected_one(published, name, caplog):
    state = published(name)
    with caplog.at_level("INFO", logger="pnfs"):
        model = load_posenfs(state, _config(name))
    assert "stem" in caplog.text
    assert ("features.17" in caplog.text) == (name == "mobilenet_cnf3_coco")
    with torch.no_grad():
        scores = model(torch.randn(1, 3, 64, 64))
    assert scores.shape == (1, model.config.skeleton_table.num_keypoints, 16, 16)
    assert torch.isfinite(scores).all()


def test_parts_and_keypoints_go_to_their_places(published):
    """`hips_part` lists pelvis, left hip, right hip; Table I's thigh lists 9, 10, 15."""
    state = published("hrnet_cnf5_mpii")
    model = load_posenfs(state, _config("hrnet_cnf5_mpii"))
    parts = list(model.config.part_table)
    assert parts[3] == "thigh" and model.config.part_table["thigh"] == (9, 10, 15)
    bias = state["hips_part.final_layer.1.bias"]
    assert torch.equal(model.head.convs[3].bias, bias[[1, 2, 0]])
    assert torch.equal(
        model.fabric.alpha[parts.index("left_lower_arm")], state["left_arm_part.alphas"][:1]
    )
    assert torch.equal(
        model.fabric.reduce[1].weight[parts.index("lower_limb")], state["reduce.2.1.weight"]
    )


def _with_second_input_node(state: dict[str, Tensor], hidden: int) -> dict[str, Tensor]:
    """As released: further rows of alphas, and weights for edges that nothing uses."""
    wide = dict(state)
    edges = hidden * (hidden + 1) // 2
    for key, tensor in state.items():
        if key.endswith(".alphas"):
            wide[key] = torch.cat([tensor, torch.randn(hidden, tensor.shape[1])])
        if ".cell_arch.0." in key:
            for extra in range(hidden):
                wide[key.replace(".cell_arch.0.", f".cell_arch.{edges + extra}.")] = (
                    torch.randn_like(tensor.float())
                )
    return wide


@pytest.mark.parametrize("name", ["mobilenet_cnf3_coco", "resnet50_cnf3_h2_coco"])
def test_released_files_with_a_second_input_node_load_alike(published, name, tmp_path):
    state = published(name)
    plain = load_posenfs(state, _config(name))
    wide = _with_second_input_node(state, MODELS[name]["fabric"]["hidden"])
    released = {
        "model": {f"module.{k}": v for k, v in wide.items()},
        "epoch": 3,
        "best_result": 0.7,
    }
    torch.save(released, tmp_path / "released.tar")
    model = load_posenfs(tmp_path / "released.tar", _config(name))
    for ours, theirs in zip(plain.state_dict().values(), model.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda s: s.pop("head_part.betas"), "lacks 1 tensors.*fabric.beta.*'head'"),
        (
            lambda s: s.update({"head_part.gammas": torch.zeros(1)}),
            "'head_part.gammas' does not belong",
        ),
        (
            lambda s: s.update({"torso_part.alphas": torch.zeros(1, 3)}),
            "'torso_part.alphas' does not",
        ),
        (
            lambda s: s.update({"head_part.alphas": torch.zeros(4, 3)}),
            r"'head_part.alphas' has shape \(4, 3\)",
        ),
        (lambda s: s.update({"head_part.alphas": torch.zeros(1, 4)}), "check channels, hidden"),
    ],
)
def test_another_models_checkpoint_is_refused_with_the_first_key(published, change, words):
    state = published("mobilenet_cnf3_coco")
    change(state)
    with pytest.raises(PnfsError, match=words) as error:
        load_posenfs(state, _config("mobilenet_cnf3_coco"))
    assert "\n" not in str(error.value)


def test_own_parts_have_no_published_layout(published):
    config = _config("mobilenet_cnf3_coco").model_copy(update={"parts": {"all": tuple(range(17))}})
    with pytest.raises(PnfsError, match="checkpoint"):
        load_posenfs(published("mobilenet_cnf3_coco"), config)
