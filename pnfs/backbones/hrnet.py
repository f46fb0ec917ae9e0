"""HRNet-W32 and -W48 (Sun et al. 2019), with the key names of its published checkpoints.

`HRNetPyramid` ends after stage 3 ("stem~stage3"): the backbone of Ours-3, -b and -c.
`HRNetTrunk` adds stage 4 and returns the map at 1/4: the HRNet baseline.
"""

from __future__ import annotations

from typing import ClassVar, cast

import torch.nn.functional as F
from torch import Tensor, nn

from pnfs.backbones.base import Backbone
from pnfs.backbones.norm import BatchNormAct2d
from pnfs.backbones.resnet import Bottleneck
from pnfs.backbones.weights import init_convolutions

BLOCKS_PER_BRANCH = 4
MODULES = {2: 1, 3: 4, 4: 3}  # stage -> exchange modules in a row
CLASSIFIER = ("incre_modules.", "downsamp_modules.", "final_layer.", "classifier.")


class BasicBlock(nn.Module):
    """Two normalised 3×3 convolutions plus the input, ReLU; the width stays."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn1 = BatchNormAct2d(width, "relu")
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = BatchNormAct2d(width, "relu")

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn1(self.conv1(x))
        return cast(Tensor, self.bn2(self.conv2(y), x))


class ExchangeModule(nn.Module):
    """Four blocks on every branch, then every output sums all branches at its own scale.

    `outputs` limits the outputs to the first ones (the last module of the trunk keeps 1/4 alone).
    """

    def __init__(self, widths: tuple[int, ...], outputs: int) -> None:
        super().__init__()
        self.branches = nn.ModuleList(
            nn.Sequential(*(BasicBlock(width) for _ in range(BLOCKS_PER_BRANCH)))
            for width in widths
        )
        self.fuse_layers = nn.ModuleList(
            nn.ModuleList(_exchange(widths, source, target) for source in range(len(widths)))
            for target in range(outputs)
        )

    def forward(self, maps: list[Tensor]) -> list[Tensor]:
        maps = [branch(x) for branch, x in zip(self.branches, maps, strict=True)]
        fused = []
        for row in self.fuse_layers:
            assert isinstance(row, nn.ModuleList)
            terms = [layer(x) for layer, x in zip(row, maps, strict=True)]
            total = terms[0]
            for term in terms[1:]:
                total = total + term
            fused.append(F.relu(total, inplace=True))
        return fused


class _ToStage3(Backbone):
    """Stem, layer 1, stages 2 and 3, and the transition to stage 4's new branch at 1/32."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.name = f"HRNet-W{width}"
        self.widths = (width, 2 * width, 4 * width, 8 * width)
        self.conv1 = nn.Conv2d(3, 64, 3, stride=2, padding=1, bias=False)
        self.bn1 = BatchNormAct2d(64, "relu")
        self.conv2 = nn.Conv2d(64, 64, 3, stride=2, padding=1, bias=False)
        self.bn2 = BatchNormAct2d(64, "relu")
        self.layer1 = nn.Sequential(*(Bottleneck(64 if i == 0 else 256, 64) for i in range(4)))
        self.transition1 = _transition((256,), self.widths[:2])
        self.stage2 = _stage(2, self.widths)
        self.transition2 = _transition(self.widths[:2], self.widths[:3])
        self.stage3 = _stage(3, self.widths)
        self.transition3 = _transition(self.widths[:3], self.widths)

    def four_branches(self, images: Tensor) -> list[Tensor]:
        x = self.bn1(self.conv1(images))
        x = self.bn2(self.conv2(x))
        maps = _move(self.transition1, [self.layer1(x)])
        maps = _move(self.transition2, self.stage2(maps))
        return _move(self.transition3, self.stage3(maps))


class HRNetPyramid(_ToStage3):
    """Stage 3's three outputs and transition 3's branch: widths `width` · (1, 2, 4, 8)."""

    known_heads: ClassVar[tuple[str, ...]] = (*CLASSIFIER, "stage4.")

    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.name += " stem~stage3"
        self.channels = self.widths
        init_convolutions(self)

    def maps(self, images: Tensor) -> tuple[Tensor, ...]:
        return tuple(self.four_branches(images))


class HRNetTrunk(_ToStage3):
    """Stage 4's map at 1/4 alone: (N, width, H / 4, W / 4)."""

    # an ImageNet file also fuses stage 4 into the three lower scales
    known_heads: ClassVar[tuple[str, ...]] = (
        *CLASSIFIER,
        *(f"stage4.{MODULES[4] - 1}.fuse_layers.{target}." for target in (1, 2, 3)),
    )

    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.channels = (width,)
        self.stage4 = _stage(4, self.widths, last_outputs=1)
        init_convolutions(self)

    def maps(self, images: Tensor) -> tuple[Tensor, ...]:
        return tuple(self.stage4(self.four_branches(images)))


def _stage(stage: int, widths: tuple[int, ...], last_outputs: int | None = None) -> nn.Sequential:
    """Stage 2, 3 or 4: exchange modules over as many branches."""
    counts = [stage] * MODULES[stage]
    if last_outputs is not None:
        counts[-1] = last_outputs
    return nn.Sequential(*(ExchangeModule(widths[:stage], outputs) for outputs in counts))


def _transition(before: tuple[int, ...], after: tuple[int, ...]) -> nn.ModuleList:
    """Per branch after: nothing, a 3×3 convolution to its width, or one that halves the scale."""
    layers: list[nn.Module] = []
    for level, width in enumerate(after):
        if level >= len(before):
            layers.append(nn.Sequential(_conv3x3(before[-1], width, stride=2, relu=True)))
        elif before[level] != width:
            layers.append(_conv3x3(before[level], width, stride=1, relu=True))
        else:
            layers.append(nn.Identity())
    return nn.ModuleList(layers)


def _move(transition: nn.ModuleList, maps: list[Tensor]) -> list[Tensor]:
    """Apply a transition; a new branch starts from the lowest scale there is."""
    return [layer(maps[min(i, len(maps) - 1)]) for i, layer in enumerate(transition)]


def _exchange(widths: tuple[int, ...], source: int, target: int) -> nn.Module:
    """What brings branch `source` to the scale and width of branch `target`."""
    if source == target:
        return nn.Identity()
    if source > target:
        return nn.Sequential(
            nn.Conv2d(widths[source], widths[target], 1, bias=False),
            BatchNormAct2d(widths[target]),
            nn.Upsample(scale_factor=1 << (source - target), mode="nearest"),
        )
    # each step halves the scale; the width changes, and the ReLU is left out, in the last one alone
    steps = target - source
    return nn.Sequential(
        *(
            _conv3x3(
                widths[source],
                widths[target] if step == steps - 1 else widths[source],
                stride=2,
                relu=step < steps - 1,
            )
            for step in range(steps)
        )
    )


def _conv3x3(inputs: int, outputs: int, *, stride: int, relu: bool) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False),
        BatchNormAct2d(outputs, "relu" if relu else "none"),
    )
