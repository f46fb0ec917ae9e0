"""The cell-and-edge table: counts, borders and β rows of the published fabrics."""

from __future__ import annotations

import itertools

import pytest

from pnfs.errors import PnfsError
from pnfs.topology import LEVELS, SLOTS, Topology, build_topology, cells_in_layer

OPERATIONS = ("zero", "skip", "separable", "atrous")


def _topology(**theta: int) -> Topology:
    return build_topology(
        **{"layers": 6, "channels": 16, "hidden": 1, **theta}, operations=OPERATIONS
    )


def test_cut_fabric_of_the_paper_has_layers_of_three_two_and_one_cells():
    table = _topology(cut=3)
    assert [row.name for row in table.cells] == [
        "cell_3_0", "cell_3_1", "cell_3_2", "cell_4_0", "cell_4_1", "cell_5_0",
    ]  # fmt: skip
    assert [row.beta_row for row in table.cells] == list(range(6))
    assert [row.channels for row in table.cells] == [64, 128, 256, 64, 128, 64]
    assert [row.name for row in table.output_cells] == ["cell_5_0"]


@pytest.mark.parametrize(("layers", "reserve", "cells"), [(7, 3, 9), (8, 5, 17)])
def test_fabric_backbones_have_the_number_of_cells_of_table_viii(layers, reserve, cells):
    table = _topology(layers=layers, reserve=reserve)
    assert len(table.cells) == cells
    assert [row.level for row in table.output_cells] == [0, 1, 2, 3]


def test_a_missing_neighbour_is_a_copy_of_the_parallel_input_with_its_own_beta():
    top = _topology(cut=3).cell_at[3, 0]
    assert [(i.transform, i.source, i.border_copy) for i in top.inputs] == [
        ("same", (2, 0), False),
        ("same", (2, 0), True),
        ("up", (2, 1), False),
    ]


def test_a_bottom_cell_without_parallel_input_takes_three_separate_down_convolutions():
    bottom = _topology().cell_at[1, 2]
    assert [(i.transform, i.source) for i in bottom.inputs] == [("down", (0, 1))] * 3
    assert [i.border_copy for i in bottom.inputs] == [True, False, True]


def test_the_first_layer_gets_the_stem_three_times():
    table = _topology()
    assert table.from_stem
    assert [(i.transform, i.source) for i in table.cell_at[0, 0].inputs] == [("same", (-1, 0))] * 3
    assert [(i.transform, i.source) for i in table.cell_at[0, 1].inputs] == [("down", (-1, 0))] * 3


def test_edges_join_every_node_to_all_earlier_ones_in_published_order():
    edges = _topology(hidden=3).edges
    assert [(e.source, e.target) for e in edges] == [(0, 1), (0, 2), (1, 2), (0, 3), (1, 3), (2, 3)]
    assert [e.alpha_row for e in edges] == list(range(6))


def test_every_input_exists_and_has_the_channels_that_its_transform_needs():
    for layers, cut, reserve in itertools.product(range(1, 9), range(0, 6), (None, 3, 5)):
        try:
            table = _topology(layers=layers, cut=cut, **({"reserve": reserve} if reserve else {}))
        except PnfsError:
            continue
        external = {(table.input_layer, level) for level in range(1 if cut == 0 else LEVELS)}
        known = external | {(row.layer, row.level) for row in table.cells}
        factor = {"same": 1, "down": 2, "up": 0.5}
        for row in table.cells:
            assert [i.slot for i in row.inputs] == list(range(len(SLOTS)))
            for source in row.inputs:
                assert source.source in known
                assert source.source[0] == row.layer - 1
                assert (
                    table.channels_at(source.source[1]) * factor[source.transform] == row.channels
                )
        for layer in range(table.first_layer, table.last_layer + 1):
            assert sum(r.layer == layer for r in table.cells) == cells_in_layer(layer, layers)


@pytest.mark.parametrize(
    "theta", [{"channels": 0}, {"hidden": 0}, {"layers": 3, "cut": 3}, {"reserve": 9}]
)
def test_an_impossible_fabric_is_refused_in_one_line(theta):
    with pytest.raises(PnfsError, match="fabric") as error:
        _topology(**theta)
    assert "\n" not in str(error.value)
