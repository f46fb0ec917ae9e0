"""separable_conv: every backend and instruction set against the float64 reference, and that against
plain layers."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numerics import error_of, examples, memory_filled_with_nan, value_and_gradients
from separable_conv_cases import (
    AFFINE,
    DTYPES,
    INTERPRETED,
    Case,
    call,
    check,
    on_every_backend,
    on_every_kernel,
    on_triton,
    random_case,
    using,
)
from torch import Tensor
from torch.nn import functional as F

from pnfs.kernels import SharedMap, separable_conv, use_backend
from pnfs.kernels.checks import ACTIVATIONS, STORAGE_CPU, Activation, activate

# Triton's interpreter takes milliseconds per program: few random shapes and small maps.
EXAMPLES, SIDE = (2, 4) if INTERPRETED else (25, 14)
SHAPE, OUT = ((2, 1, 36, 5, 4), 20) if INTERPRETED else ((2, 2, 36, 7, 9), 80)


def layers(case: Case) -> tuple[Tensor, ...]:
    """The same by torch's modules, part by part; normalises by the batch's own statistics."""
    outputs = []
    for p, x in enumerate(case.x):
        if case.mean is not None:
            affine = [None if t is None else t[p] for t in (case.gamma, case.beta)]
            x = activate(F.batch_norm(x, None, None, *affine, training=True), case.activation)
        if case.depthwise is not None:
            d = case.dilation
            x = F.conv2d(x, case.depthwise[p, :, None], padding=d, dilation=d, groups=x.shape[1])
        bias = None if case.bias is None else case.bias[p]
        outputs.append(F.conv2d(x, case.pointwise[p, :, :, None, None], bias))
    y = torch.stack(outputs)
    by_channel = y.transpose(1, 2).flatten(2)
    return y, by_channel.mean(2), by_channel.var(2, correction=0)


@pytest.mark.parametrize("options", ["", "bias", "depthwise", "depthwise bias normalised", AFFINE])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dilation", [1, 2])
def test_the_reference_equals_plain_layers(
    options: str, activation: Activation, dilation: int
) -> None:
    case = random_case(
        (3, 2, 5, 6, 7), 4, options, activation=activation, dilation=dilation
    ).double()
    weights = [t for name, t in case.tensors.items() if name not in ("mean", "var")]

    def op(*tensors: Tensor) -> tuple[Tensor, ...]:
        x = tensors[0].transpose(1, 2).flatten(2)
        own = {}
        if case.mean is not None:
            own = {"mean": x.mean(2), "var": x.var(2, correction=0)}
        return call(replace(replace(case, mean=None, var=None).with_tensors(tensors), **own))

    def plain(*tensors: Tensor) -> tuple[Tensor, ...]:
        stripped = replace(case, mean=None, var=None).with_tensors(tensors)
        return layers(replace(stripped, mean=case.mean))

    with use_backend("torch"):
        have = value_and_gradients(op, weights)
    for a, b in zip(have, value_and_gradients(plain, weights), strict=True):
        assert error_of(a, b) < 1e-12


@pytest.mark.parametrize("options", ["", "depthwise bias normalised", AFFINE])
def test_gradcheck_of_the_reference(options: str) -> None:
    case = random_case((1, 2, 2, 3, 2), 2, options, dilation=2).double()
    leaves = tuple(tensor.requires_grad_() for tensor in case.tensors.values())
    with use_backend("torch"):
        assert torch.autograd.gradcheck(lambda *t: call(case.with_tensors(t)), leaves)


@on_every_backend
@pytest.mark.parametrize("dtype", STORAGE_CPU)
@pytest.mark.parametrize(
    "options", ["", "bias", "normalised", "depthwise", "depthwise bias normalised"]
)
@pytest.mark.parametrize("stats", [True, False])
def test_equals_the_float64_reference(
    backend: str, device: str, isa: str, dtype: torch.dtype, options: str, stats: bool
) -> None:
    if INTERPRETED and dtype != torch.float32 and not stats:
        pytest.skip("Triton's interpreter: the type changes loads and stores alone")
    for dilation in (2,) if INTERPRETED else (1, 2):
        case = random_case(SHAPE, OUT, options, dilation=dilation, stats=stats, dtype=dtype)
        check(case, backend, device, isa)


@on_every_backend
@pytest.mark.parametrize("dtype", STORAGE_CPU)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(
    "options", ["normalised", "normalised beta", "normalised gamma beta", AFFINE]
)
def test_every_normalisation_and_activation(
    backend: str, device: str, isa: str, dtype: torch.dtype, activation: Activation, options: str
) -> None:
    if INTERPRETED and dtype != torch.float32:
        pytest.skip("Triton's interpreter: the type changes loads and stores alone")
    case = random_case(SHAPE, OUT, options, activation=activation, dtype=dtype)
    check(case, backend, device, isa)


@on_every_backend
def test_any_shape(backend: str, device: str, isa: str) -> None:
    @examples(EXAMPLES, device)
    @given(data=st.data())
    def any_case(data: st.DataObject) -> None:
        wide = [32] if INTERPRETED else [32, 48, 64, 80, 130]
        channels = st.one_of(st.integers(1, 20), st.sampled_from(wide))
        shape = (
            data.draw(st.integers(1, 2 if INTERPRETED else 8)),
            data.draw(st.integers(0, 3)),
            data.draw(channels),
            data.draw(st.integers(1, min(SIDE, 9))),
            data.draw(st.integers(1, SIDE)),
        )
        options = " ".join(data.draw(st.sets(st.sampled_from(["depthwise", "bias", "normalised"]))))
        if "normalised" in options:
            options += " " + " ".join(data.draw(st.sets(st.sampled_from(["gamma", "beta"]))))
        dtype = data.draw(st.sampled_from(STORAGE_CPU))
        # The gradient through var_y is 2 (y - mean_y) / count, of a y that was rounded to its
        # storage: over a handful of bfloat16 values that rounding is all there is of it.
        enough = dtype != torch.bfloat16 or shape[1] * shape[3] * shape[4] >= 64
        case = random_case(
            shape,
            data.draw(channels),
            options,
            activation=data.draw(st.sampled_from(ACTIVATIONS)),
            dilation=data.draw(st.integers(1, 3)),
            stats=data.draw(st.booleans()) and enough,
            dtype=dtype,
            seed=data.draw(st.integers(0, 99)),
        )
        check(case, backend, device, isa)

    any_case()


@on_every_kernel
@pytest.mark.parametrize(
    ("shape", "out", "dilation"),
    [
        ((1, 1, 16, 64, 48), 16, 1),  # an image in bands
        ((1, 1, 16, 64, 48), 16, 2),
        ((2, 7, 32, 16, 12), 130, 1),  # several images to a piece of the weights' gradient
        ((1, 6, 32, 112, 104), 32, 1),  # results that bypass the caches
        ((1, 1, 16, 3, 200), 16, 1),  # rows longer than a block
        ((1, 2, 16, 8, 6), 300, 2),
    ],
)
def test_every_way_to_cut_the_work(
    backend: str,
    device: str,
    isa: str,
    shape: tuple[int, int, int, int, int],
    out: int,
    dilation: int,
) -> None:
    if (backend, device) == ("triton", "cpu"):
        pytest.skip("Triton's interpreter: too many programs")
    check(random_case(shape, out, dilation=dilation), backend, device, isa)


@on_every_backend
def test_a_mean_far_above_the_deviation(backend: str, device: str, isa: str) -> None:
    """Of x and of y: no more digits are lost than the float32 inputs lack already."""
    # Triton's statistics are those before the bias and need no more pixels than this; elsewhere the
    # rounding of y, which is that of its mean, must average out.
    case = random_case((1, 2, 20, 6, 5) if INTERPRETED else (2, 3, 20, 16, 15), 24)
    offset = 1e3 * case.var.sqrt()  # type: ignore[union-attr]
    shifted = replace(
        case,
        x=case.x + offset[:, None, :, None, None],
        mean=case.mean + offset,
        bias=case.bias * 1e3,
    )  # type: ignore[operator]
    check(shifted, backend, device, isa)
    # Without a normalisation y inherits the offset: a deviation of 1 about a mean of 1000.
    shape = (1, 3, 20, 16, 15) if INTERPRETED else (2, 3, 20, 16, 15)
    plain = random_case(shape, 24, "")
    plain = replace(plain, x=plain.x + 1e3, pointwise=plain.pointwise.abs())
    with use_backend("torch"):
        want = call(plain.double())
    with using(backend, isa):
        have = [result.cpu() for result in call(plain.to(device))]
    assert (want[1] / want[2].sqrt()).min() > 1e3
    torch.testing.assert_close(have[1].double(), want[1], rtol=1e-6, atol=0)
    torch.testing.assert_close(have[2].double(), want[2], rtol=1e-4, atol=0)


@on_triton
def test_many_sums_are_merged_by_a_second_launch(
    backend: str, device: str, isa: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Either way adds the same sums in the same order."""
    case = random_case((2, 3, 20, 9, 10), 40, AFFINE).to(device)
    with using(backend, isa):
        by_the_last = call(case)
        with use_backend("torch"):
            want = call(case.double())
        monkeypatch.setattr("pnfs.kernels.triton.products.MERGED", 0)
        by_a_launch = call(case)
    for one, other, right in zip(by_the_last, by_a_launch, want, strict=True):
        assert torch.equal(one, other)
        assert error_of(one, right) <= DTYPES[torch.float32]


