"""Evaluation of ours-1 against the same network as plain modules and in inference engines.

`pytest bench/bench_predict.py --compile-models` also compiles the plain network.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import cv2
import harness
import numpy as np
import pytest
import torch
from bench_crop_normalize import MEAN, STD, people, with_cv2
from bench_decode_heatmaps import lean_torch
from bench_train import DEVICES, SIZE, ours
from plain_model import PlainPoseNet, folded, in_onnxruntime, in_openvino, missing, onnx_bytes
from torch import Tensor, nn

import pnfs
from pnfs.kernels import crop_normalize, decode_heatmaps, native

Network = Callable[[Tensor], Tensor]


@functools.cache
def settled() -> nn.Module:
    """A copy of `ours()` in evaluation mode, with statistics as training leaves them."""
    model = copy.deepcopy(ours())
    with torch.no_grad():
        for _ in range(3):
            model(torch.randn(8, 3, *SIZE, generator=torch.Generator().manual_seed(2)))
    return model.eval()


@functools.cache
def user_network(device: str, precision: str = "float32") -> Network:
    """What users run."""
    model = settled().to(device)
    if device == "cpu":
        return pnfs.fold(model, bfloat16=precision == "bfloat16")
    model.backbone.to(memory_format=torch.channels_last)
    return model


@functools.cache
def plain() -> PlainPoseNet:
    return PlainPoseNet(settled()).eval()


def without_gradients(network: Network, images: Tensor) -> Callable[[], Tensor]:
    def run() -> Tensor:
        with torch.no_grad():
            return network(images)

    return run


def other_ways(
    images: Tensor, compile_models: bool
) -> tuple[dict[str, Callable[[], Any]], dict[str, str]]:
    """Ways to the scores by name, and those that cannot run, with the reason."""
    device = images.device
    lined_up = images.contiguous(memory_format=torch.channels_last)
    eager = without_gradients(plain().to(device), images)
    fast = folded(plain()).to(device, memory_format=torch.channels_last)
    ways = {
        "eager": eager,
        "folded channels-last": without_gradients(fast, lined_up),
    }
    skipped = {}
    if compile_models:
        ways["folded compile"] = without_gradients(torch.compile(fast, dynamic=False), lined_up)
    else:
        skipped["folded compile"] = "takes a minute; asked for with --compile-models"
    engines = {"onnxruntime": in_onnxruntime, "openvino": in_openvino}
    for name, run_in in engines.items():
        reason = missing("onnx", name) if device.type == "cpu" else "compared on the CPU alone"
        if reason:
            skipped[name] = reason
            continue
        onnx = onnx_bytes(plain(), images)
        ways[name] = run_in(onnx, images)
        if name == "openvino":
            ways["openvino bf16"] = in_openvino(onnx, images, "bf16")
    return ways, skipped


@pytest.mark.parametrize("count", [1, 8])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("device", DEVICES)
def bench_network(measure: Any, request: Any, device: str, precision: str, count: int) -> None:
    half = precision == "bfloat16"
    if half:
        able, reason = native.has_function("_cpu", "multiplies_bfloat16")
        if device != "cpu" or not able or not native.module("_cpu").multiplies_bfloat16():
            pytest.skip(reason or "nothing here multiplies bfloat16 faster; users get float32")
    generator = torch.Generator().manual_seed(3)
    images = torch.randn(count, 3, *SIZE, generator=generator).to(device)
    against, skipped = {}, {}
    if not request.config.getoption("benchmark_disable"):
        against, skipped = other_ways(images, request.config.getoption("compile_models"))
    costs = pnfs.count_costs(settled(), SIZE, count, device=device)
    with pnfs.kernels.use_backend("torch"):
        want = without_gradients(settled(), images)()
    measure(
        harness.Case(
            op="evaluation",
            name=f"ours-1 256x192 batch {count} {precision}",
            backend="auto",
            device=device,
            call=without_gradients(user_network(device, precision), images),
            want=want,
            tolerance=2e-2 if half else 1e-5,
            bytes=costs.bytes,
            flops=2 * costs.conv_macs * count,
            images=count,
            against=against,
            approximate=("openvino bf16",),
            skipped=skipped,
        )
    )


@pytest.mark.parametrize("count", [8])
def bench_pipeline(measure: Any, count: int) -> None:
    """Photographs and boxes to keypoints: crop, network, decode."""
    images, matrices = people(count)
    cv2.setNumThreads(torch.get_num_threads())
    crop = (
        torch.from_numpy(np.concatenate([image.reshape(-1) for image in images])),
        torch.arange(count) * images[0].size,
        torch.tensor([image.shape[:2] for image in images], dtype=torch.int32),
        torch.from_numpy(matrices),
        torch.zeros(count, dtype=torch.bool),
    )
    back = crop[3] * 4
    network = user_network("cpu")

    def run() -> Tensor:
        with torch.no_grad():
            scores = network(crop_normalize(*crop, size=SIZE, mean=MEAN, std=STD))
            return decode_heatmaps(scores, back)[1]

    def customary(network: Network) -> Callable[[], Tensor]:
        warp, permutation = with_cv2(images, matrices), torch.arange(17)

        def run() -> Tensor:
            with torch.no_grad():
                batch = torch.stack(warp()).permute(0, 3, 1, 2)
                return lean_torch(network(batch), back, None, permutation)[1]

        return run

    def reference() -> Tensor:
        scores = settled()(crop_normalize(*crop, size=SIZE, mean=MEAN, std=STD))
        return decode_heatmaps(scores, back)[1]

    fast = folded(plain()).to(memory_format=torch.channels_last)
    with torch.no_grad():
        want = harness.on_backend("torch", reference)()
    measure(
        harness.Case(
            op="photographs to keypoints",
            name=f"ours-1 256x192 {count} people float32",
            backend="auto",
            device="cpu",
            call=run,
            want=want,
            tolerance=1e-5,
            bytes=pnfs.count_costs(settled(), SIZE, count).bytes,
            images=count,
            against={"cv2, folded channels-last": customary(fast)},
            approximate=("cv2, folded channels-last",),
        )
    )
