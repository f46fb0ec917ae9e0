"""Cells and Cell-based Neural Fabrics (Eq. 1-3), P parts stacked on the leading axis.

Shapes: P parts, N batch, C channels of the cell, H W of its scale; `x_PNCHW`, channels-last inside.

Profiles. `paper`: Eq. 1 and 2 as printed. `posenfs`, as the published code runs: the mixed
operation is scaled by |O|, the input mix by 3 and passed through a ReLU, and downsampling has no
ReLU of its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

import torch
from torch import Tensor, nn

from pnfs import kernels
from pnfs.architecture import mixing_weights, new_alpha, new_beta
from pnfs.config import Profile
from pnfs.operations import (
    BN_EPS,
    Normalised,
    PartBatchNorm2d,
    PartConv2d,
    build_branch,
    convolve,
    normalised,
)
from pnfs.topology import CellRow, Topology

Features = Mapping[tuple[int, int], Tensor]  # (layer, level) -> x_PNCHW


class ScaleTransform(nn.Sequential):
    """T of Eq. 2 up to its raw output: how a neighbour's output reaches a cell of `channels`.

    `down`: 3×3 stride 2 with bias → BN, from channels / 2. `up`: 1×1 with bias → BN, from
    2 · channels, at half the resolution. `same`: nothing. The mix that reads the result normalises
    it and upsamples it (bilinear ×2, aligned corners) on load.
    """

    def __init__(self, transform: str, parts: int, channels: int) -> None:
        conv = {
            "same": lambda: None,
            "down": lambda: PartConv2d(parts, channels // 2, channels, 3, stride=2, bias=True),
            "up": lambda: PartConv2d(parts, channels * 2, channels, 1, bias=True),
        }[transform]()
        super().__init__(
            *([] if conv is None else [conv, PartBatchNorm2d(parts, channels, affine=True)])
        )
        self.transform = transform

    def forward(self, x_PNCHW: Tensor) -> Normalised:
        """A neighbour's output → raw map, mean and var (P, C); not for `same`."""
        conv, norm = self
        assert isinstance(conv, PartConv2d) and isinstance(norm, PartBatchNorm2d)
        return (
            convolve(x_PNCHW, conv, norm)
            if self.transform == "up"
            else normalised(conv(x_PNCHW), norm)
        )

    def affine(self) -> tuple[Tensor, Tensor]:
        """Scale and shift of the batch normalisation, (P, C) each."""
        norm = self[1]
        assert isinstance(norm, PartBatchNorm2d)
        assert norm.weight is not None and norm.bias is not None
        return norm.weight, norm.bias


class MixedEdge(nn.Module):
    """One directed edge of a cell: the softmax(α)-weighted sum of all operations (Eq. 1)."""

    def __init__(
        self, operations: tuple[str, ...], parts: int, channels: int, profile: Profile
    ) -> None:
        super().__init__()
        self.scale = float(len(operations)) if profile == "posenfs" else 1.0
        branches = {name: build_branch(name, parts, channels) for name in operations}
        self.operations = nn.ModuleDict(
            {n: branch for n, branch in branches.items() if branch is not None}
        )
        self.has_skip = "skip" in operations
        terms = (["skip"] if self.has_skip else []) + list(self.operations)
        self.columns = [operations.index(name) for name in terms]

    def forward(self, x_PNCHW: Tensor, alpha_PO: Tensor) -> Tensor:
        """x (P, N, C, H, W), softmax(α) of this edge (P, O) → (P, N, C, H, W)."""
        if not self.columns:
            return torch.zeros_like(x_PNCHW)
        branches = [branch(x_PNCHW) for branch in self.operations.values()]
        return kernels.mixed_sum(
            x_PNCHW if self.has_skip else None,
            [y for y, _, _ in branches],
            [mean for _, mean, _ in branches],
            [var for _, _, var in branches],
            self.scale * alpha_PO[:, self.columns],
            relu=[bool(branch.relu) for branch in self.operations.values()],
            eps=BN_EPS,
        )


