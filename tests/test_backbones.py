"""Backbones: keys, shapes and values of the published networks, and files that fill them."""

from __future__ import annotations

import copy
import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from pnfs.backbones import build_backbone
from pnfs.backbones.base import Backbone
from pnfs.backbones.hrnet import HRNetPyramid, HRNetTrunk
from pnfs.backbones.mobilenet_v2 import InvertedResidual, MobileNetV2
from pnfs.backbones.resnet import ResNet
from pnfs.backbones.weights import load_backbone_weights, read_state_dict
from pnfs.config import ModelConfig
from pnfs.errors import PnfsError

State = dict[str, Tensor]


def draw(state: State) -> State:
    """The same names and shapes with other values."""
    return {
        key: torch.randn_like(value) if value.is_floating_point() else value + 7
        for key, value in state.items()
    }


def assert_filled(backbone: Backbone, state: State) -> None:
    for key, value in backbone.state_dict().items():
        assert torch.equal(value, state[key]), key


def bn(prefix: str, channels: int) -> State:
    shapes = {"weight": (channels,), "bias": (channels,), "running_mean": (channels,)}
    shapes |= {"running_var": (channels,)}
    state = {f"{prefix}.{leaf}": torch.randn(shape) for leaf, shape in shapes.items()}
    return state | {f"{prefix}.num_batches_tracked": torch.tensor(3)}


@pytest.fixture(scope="module")
def recipe(shared_dir: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("recipe", shared_dir / "reference" / "recipe.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("name", "build", "dead"),
    [
        ("mobilenet_cnf3_coco", MobileNetV2, "features.17."),
        ("hrnet_cnf5_mpii", lambda: HRNetPyramid(32), None),
        ("resnet50_cnf3_h2_coco", lambda: ResNet(50), None),
    ],
)
def test_keys_and_shapes_are_the_published_ones(
    shared_dir: Path, name: str, build: Callable[[], Backbone], dead: str | None
) -> None:
    published = json.loads((shared_dir / "reference" / f"{name}.keys.json").read_text())
    expected = {
        key.removeprefix("backbone."): shape
        for key, shape in published.items()
        if key.startswith("backbone.") and not (dead and key.startswith(f"backbone.{dead}"))
    }
    with torch.device("meta"):
        own = {key: list(value.shape) for key, value in build().state_dict().items()}
    assert own == expected


def test_mobilenet_reproduces_the_published_pyramid(shared_dir: Path, recipe: ModuleType) -> None:
    backbone = MobileNetV2().eval()
    backbone.load_state_dict(
        {
            key: torch.as_tensor(
                recipe.fill(f"backbone.{key}", tuple(value.shape), {"backbone": 1.0})
            )
            for key, value in backbone.state_dict().items()
        }
    )
    with np.load(shared_dir / "reference" / "mobilenet_cnf3_coco.io.npz") as fixture:
        with torch.no_grad():
            pyramid = backbone(torch.as_tensor(fixture["input"]))
        for level, feature in enumerate(pyramid):
            expected = fixture[f"feature{level}"]
            error = np.abs(feature.numpy() - expected).max() / np.abs(expected).max()
            assert error < 2e-6, level


@pytest.mark.parametrize(
    ("name", "channels"),
    [
        ("mobilenet_v2", (24, 32, 96, 160)),
        ("resnet50", (256, 512, 1024, 2048)),
        ("resnet152", (256, 512, 1024, 2048)),
        ("hrnet_w32", (32, 64, 128, 256)),
        ("hrnet_w48", (48, 96, 192, 384)),
        ("fabric-1", (40, 80, 160, 320)),
    ],
)
def test_every_backbone_gives_four_levels(name: str, channels: tuple[int, ...]) -> None:
    with torch.device("meta"):
        backbone = build_backbone(ModelConfig(backbone=name))
        pyramid = backbone(torch.empty(2, 3, 64, 96))
    assert backbone.channels == channels
    shapes = [(2, width, 16 >> level, 24 >> level) for level, width in enumerate(channels)]
    assert [tuple(feature.shape) for feature in pyramid] == shapes


@pytest.mark.parametrize("build", [MobileNetV2, lambda: ResNet(50), lambda: HRNetTrunk(32)])
def test_fresh_weights_neither_explode_nor_vanish_and_all_learn(
    build: Callable[[], Backbone],
) -> None:
    backbone = build().train()
    pyramid = backbone(torch.randn(4, 3, 64, 64))
    for feature in pyramid:
        assert 0.1 < feature.std() < 10
    sum(feature.square().mean() for feature in pyramid).backward()  # type: ignore[union-attr]
    for name, parameter in backbone.named_parameters():
        gradient = parameter.grad
        assert gradient is not None and gradient.isfinite().all() and gradient.any(), name


@pytest.mark.parametrize(
    ("inputs", "outputs", "stride", "expansion"), [(8, 4, 1, 1), (4, 6, 2, 6), (4, 4, 1, 6)]
)
def test_a_block_that_normalises_on_load_is_the_same_layers(
    inputs: int, outputs: int, stride: int, expansion: int
) -> None:
    block = InvertedResidual(inputs, outputs, stride, expansion).double().train()
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter)
    blocks = [block, copy.deepcopy(block)]
    x = torch.randn(3, inputs, 7, 6).double().requires_grad_()
    results = []
    for own, run in zip(
        blocks, (InvertedResidual.normalised_on_load, InvertedResidual.layer_by_layer), strict=True
    ):
        y = run(own, x)
        seed = torch.randn(y.shape, generator=torch.Generator().manual_seed(0)).double()
        gradients = torch.autograd.grad(y, [x, *own.parameters()], seed)
        results.append([y, *gradients, *own.buffers()])
    for have, want in zip(*results, strict=True):
        torch.testing.assert_close(have, want, rtol=1e-9, atol=1e-9)


