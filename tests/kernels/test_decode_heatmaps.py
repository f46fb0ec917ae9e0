"""decode_heatmaps: every backend against the float64 reference, and that against plain loops."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from decode_heatmaps_cases import (
    DTYPES,
    Case,
    check,
    expected,
    lay_out,
    on_every_backend,
    random_case,
    run,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from pnfs.kernels import use_backend
from pnfs.skeleton import COCO


def decode_by_loops(case: Case) -> tuple[np.ndarray, np.ndarray]:
    """The definition, cell by cell."""
    n, k, h, w = case.heatmaps.shape
    a = case.heatmaps.double().numpy()
    merged = np.empty_like(a)
    for i, j, y, x in np.ndindex(n, k, h, w):
        merged[i, j, y, x] = a[i, j, y, x]
        if case.flipped is not None:
            source = j if case.permutation is None else int(case.permutation[j])
            column = w - 1 - (max(x - 1, 0) if case.shift else x)
            merged[i, j, y, x] = (a[i, j, y, x] + float(case.flipped[i, source, y, column])) / 2
    xy, score = np.zeros((n, k, 2)), np.zeros((n, k))
    for i, j in np.ndindex(n, k):
        best, cell = -math.inf, (0, 0)
        for y, x in np.ndindex(h, w):
            if merged[i, j, y, x] > best:
                best, cell = merged[i, j, y, x], (y, x)
        y, x = cell if best > 0 else (0, 0)
        at = [float(x), float(y), 1.0]
        if best > 0 and 1 < x < w - 1 and 1 < y < h - 1:
            m = merged[i, j]
            at[0] += 0.25 * np.sign(m[y, x + 1] - m[y, x - 1])
            at[1] += 0.25 * np.sign(m[y + 1, x] - m[y - 1, x])
        xy[i, j], score[i, j] = case.matrices[i].numpy() @ at, best
    return xy, score


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("shift", [False, True])
@pytest.mark.parametrize("levels", [2, 255])
def test_the_reference_equals_loops(flip: bool, shift: bool, levels: int) -> None:
    for seed, shape in enumerate([(2, 3, 9, 7), (1, 2, 1, 1), (3, 1, 4, 4), (2, 2, 1, 6)]):
        case = random_case(shape, seed, flip=flip, shift=shift, levels=levels)
        xy, score = expected(case)
        want_xy, want_score = decode_by_loops(case)
        np.testing.assert_allclose(xy, want_xy, rtol=1e-6, atol=1e-6)
        np.testing.assert_array_equal(score, want_score)


def test_the_reference_equals_the_published_decode(shared_dir: Path) -> None:
    """pipeline.npz: posenfs profile. Its image coordinates were computed in float32."""
    data = np.load(shared_dir / "reference" / "pipeline.npz")
    heatmaps = torch.from_numpy(data["post_heatmap"])
    cells = Case(heatmaps, torch.eye(3)[:2].expand(4, 2, 3))
    four = np.array([[4, 0, 0.5], [0, 4, 0.5], [0, 0, 1]])
    image = torch.from_numpy((np.linalg.inv(data["post_affine"]) @ four)[:, :2])
    # flip_back_coco is the mirrored, exchanged map: averaged with its own mirror it is the map.
    flipped = torch.from_numpy(data["flip_back_coco"])
    for backend in ("torch", "auto"):
        with use_backend(backend):
            xy, score = run(cells)
            np.testing.assert_array_equal(xy, data["post_coords"])
            np.testing.assert_array_equal(score, data["post_max"])
            merged = run(replace(cells, flipped=flipped, permutation=COCO.flip_permutation))
            assert torch.equal(merged[0], xy) and torch.equal(merged[1], score)
            xy, _ = run(replace(cells, matrices=image))
            np.testing.assert_allclose(xy, data["post_image_xy"][..., :2], atol=5e-5)


@on_every_backend
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("channels_last", [False, True])
def test_equals_the_float64_reference(
    backend: str, device: str, dtype: torch.dtype, flip: bool, channels_last: bool
) -> None:
    layout = torch.channels_last if channels_last else torch.contiguous_format
    shapes = [(1, 17, 24, 18), (2, 16, 5, 33), (1, 5, 8, 16), (1, 33, 3, 17), (1, 1, 6, 40)]
    if is_interpreter(backend, device):
        shapes = [(1, 3, 36, 18), (2, 1, 5, 33)]
    for shape in shapes:
        for shift in (False, True):
            case = random_case(shape, flip=flip, shift=shift, dtype=dtype)
            case = case.map(lambda t: t.contiguous(memory_format=layout))
            check(case, backend, device)


def is_interpreter(backend: str, device: str) -> bool:
    """Triton's interpreter takes milliseconds per map, so its cases are small."""
    return (backend, device) == ("triton", "cpu")


