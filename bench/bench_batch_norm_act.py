"""Batch normalisation and ReLU6 of MobileNetV2's maps, forward and backward, and a residual."""

from __future__ import annotations

from typing import Any

import harness
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from pnfs.kernels import batch_norm_act

# (channels, height, width) of maps in MobileNetV2 at 256×192.
MAPS = ((96, 128, 96), (144, 64, 48), (24, 64, 48), (192, 32, 24), (576, 16, 12), (960, 8, 6))


def _torch_layers(activation: str) -> Any:
    def run(x: Tensor, weight: Tensor, bias: Tensor, *residual: Tensor) -> Tensor:
        y = F.batch_norm(x, None, None, weight, bias, training=True)
        y = y + residual[0] if residual else y
        return F.relu6(y) if activation == "relu6" else y

    return run


@pytest.mark.parametrize("map_", MAPS, ids=lambda map_: f"c{map_[0]}")
@pytest.mark.parametrize(("backend", "device"), harness.backends("batch_norm_act"))
def bench_batch_norm_act(
    measure: Any, backend: str, device: str, map_: tuple[int, int, int]
) -> None:
    batch, channels = 8, map_[0]
    activation: Any = "none" if channels == 24 else "relu6"  # the last of a block has none
    maps = 2 if channels == 24 else 1
    x, *residual = (
        (torch.randn(batch, *map_, device=device) + 1).contiguous(memory_format=torch.channels_last)
        for _ in range(maps)
    )
    inputs = [x, *(torch.rand(channels, device=device) + 0.5 for _ in range(2)), *residual]

    def run(x: Tensor, weight: Tensor, bias: Tensor, *residual: Tensor) -> Tensor:
        given = {"residual": residual[0]} if residual else {}
        return batch_norm_act(x, weight, bias, activation=activation, **given)[0]

    measure(
        harness.gradient_case(
            "batch_norm_act",
            f"{batch}x{'x'.join(map(str, map_))} {activation}",
            run,
            inputs,
            others={"F.batch_norm": _torch_layers(activation)},
            backend=backend,
            device=device,
            tolerance=1e-3,
            bytes=(8 + len(residual)) * x.nbytes,
        )
    )
