"""Every Triton kernel compiles for every architecture that we support, and spills nothing."""

from __future__ import annotations

from dataclasses import replace

import pytest

from pnfs import kernels
from pnfs.errors import PnfsError

pytest.importorskip("triton", reason="triton is not installed")

from pnfs.kernels.triton import aot


@pytest.mark.parametrize("op", [n for n, op in kernels.ops().items() if "triton" in op.backends])
def test_every_kernel_compiles_without_spills(op: str) -> None:
    usages = aot.compile_op(op)
    print("\n" + aot.table(usages))
    assert {usage.arch for usage in usages} == set(aot.ARCHITECTURES)
    assert not [usage for usage in usages if usage.local > 0]
    assert all(usage.registers > 0 and usage.occupancy >= 0.25 for usage in usages)


def test_a_kernel_that_spills_is_reported() -> None:
    """The check can fail: a tile of 256 values and their cells per thread exceeds the registers."""
    variant = aot.variants("decode_heatmaps")[0]
    greedy = replace(variant, constants={**variant.constants, "ROWS": 128}, num_warps=1)
    usage = aot.compile_variant("decode_heatmaps", greedy, 90)
    assert usage.local > 0
    assert "| decode_heatmaps_kernel |" in aot.table([usage])


def test_occupancy_follows_the_scarcest_resource() -> None:
    assert aot.occupancy(32, 0, 4, 90) == 1.0
    assert aot.occupancy(128, 0, 4, 90) == 0.25
    assert aot.occupancy(32, 100 << 10, 4, 80) == 4 / 64
    assert aot.occupancy(32, 100 << 10, 4, 90) == 8 / 64


def test_a_process_that_interprets_cannot_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(PnfsError, match="unset it to compile"):
        aot.compile_op("decode_heatmaps")
