"""The networks that the paper compares with (Tables IV, VI, VII).

Each has scalar heatmaps (d = 1, a plain linear map) or "vector in pixel" (d > 1, squashed), and
PoseNet's interface: `config`, `vectors`, `forward`, `architecture_parameters`.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pnfs.backbones import build_backbone
from pnfs.backbones.base import Backbone
from pnfs.backbones.hrnet import HRNetTrunk
from pnfs.backbones.norm import BatchNormAct2d
from pnfs.backbones.resnet import Bottleneck
from pnfs.backbones.weights import init_convolutions
from pnfs.config import ModelConfig
from pnfs.errors import PnfsError
from pnfs.head import VectorHead, merge_parts
from pnfs.running import moved_together

DECONV_CHANNELS = 256
DECONV_LAYERS = 3


class Baseline(nn.Module):
    """What the three share. `backbone` → `features` → `head` → scores."""

    backbone: Backbone
    head: VectorHead

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config

    def architecture_parameters(self) -> list[nn.Parameter]:
        """None: nothing is searched."""
        return []

    def features(self, images: Tensor) -> list[Tensor]:
        """Images (N, 3, H, W) → per part what its head reads, (N, C, H/4, W/4)."""
        raise NotImplementedError

    @moved_together()
    def vectors(self, images: Tensor) -> list[Tensor]:
        """Images (N, 3, H, W) → per part the vectors (N, K_p, d, H/4, W/4) before the squash."""
        return self.head(self.features(images))

    def forward(self, images: Tensor) -> Tensor:
        """Images (N, 3, H, W), normalised, H and W multiples of 32 → scores (N, K, H/4, W/4)."""
        return merge_parts(
            self.vectors(images), self.config.part_table, self.config.skeleton_table.num_keypoints
        )


class SimpleBaseline(Baseline):
    """ResNet and three transposed 4×4 convolutions of 256 channels (Xiao et al. 2018)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.backbone = build_backbone(config)
        layers: list[nn.Module] = []
        inputs = self.backbone.channels[-1]
        for _ in range(DECONV_LAYERS):
            layers += [
                nn.ConvTranspose2d(inputs, DECONV_CHANNELS, 4, stride=2, padding=1, bias=False),
                BatchNormAct2d(DECONV_CHANNELS, "relu"),
                nn.Identity(),  # keeps the published numbers of what follows
            ]
            inputs = DECONV_CHANNELS
        layers[-2:] = [BatchNormAct2d(DECONV_CHANNELS)]  # the head begins with the last ReLU
        self.deconv_layers = nn.Sequential(*layers)
        init_convolutions(self.deconv_layers)
        self.head = VectorHead(DECONV_CHANNELS, [_keypoints_of_one_head(config)], config.vector_dim)

    def features(self, images: Tensor) -> list[Tensor]:
        return [self.deconv_layers(self.backbone(images)[-1])]


class HRNet(Baseline):
    """HRNet-W32 or -W48 with stage 4; the head reads the map at 1/4 (Sun et al. 2019)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        width = 48 if config.backbone == "hrnet_w48" else 32
        self.backbone = HRNetTrunk(width)
        self.head = VectorHead(width, [_keypoints_of_one_head(config)], config.vector_dim)

    def features(self, images: Tensor) -> list[Tensor]:
        return [self.backbone(images)[0]]


class Branchnet(Baseline):
    """Hand-designed branches on a shared pyramid (Table VI, after Tang & Wu 2019).

    The four levels, brought to 1/4 and concatenated, feed one branch per part: a 1×1 convolution to
    `width` channels, then `blocks` residual bottlenecks of inner width `width` / 4.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        width = config.branchnet.width
        if width % 4:
            raise PnfsError(f"model.branchnet.width: {width} must be a multiple of 4")
        self.backbone = build_backbone(config)
        inputs = sum(self.backbone.channels)
        counts = [len(keypoints) for keypoints in config.part_table.values()]
        self.branches = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(inputs, width, 1),
                *(Bottleneck(width, width // 4) for _ in range(config.branchnet.blocks)),
            )
            for _ in counts
        )
        init_convolutions(self.branches)
        self.head = VectorHead(width, counts, config.vector_dim)

    def features(self, images: Tensor) -> list[Tensor]:
        finest, *coarser = self.backbone(images)
        size = finest.shape[2:]
        maps = [F.interpolate(x, size, mode="bilinear", align_corners=True) for x in coarser]
        shared = torch.cat([finest, *maps], dim=1)
        return [branch(shared) for branch in self.branches]


def _keypoints_of_one_head(config: ModelConfig) -> int:
    """K, after checking that the configuration asks for one head over all keypoints."""
    if len(config.part_table) != 1:
        raise PnfsError(
            f"model.parts: family '{config.family}' has one head for all keypoints; set parts: 1"
        )
    return config.skeleton_table.num_keypoints