# --- files -------------------------------------------------------------------------------------


@pytest.fixture
def mobilenet() -> MobileNetV2:
    return MobileNetV2()


def save_safetensors(state: State, folder: Path) -> Path:
    path = folder / "weights.safetensors"
    save_file(state, path)
    return path


def save_plain(state: State, folder: Path) -> Path:
    torch.save(state, folder / "weights.pth")
    return folder / "weights.pth"


def save_wrapped(state: State, folder: Path) -> Path:
    parallel = {f"module.{key}": value for key, value in state.items()}
    torch.save({"state_dict": parallel, "epoch": 3, "arch": "x"}, folder / "weights.pt")
    return folder / "weights.pt"


def save_training(state: State, folder: Path) -> Path:
    """A training checkpoint of a whole model: optimiser, scheduler, a score as a NumPy number."""
    weight = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.Adam([weight])
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, [3, 5])
    whole = {f"backbone.{key}": value for key, value in state.items()}
    whole["head.convs.0.weight"] = torch.zeros(1)
    tree = {
        "model": whole,
        "optimizer": optimizer.state_dict(),
        "scheduler": scheduler.state_dict(),
        "epoch": 12,
        "best_result": np.float64(0.7),
    }
    torch.save(tree, folder / "weights.tar")
    return folder / "weights.tar"


@pytest.mark.parametrize("save", [save_safetensors, save_plain, save_wrapped, save_training])
def test_every_file_format_loads(
    mobilenet: MobileNetV2, tmp_path: Path, save: Callable[[State, Path], Path]
) -> None:
    state = draw(mobilenet.state_dict())
    mobilenet.load_weights(save(state, tmp_path))
    assert_filled(mobilenet, state)


