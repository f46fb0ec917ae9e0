"""ResNet-50 and -152 (He et al. 2016), stride in the 3×3 convolution, torchvision's key names."""

from __future__ import annotations

from typing import ClassVar, cast

import torch.nn.functional as F
from torch import Tensor, nn

from pnfs.backbones.base import Backbone
from pnfs.backbones.norm import BatchNormAct2d
from pnfs.backbones.weights import init_convolutions

BLOCKS = {50: (3, 4, 6, 3), 152: (3, 8, 36, 3)}
EXPANSION = 4


class Bottleneck(nn.Module):
    """1×1 to `inner` → 3×3 → 1×1 to 4·inner, each normalised, plus the (projected) input, ReLU."""

    def __init__(self, inputs: int, inner: int, stride: int = 1) -> None:
        super().__init__()
        outputs = EXPANSION * inner
        self.conv1 = nn.Conv2d(inputs, inner, 1, bias=False)
        self.bn1 = BatchNormAct2d(inner, "relu")
        self.conv2 = nn.Conv2d(inner, inner, 3, stride, padding=1, bias=False)
        self.bn2 = BatchNormAct2d(inner, "relu")
        self.conv3 = nn.Conv2d(inner, outputs, 1, bias=False)
        self.bn3 = BatchNormAct2d(outputs, "relu")
        self.downsample: nn.Sequential | None = None
        if stride != 1 or inputs != outputs:
            self.downsample = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride, bias=False), BatchNormAct2d(outputs)
            )

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn1(self.conv1(x))
        y = self.bn2(self.conv2(y))
        residual = x if self.downsample is None else self.downsample(x)
        return cast(Tensor, self.bn3(self.conv3(y), residual))


class ResNet(Backbone):
    """The pyramid is the outputs of the four stages."""

    channels = (256, 512, 1024, 2048)
    known_heads: ClassVar[tuple[str, ...]] = ("fc.", "deconv_layers.", "final_layer.")

    def __init__(self, depth: int) -> None:
        """`depth` is 50 or 152."""
        super().__init__()
        self.name = f"ResNet-{depth}"
        self.conv1 = nn.Conv2d(3, 64, 7, stride=2, padding=3, bias=False)
        self.bn1 = BatchNormAct2d(64, "relu")
        inputs = 64
        for stage, blocks in enumerate(BLOCKS[depth]):
            inner = 64 << stage
            layers = []
            for block in range(blocks):
                stride = 2 if stage > 0 and block == 0 else 1
                layers.append(Bottleneck(inputs, inner, stride))
                inputs = EXPANSION * inner
            self.add_module(f"layer{stage + 1}", nn.Sequential(*layers))
        init_convolutions(self)

    def maps(self, images: Tensor) -> tuple[Tensor, ...]:
        x = self.bn1(self.conv1(images))
        x = F.max_pool2d(x, 3, stride=2, padding=1)
        pyramid = []
        for stage in range(1, 5):
            x = self.get_submodule(f"layer{stage}")(x)
            pyramid.append(x)
        return tuple(pyramid)
