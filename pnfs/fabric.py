"""Cells and Cell-based Neural Fabrics (Eq. 1-3), P parts stacked on the leading axis.

Shapes: P parts, N batch, C channels of the cell, H W of its scale; `x_PNCHW`, channels-last inside.

Profiles. `paper`: Eq. 1 and 2 as printed. `posenfs`, as the published code runs: the mixed
operation is scaled by |O|, the input mix by 3 and passed through a ReLU, and downsampling has no
ReLU of its own.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as recomputed

from pnfs import kernels
from pnfs.architecture import mixing_weights, new_alpha, new_beta
from pnfs.config import Profile
from pnfs.kernels.checks import dense_stacked
from pnfs.kernels.shared import SharedMap
from pnfs.liveness import CellPlan, Dropped, FabricPlan, Parts, Place, plan_fabric
from pnfs.mixing import Mix, MixTable
from pnfs.operations import (
    BN_EPS,
    Normalised,
    PartBatchNorm2d,
    PartConv2d,
    Pool,
    build_branch,
    convolve,
    downsample,
    pool_together,
    select_parts,
)
from pnfs.running import left_alone
from pnfs.topology import SLOTS, Topology

# (layer, level) -> x_PNCHW of the parts that have it
Features = Mapping[tuple[int, int], SharedMap]


def _select_shared(x: SharedMap, have: Parts, wanted: Parts) -> Tensor | SharedMap:
    """`x` of the parts `wanted`, which passes gradients on where these are all that it has."""
    return x if have == wanted else select_parts(x.map, have, wanted)


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

    def forward(self, x_PNCHW: Tensor | SharedMap) -> Normalised:
        """A neighbour's output → raw map, mean and var (P, C); not for `same`."""
        conv, norm = self
        assert isinstance(conv, PartConv2d) and isinstance(norm, PartBatchNorm2d)
        read = convolve if self.transform == "up" else downsample
        return read(x_PNCHW, conv, norm)

    def affine(self) -> tuple[Tensor, Tensor]:
        """Scale and shift of the batch normalisation, (P, C) each."""
        norm = self[1]
        assert isinstance(norm, PartBatchNorm2d)
        assert norm.weight is not None and norm.bias is not None
        return norm.weight, norm.bias


class MixedEdge(nn.Module):
    """One directed edge of a cell: the softmax(α)-weighted sum of all operations (Eq. 1).

    An operation holds weights for, and runs in, the parts that use it alone.

    With partial channels (PC-DARTS) the first C / partial channels pass through the operations and
    the others pass by; those come first in the result, so that another edge after this one
    transforms others.
    """

    def __init__(
        self,
        operations: tuple[str, ...],
        channels: int,
        parts: Parts,
        users: tuple[Parts, ...],
        partial: int = 1,
    ) -> None:
        """`parts`: those of the cell; `users`: per operation, those that use it."""
        super().__init__()
        self.parts = parts
        self.partial, self.mixed = partial, channels // partial
        self.users = {name: used for name, used in zip(operations, users, strict=True) if used}
        branches = {
            name: build_branch(name, len(used), self.mixed) for name, used in self.users.items()
        }
        self.operations = nn.ModuleDict(
            {n: branch for n, branch in branches.items() if branch is not None}
        )
        self.pools: dict[Parts, list[str]] = {}  # pools of the same parts read their map once
        for name, branch in self.operations.items():
            if isinstance(branch, Pool):
                self.pools.setdefault(self.users[name], []).append(name)
        self.has_skip = "skip" in self.users
        terms = (["skip"] if self.has_skip else []) + list(self.operations)
        self.columns = [operations.index(name) for name in terms]

    def mix(self, alpha_row: int) -> Mix:
        """The weights that `forward` takes, of this row of softmax(α)."""
        return Mix(self.parts, alpha_row, tuple((column,) for column in self.columns))

    def forward(self, x_PNCHW: Tensor | SharedMap, weights_PT: Tensor) -> Tensor:
        """x (P, N, C, H, W), the weights of `mix` → (P, N, C, H, W)."""
        shared = x_PNCHW if isinstance(x_PNCHW, SharedMap) else SharedMap(x_PNCHW)
        if self.partial == 1:
            return self._mix(shared, weights_PT)
        x_PNHWC = shared.map.permute(0, 1, 3, 4, 2)
        mixed = self._mix(SharedMap(dense_stacked(shared.map[:, :, : self.mixed])), weights_PT)
        passing_by = x_PNHWC[..., self.mixed :]
        both = torch.cat([passing_by, mixed.permute(0, 1, 3, 4, 2)], dim=-1)
        return both.permute(0, 1, 4, 2, 3)

    def _mix(self, shared: SharedMap, weights_PT: Tensor) -> Tensor:
        if not self.columns:
            return torch.zeros_like(shared.map)
        results: dict[str, Normalised] = {}
        for name, branch in self.operations.items():
            if not isinstance(branch, Pool):
                results[name] = branch(_select_shared(shared, self.parts, self.users[name]))
        for used, names in self.pools.items():
            pools = [cast(Pool, self.operations[name]) for name in names]
            together = pool_together(_select_shared(shared, self.parts, used), pools)
            results.update(zip(names, together, strict=True))
        branches = [
            [select_parts(tensor, self.users[name], self.parts) for tensor in results[name]]
            for name in self.operations
        ]
        return kernels.mixed_sum(
            shared.map if self.has_skip else None,
            [y for y, _, _ in branches],
            [mean for _, mean, _ in branches],
            [var for _, _, var in branches],
            weights_PT,
            relu=[bool(branch.relu) for branch in self.operations.values()],
            eps=BN_EPS,
        )