def test_files_of_pytorch_before_1_loads_without_batch_counters(
    mobilenet: MobileNetV2, tmp_path: Path
) -> None:
    state = draw(mobilenet.state_dict())
    old = {key: value for key, value in state.items() if not key.endswith("num_batches_tracked")}
    torch.save(old, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    load_backbone_weights(mobilenet, tmp_path / "old.pth")
    assert_filled(mobilenet, {k: state[k] if k in old else v * 0 for k, v in state.items()})


def torchvision_mobilenet(flat: State) -> State:
    """The same tensors under today's torchvision names, from torchvision's structure."""
    names: dict[str, str] = {"features.0.0": "features.0.0", "features.0.1": "features.0.1"}
    names |= {f"features.1.conv.{i}": f"features.1.conv.{n}" for i, n in
              {0: "0.0", 1: "0.1", 3: "1", 4: "2"}.items()}  # fmt: skip
    for block in range(2, 17):
        nested = {0: "0.0", 1: "0.1", 3: "1.0", 4: "1.1", 6: "2", 7: "3"}
        names |= {
            f"features.{block}.conv.{i}": f"features.{block}.conv.{n}" for i, n in nested.items()
        }
    state = {}
    for key, value in flat.items():
        layer, leaf = key.rsplit(".", 1)
        state[f"{names[layer]}.{leaf}"] = value
    state |= {"features.17.conv.0.0.weight": torch.zeros(960, 160, 1, 1)}
    state |= {"features.18.0.weight": torch.zeros(1280, 320, 1, 1)} | bn("features.18.1", 1280)
    return state | {
        "classifier.1.weight": torch.zeros(9, 1280),
        "classifier.1.bias": torch.zeros(9),
    }


def test_mobilenet_takes_the_layout_of_todays_torchvision(
    mobilenet: MobileNetV2, tmp_path: Path
) -> None:
    state = draw(mobilenet.state_dict())
    published = torchvision_mobilenet(state)
    assert len(published) == len(state) + 9
    mobilenet.load_weights(save_plain(published, tmp_path))
    assert_filled(mobilenet, state)


def test_resnet_takes_a_file_with_its_classifier(tmp_path: Path) -> None:
    backbone = ResNet(50)
    state = draw(backbone.state_dict())
    classifier = {"fc.weight": torch.zeros(10, 2048), "fc.bias": torch.zeros(10)}
    backbone.load_weights(save_plain(state | classifier, tmp_path))
    assert_filled(backbone, state)


def test_hrnet_takes_an_imagenet_file_with_and_without_stage_4(tmp_path: Path) -> None:
    trunk, pyramid = HRNetTrunk(32), HRNetPyramid(32)
    state = draw(trunk.state_dict())
    assert set(pyramid.state_dict()) < set(state)
    head = {"classifier.weight": torch.zeros(9, 2048), "classifier.bias": torch.zeros(9)}
    head |= {"incre_modules.0.0.conv1.weight": torch.zeros(64, 32, 1, 1)}
    head |= bn("downsamp_modules.0.1", 256) | bn("final_layer.1", 2048)
    # the last fusion to 1/8, which the pose networks do not have
    fusion = {"stage4.2.fuse_layers.1.0.0.0.weight": torch.zeros(64, 32, 3, 3)}
    path = save_plain(state | head | fusion, tmp_path)
    trunk.load_weights(path)
    assert_filled(trunk, state)
    pyramid.load_weights(path)
    assert_filled(pyramid, state)


def refusal(backbone: Backbone, path: Path) -> str:
    before = {key: value.clone() for key, value in backbone.state_dict().items()}
    with pytest.raises(PnfsError) as caught:
        backbone.load_weights(path)
    message = str(caught.value)
    assert "\n" not in message and str(path) in message
    assert_filled(backbone, before)
    return message


def test_a_file_of_another_network_names_the_first_keys(
    mobilenet: MobileNetV2, tmp_path: Path
) -> None:
    with torch.device("meta"):
        names = {key: torch.zeros(1, device="cpu") for key in ResNet(50).state_dict()}
    message = refusal(mobilenet, save_plain(names, tmp_path))
    assert "do not fit MobileNetV2: missing: features.0.0.weight, features.0.1.weight" in message
    assert " more; unexpected: conv1.weight, bn1.weight, bn1.bias and 315 more; " in message


def test_one_missing_extra_or_misshapen_tensor_is_refused(
    mobilenet: MobileNetV2, tmp_path: Path
) -> None:
    state = draw(mobilenet.state_dict())
    key = "features.4.conv.3.weight"
    less = {name: value for name, value in state.items() if name != key}
    assert f"missing: {key};" in refusal(mobilenet, save_plain(less, tmp_path))
    more = state | {"features.4.conv.9.weight": torch.zeros(1)}
    assert "unexpected: features.4.conv.9.weight;" in refusal(mobilenet, save_plain(more, tmp_path))
    wider = state | {key: torch.zeros(145, 1, 3, 3)}
    assert f"other shape: {key} (145, 1, 3, 3) instead of (144, 1, 3, 3);" in refusal(
        mobilenet, save_plain(wider, tmp_path)
    )


class Unpicklable:
    """An object of our own, as careless training scripts pickle."""


@pytest.mark.parametrize(
    ("name", "write", "expected"),
    [
        ("none.pth", lambda path: None, "no such file"),
        ("text.pth", lambda path: path.write_text("hello"), "cannot be read"),
        ("empty.pth", lambda path: path.write_bytes(b""), "cannot be read"),
        ("text.safetensors", lambda path: path.write_text("hello"), "cannot be read"),
        (
            "object.pth",
            lambda path: torch.save({"m": Unpicklable()}, path),
            "Unpicklable beside tensors",
        ),
        ("number.pth", lambda path: torch.save(3, path), "no state dict"),
        ("epoch.pth", lambda path: torch.save({"epoch": 3}, path), "'epoch' is not a tensor"),
    ],
)
def test_a_file_that_is_no_state_dict_is_one_line(
    mobilenet: MobileNetV2,
    tmp_path: Path,
    name: str,
    write: Callable[[Path], object],
    expected: str,
) -> None:
    write(tmp_path / name)
    assert expected in refusal(mobilenet, tmp_path / name)


def test_a_truncated_file_is_refused(mobilenet: MobileNetV2, tmp_path: Path) -> None:
    path = save_plain(mobilenet.state_dict(), tmp_path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    assert "it is damaged" in refusal(mobilenet, path)


def test_read_state_dict_strips_module_only_if_all_keys_have_it(tmp_path: Path) -> None:
    mixed = {"module.a": torch.zeros(1), "b": torch.zeros(1)}
    assert set(read_state_dict(save_plain(mixed, tmp_path))) == {"module.a", "b"}
