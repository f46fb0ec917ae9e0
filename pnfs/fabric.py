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
from torch.nn import functional as F

from pnfs.architecture import mixing_weights, new_alpha, new_beta
from pnfs.config import Profile
from pnfs.operations import (
    Operation,
    PartBatchNorm2d,
    PartConv2d,
    PartFunction,
    build_operation,
    over_parts,
)
from pnfs.topology import CellRow, Topology

Features = Mapping[tuple[int, int], Tensor]  # (layer, level) -> x_PNCHW


def _upsample(x_NCHW: Tensor) -> Tensor:
    return F.interpolate(x_NCHW, scale_factor=2, mode="bilinear", align_corners=True)


def _weighted(weights_P: Tensor, x_PNCHW: Tensor) -> Tensor:
    return weights_P.view(-1, 1, 1, 1, 1).to(x_PNCHW.dtype) * x_PNCHW


def scale_transform(transform: str, parts: int, channels: int, profile: Profile) -> nn.Sequential:
    """T of Eq. 2: how a neighbour's output reaches a cell of `channels` channels.

    `down`: 3×3 stride 2 with bias, BN (then ReLU in the paper's profile), from channels / 2.
    `up`: 1×1 with bias, BN, bilinear ×2 with aligned corners, from 2 · channels. `same`: identity.
    """
    if transform == "down":
        layers: list[nn.Module] = [
            PartConv2d(parts, channels // 2, channels, 3, stride=2, bias=True),
            PartBatchNorm2d(parts, channels, affine=True),
        ]
        if profile == "paper":
            layers.append(PartFunction(F.relu))
    elif transform == "up":
        layers = [
            PartConv2d(parts, channels * 2, channels, 1, bias=True),
            PartBatchNorm2d(parts, channels, affine=True),
            PartFunction(_upsample),
        ]
    else:
        layers = []
    return Operation(*layers)


class MixedEdge(nn.Module):
    """One directed edge of a cell: the softmax(α)-weighted sum of all operations (Eq. 1)."""

    def __init__(
        self, operations: tuple[str, ...], parts: int, channels: int, profile: Profile
    ) -> None:
        super().__init__()
        self.names = operations
        self.scale = float(len(operations)) if profile == "posenfs" else 1.0
        built = {name: build_operation(name, parts, channels) for name in operations}
        self.operations = nn.ModuleDict({name: op for name, op in built.items() if op is not None})

    def forward(self, x_PNCHW: Tensor, alpha_PO: Tensor) -> Tensor:
        """x (P, N, C, H, W), softmax(α) of this edge (P, O) → (P, N, C, H, W)."""
        total = torch.zeros_like(x_PNCHW) if not self.operations else None
        for name, operation in self.operations.items():
            column = self.names.index(name)
            term = _weighted(self.scale * alpha_PO[:, column], operation(x_PNCHW))
            total = term if total is None else total + term
        return cast(Tensor, total)


class Cell(nn.Module):
    """Eq. 3: three inputs mixed by β, H hidden nodes joined by mixed edges, one 1×1 output."""

    def __init__(self, row: CellRow, topology: Topology, parts: int, profile: Profile) -> None:
        super().__init__()
        self.row = row
        self.edge_rows = topology.edges
        self.hidden = topology.hidden
        self.profile = profile
        self.inputs = nn.ModuleList(
            scale_transform(source.transform, parts, row.channels, profile) for source in row.inputs
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
        total: Tensor | None = None
        for source, transform in zip(self.row.inputs, self.inputs, strict=True):
            term = _weighted(scale * beta_P3[:, source.slot], transform(features[source.source]))
            total = term if total is None else total + term
        assert total is not None
        return F.relu(total) if self.profile == "posenfs" else total

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
                x_PNCHW = over_parts([self.reduce[level]], x_PNCHW)
            features[(self.topology.input_layer, level)] = x_PNCHW
        alpha, beta = mixing_weights(self.alpha), mixing_weights(self.beta)
        for row in self.topology.cells:
            features[(row.layer, row.level)] = self.cells[row.name](
                features, alpha, beta[:, row.beta_row]
            )
        return tuple(features[(row.layer, row.level)] for row in self.topology.output_cells)
