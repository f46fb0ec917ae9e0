"""Every Triton kernel compiles for every architecture that we support and spills nothing, and not
anew for every batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pnfs import kernels
from pnfs.errors import PnfsError

pytest.importorskip("triton", reason="triton is not installed")

from pnfs.kernels.triton import aot, tuning

HALF = (torch.bfloat16, torch.float16)
Call = Callable[[], Any]


def maps(p: int, n: int, c: int, h: int, w: int, dtype: torch.dtype = torch.float32) -> Tensor:
    x = torch.empty(p, n, h, w, c, dtype=dtype).permute(0, 1, 4, 2, 3)
    return x.requires_grad_()


def per_channel(*shape: int) -> Tensor:
    return torch.empty(shape, requires_grad=True)


def differentiated(call: Callable[[], Tensor]) -> None:
    call().sum().backward()


def batch_norm_act(
    shape: tuple[int, int, int, int], given_stats: bool, dtype: torch.dtype
) -> Tensor:
    c = shape[1]
    x, residual = (maps(1, *shape, dtype)[0] for _ in range(2))
    stats = {"mean": per_channel(c), "var": per_channel(c)} if given_stats else {}
    weight, bias = per_channel(c), per_channel(c)
    kind = {"residual": residual, "activation": "relu6"}
    return kernels.batch_norm_act(x, weight, bias, **stats, **kind)[0]


def batch_stats(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    mean, var = kernels.batch_stats(maps(*shape, dtype))
    return mean + var


def separable_conv(shape: tuple[int, ...], out: int, whole: bool, dtype: torch.dtype) -> Tensor:
    p, _, c, _, _ = shape
    names = ("mean", "var", "gamma", "beta") if whole else ()
    norm = {name: per_channel(p, c) for name in names}
    stencil = {"depthwise": per_channel(p, c, 3, 3)} if whole else {"bias": per_channel(p, out)}
    x, weights = maps(*shape, dtype), per_channel(p, out, c)
    y, mean, var = kernels.separable_conv(x, weights, **stencil, **norm)
    return y.float().sum() + mean.sum() + var.sum()


def strided_conv(shape: tuple[int, ...], out: int, bias: bool, dtype: torch.dtype) -> Tensor:
    p, _, c, _, _ = shape
    biases = per_channel(p, out) if bias else None
    y, mean, var = kernels.strided_conv(maps(*shape, dtype), per_channel(p, out, c, 3, 3), biases)
    return y.float().sum() + mean.sum() + var.sum()


def mixed_sum(shape: tuple[int, ...], branches: int, dtype: torch.dtype) -> Tensor:
    def stats() -> list[Tensor]:
        return [per_channel(shape[0], shape[2]) for _ in range(branches)]

    x, *ys = (maps(*shape, dtype) for _ in range(branches + 1))
    weights = per_channel(shape[0], branches + 1)
    return kernels.mixed_sum(x, ys, stats(), stats(), weights, relu=[True] * branches)


def scale_mix(
    shape: tuple[int, ...], sources: str, dtype: torch.dtype, relu: bool = True
) -> Tensor:
    p, n, c, h, w = shape
    names = sources.split()
    inputs = [
        maps(p, n, c, *((h // 2, w // 2) if name == "up" else (h, w)), dtype) for name in names
    ]
    norms = [[per_channel(p, c) for name in names if name != "same"] for _ in range(4)]
    kinds = {"relu": relu, "down_relu": not relu}
    return kernels.scale_mix(inputs, names, *norms, per_channel(p, len(names)), **kinds)


def vectors(counts: tuple[int, ...], d: int, size: tuple[int, int], dtype: torch.dtype) -> Any:
    return [torch.empty(24, k, d, *size, dtype=dtype, requires_grad=True) for k in counts]


def heatmap(counts: tuple[int, ...], d: int, size: tuple[int, int], dtype: torch.dtype) -> Tensor:
    keypoints = [list(range(k)) for k in counts]
    return kernels.vector_heatmap(vectors(counts, d, size, dtype), keypoints, max(counts))


def loss(counts: tuple[int, ...], d: int, size: tuple[int, int], dtype: torch.dtype) -> Tensor:
    keypoints, k = [list(range(count)) for count in counts], max(counts)
    joints, weights = torch.empty(24, k, 2), torch.empty(24, k)
    return kernels.vector_heatmap_loss(
        vectors(counts, d, size, dtype), keypoints, joints, weights, sigma=2.0
    )


def decode(dtype: torch.dtype, channels_last: bool, flip: bool, size: tuple[int, int]) -> None:
    layout = torch.channels_last if channels_last else torch.contiguous_format
    scores = torch.empty(24, 17, *size, dtype=dtype).to(memory_format=layout)
    flipped = {"flipped": scores, "permutation": list(range(17))} if flip else {}
    kernels.decode_heatmaps(scores, torch.empty(24, 2, 3), **flipped)


def calls_of_ops() -> Iterator[tuple[str, Call]]:
    """What the steps of `ours-1` do not show: other types, many terms, the smallest maps."""
    fp32 = torch.float32
    for dtype in (fp32, *HALF):
        yield "batch_stats", partial(batch_stats, (3, 24, 40, 64, 48), dtype)
        for given_stats in (False, True):
            for shape in ((24, 40, 64, 48), (1, 1, 1, 1), (24, 390, 16, 12)):
                yield "batch_norm_act", partial(batch_norm_act, shape, given_stats, dtype)
        for whole in (False, True):
            yield "separable_conv", partial(separable_conv, (3, 24, 40, 16, 12), 40, whole, dtype)
        yield "strided_conv", partial(strided_conv, (3, 24, 40, 16, 12), 80, True, dtype)
    yield "separable_conv", partial(separable_conv, (1, 1, 1, 1, 1), 1, True, fp32)
    yield "strided_conv", partial(strided_conv, (1, 1, 1, 1, 1), 1, False, fp32)
    yield "batch_stats", partial(batch_stats, (1, 1, 1, 1, 1), fp32)
    for dtype in HALF:
        yield "mixed_sum", partial(mixed_sum, (3, 24, 40, 64, 48), 7, dtype)
        yield "scale_mix", partial(scale_mix, (3, 24, 22, 2, 2), "up up same down", dtype)
    yield "mixed_sum", partial(mixed_sum, (1, 1, 1, 1, 1), 1, fp32)
    yield "scale_mix", partial(scale_mix, (1, 1, 1, 2, 2), "up same", fp32)
    yield "scale_mix", partial(scale_mix, (3, 24, 40, 16, 12), "same down", fp32, relu=False)
    for op, call in (("vector_heatmap", heatmap), ("vector_heatmap_loss", loss)):
        yield op, partial(call, (5, 6, 6), 8, (64, 48), torch.float16)
        yield op, partial(call, (17,), 1, (64, 48), fp32)
        yield op, partial(call, (3,) * 8, 16, (64, 48), torch.bfloat16)
        yield op, partial(call, (17,), 8, (1, 1), fp32)
    for dtype in (fp32, *HALF):
        for channels_last in (False, True):
            yield "decode_heatmaps", partial(decode, dtype, channels_last, True, (64, 48))
    yield "decode_heatmaps", partial(decode, fp32, False, False, (64, 48))
    yield "decode_heatmaps", partial(decode, fp32, False, True, (1, 1))


def one_of_all(quick: int) -> pytest.MarkDecorator:
    """Every architecture, the others than `quick` among the slow tests."""
    others = [arch for arch in aot.ARCHITECTURES if arch != quick]
    return pytest.mark.parametrize(
        "arch", [quick, *(pytest.param(arch, marks=pytest.mark.slow) for arch in others)]
    )


def spilling(usages: list[aot.Usage]) -> list[aot.Usage]:
    return [usage for usage in usages if usage.local > 0]


def check(usages: list[aot.Usage]) -> None:
    print("\n" + aot.table(usages))
    assert not spilling(usages)
    assert all(usage.registers > 0 for usage in usages)
    # Eight warps that have many bytes on their way each are enough where matrices are multiplied.
    few = (
        *("separable_conv_kernel", "factors_kernel", "gradients_kernel"),
        *("strided_conv_kernel", "strided_gradients_kernel"),
    )
    assert all(u.occupancy >= (0.12 if u.kernel in few else 0.25) for u in usages)


@one_of_all(90)
@pytest.mark.parametrize(
    ("step", "dtype"),
    [
        ("evaluation", torch.float32),
        ("evaluation", torch.bfloat16),
        ("training step", torch.float32),
        pytest.param("training step", torch.bfloat16, marks=pytest.mark.slow),
    ],
)
def test_the_kernels_of_whole_steps_compile_without_spills(
    step: str, dtype: torch.dtype, arch: int
) -> None:
    usages = aot.compile_calls(lambda: aot.CALLS[step](aot.PRESET, aot.BATCH, dtype), arch)
    check(usages)
    names = {usage.op for usage in usages}
    wanted = {"decode_heatmaps"} if step == "evaluation" else {"vector_heatmap_loss"}
    wanted |= {"batch_norm_act", "mixed_sum", "scale_mix", "separable_conv", "strided_conv"}
    assert names >= wanted


@pytest.mark.slow
@pytest.mark.parametrize("arch", aot.ARCHITECTURES)
@pytest.mark.parametrize("index", range(1, tuning.MOST))
def test_the_other_configurations_compile_without_spills(index: int, arch: int) -> None:
    """Occupancy is for a measurement to judge."""
    for call in aot.CALLS.values():
        for dtype in aot.DTYPES:
            with tuning.candidate(index):
                usages = aot.compile_calls(partial(call, aot.PRESET, aot.BATCH, dtype), arch)
            print("\n" + aot.table(usages))
            assert not spilling(usages)


@one_of_all(80)  # of matrix products the one that takes most registers
@pytest.mark.parametrize("op", [n for n, op in kernels.ops().items() if "triton" in op.backends])
def test_every_kernel_compiles_without_spills(op: str, arch: int) -> None:
    usages: list[aot.Usage] = []
    for name, call in calls_of_ops():
        if name == op:
            differentiate = call if op == "decode_heatmaps" else partial(differentiated, call)
            usages += aot.compile_calls(differentiate, arch)
    assert {usage.op for usage in usages} == {op}
    check(usages)


def test_a_kernel_that_spills_is_reported() -> None:
    """The check can fail: a tile of 256 values and their cells per thread exceeds the registers."""

    def greedy(options: dict[str, Any]) -> dict[str, Any]:
        return {**options, "ROWS": 128, "num_warps": 1}

    call = partial(decode, torch.float32, False, True, (64, 48))
    (usage,) = aot.compile_calls(call, 90, change=greedy)
    assert usage.local > 0
    assert "| decode_heatmaps_kernel |" in aot.table([usage])


@pytest.mark.parametrize("step", aot.CALLS)
def test_another_batch_compiles_nothing_anew(step: str) -> None:
    """Batches that are one, odd, even, and multiples of 16."""
    first = aot.specialisations(lambda: aot.CALLS[step](aot.PRESET, 24, torch.float32))
    for batch in (1, 3, 6, 16, 17, 32, 128):
        keys = aot.specialisations(
            lambda batch=batch: aot.CALLS[step](aot.PRESET, batch, torch.float32)
        )
        assert keys == first, f"batch {batch}"


def test_a_kernel_that_compiles_anew_is_noticed() -> None:
    """The check can fail: the size of the maps is a part of what is compiled."""
    few, many = (
        aot.specialisations(partial(decode, torch.float32, False, True, size))
        for size in ((64, 48), (65, 49))
    )
    assert few.keys() == many.keys() and few != many


def test_the_document_is_written_by_its_script(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(aot, "CALLS", {"evaluation": aot.evaluation})
    aot.main(["--out", str(tmp_path / "kernels-gpu.md"), "--arch", "90"])
    text = (tmp_path / "kernels-gpu.md").read_text(encoding="utf-8")
    assert "## evaluation, float32" in text and "## evaluation, bfloat16" in text
    assert "| decode_heatmaps | decode_heatmaps_kernel | float32 24×17×64×48 | sm_90 | 1 |" in text


def test_occupancy_follows_the_scarcest_resource() -> None:
    assert aot.occupancy(32, 0, 4, 90) == 1.0
    assert aot.occupancy(128, 0, 4, 90) == 0.25
    assert aot.occupancy(32, 100 << 10, 4, 80) == 4 / 64
    assert aot.occupancy(32, 100 << 10, 4, 90) == 8 / 64


def test_a_process_that_interprets_cannot_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(PnfsError, match="unset it to compile"):
        aot.compile_calls(lambda: None, 90)