def draw_case(data: st.DataObject, max_k: int) -> Case:
    side = st.integers(1, 40)
    shape = data.draw(st.tuples(st.integers(0, 2), st.integers(1, max_k), side, side))
    return random_case(
        shape,
        data.draw(st.integers(0, 99)),
        flip=data.draw(st.booleans()),
        shift=data.draw(st.booleans()),
        dtype=data.draw(st.sampled_from(DTYPES)),
        levels=data.draw(st.sampled_from([0, 1, 255])),
    )


LAYOUTS = ("contiguous", "channels-last", "transposed", "gaps", "strided")


@on_every_backend
def test_any_shape_and_layout(backend: str, device: str) -> None:
    max_k = 2 if is_interpreter(backend, device) else 18
    # On a GPU most examples have the kernel compiled anew.
    examples = 20 if backend == "triton" else 150

    @settings(max_examples=examples, deadline=None)
    @given(data=st.data())
    def any_case(data: st.DataObject) -> None:
        case = draw_case(data, max_k)
        heatmaps = lay_out(case.heatmaps, data.draw(st.sampled_from(LAYOUTS)))
        flipped = case.flipped
        if flipped is not None:
            flipped = lay_out(flipped, data.draw(st.sampled_from(LAYOUTS)))
        check(replace(case, heatmaps=heatmaps, flipped=flipped), backend, device)

    any_case()


def single(h: int, w: int, values: dict[tuple[int, int], float], fill: float = 0.0) -> Case:
    """One map with `values` at (y, x), decoded to cells."""
    heatmap = torch.full((1, 1, h, w), fill)
    for (y, x), value in values.items():
        heatmap[0, 0, y, x] = value
    return Case(heatmap, torch.eye(3)[None, :2])


@on_every_backend
@pytest.mark.parametrize("width", [5, 20])
def test_peaks_move_a_quarter_except_at_the_border(backend: str, device: str, width: int) -> None:
    for y in range(5):
        for x in (*range(4), *range(width - 3, width)):
            case = single(5, width, {(y, x): 1.0, (y, min(x + 1, width - 1)): 1.0}, fill=-0.5)
            case.heatmaps[0, 0, y, x] = 2.0
            xy, score = check(case, backend, device)
            moves = 1 < x < width - 1 and 1 < y < 4
            assert xy[0, 0].tolist() == [x + 0.25 * moves, y]
            assert score.item() == 2.0


@on_every_backend
def test_equal_maxima_give_the_first_in_row_major_order(backend: str, device: str) -> None:
    for width in (6, 16, 37):
        last = width - 1
        for first, second in [((0, last), (1, 0)), ((2, 1), (2, last)), ((1, 3), (4, 0))]:
            case = single(5, width, {first: 0.5, second: 0.5})
            xy, _ = check(case, backend, device)
            want = [first[1], first[0]]
            assert (xy[0, 0] - torch.tensor(want)).abs().max() <= 0.25


