"""crop_normalize: every backend against the float64 reference, and that against cv2 and loops."""

from __future__ import annotations

import math
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pnfs.errors import PnfsError
from pnfs.kernels import crop_normalize, native, use_backend

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
DTYPES = {torch.float32: 2e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}  # relative to 1 + |v|

needs_cpp = pytest.mark.skipif(
    not native.has_function("_cpu", "crop_normalize")[0],
    reason=native.has_function("_cpu", "crop_normalize")[1] or "-",
)
BACKENDS = [
    pytest.param("torch", "cpu"),
    pytest.param("cpp", "cpu", marks=needs_cpp),
    pytest.param("cuda", "cpu"),
    pytest.param("cuda", "cuda", marks=pytest.mark.gpu),
]

Args = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def random_crops(sizes: list[tuple[int, int]], seed: int = 0, spread: float = 30.0) -> Args:
    """Crops of noise, with matrices that rotate, scale, shear, flip and leave the crop."""
    rng = np.random.default_rng(seed)
    lengths = [h * w * 3 for h, w in sizes]
    matrices = rng.normal(0, 1, (len(sizes), 2, 3))
    matrices[:, :, 2] *= spread
    return (
        torch.from_numpy(rng.integers(0, 256, sum(lengths), dtype=np.uint8)),
        torch.tensor([sum(lengths[:i]) for i in range(len(sizes))], dtype=torch.int64),
        torch.tensor(sizes, dtype=torch.int32).reshape(-1, 2),
        torch.from_numpy(matrices).float(),
        torch.from_numpy(rng.random(len(sizes)) < 0.5),
    )


def run(args: Args, size: tuple[int, int], device: str = "cpu", **options: Any) -> Tensor:
    moved = [tensor.to(device) for tensor in args]
    options = {"mean": MEAN, "std": STD, **options}
    return crop_normalize(*moved, size=size, **options).cpu()


def expected(args: Args, size: tuple[int, int], **options: Any) -> Tensor:
    with use_backend("torch"):
        return run(args, size, **{**options, "dtype": torch.float64})


def check(args: Args, size: tuple[int, int], backend: str, device: str, **options: Any) -> Tensor:
    dtype = options.get("dtype", torch.float32)
    with use_backend(backend):
        out = run(args, size, device, **options)
    want = expected(args, size, **options)
    assert out.shape == (len(args[1]), 3, *size)
    assert out.dtype == dtype
    assert out.is_contiguous(memory_format=torch.channels_last)
    error = ((out.double() - want).abs() / (1 + want.abs())).max() if out.numel() else 0
    assert error <= DTYPES[dtype]
    return out


def test_the_reference_equals_a_loop_over_taps() -> None:
    args = random_crops([(5, 7), (1, 1), (3, 2)], spread=3)
    pixels, offsets, sizes, matrices, flips = (tensor.numpy() for tensor in args)
    height, width = 6, 5
    out = expected(args, (height, width))
    for n, (h, w) in enumerate(sizes):
        image = pixels[offsets[n] :][: h * w * 3].reshape(h, w, 3)
        for y in range(height):
            for x in range(width):
                column = width - 1 - x if flips[n] else x
                sx, sy = matrices[n].astype(np.float64) @ (column, y, 1)
                grey = np.zeros(3)
                for ty in (math.floor(sy), math.floor(sy) + 1):
                    for tx in (math.floor(sx), math.floor(sx) + 1):
                        if 0 <= ty < h and 0 <= tx < w:
                            grey += (1 - abs(sx - tx)) * (1 - abs(sy - ty)) * image[ty, tx]
                want = (grey[::-1] / 255 - MEAN) / STD
                np.testing.assert_allclose(out[n, :, y, x], want, atol=1e-12)


