"""Backbones: images → a feature pyramid at 1/4, 1/8, 1/16, 1/32 that every part fabric shares."""

from __future__ import annotations

from collections.abc import Sequence

from pnfs.backbones.base import Backbone
from pnfs.config import ModelConfig


def build_backbone(config: ModelConfig, read: Sequence[int] | None = None) -> Backbone:
    """The backbone that `config.backbone` names, with freshly drawn weights.

    It maps images (N, 3, H, W), H and W multiples of 32, to four feature maps
    (N, channels[level], H / s, W / s), s = 4, 8, 16, 32. A pruned fabric backbone computes the
    levels in `read` alone.
    """
    if config.fabric_backbone is not None:
        from pnfs.backbones.fabric import FabricBackbone

        if config.pruning is None:
            return FabricBackbone(config.fabric_backbone)
        return FabricBackbone(config.fabric_backbone, config.pruning.backbone, read)
    if config.backbone == "mobilenet_v2":
        from pnfs.backbones.mobilenet_v2 import MobileNetV2

        return MobileNetV2()
    if config.backbone in ("resnet50", "resnet152"):
        from pnfs.backbones.resnet import ResNet

        return ResNet(int(config.backbone.removeprefix("resnet")))
    if config.backbone in ("hrnet_w32", "hrnet_w48"):
        from pnfs.backbones.hrnet import HRNetPyramid

        return HRNetPyramid(int(config.backbone.removeprefix("hrnet_w")))
    raise AssertionError(f"the schema admits no backbone '{config.backbone}'")
