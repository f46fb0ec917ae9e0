"""batch_stats: every backend against the float64 reference, and that against plain formulas."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numerics import (
    ISAS,
    check_every_value_is_written_and_equal_in_every_run,
    error_of,
    memory_filled_with_nan,
    opcheck,
    value_and_gradients,
)
from torch import Tensor

from pnfs.errors import PnfsError
from pnfs.kernels import batch_stats, native, use_backend
from pnfs.kernels.checks import STORAGE_CPU
from pnfs.kernels.registry import OpCost, op_costs

# Of the statistics, whatever the maps' dtype, and of the maps' gradient.
TOLERANCE = 2e-6
DTYPES = {torch.float32: 2e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}
if native.triton_interpreted():  # which cuts bfloat16 off
    DTYPES[torch.bfloat16] = 2**-7

needs_cpp = pytest.mark.skipif(
    not native.has_function("_cpu", "batch_stats")[0],
    reason=native.has_function("_cpu", "batch_stats")[1] or "-",
)
BACKENDS = [
    pytest.param("torch", "cpu"),
    pytest.param("cpp", "cpu", marks=needs_cpp),
    pytest.param("triton", "cpu"),
    pytest.param("triton", "cuda", marks=pytest.mark.gpu),
]
on_every_backend = pytest.mark.parametrize(("backend", "device"), BACKENDS)
on_triton = pytest.mark.parametrize(("backend", "device"), BACKENDS[2:])
# Of random shapes; Triton's interpreter takes milliseconds per program.
EXAMPLES = 6 if native.triton_interpreted() else 30


def random_maps(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """(P, N, C, H, W), channels-last inside, channels of different mean and deviation."""
    p, n, c, h, w = shape
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(p, n, h, w, c, generator=generator)
    x = x * torch.linspace(0.5, 2, c) + torch.linspace(-3, 3, c)
    return x.permute(0, 1, 4, 2, 3).to(dtype)


def check(x: Tensor, backend: str, device: str) -> list[Tensor]:
    with use_backend("torch"):
        want = value_and_gradients(batch_stats, [x.double()])
    with use_backend(backend):
        have = value_and_gradients(batch_stats, [x.to(device)])
    assert [tensor.dtype for tensor in have] == [torch.float32, torch.float32, x.dtype]
    for result, right, bound in zip(
        have, want, (TOLERANCE, TOLERANCE, DTYPES[x.dtype]), strict=True
    ):
        assert error_of(result, right) <= bound
    return have


def test_the_reference_is_mean_and_biased_variance() -> None:
    x = random_maps(3, 2, 5, 4, 6).double()
    mean, var = batch_stats(x)
    for p in range(3):
        for c in range(5):
            values = x[p, :, c].flatten()
            assert mean[p, c] == pytest.approx(values.mean().item(), abs=1e-12)
            assert var[p, c] == pytest.approx(values.var(correction=0).item(), abs=1e-12)


def test_gradcheck_of_the_reference() -> None:
    x = random_maps(2, 2, 3, 2, 2).double().requires_grad_()
    assert torch.autograd.gradcheck(batch_stats, (x,))


# Maps of several programs; Triton's interpreter takes milliseconds for each.
LARGE = (2, 2, 64, 12, 15) if native.triton_interpreted() else (2, 8, 128, 24, 24)


@on_every_backend
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(3, 2, 64, 6, 5), LARGE, (1, 1, 3, 1, 1)])
def test_equals_the_float64_reference(
    backend: str, device: str, dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    if backend == "cpp" and dtype not in STORAGE_CPU:
        pytest.skip("not a type of the CPU kernels")
    check(random_maps(*shape, dtype=dtype), backend, device)


@on_every_backend
@pytest.mark.filterwarnings("ignore:var_mean")  # of an empty batch
@settings(max_examples=EXAMPLES, deadline=None)
@given(
    parts=st.integers(1, 8),
    images=st.integers(0, 3),
    channels=st.one_of(st.integers(1, 20), st.sampled_from([32, 48, 64, 80, 130])),
    height=st.integers(1, 6),
    width=st.integers(1, 6),
)
def test_any_shape(
    backend: str, device: str, parts: int, images: int, channels: int, height: int, width: int
) -> None:
    have = check(random_maps(parts, images, channels, height, width), backend, device)
    if images == 0:
        assert have[0].isnan().all() and have[1].isnan().all()


@on_every_backend
def test_a_mean_far_above_the_deviation(backend: str, device: str) -> None:
    """1000 deviations, where the mean of squares less the square of the mean loses all digits."""
    x = random_maps(2, 3, 20, 40, 50) + 2000
    have = check(x, backend, device)
    want = x.double().var(dim=(1, 3, 4), correction=0)
    assert ((have[1].cpu() - want).abs() / want).max() < 1e-5


@on_every_backend
def test_a_first_pixel_far_from_the_others(backend: str, device: str) -> None:
    x = random_maps(2, 1, 20, 16, 16)
    x[:, 0, :, 0, 0] = 1e3
    check(x, backend, device)


@on_every_backend
def test_constant_maps_have_no_variance(backend: str, device: str) -> None:
    with use_backend(backend):
        mean, var = batch_stats(torch.full((2, 3, 17, 30, 40), 0.1, device=device))
    assert torch.equal(mean.cpu(), torch.full((2, 17), 0.1))
    assert torch.equal(var.cpu(), torch.zeros(2, 17))


@on_every_backend
def test_any_layout_and_maps_without_parts(backend: str, device: str) -> None:
    x = random_maps(2, 3, 16, 6, 5)
    want = check(x, backend, device)
    for same in (x.contiguous(), torch.stack((x, x), dim=-1)[..., 0]):
        assert all(
            torch.equal(a, b) for a, b in zip(check(same, backend, device), want, strict=True)
        )
    check(x[:1].expand(3, 3, 16, 6, 5), backend, device)
    with use_backend(backend):
        mean, var = batch_stats(x[1].to(device))
    assert mean.shape == var.shape == (16,)
    assert torch.equal(mean, want[0][1]) and torch.equal(var, want[1][1])


@on_every_backend
def test_one_of_the_results_can_go_unused(backend: str, device: str) -> None:
    x = random_maps(1, 2, 4, 3, 3)
    with use_backend(backend):
        have = value_and_gradients(lambda x: batch_stats(x)[1], [x.to(device)])
    want = value_and_gradients(lambda x: x.double().var((1, 3, 4), correction=0), [x])
    assert all(error_of(a, b) < TOLERANCE for a, b in zip(have, want, strict=True))


@needs_cpp
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", STORAGE_CPU)
def test_every_instruction_set(
    isa: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PNFS_ISA", isa)
    for channels in (3, 22, 64):
        check(random_maps(2, 2, channels, 20, 16, dtype=dtype), "cpp", "cpu")


@needs_cpp
def test_every_value_is_written_and_equal_in_every_run() -> None:
    x = random_maps(3, 3, 80, 17, 19)
    check_every_value_is_written_and_equal_in_every_run(
        lambda: value_and_gradients(batch_stats, [x])
    )


@needs_cpp
@pytest.mark.parametrize("dtype", STORAGE_CPU)
def test_opcheck(dtype: torch.dtype) -> None:
    for shape in ((2, 2, 5, 3, 4), (1, 1, 16, 1, 1)):
        opcheck("batch_stats_cpp", random_maps(*shape, dtype=dtype))


@on_triton
@pytest.mark.parametrize("shape", [(2, 2, 20, 29, 18), (1, 1, 3, 1, 1)])
def test_programs_that_take_several_steps(
    backend: str, device: str, shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every value is written, and the same ones in every run."""
    monkeypatch.setattr("pnfs.kernels.triton.maps.PROGRAMS_MERGED", 3)
    monkeypatch.setattr("pnfs.kernels.triton.maps.TILE_SUMS", 512)
    with memory_filled_with_nan():
        first, second = (check(random_maps(*shape), backend, device) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@on_triton
def test_opcheck_of_triton(backend: str, device: str) -> None:
    x = random_maps(2, 2, 5, 3, 4).to(device).requires_grad_()
    torch.library.opcheck(torch.ops.pnfs.batch_stats_triton.default, (x,))


def test_costs_of_the_gpu_count_the_sums_between_its_two_kernels() -> None:
    pytest.importorskip("triton", reason="triton is not installed")
    x = random_maps(3, 2, 32, 32, 24).to("meta")
    # Two sums per part and channel of 12 blocks of 128 pixels, written and read.
    want = OpCost(launches=2, scratch=2 * 4 * 2 * 3 * 32 * 12)
    assert op_costs["pnfs::batch_stats_triton"]((x,), None) == want


@needs_cpp
def test_torch_compile_keeps_the_op_and_its_gradient() -> None:
    x = random_maps(2, 2, 16, 4, 4)
    compiled = torch.compile(
        lambda x: 2 * torch.cat(batch_stats(x)), fullgraph=True, backend="aot_eager"
    )
    have = value_and_gradients(compiled, [x])
    want = value_and_gradients(lambda x: 2 * torch.cat(batch_stats(x)), [x])
    assert all(torch.equal(a, b) for a, b in zip(have, want, strict=True))


def test_wrong_arguments_are_named() -> None:
    with pytest.raises(PnfsError, match="x must have shape"):
        batch_stats(torch.zeros(3, 3))
    with pytest.raises(PnfsError, match="x must be float32 or bfloat16 or float16 or float64"):
        batch_stats(torch.zeros(1, 1, 1, 1, 1, dtype=torch.int64))
