"""Fabrics: stacked equals separate, profiles follow their equations, gradients flow."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from pnfs.architecture import entropy, mixing_weights, randomize_
from pnfs.backbones.fabric import FabricBackbone
from pnfs.config import FABRIC_BACKBONES, OPERATIONS, load_config
from pnfs.fabric import Fabric, MixedEdge
from pnfs.folding import fold
from pnfs.kernels import use_backend
from pnfs.kernels.checks import as_stacked
from pnfs.kernels.shared import SharedMap
from pnfs.mixing import Mix, MixTable
from pnfs.model import build_model
from pnfs.operations import build_branch
from pnfs.topology import build_topology

CHANNELS = (24, 32, 96, 160)


def _fabric(
    parts: int, *, hidden: int = 1, profile: str = "posenfs", operations=OPERATIONS
) -> Fabric:
    topology = build_topology(layers=6, channels=2, hidden=hidden, operations=operations, cut=3)
    fabric = Fabric(topology, parts, profile=profile, in_channels=CHANNELS)
    randomize_(fabric.architecture_parameters(), seed=1)
    return fabric


def _weights(softmax: Tensor, mix: Mix, factor: float) -> Tensor:
    """Of one mix, from a softmax (P, columns) of one row."""
    table = MixTable((len(softmax), 1, softmax.shape[1]), [mix], factor).to(softmax.dtype)
    return table(softmax[:, None])[0]


def _pyramid(batch: int = 2, height: int = 16, width: int = 8) -> tuple[torch.Tensor, ...]:
    return tuple(torch.randn(batch, c, height >> i, width >> i) for i, c in enumerate(CHANNELS))


def _take_part(stacked: Fabric, part: int, **kwargs: object) -> Fabric:
    single = _fabric(1, **kwargs)  # type: ignore[arg-type]
    single.load_state_dict(
        {key: tensor[part : part + 1] for key, tensor in stacked.state_dict().items()}
    )
    return single


@pytest.mark.parametrize(
    ("parts", "training", "profile", "dtype"),
    [
        (1, True, "posenfs", torch.float64),
        (3, False, "posenfs", torch.float32),
        (3, True, "paper", torch.float64),
        (8, True, "posenfs", torch.float64),
        (8, False, "posenfs", torch.float32),
    ],
)
def test_the_stacked_fabric_equals_separate_fabrics(parts, training, profile, dtype):
    """Batch statistics only in float64: a kernel's order of summing may depend on P, and the four
    samples per channel of these small maps turn 1e-7 into 1e-5."""
    stacked = _fabric(parts, hidden=2, profile=profile).train(training).to(dtype)
    separate = [
        _take_part(stacked, p, hidden=2, profile=profile).train(training).to(dtype)
        for p in range(parts)
    ]
    pyramid = tuple(x.to(dtype) for x in _pyramid())
    (together,) = stacked(pyramid)
    apart = torch.cat([fabric(pyramid)[0] for fabric in separate])
    torch.testing.assert_close(together, apart, rtol=1e-6, atol=1e-6)
    states = [fabric.state_dict() for fabric in separate]
    for key, tensor in stacked.state_dict().items():  # running statistics moved alike
        alone = torch.cat([state[key] for state in states])
        torch.testing.assert_close(tensor, alone, rtol=1e-6, atol=1e-6)


def test_gradients_of_the_stacked_fabric_equal_those_of_separate_fabrics():
    stacked = _fabric(3).double()
    separate = [_take_part(stacked, p).double() for p in range(3)]
    pyramid = tuple(x.double() for x in _pyramid())
    stacked(pyramid)[0].square().mean().backward()
    for fabric in separate:
        (fabric(pyramid)[0].square().mean() / 3).backward()
    named = [dict(fabric.named_parameters()) for fabric in separate]
    for name, parameter in stacked.named_parameters():
        alone = [parameters[name].grad for parameters in named]
        assert (parameter.grad is None) == (alone[0] is None)
        if parameter.grad is not None:
            scale = parameter.grad.abs().max().clamp_min(1e-6)
            torch.testing.assert_close(
                parameter.grad / scale, torch.cat(alone) / scale, rtol=0, atol=1e-6
            )


def test_the_posenfs_profile_scales_the_mixes_and_the_papers_does_not():
    posenfs = _fabric(2, operations=("zero", "skip")).double()
    paper = _fabric(2, operations=("zero", "skip"), profile="paper").double()
    row = posenfs.topology.cells[0]
    cell, printed = posenfs.cells[row.name], paper.cells[row.name]
    x = torch.randn(2, 1, row.channels, 4, 4, dtype=torch.float64)
    alpha = mixing_weights(torch.randn(2, 2, dtype=torch.float64))
    for fabric, edge, factor in ((paper, printed.edges[0], 1), (posenfs, cell.edges[0], 2)):
        weights = _weights(alpha, edge.mix(0), fabric.of_edges.factor)
        want = factor * alpha[:, 1].view(-1, 1, 1, 1, 1) * x
        torch.testing.assert_close(edge(x, weights), want)

    printed.load_state_dict(cell.state_dict())
    beta = mixing_weights(torch.randn(2, 3, dtype=torch.float64))
    features = {
        source.source: SharedMap(
            torch.randn(2, 1, row.channels << source.source[1], 4 >> source.source[1],
                        4 >> source.source[1], dtype=torch.float64)
        )
        for source in row.inputs
    }  # fmt: skip
    ours, papers = (
        node.input_node(
            features, _weights(beta, replace(node.mixes()[0], row=0), fabric.of_inputs.factor)
        )
        for fabric, node in ((posenfs, cell), (paper, printed))
    )
    torch.testing.assert_close(ours, F.relu(3 * papers))


def test_border_copies_of_an_input_are_one_term_with_the_sum_of_their_weights():
    fabric = _fabric(2)
    place = list(fabric.cells).index("cell_3_0")
    mix, _ = fabric.cells["cell_3_0"].mixes()
    assert mix.terms == ((0, 1), (2,))
    beta = fabric.mixing_weights()[1]
    weights = fabric.of_inputs(beta)[place]
    same, above, below = beta[:, mix.row].unbind(1)
    torch.testing.assert_close(weights, 3 * torch.stack([same + above, below], dim=1))


@pytest.mark.parametrize("factor", [1, 4])
def test_partial_channels_send_the_first_through_the_mix_and_let_the_others_pass(factor):
    operations, everywhere = ("zero", "skip", "separable", "max_pool"), (0, 1)
    users = (everywhere,) * len(operations)
    edge = MixedEdge(operations, 8, everywhere, users, partial=4)
    small = MixedEdge(operations, 2, everywhere, users)
    small.load_state_dict(edge.state_dict())
    x = as_stacked(torch.randn(2, 3, 8, 6, 5)).requires_grad_(True)
    alpha = _weights(torch.randn(2, 4).softmax(-1), edge.mix(0), factor)
    mixed = small(as_stacked(x[:, :, :2]), alpha)
    out = edge(x, alpha)
    assert torch.equal(out, torch.cat([x[:, :, 2:], mixed], dim=2))
    assert as_stacked(out) is out
    weight = torch.randn_like(out)
    ours, theirs = (
        torch.autograd.grad((y * weight).sum(), x, retain_graph=True)[0]
        for y in (out, torch.cat([x[:, :, 2:], mixed], dim=2))
    )
    torch.testing.assert_close(ours, theirs)


def test_a_mix_of_zero_alone_is_zero():
    fabric = _fabric(2, operations=("zero",))
    edge = fabric.cells["cell_3_0"].edges[0]
    assert not edge(torch.randn(2, 1, 8, 4, 4), torch.ones(2, 0)).any()


def test_average_pooling_does_not_count_the_padding():
    branch = build_branch("avg_pool", 1, 4)
    assert branch is not None
    ones = torch.ones(1, 2, 4, 5, 5)
    torch.testing.assert_close(branch.eval()(ones)[0], ones)


@pytest.mark.parametrize("name", [name for name in OPERATIONS if name not in ("zero", "skip")])
@pytest.mark.parametrize("size", [(1, 1), (3, 5)])
def test_branches_keep_the_shape_and_stay_channels_last(name, size):
    branch = build_branch(name, 3, 4)
    assert branch is not None
    x = as_stacked(torch.randn(3, 2, 4, *size))
    y, mean, var = branch(x)
    assert y.shape == x.shape
    assert mean.shape == var.shape == (3, 4)
    assert all(part.is_contiguous(memory_format=torch.channels_last) for part in y)


def test_alpha_and_beta_start_uniform_and_random_ones_follow_the_seed():
    topology = build_topology(layers=6, channels=2, hidden=1, operations=OPERATIONS, cut=3)
    fabric = Fabric(topology, 3, in_channels=CHANNELS)
    assert fabric.alpha.shape == (3, 1, 6) and fabric.beta.shape == (3, 6, 3)
    torch.testing.assert_close(
        entropy(fabric.mixing_weights()[0]), torch.full((3, 1), torch.tensor(6.0).log().item())
    )
    before = [id(p) for p in fabric.architecture_parameters()]
    randomize_(fabric.architecture_parameters(), seed=3)
    first = fabric.alpha.detach().clone()
    randomize_(fabric.architecture_parameters(), seed=3)
    assert torch.equal(first, fabric.alpha) and before == [
        id(p) for p in fabric.architecture_parameters()
    ]
    randomize_(fabric.architecture_parameters(), seed=4)
    assert not torch.equal(first, fabric.alpha)


@pytest.mark.parametrize("name", FABRIC_BACKBONES)
def test_fabric_backbones_give_a_four_level_pyramid(name):
    config = FABRIC_BACKBONES[name]
    backbone = FabricBackbone(config).eval()
    levels = backbone(torch.randn(1, 3, 64, 32))
    assert [tuple(level.shape[1:]) for level in levels] == [
        ((4 << i) * config.channels, 16 >> i, 8 >> i) for i in range(4)
    ]
    assert backbone.channels == tuple(level.shape[1] for level in levels)


@pytest.mark.parametrize(
    ("backbone", "channels", "reduced"), [("mobilenet_v2", 6, True), ("hrnet_w32", 8, False)]
)
def test_the_pyramid_is_reduced_unless_every_level_has_the_right_width(backbone, channels, reduced):
    """MobileNetV2's 1/4 level has the 24 channels of C = 6, and no other level agrees."""
    settings = [f"model.backbone={backbone}", f"model.fabric.channels={channels}"]
    model = build_model(load_config("ours-1", settings).model).eval()
    assert [conv.weight.shape[1] for conv in model.fabric.reduce] == (
        [24, 48, 96, 192] if reduced else []
    )
    images = torch.randn(1, 3, 64, 32)
    with torch.no_grad():
        scores = model(images)
        assert scores.shape == (1, 17, 16, 8)
        torch.testing.assert_close(fold(model)(images), scores, rtol=1e-4, atol=1e-5)


