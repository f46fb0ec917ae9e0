"""What of a fabric is alive: which cells, operations, connections and reduce convolutions reach an
output, part by part. Reads the topology table, derives no adjacency of its own; no torch.

A mixing weight may be dropped: an operation of an edge (softmax(α), Eq. 1) or an input of a cell
(softmax(β), Eq. 2). A cell is alive in a part if an output of that part reads it through inputs
that are kept; what only dead cells read is dead with them. A border copy is an input like any
other: its row in the table says whose output it takes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from pnfs.errors import PnfsError, did_you_mean
from pnfs.topology import SLOTS, CellRow, Topology

Parts = tuple[int, ...]  # indices on the parts axis, ascending
Place = tuple[int, int]  # (layer, level)


@dataclass(frozen=True)
class Dropped:
    """Mixing weights that are held at zero.

    Attributes:
        operations: (part, edge's α row, operation's column); of all cells of the part, as α is.
        inputs: (part, cell's β row, slot).
    """

    operations: frozenset[tuple[int, int, int]] = frozenset()
    inputs: frozenset[tuple[int, int, int]] = frozenset()

    @classmethod
    def from_names(
        cls,
        topology: Topology,
        parts: Sequence[str],
        operations: Iterable[tuple[str, int, str]],
        inputs: Iterable[tuple[str, str, str]],
    ) -> Dropped:
        """From (part, edge, operation) and (part, cell, slot) with names, as configurations have.

        Raises:
            PnfsError: a name that this fabric does not have.
        """
        part = _Index("part", parts)
        operation = _Index("operation", topology.operations)
        cell = _Index("cell", [row.name for row in topology.cells])
        slot = _Index("input", SLOTS)
        return cls(
            frozenset((part[p], edge, operation[o]) for p, edge, o in operations),
            frozenset((part[p], cell[c], slot[s]) for p, c, s in inputs),
        )

    def names(
        self, topology: Topology, parts: Sequence[str]
    ) -> tuple[list[tuple[str, int, str]], list[tuple[str, str, str]]]:
        """What `from_names` takes, sorted."""
        return (
            [(parts[p], edge, topology.operations[o]) for p, edge, o in sorted(self.operations)],
            [(parts[p], topology.cells[c].name, SLOTS[s]) for p, c, s in sorted(self.inputs)],
        )


@dataclass(frozen=True)
class CellPlan:
    """One live cell.

    Attributes:
        row: its row of the topology table.
        parts: where it is alive.
        inputs: per slot, the parts that read it.
        operations: per edge (in the table's order) and operation (in α's), the parts that use it.
    """

    row: CellRow
    parts: Parts
    inputs: tuple[Parts, ...]
    operations: tuple[tuple[Parts, ...], ...]


@dataclass(frozen=True)
class FabricPlan:
    """What P fabrics of one topology compute.

    Attributes:
        topology: the table.
        parts: P.
        dropped: the mixing weights that are zero.
        cells: the live cells, in the table's order.
        reads: per level of the pyramid (or the stem), the parts in which a live cell reads it.
        outputs: per level of the last layer, the parts whose output is used.
    """

    topology: Topology
    parts: int
    dropped: Dropped
    cells: tuple[CellPlan, ...]
    reads: tuple[Parts, ...]
    outputs: tuple[Parts, ...]

    @property
    def pruned(self) -> bool:
        """Whether anything that the table lists was left out by choice."""
        return bool(
            self.dropped.operations
            or self.dropped.inputs
            or any(len(parts) < self.parts for parts in self.outputs)
        )

    @cached_property
    def cell_at(self) -> dict[Place, CellPlan]:
        return {(cell.row.layer, cell.row.level): cell for cell in self.cells}

    def parts_of(self, place: Place) -> Parts:
        """The parts in which the map at (layer, level), a cell's or an input, exists."""
        layer, level = place
        if layer == self.topology.input_layer:
            return self.reads[level]
        cell = self.cell_at.get(place)
        return () if cell is None else cell.parts


def plan_fabric(
    topology: Topology,
    parts: int,
    dropped: Dropped | None = None,
    *,
    outputs: Mapping[int, Iterable[int]] | None = None,
) -> FabricPlan:
    """Follow every part's outputs back to its inputs.

    Args:
        topology: the table.
        parts: P.
        dropped: mixing weights held at zero; none by default.
        outputs: level of the last layer -> parts whose output there is used; all by default.

    Returns:
        The plan. Without `dropped` and `outputs` everything that an output reads is alive.

    Raises:
        PnfsError: a dropped weight that does not exist, or an edge or a cell that keeps none.
    """
    dropped = dropped or Dropped()
    _check(topology, parts, dropped)
    everywhere = range(parts)
    alive: dict[Place, set[int]] = {}
    for cell in topology.output_cells:
        wanted = everywhere if outputs is None else outputs.get(cell.level, ())
        alive[(cell.layer, cell.level)] = set(wanted)
    used_outputs = tuple(
        tuple(sorted(alive[(cell.layer, cell.level)])) for cell in topology.output_cells
    )
    cells: list[CellPlan] = []
    for row in reversed(topology.cells):  # every reader comes before what it reads
        here = tuple(sorted(alive.get((row.layer, row.level), ())))
        if not here:
            continue
        inputs = []
        for source in row.inputs:
            readers = tuple(p for p in here if (p, row.beta_row, source.slot) not in dropped.inputs)
            alive.setdefault(source.source, set()).update(readers)
            inputs.append(readers)
        operations = tuple(
            tuple(
                tuple(p for p in here if (p, edge.alpha_row, column) not in dropped.operations)
                for column in range(len(topology.operations))
            )
            for edge in topology.edges
        )
        cells.append(CellPlan(row, here, tuple(inputs), operations))
    levels = 1 + max(
        (source.source[1] for row in topology.cells for source in row.inputs
         if source.source[0] == topology.input_layer),
        default=0,
    )  # fmt: skip
    reads = tuple(
        tuple(sorted(alive.get((topology.input_layer, level), ()))) for level in range(levels)
    )
    return FabricPlan(topology, parts, dropped, tuple(reversed(cells)), reads, used_outputs)


class _Index:
    """Positions of names; a strange one is an error."""

    def __init__(self, kind: str, names: Sequence[str]) -> None:
        self.kind, self.names = kind, list(names)

    def __getitem__(self, name: str) -> int:
        if name not in self.names:
            raise PnfsError(
                f"model.pruning: {self.kind} '{name}' is unknown; this fabric has "
                f"{', '.join(self.names)}{did_you_mean(name, self.names)}"
            )
        return self.names.index(name)


def _check(topology: Topology, parts: int, dropped: Dropped) -> None:
    kinds = (
        ("operations", dropped.operations, len(topology.edges), len(topology.operations)),
        ("inputs", dropped.inputs, len(topology.cells), len(SLOTS)),
    )
    for name, indices, rows, columns in kinds:
        for index in indices:
            if not all(
                0 <= i < size for i, size in zip(index, (parts, rows, columns), strict=True)
            ):
                raise PnfsError(
                    f"dropped {name}: {list(index)} is outside {parts} parts, {rows} rows and "
                    f"{columns} columns; the file is of another fabric"
                )
        per_mix = Counter(index[:2] for index in indices)
        for (part, row), count in per_mix.items():
            if count >= columns:
                raise PnfsError(
                    f"dropped {name}: part {part}, row {row} keeps none of {columns}; keep one"
                )
