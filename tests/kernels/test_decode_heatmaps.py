"""decode_heatmaps: every backend against the float64 reference, and that against plain loops."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pnfs.errors import PnfsError
from pnfs.kernels import decode_heatmaps, native, use_backend
from pnfs.skeleton import COCO

DTYPES = (torch.float32, torch.bfloat16, torch.float16)

needs_cpp = pytest.mark.skipif(
    not native.has_function("_cpu", "decode_heatmaps")[0],
    reason=native.has_function("_cpu", "decode_heatmaps")[1] or "-",
)
BACKENDS = [
    pytest.param("torch", "cpu"),
    pytest.param("cpp", "cpu", marks=needs_cpp),
    pytest.param("triton", "cpu"),
    pytest.param("triton", "cuda", marks=pytest.mark.gpu),
]
on_every_backend = pytest.mark.parametrize(("backend", "device"), BACKENDS)


@dataclass(frozen=True)
class Case:
    """The arguments of one call."""

    heatmaps: Tensor
    matrices: Tensor
    flipped: Tensor | None = None
    permutation: Tensor | tuple[int, ...] | None = None
    shift: bool = False

    def map(self, change: Callable[[Tensor], Tensor]) -> Case:
        """The same with both maps changed."""
        flipped = None if self.flipped is None else change(self.flipped)
        return replace(self, heatmaps=change(self.heatmaps), flipped=flipped)


def random_case(
    shape: tuple[int, int, int, int],
    seed: int = 0,
    *,
    flip: bool = True,
    shift: bool = False,
    dtype: torch.dtype = torch.float32,
    levels: int = 255,
) -> Case:
    """Multiples of 1/256, which every dtype and every average holds exactly; few levels give many
    equal maxima."""
    n, k = shape[:2]
    generator = torch.Generator().manual_seed(seed)
    low = -levels if seed % 3 else -2 * levels

    def maps() -> Tensor:
        return (torch.randint(low, levels + 1, shape, generator=generator) / 256).to(dtype)

    return Case(
        maps(),
        torch.randn(n, 2, 3, generator=generator, dtype=torch.float64),
        maps() if flip else None,
        tuple(torch.randperm(k, generator=generator).tolist()) if flip else None,
        shift,
    )


def run(case: Case, device: str = "cpu") -> tuple[Tensor, Tensor]:
    def move(value: Any) -> Any:
        return value.to(device) if isinstance(value, Tensor) else value

    xy, score = decode_heatmaps(
        move(case.heatmaps),
        move(case.matrices),
        flipped=move(case.flipped),
        permutation=move(case.permutation),
        shift=case.shift,
    )
    assert xy.dtype == score.dtype == torch.float32
    return xy.cpu(), score.cpu()


def expected(case: Case) -> tuple[Tensor, Tensor]:
    with use_backend("torch"):
        return run(case.map(Tensor.double))


def check(case: Case, backend: str, device: str) -> tuple[Tensor, Tensor]:
    n, k = case.heatmaps.shape[:2]
    with use_backend(backend):
        xy, score = run(case, device)
    assert xy.shape == (n, k, 2)
    assert score.shape == (n, k)
    want_xy, want_score = expected(case)
    assert torch.equal(score, want_score)
    torch.testing.assert_close(xy, want_xy, rtol=1e-6, atol=1e-5)
    return xy, score


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


def lay_out(tensor: Tensor, layout: str) -> Tensor:
    """The same values in another memory layout."""
    if layout == "channels-last":
        return tensor.contiguous(memory_format=torch.channels_last)
    if layout == "transposed":
        return tensor.transpose(2, 3).contiguous().transpose(2, 3)
    if layout == "gaps":  # a part of a larger tensor
        padded = torch.full([side + 2 for side in tensor.shape], math.inf, dtype=tensor.dtype)
        inner = padded[1:-1, 1:-1, 1:-1, 1:-1]
        inner.copy_(tensor)
        return inner
    if layout == "strided":
        return torch.stack((tensor, torch.full_like(tensor, math.inf)), dim=-1)[..., 0]
    return tensor


LAYOUTS = ("contiguous", "channels-last", "transposed", "gaps", "strided")


@on_every_backend
def test_any_shape_and_layout(backend: str, device: str) -> None:
    examples, max_k = (20, 2) if is_interpreter(backend, device) else (150, 18)

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


@needs_cpp
def test_every_value_is_written_and_equal_in_every_run(monkeypatch: pytest.MonkeyPatch) -> None:
    real = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *a, **k: real(*a, **k).fill_(math.nan))
    case = random_case((5, 17, 40, 30), shift=True)
    channels_last = case.map(lambda t: lay_out(t, "channels-last"))
    threads = torch.get_num_threads()
    outputs = []
    try:
        for count in (1, 2, 3, 1):
            torch.set_num_threads(count)
            with use_backend("cpp"):
                outputs += [run(case), run(channels_last)]
    finally:
        torch.set_num_threads(threads)
    assert not outputs[0][0].isnan().any()
    for xy, score in outputs:
        assert torch.equal(xy, outputs[0][0]) and torch.equal(score, outputs[0][1])


@needs_cpp
def test_addresses_beyond_two_to_the_31() -> None:
    try:  # pages that nobody touches cost no memory
        storage = torch.empty(2**31 + 4096, dtype=torch.bfloat16)
    except RuntimeError:
        pytest.skip("no 4 GiB of address space")
    small = random_case((2, 16, 12, 16), dtype=torch.bfloat16, flip=False)
    for strides in [(2**31, 192, 16, 1), (2**31, 1, 256, 16)]:
        far = storage.as_strided((2, 16, 12, 16), strides)
        far.copy_(small.heatmaps)
        check(replace(small, heatmaps=far), "cpp", "cpu")


@needs_cpp
def test_opcheck() -> None:
    for dtype in DTYPES:
        case = random_case((2, 3, 6, 18), dtype=dtype)
        args = (case.heatmaps, case.matrices, case.flipped, torch.tensor(case.permutation), True)
        torch.library.opcheck(torch.ops.pnfs.decode_heatmaps_cpp.default, args)
    args = (case.heatmaps, case.matrices, None, None, False)
    torch.library.opcheck(torch.ops.pnfs.decode_heatmaps_cpp.default, args)


@needs_cpp
def test_torch_compile_sees_one_op() -> None:
    case = random_case((2, 17, 8, 18))
    compiled = torch.compile(run, backend="aot_eager", fullgraph=False)
    for got, want in zip(compiled(case), run(case), strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("backend", ["torch", "auto"])
def test_nothing_is_differentiated(backend: str) -> None:
    case = random_case((1, 2, 5, 5)).map(Tensor.requires_grad_)
    with use_backend(backend):
        assert not any(result.requires_grad for result in run(case))


MAPS = torch.zeros(2, 3, 4, 5)
MATRICES = torch.zeros(2, 2, 3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"heatmaps": MAPS[0]}, r"heatmaps must have shape \(any, any, any, any\)"),
        ({"heatmaps": MAPS.int()}, "heatmaps must be float32 or bfloat16 or float16 or float64"),
        ({"heatmaps": MAPS[..., :0]}, r"heatmaps must have cells, not shape \(2, 3, 4, 0\)"),
        ({"matrices": MATRICES[:1]}, r"matrices must have shape \(2, 2, 3\), not \(1, 2, 3\)"),
        ({"matrices": MATRICES.half()}, "matrices must be float32 or float64, not float16"),
        ({"flipped": MAPS[:, :2]}, r"flipped must have shape \(2, 3, 4, 5\)"),
        ({"flipped": MAPS.half()}, "flipped must be float32, not float16"),
        ({"flipped": MAPS, "permutation": (0, 1)}, "permutation must have 3 indices"),
        ({"flipped": MAPS, "permutation": (0, 1, 3)}, r"has index 3; indices must be 0\.\.2"),
        ({"flipped": MAPS, "permutation": torch.tensor([0, -1, 1])}, "has index -1"),
        ({"flipped": MAPS, "permutation": torch.zeros(3)}, "permutation must be int64"),
        ({"flipped": MAPS.to("meta")}, "flipped is on meta but heatmaps is on cpu"),
    ],
)
def test_wrong_arguments_are_named(change: dict[str, Any], message: str) -> None:
    arguments = {"heatmaps": MAPS, "matrices": MATRICES, **change}
    with pytest.raises(PnfsError, match=message):
        decode_heatmaps(arguments.pop("heatmaps"), arguments.pop("matrices"), **arguments)


@pytest.mark.gpu
def test_on_a_gpu_a_wrong_permutation_reads_nothing() -> None:
    case = replace(random_case((1, 2, 5, 5)), permutation=torch.tensor([2**40, 1]))
    with use_backend("triton"):
        xy, score = run(case, "cuda")
    assert score[0, 0] == -math.inf and xy[0, 0].isfinite().all()
