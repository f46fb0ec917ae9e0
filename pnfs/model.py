"""PoseNet = backbone → P part fabrics → vector in pixel (Fig. 3), and the model factory."""

from __future__ import annotations

from torch import Tensor, nn

from pnfs.backbones import build_backbone
from pnfs.baselines import Branchnet, HRNet, SimpleBaseline
from pnfs.config import ModelConfig
from pnfs.fabric import Fabric
from pnfs.head import VectorHead, merge_parts
from pnfs.liveness import Dropped, plan_fabric
from pnfs.running import moved_together
from pnfs.topology import build_topology


class PoseNet(nn.Module):
    """Pose Neural Fabrics: one shared backbone, P part fabrics, a vector at every pixel.

    Attributes:
        config: the configuration that built it.
        backbone: images → pyramid of four levels.
        fabric: the P part fabrics, stacked.
        head: per-part 1×1 convolutions to vectors.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        part_table = config.part_table
        topology = build_topology(
            layers=config.fabric.layers,
            channels=config.fabric.channels,
            hidden=config.fabric.hidden,
            operations=config.fabric.operations,
            cut=config.fabric.cut,
        )
        dropped = None
        if config.pruning is not None:
            names = config.pruning.fabric
            dropped = Dropped.from_names(topology, list(part_table), names.operations, names.inputs)
        reads = plan_fabric(topology, len(part_table), dropped).reads
        self.backbone = build_backbone(
            config, [level for level, parts in enumerate(reads) if parts]
        )
        self.fabric = Fabric(
            topology,
            len(part_table),
            profile=config.fabric.profile,
            in_channels=self.backbone.channels,
            dropped=dropped,
            partial=config.fabric.partial,
            checkpoint=config.fabric.checkpoint,
        )
        counts = [len(keypoints) for keypoints in part_table.values()]
        self.head = VectorHead(topology.channels_at(0), counts, config.vector_dim)

    def architecture_parameters(self) -> list[nn.Parameter]:
        """α and β of the part fabrics, then of a fabric backbone, by identity."""
        fabrics = (module for module in self.modules() if isinstance(module, Fabric))
        ordered = sorted(fabrics, key=lambda fabric: fabric is not self.fabric)
        return [parameter for fabric in ordered for parameter in fabric.architecture_parameters()]

    @moved_together()
    def vectors(self, images: Tensor) -> list[Tensor]:
        """Images (N, 3, H, W) → per part the vectors (N, K_p, d, H/4, W/4) before the squash."""
        return self.head(self.fabric(self.backbone(images))[0])

    def forward(self, images: Tensor) -> Tensor:
        """Scores of all keypoints.

        Args:
            images: (N, 3, H, W), normalised; H and W multiples of 32.

        Returns:
            (N, K, H/4, W/4): squashed lengths in [0, 1) summed over the parts that predict a
            keypoint (Eq. 5, 6); with d = 1 plain linear score maps.
        """
        return merge_parts(
            self.vectors(images), self.config.part_table, self.config.skeleton_table.num_keypoints
        )


_FAMILIES: dict[str, type[nn.Module]] = {
    "pnfs": PoseNet,
    "simplebaseline": SimpleBaseline,
    "hrnet": HRNet,
    "branchnet": Branchnet,
}


def build_model(config: ModelConfig) -> nn.Module:
    """The model that `config` describes, with fresh weights.

    All families share one interface: `forward(images (N, 3, H, W)) → scores (N, K, H/4, W/4)`,
    `vectors(images)`, `architecture_parameters()` and `config`.
    """
    return _FAMILIES[config.family](config)