class Cell(nn.Module):
    """Eq. 3: three inputs mixed by β, H hidden nodes joined by mixed edges, one 1×1 output."""

    def __init__(self, row: CellRow, topology: Topology, parts: int, profile: Profile) -> None:
        super().__init__()
        self.row = row
        self.edge_rows = topology.edges
        self.hidden = topology.hidden
        self.profile = profile
        self.inputs = nn.ModuleList(
            ScaleTransform(source.transform, parts, row.channels) for source in row.inputs
        )
        self.edges = nn.ModuleList(
            MixedEdge(topology.operations, parts, row.channels, profile) for _ in topology.edges
        )
        self.output = PartConv2d(
            parts, row.channels * topology.hidden, row.channels, 1, bias=True, normalised=False
        )

    def input_node(self, features: Features, beta_P3: Tensor) -> Tensor:
        """h₀ = Σ softmax(β) · T(O) over parallel, above and below (Eq. 2)."""
        scale = float(len(self.row.inputs)) if self.profile == "posenfs" else 1.0
        # Border copies of the parallel input are the same map: one source with the sum of weights.
        same = [source for source in self.row.inputs if source.transform == "same"]
        others = [source for source in self.row.inputs if source.transform != "same"]
        transforms = [cast(ScaleTransform, self.inputs[source.slot]) for source in others]
        sources = [features[same[0].source]] if same else []
        weights = [beta_P3[:, [source.slot for source in same]].sum(1)] if same else []
        maps = [
            transform(features[source.source])
            for source, transform in zip(others, transforms, strict=True)
        ]
        affine = [transform.affine() for transform in transforms]
        return kernels.scale_mix(
            [*sources, *(y for y, _, _ in maps)],
            [*(["same"] if same else []), *(source.transform for source in others)],
            [mean for _, mean, _ in maps],
            [var for _, _, var in maps],
            [gamma for gamma, _ in affine],
            [beta for _, beta in affine],
            scale * torch.stack([*weights, *(beta_P3[:, source.slot] for source in others)], dim=1),
            relu=self.profile == "posenfs",
            down_relu=self.profile == "paper",
            eps=BN_EPS,
        )

    def forward(self, features: Features, alpha_PEO: Tensor, beta_P3: Tensor) -> Tensor:
        """Earlier outputs, softmax(α) (P, E, O), this cell's softmax(β) (P, 3) → output node."""
        nodes = [self.input_node(features, beta_P3)]
        for target in range(1, self.hidden + 1):
            total: Tensor | None = None
            for edge, mixed in zip(self.edge_rows, self.edges, strict=True):
                if edge.target == target:
                    term = mixed(nodes[edge.source], alpha_PEO[:, edge.alpha_row])
                    total = term if total is None else total + term
            assert total is not None
            nodes.append(total)
        hidden = nodes[1] if self.hidden == 1 else torch.cat(nodes[1:], dim=2)
        return self.output(hidden)


class Fabric(nn.Module):
    """P Cell-based Neural Fabrics of one topology; they differ in weights, α and β.

    Attributes:
        topology: the cell-and-edge table.
        alpha: logits (P, E, O), one row per edge, shared by all cells of a part.
        beta: logits (P, cells, 3), rows in the table's order, columns parallel, above, below.
        cells: `cell_{layer}_{level}` -> Cell.
        reduce: per level the 1×1 convolution that brings the pyramid to this fabric's widths; empty
            where the pyramid's 1/4 level has the right width already (or a stem feeds the fabric).
    """

    def __init__(
        self,
        topology: Topology,
        parts: int,
        *,
        profile: Profile = "posenfs",
        in_channels: tuple[int, ...] | None = None,
    ) -> None:
        """`in_channels`: channels of the pyramid's levels, or None when a stem feeds layer 0."""
        super().__init__()
        self.topology = topology
        self.parts = parts
        self.profile = profile
        self.alpha = new_alpha(topology, parts)
        self.beta = new_beta(topology, parts)
        self.reduce = nn.ModuleList()
        if in_channels is not None and in_channels[0] != topology.channels_at(0):
            self.reduce.extend(
                PartConv2d(
                    parts, channels, topology.channels_at(level), 1, bias=True, normalised=False
                )
                for level, channels in enumerate(in_channels)
            )
        self.cells = nn.ModuleDict(
            {row.name: Cell(row, topology, parts, profile) for row in topology.cells}
        )

    def architecture_parameters(self) -> list[nn.Parameter]:
        return [self.alpha, self.beta]

    def forward(self, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Shared input maps → outputs of the last layer's cells.

        Args:
            inputs: the pyramid, (N, C_level, H / 2^level, W / 2^level) per level, or the stem's
            map alone.

        Returns:
            Per level of the last layer (P, N, C, H, W), 1/4 first.
        """
        features: dict[tuple[int, int], Tensor] = {}
        for level, x_NCHW in enumerate(inputs):
            x_PNCHW = x_NCHW.expand(self.parts, *x_NCHW.shape)
            if self.reduce:
                x_PNCHW = self.reduce[level](x_PNCHW)
            features[(self.topology.input_layer, level)] = x_PNCHW
        alpha, beta = mixing_weights(self.alpha), mixing_weights(self.beta)
        for row in self.topology.cells:
            features[(row.layer, row.level)] = self.cells[row.name](
                features, alpha, beta[:, row.beta_row]
            )
        return tuple(features[(row.layer, row.level)] for row in self.topology.output_cells)
