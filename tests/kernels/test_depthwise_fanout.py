"""depthwise_fanout: every backend and instruction set against the float64 reference, and that
against plain layers."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from depthwise_fanout_cases import (
    ALL,
    DTYPES,
    STORAGE_CPU,
    Case,
    call,
    check,
    on_every_backend,
    random_case,
    using,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from numerics import error_of, value_and_gradients
from torch import Tensor
from torch.nn import functional as F

from pnfs.kernels import depthwise_fanout, use_backend
from pnfs.kernels.checks import ACTIVATIONS


def layers(case: Case) -> tuple[Tensor, ...]:
    """The same by torch's modules, part by part; normalises by the batch's own statistics."""
    x_all, *rest = case.tensors
    count = case.kinds.count("conv")
    weights, gamma, beta = rest[:count], rest[count], rest[count + 1]
    results = []
    index = 0
    for kind in case.kinds:
        maps = []
        for p, x in enumerate(x_all):
            z = F.batch_norm(x, None, None, gamma[p], beta[p], training=True)
            z = {"none": lambda v: v, "relu": F.relu, "relu6": F.relu6}[case.activation](z)
            if kind == "conv":
                d = case.dilations[index]
                taps = weights[index][p, :, None]
                maps.append(F.conv2d(z, taps, None, case.stride, d, d, groups=len(taps)))
            elif kind == "avg_pool":
                ones = F.avg_pool2d(torch.ones_like(z), 3, case.stride, 1)
                maps.append(F.avg_pool2d(z, 3, case.stride, 1) / ones)
            else:
                maps.append(F.max_pool2d(z, 3, case.stride, 1))
        index += kind == "conv"
        y = torch.stack(maps)
        by_channel = y.transpose(1, 2).flatten(2)
        results += [y, by_channel.mean(2), by_channel.var(2, correction=0)]
    return tuple(results)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("stride", [1, 2])
def test_the_reference_equals_plain_layers(activation: str, stride: int) -> None:
    case = random_case((2, 3, 4, 6, 7), activation=activation, stride=stride).double()
    x, w1, w2, _, _, gamma, beta = case.tensors

    def op(*leaves: Tensor) -> tuple[Tensor, ...]:
        by_channel = leaves[0].transpose(1, 2).flatten(2)
        moments = (by_channel.mean(2), by_channel.var(2, correction=0))
        return call(replace(case, tensors=(*leaves[:3], *moments, *leaves[3:])))

    leaves = [x, w1, w2, gamma, beta]
    with use_backend("torch"):
        have = value_and_gradients(op, leaves)
    want = value_and_gradients(lambda *t: layers(replace(case, tensors=t)), leaves)
    for a, b in zip(have, want, strict=True):
        assert error_of(a, b) < 1e-12


@pytest.mark.parametrize("stride", [1, 2])
def test_gradcheck_of_the_reference(stride: int) -> None:
    case = random_case((1, 2, 2, 3, 2), activation="none", stride=stride).double()
    spread = torch.randperm(case.tensors[0].numel()).reshape(case.tensors[0].shape) / 4.0
    leaves = tuple(t.requires_grad_() for t in case.with_x(spread.double()).tensors)
    with use_backend("torch"):
        assert torch.autograd.gradcheck(lambda *t: call(replace(case, tensors=t)), leaves)


@on_every_backend
@pytest.mark.parametrize("dtype", STORAGE_CPU)
@pytest.mark.parametrize("stride", [1, 2])
def test_equals_the_float64_reference(
    backend: str, device: str, isa: str, dtype: torch.dtype, stride: int
) -> None:
    for kinds in (("conv",), ("avg_pool", "max_pool"), ALL):
        for norm, activation in ((0, "none"), (0, "relu"), (2, "relu"), (3, "none"), (4, "relu6")):
            case = random_case(
                (2, 2, 36, 7, 9), kinds, norm=norm, activation=activation, stride=stride,
                stats=norm != 2, dtype=dtype,
            )  # fmt: skip
            check(case, backend, device, isa)


@on_every_backend
@settings(max_examples=20, deadline=None)
@given(data=st.data())
def test_any_shape(backend: str, device: str, isa: str, data: st.DataObject) -> None:
    shape = (
        data.draw(st.integers(1, 8)),
        data.draw(st.integers(0, 3)),
        data.draw(st.one_of(st.integers(1, 20), st.sampled_from([32, 48, 64, 80, 130]))),
        data.draw(st.integers(1, 9)),
        data.draw(st.integers(1, 14)),
    )
    kinds = tuple(data.draw(st.lists(st.sampled_from(ALL), min_size=1, max_size=8)))
    most = 2 if backend == "cuda" else 3
    stride, dtype = data.draw(st.integers(1, 2)), data.draw(st.sampled_from(STORAGE_CPU))
    # What a bfloat16 map is rounded by shows in its distance from the mean, and in the gradient
    # through the variance of a few pixels.
    few = shape[1] * (shape[3] // stride) * (shape[4] // stride) < 64
    stats = data.draw(st.booleans()) and not (few and dtype == torch.bfloat16)
    case = random_case(
        shape,
        kinds,
        tuple(data.draw(st.integers(1, most)) for _ in range(kinds.count("conv"))),
        norm=data.draw(st.sampled_from([0, 2, 3, 4])),
        activation=data.draw(st.sampled_from(ACTIVATIONS)),
        stride=stride,
        stats=stats,
        dtype=dtype,
        seed=data.draw(st.integers(0, 99)),
    )
    check(case, backend, device, isa)


@on_every_backend
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("shape", [(1, 1, 16, 64, 48), (1, 6, 32, 112, 104), (2, 13, 8, 6, 5)])
def test_every_way_to_cut_the_work(
    backend: str, device: str, isa: str, stride: int, shape: tuple[int, int, int, int, int]
) -> None:
    """An image in bands; results that bypass the caches; several images to a piece."""
    check(random_case(shape, ("conv", "max_pool"), (2,), stride=stride), backend, device, isa)


@on_every_backend
def test_a_mean_far_above_the_deviation(backend: str, device: str, isa: str) -> None:
    """Of x and of the results: no more digits are lost than the float32 inputs lack already."""
    case = random_case((2, 3, 20, 16, 15), ("avg_pool", "max_pool"), norm=0, activation="none")
    case = case.with_x(case.tensors[0] + 1e3)
    with use_backend("torch"):
        want = call(case.double())
    with using(backend, isa):
        have = [result.cpu() for result in call(case.to(device))]
    for i in (1, 4):
        torch.testing.assert_close(have[i].double(), want[i], rtol=1e-6, atol=0)
        torch.testing.assert_close(have[i + 1].double(), want[i + 1], rtol=1e-3, atol=0)
    normalised = random_case((2, 3, 20, 16, 15))
    x, w1, w2, mean, *rest = normalised.tensors
    far = replace(
        normalised, tensors=(x + 256, w1, w2, (mean * 64).round() / 64 + 256, *rest)
    )  # exact in float32
    check(far, backend, device, isa)


@on_every_backend
def test_any_layout(backend: str, device: str, isa: str) -> None:
    case = random_case((3, 2, 16, 6, 5))
    x = case.tensors[0]
    plain = check(case, backend, device, isa)
    contiguous = check(case.with_x(x.contiguous()), backend, device, isa)
    strided = check(case.with_x(torch.stack((x, x), -1)[..., 0]), backend, device, isa)
    shared = check(case.with_x(x[:1].expand_as(x)), backend, device, isa)
    turned = tuple(t.mT.contiguous().mT if t.ndim == 4 else t for t in case.tensors)
    for other in (contiguous, strided, check(replace(case, tensors=turned), backend, device, isa)):
        assert torch.equal(plain[0], other[0])
    assert not torch.equal(plain[0][1], shared[0][1])


@on_every_backend
def test_results_without_a_gradient(backend: str, device: str, isa: str) -> None:
    """A loss of one map alone, and one of one map's statistics alone."""
    case = random_case((2, 2, 16, 5, 6))
    for kept in (0, 4, 8):

        def some(*leaves: Tensor, kept: int = kept) -> Tensor:
            used = 0 * sum(leaf.sum() for leaf in leaves)  # torch.autograd.grad wants all used
            return call(replace(case, tensors=leaves))[kept] + used

        with use_backend("torch"):
            want = value_and_gradients(some, [t.double() for t in case.tensors])
        with using(backend, isa):
            have = value_and_gradients(some, [t.to(device) for t in case.tensors])
        for result, right in zip(have, want, strict=True):
            assert error_of(result, right) <= DTYPES[torch.float32]


