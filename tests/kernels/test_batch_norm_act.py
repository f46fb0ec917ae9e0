"""batch_norm_act: every backend against the float64 reference, and that against torch's layers."""

from __future__ import annotations

import pytest
import torch
from batch_norm_act_cases import (
    DTYPES,
    check,
    needs_cpp,
    of_every_kind,
    on_every_backend,
    on_triton,
    random_case,
)
from hypothesis import given
from hypothesis import strategies as st
from numerics import ISAS, error_of, examples, memory_filled_with_nan, value_and_gradients
from torch import Tensor
from torch.nn import functional as F

from pnfs.kernels import batch_norm_act, batch_stats, native, use_backend
from pnfs.kernels.checks import ACTIVATIONS, STORAGE_CPU, Activation

# Of random shapes; Triton's interpreter takes milliseconds per program.
EXAMPLES = 6 if native.triton_interpreted() else 40


def taken(backend: str, dtype: torch.dtype) -> bool:
    return backend != "cpp" or dtype in STORAGE_CPU


def test_the_reference_equals_torchs_layers() -> None:
    case = random_case((3, 5, 4, 6), "relu6", residual=True).map(Tensor.double)
    norm = torch.nn.BatchNorm2d(5).double()

    def layers(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor) -> Tensor:
        z = F.batch_norm(x, norm.running_mean, norm.running_var, weight, bias, True, 0.1)
        return F.relu6(z + residual)

    with use_backend("torch"):
        y, mean, var, *gradients = case.results()
    want = value_and_gradients(layers, list(case.tensors.values()))
    for have, right in zip([y, *gradients], want, strict=True):
        assert error_of(have, right) < 1e-12
    count = 3 * 4 * 6
    assert error_of(0.1 * mean, norm.running_mean) < 1e-12
    assert error_of(0.9 + 0.1 * var * count / (count - 1), norm.running_var) < 1e-12


def test_given_statistics_are_those_of_an_evaluated_layer() -> None:
    case = random_case((3, 5, 4, 6), "relu", given_stats=True).map(Tensor.double)
    assert case.mean is not None
    want = F.relu(F.batch_norm(case.x, case.mean, case.var, case.weight, case.bias))
    y, *none = batch_norm_act(**case.tensors, activation="relu")
    assert error_of(y, want) < 1e-12
    assert error_of(case.results()[0], want) < 1e-12
    assert all(tensor.shape == (0,) for tensor in none)


@of_every_kind
def test_gradcheck_of_the_reference(
    activation: Activation, residual: bool, given_stats: bool
) -> None:
    case = random_case((2, 3, 2, 2), activation, residual=residual, given_stats=given_stats)
    case = case.map(Tensor.double)
    names = list(case.tensors)

    def call(*tensors: Tensor) -> Tensor:
        given = dict(zip(names, tensors, strict=True))
        return batch_norm_act(**given, activation=activation)[0]

    leaves = tuple(tensor.requires_grad_() for tensor in case.tensors.values())
    assert torch.autograd.gradcheck(call, leaves)


@on_every_backend
@pytest.mark.parametrize("dtype", DTYPES)
@of_every_kind
def test_equals_the_float64_reference(
    backend: str,
    device: str,
    dtype: torch.dtype,
    activation: Activation,
    residual: bool,
    given_stats: bool,
) -> None:
    if not taken(backend, dtype):
        pytest.skip("not a type of the CPU kernels")
    kind = {"residual": residual, "given_stats": given_stats, "dtype": dtype}
    check(random_case((2, 24, 6, 5), activation, **kind), backend, device)


@on_every_backend
def test_any_shape(backend: str, device: str) -> None:
    @examples(EXAMPLES, device)
    @given(
        images=st.integers(1, 3),
        channels=st.one_of(st.integers(1, 20), st.sampled_from([24, 32, 48, 80, 130, 144])),
        height=st.integers(1, 6),
        width=st.integers(1, 6),
        activation=st.sampled_from(ACTIVATIONS),
        residual=st.booleans(),
        given_stats=st.booleans(),
    )
    def any_case(
        images: int,
        channels: int,
        height: int,
        width: int,
        activation: Activation,
        residual: bool,
        given_stats: bool,
    ) -> None:
        shape = (images, channels, height, width)
        kind = {"residual": residual, "given_stats": given_stats}
        # Over a few values the gradient of x nearly cancels, and 1 / deviation magnifies what is
        # left.
        few = images * height * width < 8 and not given_stats
        case = random_case(shape, activation, **kind)
        check(case, backend, device, magnified=100 if few else 10)

    any_case()


@on_every_backend
@pytest.mark.filterwarnings("ignore:var_mean")
@pytest.mark.parametrize("given_stats", [False, True])
def test_an_empty_batch(backend: str, device: str, given_stats: bool) -> None:
    case = random_case((0, 5, 4, 3), residual=True, given_stats=given_stats)
    have = check(case, backend, device)
    if not given_stats:
        assert have[1].isnan().all() and have[2].isnan().all()
    assert not any(tensor.any() for tensor in have[3:])


@on_every_backend
@pytest.mark.parametrize("residual", [False, True])
def test_sums_over_many_pixels(backend: str, device: str, residual: bool) -> None:
    """Several units of work, results past the caches, and pixels that fill no whole row."""
    if (backend, device) == ("triton", "cpu"):
        pytest.skip("Triton's interpreter: too many programs")
    check(random_case((5, 24, 111, 97), residual=residual), backend, device)


@on_every_backend
def test_a_mean_far_above_the_deviation(backend: str, device: str) -> None:
    """1000 deviations: float32 keeps three digits more, the statistics all of them."""
    if backend == "torch":
        pytest.skip("torch.batch_norm loses them")
    check(random_case((2, 20, 16, 15), "relu", offset=2000), backend, device, magnified=100)


