"""Costs: the published counts as integers, and every rule on modules counted by hand."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pnfs import fold, kernels
from pnfs.backbones import build_backbone
from pnfs.config import ModelConfig, list_presets, load_config
from pnfs.costs import PAPER, count_costs, preset_table
from pnfs.errors import PnfsError
from pnfs.kernels import registry
from pnfs.kernels.registry import OpCost, torch_op
from pnfs.model import build_model

LATER = "ours-3 pruned as in Fig. 1"


def hollow_preset(name: str) -> nn.Module:
    with torch.device("meta"):
        return build_model(load_config(name).model)


@cache
def reference_counts(path: Path) -> dict[str, dict[str, Any]]:
    return json.loads((path / "reference" / "counts.json").read_text())


EXACT_OR_ROUNDED = [name for name in list_presets() if not name.startswith(("tiny", "fabric-"))]


@pytest.mark.parametrize("name", EXACT_OR_ROUNDED)
def test_preset_equals_the_reference_counts(shared_dir: Path, name: str) -> None:
    row = reference_counts(shared_dir)[name]
    assert list(load_config(name).model.input_size) == row["input_hw"]
    costs = count_costs(hollow_preset(name), row["input_hw"])
    if "params" in row:
        assert (costs.params, costs.conv_macs) == (row["params"], row["conv_macs"])
    else:
        rounded = round(costs.params, -3), round(costs.conv_macs, -6)
        assert rounded == (row["params_rounded_to_1e3"], row["conv_macs_rounded_to_1e6"])
    assert sum(share.params for share in costs.modules.values()) == costs.params
    assert sum(share.conv_macs for share in costs.modules.values()) == costs.conv_macs


@pytest.mark.parametrize(
    "name", ["mobilenet_v2", "resnet50", "hrnet_w32", "fabric-1", "fabric-2", "fabric-3"]
)
def test_backbone_equals_the_reference_counts(shared_dir: Path, name: str) -> None:
    row = reference_counts(shared_dir)[f"backbone {name}"]
    with torch.device("meta"):
        backbone = build_backbone(ModelConfig(backbone=name))
    costs = count_costs(backbone, row["input_hw"])
    assert (costs.params, costs.conv_macs) == (row["params"], row["conv_macs"])


def test_every_row_of_the_reference_is_checked_and_quoted(shared_dir: Path) -> None:
    rows = reference_counts(shared_dir)
    models = {name for name in rows if not name.startswith("backbone ")} - {LATER}
    assert models == set(EXACT_OR_ROUNDED)
    for name in models - {"ours-3"}:
        assert " / ".join(PAPER.get(name, ("-",))).replace(" / ", "/") == rows[name]["paper"]
    for name in ("fabric-1", "fabric-2", "fabric-3"):
        assert PAPER[name][0] == f"backbone {rows[f'backbone {name}']['paper']}"


# --- counted by hand -----------------------------------------------------------------------------


def test_convolutions_of_every_kind() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2, padding=1),  # 16×12 -> 8×6
        nn.Conv2d(8, 8, 3, padding=2, dilation=2, groups=8, bias=False),
        nn.BatchNorm2d(8),
        nn.ConvTranspose2d(8, 4, 4, stride=2, padding=1),  # 8×6 -> 16×12
    )
    costs = count_costs(model, (16, 12), batch=3)
    assert costs.conv_macs == 48 * 8 * 27 + 48 * 8 * 9 + 48 * 8 * 4 * 16
    assert costs.params == (8 * 27 + 8) + 8 * 9 + 16 + (8 * 4 * 16 + 4)
    assert costs.launches == 4
    assert costs.modules["3"].params == 8 * 4 * 16 + 4


class Stacked(nn.Module):
    """P convolutions in one parameter; a spare parameter that no forward pass uses; α."""

    def __init__(self, product: bool) -> None:
        super().__init__()
        self.product = product
        self.weight = nn.Parameter(torch.zeros(2, 5, 3, 1, 1))
        self.spare = nn.Parameter(torch.zeros(99))
        self.alpha = nn.Parameter(torch.zeros(2))

    def architecture_parameters(self) -> list[nn.Parameter]:
        return [self.alpha]

    def forward(self, images: Tensor) -> Tensor:
        mix = self.alpha.softmax(0)
        if self.product:
            pixels = images.flatten(2).expand(2, -1, -1, -1).flatten(2)  # (P, N, 3·h·w)
            pixels = pixels.view(2, images.shape[0], 3, -1).transpose(1, 2).reshape(2, 3, -1)
            maps = self.weight[..., 0, 0] @ pixels
            return (mix[:, None, None] * maps).sum()
        maps = [nn.functional.conv2d(images, weight) for weight in self.weight.unbind(0)]
        return mix[0] * maps[0] + mix[1] * maps[1]


@pytest.mark.parametrize("product", [False, True])
def test_stacked_parts_dead_weight_and_matrix_products(product: bool) -> None:
    costs = count_costs(Stacked(product), (4, 6), batch=2)
    assert costs.conv_macs == 2 * 24 * 5 * 3
    assert costs.params == 2 * 5 * 3
    assert costs.architecture_params == 2


def test_bytes_count_each_tensor_once_and_broadcasts_at_their_own_size() -> None:
    class Pointwise(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            images = images.flatten(2).transpose(1, 2)  # views are free
            doubled = images + images  # reads one tensor, writes one
            scale = images.new_empty(1, 1, 3).expand_as(images)  # 3 elements in memory
            return doubled.mul_(scale)  # reads two, writes one of them

    costs = count_costs(Pointwise(), (4, 4), batch=2)
    tensor = 2 * 3 * 16 * 4
    assert costs.launches == 2
    assert costs.bytes == 2 * tensor + (2 * tensor + 3 * 4)


def test_training_counts_the_backward_pass_but_not_its_multiply_adds() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1, bias=False), nn.ReLU())
    forward, step = (count_costs(model, (8, 8), mode=mode) for mode in ("eval", "train"))
    assert (step.conv_macs, step.params) == (forward.conv_macs, forward.params)
    assert step.launches > forward.launches + 2 and step.bytes > 2 * forward.bytes


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_bytes_scale_with_the_batch_and_launches_do_not(mode: Any) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
    two, four = (count_costs(model, (64, 64), batch=n, mode=mode) for n in (2, 4))
    assert (two.launches, two.conv_macs, two.params) == (four.launches, four.conv_macs, four.params)
    assert 1.9 < four.bytes / two.bytes < 2


def test_a_training_step_of_a_pose_model_includes_its_loss() -> None:
    model = hollow_preset("tiny")
    step = count_costs(model, (128, 96), batch=2, mode="train")
    forward = count_costs(model, (128, 96), batch=2)
    assert (step.params, step.conv_macs) == (forward.params, forward.conv_macs)
    assert step.launches > 2 * forward.launches and step.bytes > 2 * forward.bytes


def need_cpp() -> None:
    if "cpp" not in {row.backend for row in kernels.explain() if row.available}:
        pytest.skip("the C++ kernels are not built, see `pnfs info`")


def test_traffic_of_the_published_architecture_stays_within_its_bounds() -> None:
    """ours-1 at 256×192, batch 24. Plain modules: 2,229 calls and 50.2 GB a training step, 828
    calls and 19.1 GB an evaluation."""
    need_cpp()
    model = build_model(load_config("ours-1", ["model.input_size=[256, 192]"]).model)
    step = count_costs(model, (256, 192), batch=24, mode="train")
    assert step.launches <= 266 and step.bytes <= 16.7e9
    with torch.autocast("cpu", torch.bfloat16):
        assert count_costs(model, (256, 192), batch=24, mode="train").bytes <= 8.4e9
    scores = count_costs(fold(model.eval()), (256, 192), batch=24)
    assert scores.launches <= 150 and scores.bytes <= 6e9


def test_pools_of_an_edge_are_one_call_each_way_that_reads_their_map_once() -> None:
    """ours-1 with both pools. As a call for each pool: 302 calls and 21.9 GB a training step."""
    need_cpp()
    names, step = ["zero", "skip", "separable", "atrous"], []
    for operations in (names, [*names, "avg_pool", "max_pool"]):
        with torch.device("meta"):
            model = build_model(
                load_config("ours-1", [f"model.fabric.operations={operations}"]).model
            )
        step.append(count_costs(model, (256, 192), batch=24, mode="train"))
    without, pools = step
    assert pools.launches <= 284 and pools.bytes <= 20.5e9
    edges = pools.calls["pnfs::mixed_sum_cpp"].launches
    for name in ("pnfs::depthwise_fanout_cpp", "pnfs::depthwise_fanout_cpp_backward"):
        assert pools.calls[name].launches == without.calls[name].launches + edges


def test_launches_of_a_step_on_a_gpu() -> None:
    """ours-1 on the kernels of a GPU, any batch; before `separable_conv` had some: 1,723."""
    pytest.importorskip("triton", reason="triton is not installed")
    model = hollow_preset("ours-1")
    step = count_costs(model, (256, 192), batch=24, mode="train", device="cuda")
    # separable_conv's backward pass has its depthwise result in memory: more bytes, less time.
    assert step.launches <= 428 and step.bytes <= 23e9


def test_counting_leaves_the_model_as_it_was() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    count_costs(model, (8, 8), mode="eval")
    count_costs(model, (8, 8), mode="train")
    assert model.training and model[1].training
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key])
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_kernel_says_what_it_costs(monkeypatch: pytest.MonkeyPatch) -> None:
    def double(x: Tensor) -> Tensor:
        return 2 * x

    calls = {}
    for name, cost in (("costs_silent", None), ("costs_told", lambda args, out: OpCost(3, 70, 5))):
        calls[name] = torch_op(name, double, torch.empty_like, devices=["cpu"], cost=cost)

    class Kernel(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            return calls[name](images)

    name = "costs_silent"
    silent = count_costs(Kernel(), (4, 4))
    assert (silent.launches, silent.bytes, silent.conv_macs) == (1, 2 * 3 * 16 * 4, 0)
    name = "costs_told"
    told = count_costs(Kernel(), (4, 4))
    assert (told.launches, told.bytes, told.conv_macs) == (3, 70, 5)
    monkeypatch.delitem(registry.op_costs, "pnfs::costs_told")


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"mode": "infer"}, "mode 'infer'"),
        ({"batch": 0}, "batch 0"),
        ({"size": (0, 8)}, "size (0, 8)"),
        ({"device": "tpu"}, "device 'tpu'"),
    ],
)
def test_bad_arguments_are_one_line(changes: dict[str, Any], expected: str) -> None:
    with pytest.raises(PnfsError, match="count_costs: ") as caught:
        count_costs(nn.Identity(), **({"size": (8, 8)} | changes))
    assert expected in str(caught.value)


@pytest.mark.gpu
def test_counts_on_a_gpu_equal_those_on_the_cpu() -> None:
    model = hollow_preset("tiny")
    here, there = (count_costs(model, (128, 96), device=device) for device in ("cpu", "cuda"))
    assert (here.params, here.conv_macs) == (there.params, there.conv_macs)


def test_table_of_presets() -> None:
    assert preset_table(["mobilenet-p3-d8", "tiny"]).splitlines()[2:] == [
        "| mobilenet-p3-d8 | 256×256 | 2,894,880 | 1,249,841,152 | 3.3M / 1.2G |",
        "| tiny | 128×96 | 658,040 | 76,600,320 | – |",
    ]


def test_training_keeps_less_for_the_backward_pass_than_plain_modules() -> None:
    """Less than half of the 220 MB an image that `bench/plain_model.py` keeps by the same count."""
    model, batch = hollow_preset("ours-1"), 8
    saved = count_costs(model, (256, 192), batch, "train").saved
    with kernels.use_backend("torch"):
        reference = count_costs(model, (256, 192), batch, "train").saved
    assert reference == pytest.approx(285e6 * batch, rel=0.01)
    assert saved < 0.47 * 220e6 * batch
    assert count_costs(model, (256, 192), batch).saved == 0


def test_checkpointed_cells_keep_less_than_half_for_one_more_forward_pass() -> None:
    model, batch = hollow_preset("ours-1"), 8
    plain = count_costs(model, (256, 192), batch, "train")
    model.fabric.checkpoint = True
    costs = count_costs(model, (256, 192), batch, "train")
    assert costs.saved < 0.46 * plain.saved
    assert plain.launches < costs.launches < 1.25 * plain.launches
    assert (costs.params, costs.conv_macs) == (plain.params, plain.conv_macs)