@on_every_backend
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_value_that_is_no_number_spoils_its_neighbours_alone(
    backend: str, device: str, isa: str, bad: float
) -> None:
    case = random_case((1, 2, 16, 7, 8), norm=0, activation="none", stats=False)
    case.tensors[0][0, 1, 3, 2, 4] = bad
    with use_backend("torch"):
        want = call(case.double())
    with using(backend, isa):
        have = [result.cpu() for result in call(case.to(device))]
    for result, right in zip(have, want, strict=True):
        assert torch.equal(result.isfinite(), right.isfinite())
        assert torch.equal(result.isnan(), right.isnan())


@on_every_backend
def test_the_gradient_of_a_maximum_goes_to_the_first_of_equal_values(
    backend: str, device: str, isa: str
) -> None:
    flat = torch.zeros(1, 1, 5, 4, 4, device=device).requires_grad_()
    with using(backend, isa):
        ((y, _, _),) = depthwise_fanout(flat, ["max_pool"], stats=False)
        (gradient,) = torch.autograd.grad(y.sum(), flat)
    # Windows are cut at the border, so four of them start at (0, 0).
    right = torch.tensor([[4.0, 2, 2, 0], [2, 1, 1, 0], [2, 1, 1, 0], [0, 0, 0, 0]])
    assert torch.equal(gradient.cpu(), right.expand(1, 1, 5, 4, 4))


@on_every_backend
def test_weights_of_the_maps_type(backend: str, device: str, isa: str) -> None:
    case = random_case((2, 2, 16, 5, 6), dtype=torch.bfloat16)
    half = tuple(t.bfloat16() if t.ndim == 4 else t for t in case.tensors)
    have = check(replace(case, tensors=half), backend, device, isa)
    assert have[13].dtype == torch.bfloat16