def test_the_memory_format_of_a_model_leaves_the_weights_of_parts_alone():
    torch.manual_seed(0)
    model = build_model(load_config("tiny").model).eval()
    images = torch.randn(2, 3, 64, 32)
    with torch.no_grad():
        want = model(images)
        lined_up = model.to(torch.float32, memory_format=torch.channels_last)
        torch.testing.assert_close(lined_up(images), want)
    weights = [parameter for parameter in model.parameters() if parameter.dim() == 5]
    assert weights and all(weight.is_contiguous() for weight in weights)
    stem = model.backbone.stem[0].weight
    assert stem.is_contiguous(memory_format=torch.channels_last)
    assert all(weight.dtype == torch.float64 for weight in model.double().parameters())


@pytest.mark.parametrize("backend", ["auto", "torch"])
@pytest.mark.parametrize(("hidden", "profile"), [(1, "posenfs"), (2, "paper")])
def test_checkpointed_cells_give_the_same_bits_and_move_statistics_once(hidden, profile, backend):
    dtype = torch.float64 if backend == "torch" else torch.float32
    fabric = _fabric(2, hidden=hidden, profile=profile).to(dtype).train()
    start = {name: value.clone() for name, value in fabric.state_dict().items()}
    torch.manual_seed(0)
    pyramid = tuple(
        torch.randn(2, c, 32 >> level, 32 >> level, dtype=dtype, requires_grad=True)
        for level, c in enumerate(CHANNELS)
    )
    leaves = [*fabric.parameters(), *pyramid]
    found = []
    for checkpoint in (False, True):
        fabric.load_state_dict(start)
        fabric.checkpoint = checkpoint
        with use_backend(backend):
            for _ in range(2):  # the first backward pass leaves no mark on statistics
                outputs = [x for x in fabric(pyramid) if x is not None]
                loss = sum(x.square().mean() for x in outputs)
                gradients = torch.autograd.grad(loss, leaves, allow_unused=True)
        found.append([loss, *fabric.buffers(), *gradients])
        found[-1] = [x if x is None else x.clone() for x in found[-1]]
    for plain, checkpointed in zip(*found, strict=True):
        assert (plain is None) == (checkpointed is None)
        assert plain is None or torch.equal(plain, checkpointed)


def test_checkpointed_cells_are_run_once_where_nothing_is_trained():
    fabric = _fabric(1).eval()
    pyramid = tuple(torch.randn(1, c, 32 >> i, 32 >> i) for i, c in enumerate(CHANNELS))
    plain = fabric(pyramid)[0]
    fabric.checkpoint = True
    assert torch.equal(fabric(pyramid)[0], plain)