@on_every_backend
def test_any_layout(backend: str, device: str, isa: str) -> None:
    case = random_case((2, 1, 16, 4, 3) if INTERPRETED else (3, 2, 16, 6, 5), 8)
    plain = check(case, backend, device, isa)
    contiguous = check(replace(case, x=case.x.contiguous()), backend, device, isa)
    strided = check(replace(case, x=torch.stack((case.x,) * 2, -1)[..., 0]), backend, device, isa)
    shared = check(replace(case, x=case.x[:1].expand_as(case.x)), backend, device, isa)
    turned = replace(case, pointwise=case.pointwise.mT.contiguous().mT)
    for other in (contiguous, strided, check(turned, backend, device, isa)):
        assert torch.equal(plain[0], other[0])
    assert not torch.equal(plain[0][1], shared[0][1])


@on_every_backend
def test_results_without_a_gradient(backend: str, device: str, isa: str) -> None:
    """A loss of y alone, and one of the statistics alone."""
    case = random_case((1, 1, 16, 5, 6) if INTERPRETED else (2, 2, 16, 5, 6), 24)
    for kept in (slice(0, 1), slice(1, 2), slice(2, 3)):

        def some(*leaves: Tensor, kept: slice = kept, case: Case = case) -> tuple[Tensor, ...]:
            return call(case.with_tensors(leaves))[kept]

        with use_backend("torch"):
            want = value_and_gradients(some, [t.double() for t in case.tensors.values()])
        with using(backend, isa):
            have = value_and_gradients(some, [t.to(device) for t in case.tensors.values()])
        for result, right in zip(have, want, strict=True):
            assert error_of(result, right) <= DTYPES[torch.float32]