@pytest.mark.parametrize(("backend", "device"), BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("order", ["rgb", "bgr"])
def test_equals_the_float64_reference(
    backend: str, device: str, dtype: torch.dtype, order: str
) -> None:
    args = random_crops([(40, 31), (1, 1), (64, 48), (1, 50), (50, 1), (2, 2)])
    check(args, (33, 27), backend, device, dtype=dtype, order=order)


@pytest.mark.parametrize(("backend", "device"), BACKENDS)
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_shape(backend: str, device: str, data: st.DataObject) -> None:
    side = st.integers(1, 9)
    sizes = data.draw(st.lists(st.tuples(side, side), max_size=4))
    size = data.draw(st.tuples(side, side))
    seed = data.draw(st.integers(0, 99))
    pixels, offsets, shapes, matrices, flips = random_crops(sizes, seed, spread=3)
    if data.draw(st.booleans()):  # positions on the grid of pixels, and on the border
        matrices = (matrices * 2).round() / 2
    args = (pixels, offsets, shapes, matrices, flips)
    check(args, size, backend, device, order=data.draw(st.sampled_from(["rgb", "bgr"])))


@pytest.mark.parametrize(("backend", "device"), BACKENDS)
def test_a_large_crop_keeps_its_accuracy(backend: str, device: str) -> None:
    args = random_crops([(40, 9000), (9000, 40)])
    args[3][:] = torch.tensor(
        [[[45.0, 0.01, 10.3], [0.2, 0.4, 0.7]], [[0.2, 0.4, 0.7], [0.01, 45.0, 10.3]]]
    )
    check(args, (64, 64), backend, device)


@pytest.mark.parametrize(("backend", "device"), BACKENDS)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 1e30, -1e30, 1e12])
def test_positions_that_are_no_position_read_nothing(backend: str, device: str, bad: float) -> None:
    args = random_crops([(8, 8)] * 6)
    for n in range(6):
        args[3][n].view(-1)[n] = bad
    check(args, (5, 6), backend, device)


@pytest.mark.parametrize(("backend", "device"), BACKENDS)
def test_identity_copies_every_pixel_and_flip_mirrors(backend: str, device: str) -> None:
    args = random_crops([(11, 9)])
    args[3][:] = torch.eye(3)[:2]
    image = args[0].reshape(11, 9, 3)
    for flip in (False, True):
        args[4][:] = flip
        out = check(args, (11, 9), backend, device, mean=(0, 0, 0), std=(1 / 255,) * 3)
        want = image.flip(1) if flip else image
        torch.testing.assert_close(out[0].permute(1, 2, 0).flip(2), want.float())


@pytest.mark.parametrize(("backend", "device"), BACKENDS)
def test_a_neighbouring_crop_is_never_read(backend: str, device: str) -> None:
    args = random_crops([(7, 6), (8, 5), (6, 7)])
    first = check(args, (16, 16), backend, device)
    args[0][: 7 * 6 * 3] = 255
    args[0][7 * 6 * 3 + 8 * 5 * 3 :] = 255
    second = check(args, (16, 16), backend, device)
    assert torch.equal(first[1], second[1])


@pytest.mark.parametrize(("backend", "device"), BACKENDS)
def test_no_crops_give_an_empty_batch(backend: str, device: str) -> None:
    check(random_crops([]), (4, 3), backend, device)


@pytest.mark.parametrize(("backend", "device"), BACKENDS)
def test_strided_arguments(backend: str, device: str) -> None:
    args = random_crops([(9, 8), (8, 9)])
    want = expected(args, (5, 5))
    strided = tuple(torch.stack((t, torch.zeros_like(t)), dim=-1)[..., 0] for t in args)
    assert not any(tensor.is_contiguous() for tensor in strided)
    with use_backend(backend):
        out = run(strided, (5, 5), device)  # type: ignore[arg-type]
    torch.testing.assert_close(out.double(), want, atol=1e-5, rtol=0)


@needs_cpp
def test_every_value_is_written_and_equal_in_every_run(monkeypatch: pytest.MonkeyPatch) -> None:
    args = random_crops([(90, 70)] * 6)
    real = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *a, **k: real(*a, **k).fill_(math.nan))
    threads = torch.get_num_threads()
    outputs = []
    try:
        for count in (1, 2, 3, 1):
            torch.set_num_threads(count)
            with use_backend("cpp"):
                outputs.append(run(args, (65, 33)))
    finally:
        torch.set_num_threads(threads)
    assert not outputs[0].isnan().any()
    assert all(torch.equal(outputs[0], other) for other in outputs)


@needs_cpp
def test_opcheck() -> None:
    args = random_crops([(9, 8), (5, 6)])
    for dtype in DTYPES:
        full = (*args, 4, 5, list(MEAN), list(STD), True, dtype)
        torch.library.opcheck(torch.ops.pnfs.crop_normalize_cpp.default, full)


