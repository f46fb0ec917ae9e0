"""A training step of ours-1 against the same network as plain PyTorch modules.

`pytest bench/bench_train.py --compile-models` also compiles the plain network, which takes minutes.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import harness
import pytest
import torch
from plain_model import PlainPoseNet, heatmap_mse
from torch import Tensor, nn

import pnfs
from pnfs.head import pose_loss, render_targets

SIZE, BATCH, SIGMA = (256, 192), 8, 2.0
SETTINGS = [f"model.input_size={list(SIZE)}"]


@functools.cache
def ours() -> nn.Module:
    torch.manual_seed(0)
    model = pnfs.build_model(pnfs.load_config("ours-1", SETTINGS).model).train()
    with torch.no_grad():  # scores of all sizes, so that no gradient vanishes
        for conv in model.head.convs:
            conv.weight.mul_(5)
    return model


def batch(device: str) -> tuple[Tensor, Tensor, Tensor]:
    """Images, joints and weights."""
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(BATCH, 3, *SIZE, generator=generator)
    joints = torch.rand(BATCH, 17, 2, generator=generator) * torch.tensor([192.0, 256.0])
    weights = (torch.rand(BATCH, 17, generator=generator) < 0.8).float()
    return images.to(device), joints.to(device), weights.to(device)


def shared(model: nn.Module) -> list[Tensor]:
    """The parameters that both networks hold as one: gradients of all else pass through them."""
    parameters = dict(model.named_parameters())
    return [parameters[key] for key in sorted(parameters) if key.startswith(("backbone", "head"))]


def step_of(
    model: nn.Module, loss: Callable[[], Tensor], optimizer: bool
) -> Callable[[], tuple[Tensor, ...]]:
    """A step: forward pass, loss, backward pass to every parameter, and an update if asked."""
    parameters = list(model.parameters())
    adam = torch.optim.Adam(parameters, lr=1e-5, fused=True) if optimizer else None
    checked = shared(model)

    def step() -> tuple[Tensor, ...]:
        for parameter in parameters:
            parameter.grad = None
        value = loss()
        value.backward()
        if adam is not None:
            adam.step()
        return (value.detach(), *(p.grad for p in checked if p.grad is not None))

    return step


def plain_step(
    device: str, optimizer: bool, *, format_: torch.memory_format, compiled: bool = False
) -> Callable[[], tuple[Tensor, ...]]:
    images, joints, weights = batch(device)
    model = PlainPoseNet(copy.deepcopy(ours())).train()  # of its own: the memory format is too
    model = model.to(device, memory_format=format_)
    images = images.contiguous(memory_format=format_)
    targets = render_targets(joints, (SIZE[0] // 4, SIZE[1] // 4), sigma=SIGMA)
    run = torch.compile(model, dynamic=False) if compiled else model
    return step_of(model, lambda: heatmap_mse(run(images), targets, weights), optimizer)


def our_step(
    device: str, optimizer: bool, dtype: torch.dtype, backend: str
) -> Callable[[], tuple[Tensor, ...]]:
    images, joints, weights = batch(device)
    model = copy.deepcopy(ours()).to(device, dtype, memory_format=torch.contiguous_format)
    model.backbone.to(memory_format=torch.channels_last)
    images = images.to(dtype).contiguous(memory_format=torch.channels_last)
    loss = functools.partial(pose_loss, model, images, joints, weights, sigma=SIGMA)
    return harness.on_backend(backend, step_of(model, loss, optimizer))


@functools.cache
def right_step(device: str) -> tuple[Tensor, ...]:
    return our_step(device, False, torch.float64, "torch")()


DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


@pytest.mark.parametrize("optimizer", [False, True], ids=["step", "step and update"])
@pytest.mark.parametrize("device", DEVICES)
def bench_train(measure: Any, request: Any, device: str, optimizer: bool) -> None:
    plain = functools.partial(plain_step, device, optimizer)
    against = {
        "eager": plain(format_=torch.contiguous_format),
        "channels-last": plain(format_=torch.channels_last),
    }
    skipped = {}
    if request.config.getoption("compile_models"):
        against["compile"] = plain(format_=torch.channels_last, compiled=True)
    else:
        skipped["compile"] = "takes minutes; asked for with --compile-models"
    call = our_step(device, optimizer, torch.float32, "auto")
    want = right_step(device)
    distance = harness.distance_of(our_step(device, False, torch.float32, "auto")(), want)
    # float32 bends paths at the kinks of ReLUs whoever sums: as near as the reference gets in it
    allowed = 1e-3 + 2 * harness.distance_of(
        our_step(device, False, torch.float32, "torch")(), want
    )
    assert distance < allowed, (
        f"loss or a gradient is wrong by {distance:.3g}, allowed is {allowed:.3g}; "
        "no speed is reported"
    )
    costs = pnfs.count_costs(ours(), SIZE, BATCH, "train", device=device)
    measure(
        harness.Case(
            op="training step",
            name=f"ours-1 256x192 batch {BATCH} float32" + (" with Adam" if optimizer else ""),
            backend="auto",
            device=device,
            call=call,
            want=want,
            tolerance=1e-3,
            tolerance_against=0.06,  # of a gradient's norm, see above
            bytes=costs.bytes,
            flops=3 * 2 * costs.conv_macs * BATCH,  # the gradients of both factors
            images=BATCH,
            against=against,
            skipped=skipped,
        )
    )