@on_every_backend
def test_two_in_a_row_are_a_separable_convolution(backend: str, device: str, isa: str) -> None:
    """Statistics of the first go to the second: together the gradient of a batch normalisation."""
    p, n = (1, 1) if INTERPRETED else (2, 3)
    first = random_case((p, n, 16, 6, 5), 24, "depthwise")
    second = random_case((p, n, 24, 6, 5), 16, "depthwise")

    def chain(*leaves: Tensor) -> tuple[Tensor, ...]:
        x, pointwise, depthwise, pointwise_2, depthwise_2 = leaves
        y, mean, var = separable_conv(x, pointwise, depthwise=depthwise)
        return separable_conv(y, pointwise_2, depthwise=depthwise_2, mean=mean, var=var)

    def modules(*leaves: Tensor) -> tuple[Tensor, ...]:
        x, pointwise, depthwise, pointwise_2, depthwise_2 = leaves
        y, mean, var = layers(Case(x, pointwise, depthwise))
        return layers(Case(y, pointwise_2, depthwise_2, mean=mean, var=var))

    inputs = [first.x, first.pointwise, first.depthwise, second.pointwise, second.depthwise]
    want = value_and_gradients(modules, [tensor.double() for tensor in inputs])  # type: ignore[union-attr]
    with using(backend, isa):
        have = value_and_gradients(chain, [tensor.to(device) for tensor in inputs])  # type: ignore[union-attr]
    for result, right in zip(have, want, strict=True):
        assert error_of(result, right) <= 2 * DTYPES[torch.float32]