@on_every_backend
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_any_layout(backend: str, device: str, activation: Activation) -> None:
    case = random_case((3, 16, 6, 5), activation, residual=True)
    want = check(case, backend, device)
    for same in (
        case.map(lambda x: x.contiguous()),
        case.map(lambda x: torch.stack((x, x), dim=-1)[..., 0]),
    ):
        have = check(same, backend, device)
        assert all(error_of(a, b) < 1e-5 for a, b in zip(have, want, strict=True))


@on_every_backend
def test_an_infinite_and_a_missing_value_stay(backend: str, device: str) -> None:
    case = random_case((1, 3, 1, 4), "relu6", given_stats=True).map(lambda x: x.to(device))
    x = case.x.clone()
    x[0, :, 0, 0], x[0, :, 0, 1], x[0, :, 0, 2] = torch.nan, torch.inf, -torch.inf
    with use_backend(backend):
        y = batch_norm_act(**{**case.tensors, "x": x}, activation="relu6")[0][0, :, 0]
    assert y[:, 0].isnan().all() and (y[:, 1] == 6).all() and (y[:, 2] == 0).all()


@on_every_backend
def test_on_the_edges_of_the_activation_nothing_passes(backend: str, device: str) -> None:
    """As in torch: the gradient is 0 where the activation's input is exactly 0 or 6."""
    x = torch.tensor([-1.0, 0, 3, 6, 7], device=device).view(1, 1, 1, 5).requires_grad_()
    one, zero = torch.ones(1, device=device), torch.zeros(1, device=device)
    for activation, passed in (("relu6", [0, 0, 1, 0, 0]), ("relu", [0, 0, 1, 1, 1])):
        with use_backend(backend):
            y = batch_norm_act(x, one, zero, mean=zero, var=one, activation=activation, eps=0.0)[0]
        (gradient,) = torch.autograd.grad(y.sum(), x)
        assert gradient.flatten().tolist() == passed


@on_every_backend
def test_statistics_from_elsewhere_have_gradients(backend: str, device: str) -> None:
    """batch_stats and batch_norm_act together are a batch normalisation: what ranks share."""
    case = random_case((2, 24, 5, 6), "relu6", residual=True)

    def call(*tensors: Tensor) -> Tensor:
        x, weight, bias, residual = tensors
        mean, var = batch_stats(x)
        return batch_norm_act(
            x, weight, bias, mean=mean, var=var, residual=residual, activation="relu6"
        )[0]

    tensors = [tensor.to(device) for tensor in case.tensors.values()]
    with use_backend({"batch_norm_act": backend}):
        have = value_and_gradients(call, tensors)
        y, _, _, *gradients = case.map(lambda x: x.to(device)).results()
    for a, b in zip(have, [y, *gradients], strict=True):
        assert error_of(a, b) < 4e-6


@needs_cpp
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", STORAGE_CPU)
def test_every_instruction_set(
    isa: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PNFS_ISA", isa)
    for channels in (3, 22, 64):
        for residual in (False, True):
            check(random_case((2, channels, 20, 17), residual=residual, dtype=dtype), "cpp", "cpu")


@on_triton
@pytest.mark.parametrize("given_stats", [False, True])
@pytest.mark.parametrize("shape", [(2, 20, 29, 18), (1, 3, 1, 1)])
def test_programs_that_take_several_steps(
    backend: str,
    device: str,
    shape: tuple[int, int, int, int],
    given_stats: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Every value is written, and the same ones in every run."""
    for name in ("PROGRAMS", "PROGRAMS_MERGED"):
        monkeypatch.setattr(f"pnfs.kernels.triton.maps.{name}", 3)
    monkeypatch.setattr("pnfs.kernels.triton.maps.TILE_SUMS", 512)
    monkeypatch.setattr("pnfs.kernels.triton.batch_norm_act.TILE_GRADIENT", 512)
    case = random_case(shape, residual=True, given_stats=given_stats)
    with memory_filled_with_nan():
        first, second = (check(case, backend, device, magnified=10) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@on_triton
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("residual", [False, True])
def test_one_launch_each_way_equals_the_float64_reference(
    backend: str,
    device: str,
    residual: bool,
    activation: Activation,
    dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One step and several, the last of them full or not; channels that fill programs or do not.
    Every value is written, and the same ones in every run."""
    monkeypatch.setattr("pnfs.kernels.triton.batch_norm_once.PROGRAMS", 1)
    monkeypatch.setattr("pnfs.kernels.triton.batch_norm_once.TILE", 256)
    for shape in ((2, 16, 6, 5), (1, 13, 9, 8), (2, 8, 8, 4)):
        case = random_case(shape, activation, residual=residual, dtype=dtype)
        with memory_filled_with_nan():
            first, second = (check(case, backend, device) for _ in range(2))
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@on_triton
@pytest.mark.parametrize("shape", [(1, 384, 1, 1), (1, 379, 5, 3)])
def test_maps_of_many_channels_take_one_launch(
    backend: str, device: str, shape: tuple[int, int, int, int]
) -> None:
    few = shape[2:] == (1, 1)  # a pixel has no deviation; 1 / sqrt(eps) magnifies what is left
    check(random_case(shape, residual=True), backend, device, magnified=100 if few else 10)


@on_triton
def test_one_launch_keeps_a_mean_far_above_the_deviation(
    backend: str, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pnfs.kernels.triton.batch_norm_once.PROGRAMS", 1)
    monkeypatch.setattr("pnfs.kernels.triton.batch_norm_once.TILE", 512)
    check(random_case((2, 20, 16, 15), "relu", offset=2000), backend, device, magnified=100)