class Cell(nn.Module):
    """Eq. 3: three inputs mixed by β, H hidden nodes joined by mixed edges, one 1×1 output."""

    def __init__(
        self, plan: CellPlan, fabric: FabricPlan, profile: Profile, partial: int = 1
    ) -> None:
        super().__init__()
        self.plan = plan
        self.row = plan.row
        # the parts that each source's map has
        self.sources = {x.source: fabric.parts_of(x.source) for x in plan.row.inputs}
        topology = fabric.topology
        self.edge_rows = topology.edges
        self.hidden = topology.hidden
        self.profile = profile
        channels, parts = plan.row.channels, len(plan.parts)
        self.inputs = nn.ModuleList(
            ScaleTransform(source.transform if readers else "same", len(readers), channels)
            for source, readers in zip(plan.row.inputs, plan.inputs, strict=True)
        )
        self.edges = nn.ModuleList(
            MixedEdge(topology.operations, channels, plan.parts, users, partial)
            for users in plan.operations
        )
        self.output = PartConv2d(
            parts, channels * topology.hidden, channels, 1, bias=True, normalised=False
        )

        live = [source for source in plan.row.inputs if plan.inputs[source.slot]]
        # Border copies of the parallel input are the same map: one term, whose weights are added.
        self.same = [source for source in live if source.transform == "same"]
        self.others = [source for source in live if source.transform != "same"]

    def mixes(self) -> tuple[Mix, list[Mix]]:
        """The weights that `forward` takes, of softmax(β) and, edge by edge, of softmax(α)."""
        same = tuple(source.slot for source in self.same)
        terms = (*((same,) if same else ()), *((source.slot,) for source in self.others))
        return (
            Mix(self.plan.parts, self.row.beta_row, terms),
            [
                cast(MixedEdge, edge).mix(row.alpha_row)
                for row, edge in zip(self.edge_rows, self.edges, strict=True)
            ],
        )

    def input_node(self, features: Features, weights_PT: Tensor) -> Tensor:
        """h₀ = Σ softmax(β) · T(O) over parallel, above and below (Eq. 2)."""
        parts, readers = self.plan.parts, self.plan.inputs
        sources = []
        if self.same:
            place = self.same[0].source
            sources.append(select_parts(features[place].map, self.sources[place], parts))
        maps, affine = [], []
        for source in self.others:
            transform, used = cast(ScaleTransform, self.inputs[source.slot]), readers[source.slot]
            read = _select_shared(features[source.source], self.sources[source.source], used)
            maps.append([select_parts(tensor, used, parts) for tensor in transform(read)])
            affine.append([select_parts(tensor, used, parts) for tensor in transform.affine()])
        return kernels.scale_mix(
            [*sources, *(y for y, _, _ in maps)],
            [*(["same"] if self.same else []), *(source.transform for source in self.others)],
            [mean for _, mean, _ in maps],
            [var for _, _, var in maps],
            [gamma for gamma, _ in affine],
            [beta for _, beta in affine],
            weights_PT,
            relu=self.profile == "posenfs",
            down_relu=self.profile == "paper",
            eps=BN_EPS,
        )

    def forward(self, features: Features, of_inputs: Tensor, *of_edges: Tensor) -> Tensor:
        """Earlier outputs, the weights of `mixes` → output node.

        P are the parts in which the cell is alive, `plan.parts`.
        """
        nodes = [SharedMap(self.input_node(features, of_inputs))]
        for target in range(1, self.hidden + 1):
            total: Tensor | None = None
            for edge, mixed, weights in zip(self.edge_rows, self.edges, of_edges, strict=True):
                if edge.target == target:
                    term = mixed(nodes[edge.source], weights)
                    total = term if total is None else total + term
            assert total is not None
            nodes.append(SharedMap(total))
        outputs = [node.map for node in nodes[1:]]
        hidden = outputs[0] if self.hidden == 1 else torch.cat(outputs, dim=2)
        return self.output(hidden)


