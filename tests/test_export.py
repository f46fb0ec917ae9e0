"""Exported models give the model's scores in other runtimes, and exporting changes nothing here."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import cast

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import pnfs
from pnfs import export
from pnfs.config import load_config
from pnfs.errors import PnfsError
from pnfs.export import export_onnx, export_program, plain_module
from pnfs.head import pose_loss
from pnfs.kernels import use_backend
from pnfs.model import build_model

EVERYTHING = (
    "model.fabric={channels: 3, hidden: 2, profile: paper, operations: "
    "[zero, skip, separable, atrous, avg_pool, max_pool]}"
)
SMALL = {
    "fabric backbone": ("tiny", ()),
    "every operation, hidden 2, parts that overlap": ("tiny", (EVERYTHING, "model.parts=5")),
    "mobilenet, d 1": ("ours-1", ("model.fabric.channels=4", "model.vector_dim=1")),
    "resnet baseline": ("simplebaseline-r50-vec8", ("model.skeleton=coco",)),
}


def model_of(case: str) -> nn.Module:
    """Untrained, with statistics, biases and architecture as after training."""
    preset, settings = SMALL[case]
    torch.manual_seed(0)
    model = build_model(load_config(preset, ["model.input_size=[64, 32]", *settings]).model)
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
def scores_of(model: nn.Module, images: Tensor) -> Tensor:
    with use_backend("torch"):
        return model(images)


@pytest.mark.parametrize("case", SMALL)
def test_onnx_runtime_gives_the_models_scores_in_any_batch(tmp_path: Path, case: str) -> None:
    onnx, runtime = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
    model, path = model_of(case), tmp_path / "model.onnx"
    report = export_onnx(model, path, torch.randn(3, 3, 64, 32), profile="posenfs", source="a run")
    assert report.error < 1e-5 and report.batches == (3, 1) and report.bytes == path.stat().st_size
    session = runtime.InferenceSession(str(path))
    [images], [scores] = session.get_inputs(), session.get_outputs()
    assert images.shape == ["batch", 3, 64, 32] and scores.shape[1:] == [17, 16, 8]
    for count in (1, 2, 5):
        x = torch.randn(count, 3, 64, 32)
        have = session.run(None, {"images": x.numpy()})[0]
        np.testing.assert_allclose(have, scores_of(model, x), rtol=1e-4, atol=1e-5)
    said = session.get_modelmeta().custom_metadata_map
    assert said["colors"] == "blue, green, red" and said["source"] == "a run"
    assert json.loads(said["config"]) == model.config.model_dump(mode="json")
    assert json.loads(said["keypoints"])[0] == "nose" and len(json.loads(said["mean"])) == 3
    kinds = {(node.domain, node.op_type) for node in onnx.load(path).graph.node}
    assert not {domain for domain, _ in kinds} - {""}
    if case != "resnet baseline":
        assert ("", "BatchNormalization") not in kinds, "all are folded"


def test_a_pruned_model_is_exported_smaller(tmp_path: Path) -> None:
    pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
    model = model_of("fabric backbone")
    small, _ = pnfs.prune(model, threshold=0.3)
    whole, less = (
        export_onnx(m, tmp_path / f"{i}.onnx").bytes for i, m in enumerate((model, small))
    )
    assert less < whole


@pytest.mark.slow
def test_a_program_of_torch_export_runs_without_this_package(tmp_path: Path) -> None:
    model = model_of("every operation, hidden 2, parts that overlap")
    assert export_program(model, tmp_path / "model.pt2").error < 1e-5
    images = torch.randn(3, 3, 64, 32)
    torch.save(images, tmp_path / "images.pt")
    code = (
        "import sys, torch\n"
        "sys.modules['pnfs'] = None\n"
        "program = torch.export.load('model.pt2').module()\n"
        "torch.save(program(torch.load('images.pt')), 'scores.pt')\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path)
    have = torch.load(tmp_path / "scores.pt")
    torch.testing.assert_close(have, scores_of(model, images), rtol=1e-4, atol=1e-5)


def gradients(model: nn.Module) -> list[Tensor | None]:
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(2, 3, 64, 32, generator=generator)
    joints = torch.rand(2, 17, 2, generator=generator) * 32
    model.zero_grad(set_to_none=True)
    pose_loss(model, images, joints, torch.ones(2, 17), sigma=2.0).backward()
    return [None if p.grad is None else p.grad.clone() for p in model.parameters()]


def same(a: Tensor | None, b: Tensor | None) -> bool:
    return a is b if a is None or b is None else torch.equal(a, b)


def test_exporting_leaves_the_model_and_its_training_as_they_were(tmp_path: Path) -> None:
    """Gradients too, also those of plain modules in the same process."""
    pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
    model = model_of("fabric backbone").train()
    cast(nn.Module, model.backbone).eval()  # as in training with a frozen backbone
    plain = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU6(), nn.Conv2d(4, 17, 1))

    def plain_gradients() -> list[Tensor]:
        x = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(2))
        return list(torch.autograd.grad(plain(x).square().mean(), list(plain.parameters())))

    twin = copy.deepcopy(model)
    before, plain_before = gradients(twin), plain_gradients()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    export_onnx(model, tmp_path / "a.onnx")
    export_program(model, tmp_path / "a.pt2")
    assert [module.training for module in model.modules()] == modes
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert torch.is_grad_enabled()
    assert all(map(same, gradients(model), before))
    assert all(map(torch.equal, plain_gradients(), plain_before))


@pytest.mark.parametrize("package", ["onnx", "onnxruntime"])
def test_a_missing_package_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str
) -> None:
    monkeypatch.setitem(sys.modules, "onnx", sys)  # any module: not used before both are there
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(PnfsError, match=rf"{package} is not installed; pip install 'pnfs\[export"):
        export_onnx(model_of("fabric backbone"), tmp_path / "a.onnx")


def test_what_cannot_be_exported_is_one_line_and_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, path = model_of("fabric backbone"), tmp_path / "a.pt2"
    with pytest.raises(PnfsError, match="Linear has no `config`"):
        export_program(nn.Linear(1, 1), path)
    with pytest.raises(PnfsError, match=r"images are \(1, 3, 8, 8\); give \(N, 3, 64, 32\)"):
        export_program(model, path, torch.zeros(1, 3, 8, 8))

    class Wrong(nn.Module):
        def __init__(self, model: nn.Module) -> None:
            super().__init__()
            self.right = plain_module(model)

        def forward(self, images: Tensor) -> Tensor:
            return self.right(images) + 1e-3

    monkeypatch.setattr(export, "plain_module", Wrong)
    with pytest.raises(PnfsError, match="scores differ by 0.001 .*nothing was written"):
        export_program(model, path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("write", [export_onnx, export_program])
@pytest.mark.parametrize("place", ["file/model", "folder"])
def test_a_file_that_cannot_be_written_is_known_before_the_work(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    write: Callable[..., object],
    place: str,
) -> None:
    for package in ("onnx", "onnxruntime"):
        monkeypatch.setitem(sys.modules, package, sys)  # any module: neither is used
    monkeypatch.setattr(export, "plain_module", None)  # neither is this
    (tmp_path / "file").write_text("")
    (tmp_path / "folder").mkdir()
    with pytest.raises(PnfsError, match=rf"{place}: cannot be written \(.*\); name another file"):
        write(nn.Linear(1, 1), tmp_path / place)
    assert sorted(entry.name for entry in tmp_path.rglob("*")) == ["file", "folder"]
