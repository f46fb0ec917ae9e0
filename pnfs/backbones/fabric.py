"""A Cell-based Neural Fabric as the backbone (Fig. 5, blue; Table VIII)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from pnfs.backbones.base import Backbone
from pnfs.backbones.norm import BatchNormAct2d
from pnfs.config import DroppedConfig, FabricBackboneConfig
from pnfs.fabric import Fabric
from pnfs.liveness import Dropped
from pnfs.topology import build_topology

STEM_CHANNELS = 64


def fabric_stem(out_channels: int) -> nn.Sequential:
    """Image → 1/4 scale: 3×3 stride 2 → BN → 3×3 stride 2 → BN → ReLU → 1×1."""
    return nn.Sequential(
        nn.Conv2d(3, STEM_CHANNELS, 3, stride=2, padding=1, bias=False),
        BatchNormAct2d(STEM_CHANNELS),
        nn.Conv2d(STEM_CHANNELS, STEM_CHANNELS, 3, stride=2, padding=1, bias=False),
        BatchNormAct2d(STEM_CHANNELS, "relu"),
        nn.Identity(),  # keeps the published numbers of what follows
        nn.Conv2d(STEM_CHANNELS, out_channels, 1, bias=False),
    )


class FabricBackbone(Backbone):
    """Stem and the first layers of one fabric: images → a four-level feature pyramid.

    Attributes:
        channels: channels of the pyramid at 1/4, 1/8, 1/16, 1/32.
        fabric: a `Fabric` with one part; its α and β are searched like those of the parts.
    """

    name = "fabric backbone"

    def __init__(
        self,
        config: FabricBackboneConfig,
        pruning: DroppedConfig | None = None,
        read: Sequence[int] | None = None,
    ) -> None:
        """`pruning`: what was dropped; `read`: the levels that somebody reads, all by default."""
        super().__init__()
        topology = build_topology(
            layers=config.layers,
            channels=config.channels,
            hidden=config.hidden,
            operations=config.operations,
            reserve=config.reserve,
        )
        self.channels = tuple(row.channels for row in topology.output_cells)
        self.stem = fabric_stem(topology.channels_at(0))
        for layer in self.stem:
            if isinstance(layer, nn.Conv2d):
                nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
        dropped = None
        if pruning is not None:
            names = pruning.operations, pruning.inputs
            dropped = Dropped.from_names(topology, ["backbone"], *names)
        outputs = None if read is None else dict.fromkeys(read, (0,))
        self.fabric = Fabric(
            topology,
            1,
            profile=config.profile,
            dropped=dropped,
            outputs=outputs,
            partial=config.partial,
            checkpoint=config.checkpoint,
        )

    def maps(self, images: Tensor) -> tuple[Tensor, ...]:
        """Images (N, 3, H, W) → four maps (N, channels[level], H / s, W / s), s = 4, 8, 16, 32; an
        empty one for a level that nobody reads."""
        levels = self.fabric((self.stem(images),))
        return tuple(images.new_empty(0) if level is None else level[0] for level in levels)