class Fabric(nn.Module):
    """P Cell-based Neural Fabrics of one topology; they differ in weights, α and β.

    Attributes:
        topology: the cell-and-edge table.
        plan: which cells, operations and connections there are, part by part; all of them but
            after pruning.
        alpha: logits (P, E, O), one row per edge, shared by all cells of a part.
        beta: logits (P, cells, 3), rows in the table's order, columns parallel, above, below.
        cells: `cell_{layer}_{level}` -> Cell.
        reduce: per level the 1×1 convolution that brings the pyramid to this fabric's widths; empty
            where every level has the right width already (or a stem feeds the fabric). The
            published code asks the 1/4 level alone, and fails where another differs.
    """

    alpha_mask: Tensor | None
    beta_mask: Tensor | None

    def __init__(
        self,
        topology: Topology,
        parts: int,
        *,
        profile: Profile = "posenfs",
        in_channels: tuple[int, ...] | None = None,
        dropped: Dropped | None = None,
        outputs: Mapping[int, Parts] | None = None,
        partial: int = 1,
        checkpoint: bool = False,
    ) -> None:
        """
        Args:
            partial: see `MixedEdge`; must divide the channels.
            checkpoint: while training keep only the cells' outputs for the backward pass, which
                then runs each cell once more: less memory for more time, equal gradients.
            in_channels: channels of the pyramid's levels, or None when a stem feeds layer 0.
            dropped, outputs: what pruning left out, see `plan_fabric`.
        """
        super().__init__()
        self.topology = topology
        self.parts = parts
        self.profile = profile
        self.partial, self.checkpoint = partial, checkpoint
        self.plan = plan_fabric(topology, parts, dropped, outputs=outputs)
        self.alpha = new_alpha(topology, parts)
        self.beta = new_beta(topology, parts)
        # 0, or −∞ for what is dropped, so that softmax gives it no weight whatever the logit says.
        self._add_mask("alpha_mask", self.alpha, self.plan.dropped.operations)
        self._add_mask("beta_mask", self.beta, self.plan.dropped.inputs)
        self.reduce = nn.ModuleList()
        if in_channels is not None and any(
            have != topology.channels_at(level) for level, have in enumerate(in_channels)
        ):
            readers = self.plan.reads if self.plan.pruned else [range(parts)] * len(in_channels)
            self.reduce.extend(
                PartConv2d(
                    len(users),
                    channels,
                    topology.channels_at(level),
                    1,
                    bias=True,
                    normalised=False,
                )
                if users
                else nn.Identity()
                for level, (channels, users) in enumerate(zip(in_channels, readers, strict=False))
            )
        self.cells = nn.ModuleDict(
            {cell.row.name: Cell(cell, self.plan, profile, partial) for cell in self.plan.cells}
        )
        mixes = [cast(Cell, cell).mixes() for cell in self.cells.values()]
        inputs, operations = len(SLOTS), len(topology.operations)
        factors = (inputs, operations) if profile == "posenfs" else (1, 1)
        self.of_inputs = MixTable(self.beta.shape, [mix for mix, _ in mixes], factors[0])
        of_edges = [mix for _, edges in mixes for mix in edges]
        self.of_edges = MixTable(self.alpha.shape, of_edges, factors[1])

    def _add_mask(
        self, name: str, logits: Tensor, dropped: frozenset[tuple[int, int, int]]
    ) -> None:
        mask = torch.zeros_like(logits.data) if dropped else None
        for index in dropped:
            assert mask is not None
            mask[index] = -torch.inf
        self.register_buffer(name, mask, persistent=False)

    def architecture_parameters(self) -> list[nn.Parameter]:
        return [self.alpha, self.beta]

    def mixing_weights(self) -> tuple[Tensor, Tensor]:
        """softmax(α) (P, E, O) and softmax(β) (P, cells, 3); zero for what is dropped."""
        alpha = self.alpha if self.alpha_mask is None else self.alpha + self.alpha_mask
        beta = self.beta if self.beta_mask is None else self.beta + self.beta_mask
        return mixing_weights(alpha), mixing_weights(beta)

    def _run(self, cell: Cell, features: Features, weights: Sequence[Tensor]) -> Tensor:
        """The output of a cell; `features` then hold what the next reader takes."""
        if not (self.checkpoint and self.training and torch.is_grad_enabled()):
            return cast(Tensor, cell(features, *weights))
        read = [place for place in cell.sources if place in features]

        def run(*tensors: Tensor) -> tuple[Tensor, ...]:
            maps = tensors[len(weights) :]
            shared = {place: SharedMap(x) for place, x in zip(read, maps, strict=True)}
            output = cell(shared, *tensors[: len(weights)])
            return output, *(x.map for x in shared.values())

        output, *maps = recomputed(
            run,
            *weights,
            *(features[place].map for place in read),
            use_reentrant=False,
            preserve_rng_state=False,  # cells draw nothing
            # Running statistics move once a step, with those of the forward pass.
            context_fn=lambda: (contextlib.nullcontext(), left_alone()),
        )
        for place, x in zip(read, maps, strict=True):
            features[place].map = x
        return cast(Tensor, output)

    def forward(self, inputs: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
        """Shared input maps → outputs of the last layer's cells.

        Args:
            inputs: the pyramid, (N, C_level, H / 2^level, W / 2^level) per level, or the stem's
                map alone. A level that `plan.reads` shows as unread may be None.

        Returns:
            Per level of the last layer, 1/4 first, (P, N, C, H, W) of the parts in
            `plan.outputs[level]`; None where these are none.
        """
        features: dict[Place, SharedMap] = {}
        layer = self.topology.input_layer
        for level, users in enumerate(self.plan.reads):
            x_NCHW = inputs[level]
            if not users:
                continue
            assert x_NCHW is not None
            # As rows of pixels, which is how the gradients of the parts are then added up.
            x_PNHWC = x_NCHW.permute(0, 2, 3, 1).expand(len(users), -1, -1, -1, -1)
            x_PNCHW = x_PNHWC.permute(0, 1, 4, 2, 3)
            if self.reduce:
                x_PNCHW = self.reduce[level](x_PNCHW)
            features[(layer, level)] = SharedMap(x_PNCHW)
        alpha, beta = self.mixing_weights()
        of_edges, edges = self.of_edges(alpha), len(self.topology.edges)
        for i, (plan, of_inputs) in enumerate(
            zip(self.plan.cells, self.of_inputs(beta), strict=True)
        ):
            cell = cast(Cell, self.cells[plan.row.name])
            weights = of_inputs, *of_edges[i * edges : (i + 1) * edges]
            features[(plan.row.layer, plan.row.level)] = SharedMap(
                self._run(cell, features, weights)
            )
        places = [(row.layer, row.level) for row in self.topology.output_cells]
        return tuple(features[place].map if place in features else None for place in places)
