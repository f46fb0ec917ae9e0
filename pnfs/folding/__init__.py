"""A PoseNet in evaluation mode, folded: the same scores from one native call.

All that is linear is multiplied out in float64 before the first image: batch normalisation, α and β
into the weights (|O|·softmax(α) ≥ 0 passes through a ReLU), the cells' output convolutions and the
pyramid's 1×1 reductions into the convolutions that read them, where that lowers the work. 1×1
convolutions stand before the upsampling, with which they commute. Cells and operations that no
output depends on, or whose weight is exactly zero, are left out.

Shapes: matrices (O, I); 3×3 kernels (O, I, 3, 3); depthwise taps (C, 3, 3).
"""

from __future__ import annotations

import contextlib
from typing import cast

import torch
from torch import Tensor, nn

from pnfs.backbones.fabric import FabricBackbone
from pnfs.backbones.mobilenet_v2 import MobileNetV2
from pnfs.capture import Captured, Recorder, recorder_for
from pnfs.errors import PnfsError
from pnfs.fabric import Fabric
from pnfs.folding.backbones import fused_backbone, write_mobilenet, write_stem
from pnfs.folding.fabric import FabricFolder, live_inputs
from pnfs.folding.writer import Feature, Writer
from pnfs.kernels import calls, native
from pnfs.kernels.folded_network import OP, folded_network
from pnfs.kernels.folded_program import NONE, RELU, Head
from pnfs.model import PoseNet


class FoldedPoseNet(nn.Module):
    """What `fold` returns: images (N, 3, H, W) → scores (N, K, H/4, W/4), for evaluation alone.

    Attributes:
        config: that of the folded model.
        backbone: modules that run before the program, or None where the program has all of it.
        weights: all weights, in the program's order.
        program: see `pnfs.kernels.folded_network`.
        rounded_products: whether the program's products round their operands to bfloat16.
    """

    weights: Tensor

    def __init__(self, model: PoseNet, bfloat16: bool = False) -> None:
        super().__init__()
        self.config = model.config
        writer = Writer(bfloat16)
        with torch.no_grad():
            self.backbone = None if _is_foldable(model) else fused_backbone(model.backbone)
            _write_network(writer, model)
        self.rounded_products = bfloat16
        self.program = writer.program(model.config.skeleton_table.num_keypoints)
        dtype = next(model.parameters()).dtype
        device = next(model.parameters()).device
        self.register_buffer("weights", writer.weights().to(device, dtype))

    def forward(self, images: Tensor) -> Tensor:
        """As `PoseNet.forward`, for images of the weights' dtype.

        Raises:
            PnfsError: a size that is no multiple of 32, or another dtype.
        """
        if self.backbone is None:
            return folded_network([images], self.weights, self.program)
        # Autocast has a say where the products round, too; its maps are those of a lower precision.
        device = images.device.type
        with contextlib.nullcontext() if self.rounded_products else calls.without_autocast(device):
            maps = [x.to(self.weights.dtype) for x in self.backbone(images)]
        return folded_network(maps, self.weights, self.program)


def fold(model: nn.Module, bfloat16: bool = False) -> FoldedPoseNet:
    """The evaluation mode of `model`, as it is now, in one native call.

    The result shares no memory with `model`, whose later changes it does not see.

    Args:
        model: a PoseNet, from `build_model` or `load_model`.
        bfloat16: round the operands of 1×1 and 3×3 convolutions to bfloat16, which processors with
            AMX or AVX512-BF16 multiply faster; sums and maps stay in float32. Depthwise
            convolutions are not touched; a backbone outside the program follows the caller's
            autocast, and without `bfloat16` it runs in float32 under any.

    Raises:
        PnfsError: not a PoseNet, or one with partial channels.
    """
    if not isinstance(model, PoseNet):
        raise PnfsError(f"fold: takes a PoseNet, not {type(model).__name__}")
    if _has_partial_channels(model):
        raise PnfsError(
            "fold: a fabric with partial channels cannot be folded; train its architecture with "
            "partial=1 (search.architecture), which is what partial channels are for"
        )
    return FoldedPoseNet(model, bfloat16).eval()


class ReplayedNetwork(nn.Module):
    """A network whose forward pass is replayed as one CUDA graph where an image size and batch
    comes again; see `pnfs.capture`. For evaluation: it sees weights that change in place."""

    def __init__(self, network: nn.Module, recorder: Recorder) -> None:
        super().__init__()
        self.network = network
        self._call = Captured(lambda images: (network(images),), recorder)

    def forward(self, images: Tensor) -> Tensor:
        """As the network's, for one precision: autocast as it was at the first calls."""
        (scores,) = self._call(images)
        return scores.clone()  # the next replay overwrites them


def for_evaluation(model: nn.Module, device: torch.device, precision: str) -> nn.Module:
    """`model` as it runs fastest: a PoseNet in float32 or bfloat16 folded, on a CPU that has the
    kernel; any network replayed, on a GPU."""
    recorder = recorder_for(device)
    if recorder is not None:
        return ReplayedNetwork(model, recorder)
    if type(model) is not PoseNet or device.type != "cpu" or precision == "fp16":
        return model
    if _has_partial_channels(model):
        return model
    if any(p.dtype != torch.float32 or p.device.type != "cpu" for p in model.parameters()):
        return model
    example = torch.empty(0)
    try:
        chosen = OP.choose([[example], example, ""])
    except PnfsError:  # another backend was asked for
        return model
    if chosen != "cpp":
        return model
    # Without instructions for bfloat16, float32 is faster, and closer.
    return fold(model, precision == "bf16" and native.module("_cpu").multiplies_bfloat16())


def _has_partial_channels(model: PoseNet) -> bool:
    return any(module.partial > 1 for module in model.modules() if isinstance(module, Fabric))


def _is_foldable(model: PoseNet) -> bool:
    """Whether the program can hold the backbone."""
    return isinstance(model.backbone, MobileNetV2 | FabricBackbone)


def _write_network(writer: Writer, model: PoseNet) -> None:
    backbone = model.backbone
    if isinstance(backbone, MobileNetV2):
        pyramid = [Feature(tap) for tap in write_mobilenet(writer, backbone)]
    elif isinstance(backbone, FabricBackbone):
        stem = write_stem(writer, backbone.stem)
        levels = range(len(backbone.channels))
        wanted = live_inputs(model.fabric)
        used = [level for level in levels if level in wanted]
        features = FabricFolder(writer, backbone.fabric, 0, [stem]).outputs(used)
        buffers = {level: writer.materialise(features[level]) for level in used}
        pyramid = [Feature(buffers.get(level, NONE)) for level in levels]
    else:
        pyramid = [
            Feature(writer.load(2 + level, channels))
            for level, channels in enumerate(backbone.channels)
        ]
    heads = []
    for part in range(model.fabric.parts):
        folder = FabricFolder(writer, model.fabric, part, pyramid)
        heads.append(writer.materialise(folder.outputs([0])[0], act=RELU))
    convs = [cast(nn.Conv2d, conv) for conv in model.head.convs]
    weights = [writer.matrix(conv.weight.detach().double().flatten(1).cpu()) for conv in convs]
    biases = [writer.store(cast(Tensor, conv.bias).detach().cpu()) for conv in convs]
    parts = tuple(tuple(keypoints) for keypoints in model.config.part_table.values())
    depth = model.head.vector_dim
    writer.steps.append(Head(depth, tuple(heads), tuple(weights), tuple(biases), parts))