def test_cv2_agrees_up_to_its_rounding() -> None:
    """cv2 rounds grey levels: half a level. Before version 5 it also rounds positions to 1/32."""
    cv2 = pytest.importorskip("cv2")
    rng = np.random.default_rng(3)
    image = cv2.GaussianBlur(rng.integers(0, 256, (300, 400, 3), dtype=np.uint8), (0, 0), 4)
    slope = max(np.abs(np.diff(image.astype(int), axis=axis)).max() for axis in (0, 1))
    bound = 0.51 + (0 if int(cv2.__version__.split(".")[0]) >= 5 else slope / 32)
    for angle, zoom, flip in [(0, 1, False), (30, 1.7, True), (-75, 0.6, False), (180, 1.1, True)]:
        rotation = np.array(cv2.getRotationMatrix2D((200, 150), angle, zoom), dtype=np.float32)
        args = (
            torch.from_numpy(image.reshape(-1)),
            torch.tensor([0]),
            torch.tensor([image.shape[:2]], dtype=torch.int32),
            torch.from_numpy(rotation)[None],
            torch.tensor([flip]),
        )
        warped = cv2.warpAffine(
            image, rotation, (192, 256), flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
        )
        warped = warped[:, ::-1] if flip else warped
        ours = run(args, (256, 192), order="bgr", mean=(0, 0, 0), std=(1 / 255,) * 3)
        difference = np.abs(ours[0].permute(1, 2, 0).numpy() - warped.astype(np.float32))
        assert difference.max() <= bound


@pytest.mark.parametrize(("backend", "device"), BACKENDS[:2])
@pytest.mark.parametrize(
    ("offset", "height"), [(-1, 8), (193, 8), (2**62, 8), (192, 0), (192, -3), (192, 9)]
)
def test_a_crop_outside_the_pixels_is_refused(
    backend: str, device: str, offset: int, height: int
) -> None:
    args = random_crops([(8, 8), (8, 8)])
    args[1][1], args[2][1, 0] = offset, height
    with use_backend(backend), pytest.raises(PnfsError, match="crop_normalize: crop 1 .* 384 byt"):
        run(args, (4, 4), device)


@pytest.mark.gpu
def test_on_a_gpu_a_crop_outside_the_pixels_gives_nan() -> None:
    args = random_crops([(8, 8), (8, 8), (8, 8)])
    args[1][1] = 10_000
    for backend in ("cuda", "torch"):
        with use_backend(backend):
            out = run(args, (4, 4), "cuda")
        assert out.isnan().flatten(1).all(1).tolist() == [False, True, False]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pixels": torch.zeros(3)}, "pixels must be uint8, not float32"),
        ({"offsets": torch.zeros(1, dtype=torch.int32)}, "offsets must be int64, not int32"),
        ({"sizes": torch.zeros(2, 2, dtype=torch.int32)}, r"sizes must have shape \(1, 2\)"),
        ({"matrices": torch.zeros(1, 3, 3)}, r"matrices must have shape \(1, 2, 3\)"),
        ({"flips": torch.zeros(1)}, "flips must be bool"),
        ({"size": (0, 4)}, "size must be a positive"),
        ({"std": (1.0, 0.0, 1.0)}, "std not 0"),
        ({"mean": (1.0,)}, "3 numbers"),
        ({"order": "gbr"}, "order must be 'rgb' or 'bgr', not 'gbr'"),
        ({"dtype": torch.int32}, "dtype must be"),
        ({"flips": torch.zeros(1, dtype=torch.bool, device="meta")}, "flips is on meta"),
    ],
)
def test_wrong_arguments_are_named(change: dict[str, Any], message: str) -> None:
    names = ("pixels", "offsets", "sizes", "matrices", "flips")
    arguments = {
        **dict(zip(names, random_crops([(4, 4)]), strict=True)),
        "size": (4, 4),
        "mean": MEAN,
        "std": STD,
        **change,
    }
    with pytest.raises(PnfsError, match=message):
        crop_normalize(**arguments)


GUARDED = """
import ctypes, mmap
import torch
from pnfs import kernels

page = mmap.PAGESIZE
memory = mmap.mmap(-1, 2 * page)
start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
libc = ctypes.CDLL(None)
assert libc.mprotect(ctypes.c_void_p(start + page), ctypes.c_size_t(page), 0) == 0
for spare in range(5):
    count = 20 * 30 * 3 + spare
    bytes_ = (ctypes.c_uint8 * count).from_address(start + page - count)
    out = kernels.crop_normalize(
        torch.frombuffer(bytes_, dtype=torch.uint8), torch.tensor([0]),
        torch.tensor([[20, 30]], dtype=torch.int32),
        torch.tensor([[[1.0, 0, 0.25], [0, 1.0, 0.25]]]), torch.tensor([False]),
        size=(24, 34), mean=(0, 0, 0), std=(1, 1, 1),
    )
    print(spare, out.shape[2])
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="protects memory as Linux does")
def test_nothing_behind_the_pixels_is_read() -> None:
    """They end where memory that may not be read begins, some bytes behind the crop."""
    done = subprocess.run([sys.executable, "-c", GUARDED], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == "0 24 1 24 2 24 3 24 4 24".split()