@on_every_backend
@pytest.mark.parametrize("options", ["", "bias", "depthwise normalised"])
@pytest.mark.parametrize("dtype", STORAGE_CPU)
def test_gradients_of_a_map_with_several_readers(
    backend: str, device: str, isa: str, options: str, dtype: torch.dtype
) -> None:
    """Two convolutions read x, and after them a square, or nothing."""
    if INTERPRETED and dtype != torch.float32:
        pytest.skip("Triton's interpreter: the type changes loads and stores alone")
    case = random_case(
        (1, 1, 20, 5, 4) if INTERPRETED else (2, 3, 20, 9, 7), 16, options, dtype=dtype
    )

    def readers(share: bool, used: bool) -> Any:
        def call_all(*leaves: Tensor) -> tuple[Tensor, ...]:
            own = case.with_tensors(leaves)
            x: Any = SharedMap(own.x)
            first = call(replace(own, x=x) if share else own)
            second = call(replace(own, x=x if share else own.x, dilation=2))
            return (*first, *second, *([x.map.square()] if used else []))

        return call_all

    for used in (True, False):
        with use_backend("torch"):
            tensors = [t.double() for t in case.tensors.values()]
            want = value_and_gradients(readers(False, used), tensors)
        with using(backend, isa), memory_filled_with_nan():
            tensors = [t.to(device) for t in case.tensors.values()]
            have = value_and_gradients(readers(True, used), tensors)
        for result, right in zip(have, want, strict=True):
            assert error_of(result, right) <= 2 * DTYPES[dtype]


@on_every_backend
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_value_that_is_no_number_spoils_its_neighbours_alone(
    backend: str, device: str, isa: str, bad: float
) -> None:
    case = random_case((1, 2, 16, 7, 8), 20, "depthwise normalised", stats=False)
    case.x[0, 1, 3, 2, 4] = bad
    with use_backend("torch"):
        want = call(case.double())[0]
    with using(backend, isa):
        have = call(case.to(device))[0].cpu()
    assert torch.equal(have.isfinite(), want.isfinite())
    assert (~have.isfinite()).any(2)[0].sum() == 9


@on_every_backend
def test_weights_of_the_maps_type(backend: str, device: str, isa: str) -> None:
    case = random_case((2, 2, 16, 5, 6), 8, dtype=torch.bfloat16)
    half = {name: getattr(case, name).bfloat16() for name in ("pointwise", "depthwise", "bias")}
    have = check(replace(case, **half), backend, device, isa)
    assert have[-5].dtype == torch.bfloat16


@on_triton
@pytest.mark.parametrize("options", ["bias", "depthwise normalised gamma beta"])
def test_float16_on_a_gpu(backend: str, device: str, isa: str, options: str) -> None:
    case = random_case((2, 2, 20, 5, 6), 24, options, dtype=torch.float16)
    check(case, backend, device, isa)
