"""What reaches an output, part by part: borders, dead ends, and names of dropped weights."""

from __future__ import annotations

import pytest

from pnfs.errors import PnfsError
from pnfs.liveness import Dropped, FabricPlan, plan_fabric
from pnfs.topology import SLOTS, Topology, build_topology

OPERATIONS = ("zero", "skip", "separable")


def topology(**settings: int) -> Topology:
    values = {"layers": 6, "cut": 3, "channels": 2, "hidden": 1, **settings}
    return build_topology(operations=OPERATIONS, **values)


def drop(table: Topology, part: int, **inputs: str) -> frozenset[tuple[int, int, int]]:
    rows = {row.name: row.beta_row for row in table.cells}
    return frozenset(
        (part, rows[cell], SLOTS.index(slot))
        for cell, slots in inputs.items()
        for slot in slots.split()
    )


def names(plan: FabricPlan, part: int) -> list[str]:
    return [cell.row.name for cell in plan.cells if part in cell.parts]


def test_everything_is_alive_by_default() -> None:
    table = topology()
    plan = plan_fabric(table, 2)
    assert [cell.row for cell in plan.cells] == list(table.cells) and not plan.pruned
    assert plan.reads == ((0, 1),) * 4 and plan.outputs == ((0, 1),)
    assert all(cell.parts == (0, 1) for cell in plan.cells)


def test_a_cell_dies_with_its_readers_in_the_part_where_they_drop_it() -> None:
    table = topology()
    only_from_below = drop(table, 0, cell_5_0="parallel above")
    plan = plan_fabric(table, 2, Dropped(inputs=only_from_below))
    assert names(plan, 0) == ["cell_3_0", "cell_3_1", "cell_3_2", "cell_4_1", "cell_5_0"]
    assert names(plan, 1) == [row.name for row in table.cells]
    assert plan.cell_at[(5, 0)].inputs == ((1,), (1,), (0, 1))


def test_a_border_copy_keeps_its_source_alive() -> None:
    # The above input of a 1/4 cell is a copy of the parallel one: dropping parallel alone kills
    # nothing, which is where the published pruner goes wrong.
    table = topology()
    plan = plan_fabric(table, 1, Dropped(inputs=drop(table, 0, cell_5_0="parallel")))
    assert "cell_4_0" in names(plan, 0)


def test_unread_levels_of_the_pyramid_need_no_reduce_convolution() -> None:
    table = topology()
    plan = plan_fabric(table, 1, Dropped(inputs=drop(table, 0, cell_3_2="below")))
    assert plan.reads == ((0,), (0,), (0,), ())


def test_a_backbones_unread_outputs_die_with_what_feeds_them_alone() -> None:
    table = build_topology(layers=7, channels=2, hidden=2, operations=OPERATIONS, reserve=3)
    plan = plan_fabric(table, 1, outputs={0: (0,), 1: (0,), 2: (0,)})
    assert plan.outputs == ((0,), (0,), (0,), ()) and plan.pruned
    assert "cell_2_3" not in names(plan, 0) and "cell_1_2" in names(plan, 0)


def test_operations_are_dropped_in_every_cell_of_the_part() -> None:
    plan = plan_fabric(topology(), 3, Dropped(operations=frozenset({(1, 0, 2)})))
    assert all(cell.operations[0] == ((0, 1, 2), (0, 1, 2), (0, 2)) for cell in plan.cells)


def test_names_and_indices_are_two_forms_of_one_thing() -> None:
    table = topology()
    dropped = Dropped(frozenset({(1, 0, 2), (0, 0, 0)}), drop(table, 1, cell_4_1="above below"))
    operations, inputs = dropped.names(table, ["arms", "legs"])
    assert operations == [("arms", 0, "zero"), ("legs", 0, "separable")]
    assert inputs == [("legs", "cell_4_1", "above"), ("legs", "cell_4_1", "below")]
    assert Dropped.from_names(table, ["arms", "legs"], operations, inputs) == dropped


def test_what_a_fabric_does_not_have_is_one_line() -> None:
    table = topology()
    with pytest.raises(PnfsError, match="part 'leg' is unknown.*did you mean 'legs'"):
        Dropped.from_names(table, ["arms", "legs"], [("leg", 0, "skip")], [])
    with pytest.raises(PnfsError, match=r"\[0, 1, 0\] is outside"):
        plan_fabric(table, 1, Dropped(operations=frozenset({(0, 1, 0)})))
    everything = frozenset({(0, 0, column) for column in range(3)})
    with pytest.raises(PnfsError, match="part 0, row 0 keeps none of 3"):
        plan_fabric(table, 1, Dropped(operations=everything))
