"""MobileNetV2 (Sandler et al. 2018) up to its last 160-channel block: Table IX of the paper.

Sub-modules carry the names of the flat key layout (`features.1.conv.0.weight`) of published PNFS
checkpoints; torchvision's nested one (`features.1.conv.0.0.weight`) is mapped to it.
"""

from __future__ import annotations

import re
from typing import Any, ClassVar, cast

from torch import Tensor, nn

from pnfs import kernels
from pnfs.backbones.base import Backbone
from pnfs.backbones.norm import BatchNormAct2d
from pnfs.backbones.weights import init_convolutions
from pnfs.kernels.shared import SharedMap

# (expansion t, output channels, repeats, first stride), Table IX
SETTINGS = (
    (1, 16, 1, 1),
    (6, 24, 2, 2),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
)
STEM_CHANNELS = 32
# The last block at 1/4, 1/8, 1/16 and 1/32; Table IX's "64" for P2 is a misprint.
TAPS = (3, 6, 13, 16)


class MobileNetV2(Backbone):
    """Each map is a block's output: after the linear 1×1 convolution and its BN, no ReLU."""

    name = "MobileNetV2"
    channels = (24, 32, 96, 160)
    known_heads: ClassVar[tuple[str, ...]] = ("features.17.", "features.18.", "classifier.")

    def __init__(self) -> None:
        super().__init__()
        stem = nn.Sequential(
            nn.Conv2d(3, STEM_CHANNELS, 3, stride=2, padding=1, bias=False),
            BatchNormAct2d(STEM_CHANNELS, "relu6"),
        )
        blocks: list[nn.Module] = [stem]
        inputs = STEM_CHANNELS
        for expansion, outputs, repeats, stride in SETTINGS:
            for repeat in range(repeats):
                blocks.append(
                    InvertedResidual(inputs, outputs, stride if repeat == 0 else 1, expansion)
                )
                inputs = outputs
        self.features = nn.Sequential(*blocks)
        init_convolutions(self)

    def maps(self, images: Tensor) -> tuple[Tensor, ...]:
        pyramid = []
        x = images
        for index, block in enumerate(self.features):
            x = block(x)
            if index in TAPS:
                pyramid.append(x)
        return tuple(pyramid)

    def rename_keys(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """torchvision's nested keys as flat ones; flat keys stay."""
        nested = any(re.match(r"features\.\d+\.conv\.0\.0\.", key) for key in state)
        return {_flat_key(key): value for key, value in state.items()} if nested else state


class InvertedResidual(nn.Module):
    """1×1 expansion (none for t = 1) → depthwise 3×3 → linear 1×1, plus the input if it fits.

    The identities stand where checkpoints number the activations. While training where
    there are kernels for it, the wide maps between the convolutions are normalised where they are
    read, and stored as they are.
    """

    def __init__(self, inputs: int, outputs: int, stride: int, expansion: int) -> None:
        super().__init__()
        self.residual = stride == 1 and inputs == outputs
        hidden = inputs * expansion
        layers: list[nn.Module] = []
        if expansion != 1:
            layers += [
                nn.Conv2d(inputs, hidden, 1, bias=False),
                BatchNormAct2d(hidden, "relu6"),
                nn.Identity(),
            ]
        layers += [
            nn.Conv2d(hidden, hidden, 3, stride, padding=1, groups=hidden, bias=False),
            BatchNormAct2d(hidden, "relu6"),
            nn.Identity(),
            nn.Conv2d(hidden, outputs, 1, bias=False),
            BatchNormAct2d(outputs),
        ]
        self.conv = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        if self.training and kernels.ops()["depthwise_fanout"].has_kernel(x.device.type):
            return self.normalised_on_load(x)
        return self.layer_by_layer(x)

    def layer_by_layer(self, x: Tensor) -> Tensor:
        *layers, norm = self.conv
        y = x
        for layer in layers:
            y = layer(y)
        return cast(Tensor, norm(y, x if self.residual else None))

    def normalised_on_load(self, x: Tensor) -> Tensor:
        """The same in training mode; every convolution takes its result's statistics as well."""
        *expansion, depthwise, norm, _, projection, last = cast(Any, self.conv)
        shared = SharedMap(x[None])
        y = shared.map
        on_load: dict[str, Any] = {}
        if expansion:
            y, mean, var = kernels.separable_conv(shared, expansion[0].weight.flatten(1)[None])
            on_load = expansion[1].on_load(y, mean, var)
        taps = depthwise.weight.flatten(0, 1)[None]
        ((y, mean, var),) = kernels.depthwise_fanout(
            y, ["conv"], [taps], stride=depthwise.stride[0], **on_load
        )
        y, mean, var = kernels.separable_conv(
            y, projection.weight.flatten(1)[None], **norm.on_load(y, mean, var)
        )
        y = y.squeeze(0)
        mean, var = last.note(y, mean.squeeze(0), var.squeeze(0))
        residual = shared.map.squeeze(0) if self.residual else None
        return cast(Tensor, last.normalise(y, residual, mean, var)[0])


def _flat_key(key: str) -> str:
    """`features.B.conv.G.L.rest` → `features.B.conv.I.rest`.

    torchvision groups convolution, normalisation and ReLU6; the last convolution and its
    normalisation stand alone, with G only.
    """
    match = re.fullmatch(r"(features\.(\d+)\.conv)\.(\d+)\.(?:(\d+)\.)?(\w+)", key)
    if match is None:
        return key
    prefix, block, group, layer, rest = match.groups()
    groups = 1 if block == "1" else 2
    index = 3 * int(group) + int(layer) if layer else 3 * groups + int(group) - groups
    return f"{prefix}.{index}.{rest}"
