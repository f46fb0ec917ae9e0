"""The cell-and-edge table of a Cell-based Neural Fabric: the one place that knows adjacency.

`build_topology` turns Θ = (layers L, channels C, hidden nodes H, operations O, which layers are
kept) into rows: every cell with its three inputs *written out*, border copies included (Fig. 5,
footnote 2). The forward pass, the pruner, the cost model, the plots and the JSON read this table;
none derives adjacency again. Pure Python, no torch.

Conventions: `level` 0..3 is scale 1/4, 1/8, 1/16, 1/32; a cell at 1/s has s·C channels; layers
count from 0 in the uncut fabric, so a cut-3 fabric of L = 6 has layers 3, 4, 5.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from pnfs.errors import PnfsError

LEVELS = 4
SLOTS = ("parallel", "above", "below")  # the order of a β row (Eq. 2)
Transform = Literal["same", "down", "up"]


@dataclass(frozen=True)
class CellInput:
    """One of a cell's three inputs.

    Attributes:
        slot: position in the β row: 0 parallel, 1 above (higher resolution), 2 below.
        source: (layer, level) of the producing cell; layer `first_layer - 1` is the feature pyramid
            (cut fabric) or, in a fabric that starts at layer 0, the stem, which has level 0 only.
        transform: how the source reaches this cell's scale.
        border_copy: the neighbour this slot is named for does not exist, and another one stands in.
    """

    slot: int
    source: tuple[int, int]
    transform: Transform
    border_copy: bool


@dataclass(frozen=True)
class CellRow:
    """One cell: where it is, how wide it is, its row in β, and its inputs in slot order."""

    layer: int
    level: int
    channels: int
    beta_row: int
    inputs: tuple[CellInput, CellInput, CellInput]

    @property
    def name(self) -> str:
        return f"cell_{self.layer}_{self.level}"

    @property
    def stride(self) -> int:
        """Input pixels per feature pixel."""
        return 4 << self.level


@dataclass(frozen=True)
class Edge:
    """A directed edge h_source → h_target of every cell; `alpha_row` is its α row (Eq. 1)."""

    source: int
    target: int
    alpha_row: int


@dataclass(frozen=True)
class Topology:
    """The whole table. `cells` is layer-major, then 1/4 → 1/32: the order of β's rows."""

    layers: int
    first_layer: int
    last_layer: int
    channels: int
    hidden: int
    operations: tuple[str, ...]
    cells: tuple[CellRow, ...]
    edges: tuple[Edge, ...]

    @cached_property
    def cell_at(self) -> dict[tuple[int, int], CellRow]:
        return {(cell.layer, cell.level): cell for cell in self.cells}

    @property
    def from_stem(self) -> bool:
        """Whether the fabric starts at layer 0 and reads a stem, not a pyramid."""
        return self.first_layer == 0

    @property
    def input_layer(self) -> int:
        """The layer number that inputs from outside carry in `CellInput.source`."""
        return self.first_layer - 1

    @property
    def output_cells(self) -> tuple[CellRow, ...]:
        """Cells of the last kept layer, 1/4 first."""
        return tuple(cell for cell in self.cells if cell.layer == self.last_layer)

    def channels_at(self, level: int) -> int:
        return (4 << level) * self.channels


def cells_in_layer(layer: int, layers: int) -> int:
    """Number of cells in `layer` of a fabric with `layers` layers: min(j + 2, 4, L - j)."""
    return min(layer + 2, LEVELS, layers - layer)


def _cell_inputs(layer: int, level: int, available: int) -> tuple[CellInput, ...]:
    """The three inputs of a cell whose previous layer offers levels 0..available-1."""
    source_layer = layer - 1
    has_parallel = level < available
    if not has_parallel:  # a bottom cell: the output from above fills all three slots
        return tuple(
            CellInput(slot, (source_layer, level - 1), "down", border_copy=slot != 1)
            for slot in range(3)
        )
    inputs = [CellInput(0, (source_layer, level), "same", border_copy=False)]
    neighbours: tuple[tuple[int, int, Transform], ...] = (
        (1, level - 1, "down"),
        (2, level + 1, "up"),
    )
    for slot, neighbour, transform in neighbours:
        if 0 <= neighbour < available:
            inputs.append(CellInput(slot, (source_layer, neighbour), transform, border_copy=False))
        else:
            inputs.append(CellInput(slot, (source_layer, level), "same", border_copy=True))
    return tuple(inputs)


def build_topology(
    *,
    layers: int,
    channels: int,
    hidden: int,
    operations: tuple[str, ...] | list[str],
    cut: int = 0,
    reserve: int | None = None,
) -> Topology:
    """Build the table for Θ.

    Args:
        layers: L, the layers of the uncut fabric.
        channels: C; a cell at scale 1/s has s·C channels.
        hidden: H, hidden nodes per cell.
        operations: candidate operations in α's column order.
        cut: layers dropped at the front (a subnetwork; reads a four-level pyramid when > 0).
        reserve: layers kept at the front (a backbone); `None` keeps all.

    Raises:
        PnfsError: a value out of range, or a cut and reserve that leave no layer.
    """
    if min(layers, channels, hidden) < 1:
        raise PnfsError(
            f"fabric: layers {layers}, channels {channels} and hidden {hidden} must be 1 or more"
        )
    last = (layers if reserve is None else reserve) - 1
    if not 0 <= cut <= last < layers:
        raise PnfsError(
            f"fabric: cut {cut} and reserve {reserve} leave no layer of {layers}; "
            "need 0 <= cut < reserve <= layers"
        )
    cells: list[CellRow] = []
    for layer in range(cut, last + 1):
        if layer == 0:
            available = 1  # the stem
        elif layer == cut:
            available = LEVELS  # the feature pyramid
        else:
            available = cells_in_layer(layer - 1, layers)
        for level in range(cells_in_layer(layer, layers)):
            inputs = _cell_inputs(layer, level, available)
            assert len(inputs) == len(SLOTS)
            cells.append(
                CellRow(
                    layer,
                    level,
                    (4 << level) * channels,
                    len(cells),
                    (inputs[0], inputs[1], inputs[2]),
                )
            )
    pairs = [(i, j) for j in range(1, hidden + 1) for i in range(j)]
    edges = tuple(Edge(i, j, row) for row, (i, j) in enumerate(pairs))
    return Topology(layers, cut, last, channels, hidden, tuple(operations), tuple(cells), edges)