@on_every_backend
@pytest.mark.parametrize("value", [0.0, -1.0, -math.inf, math.nan])
def test_a_map_without_a_positive_value_gives_cell_zero(
    backend: str, device: str, value: float
) -> None:
    for width in (4, 19):
        xy, score = check(single(4, width, {}, fill=value), backend, device)
        assert xy.tolist() == [[[0.0, 0.0]]]
        assert score.item() == (-math.inf if math.isnan(value) else value)
        better = single(4, width, {(2, 2): -0.0}, fill=-2.0)
        xy, score = check(better, backend, device)
        assert xy.tolist() == [[[0.0, 0.0]]]
        assert score.item() == 0


@on_every_backend
def test_nan_never_wins_and_moves_nothing(backend: str, device: str) -> None:
    nan = math.nan
    for width in (7, 24):
        scattered = {(0, 0): nan, (3, 3): 1.0, (3, 4): nan, (2, 3): 0.5, (6, width - 1): nan}
        xy, score = check(single(7, width, scattered), backend, device)
        assert xy[0, 0].tolist() == [3.0, 2.75]
        assert score.item() == 1.0
        xy, score = check(single(7, width, {(5, 1): 1.0}, fill=nan), backend, device)
        assert xy[0, 0].tolist() == [1.0, 5.0]
        # A NaN in the flipped map spoils the cells that it is averaged with, and no others.
        case = single(7, width, {(3, 3): 2.0, (4, 5): 1.0})
        flipped = torch.zeros_like(case.heatmaps)
        flipped[0, 0, 3, width - 1 - 3] = nan
        xy, score = check(replace(case, flipped=flipped), backend, device)
        assert score.item() == 0.5
        assert xy[0, 0].tolist() == [5.0, 4.0]


@on_every_backend
def test_infinity_is_a_value_like_others(backend: str, device: str) -> None:
    case = single(6, 18, {(3, 3): math.inf, (3, 2): 1.0, (4, 3): -math.inf})
    xy, score = check(case, backend, device)
    assert xy[0, 0].tolist() == [2.75, 2.75]
    assert score.item() == math.inf


@on_every_backend
def test_the_smallest_half_precision_numbers_count(backend: str, device: str) -> None:
    for dtype in DTYPES:
        tiny = torch.finfo(dtype).smallest_normal / 4  # a subnormal number
        case = single(5, 18, {(2, 9): tiny, (2, 8): tiny / 2}).map(lambda t, d=dtype: t.to(d))
        if backend == "triton" and dtype != torch.float16:
            continue  # a GPU may flush these, which in float32 are subnormal too
        xy, _ = check(case, backend, device)
        assert xy[0, 0].tolist() == [8.75, 2.0]


@on_every_backend
def test_matrices_of_both_precisions_and_any_strides(backend: str, device: str) -> None:
    case = random_case((3, 2, 6, 7), flip=False)
    check(replace(case, matrices=case.matrices.float()), backend, device)
    check(replace(case, matrices=case.matrices.transpose(1, 2).contiguous().mT), backend, device)
    large = torch.tensor([[1.0, 0.0, 2**24], [0.0, 1.0, -(2**24)]], dtype=torch.float64)
    check(replace(case, matrices=large.expand(3, 2, 3)), backend, device)


@on_every_backend
def test_a_permutation_is_a_tensor_or_a_sequence(backend: str, device: str) -> None:
    case = random_case((2, 4, 5, 17))
    case = replace(case, permutation=(2, 0, 3, 1))
    want = check(case, backend, device)
    got = check(replace(case, permutation=torch.tensor((2, 0, 3, 1))), backend, device)
    assert torch.equal(want[0], got[0])
    check(replace(case, permutation=(0, 0, 1, 1)), backend, device)
    check(replace(case, permutation=None), backend, device)


@on_every_backend
def test_no_people_give_empty_results(backend: str, device: str) -> None:
    check(random_case((0, 17, 8, 6)), backend, device)
    check(random_case((2, 0, 8, 6), flip=False), backend, device)
