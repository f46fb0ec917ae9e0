"""mixed_sum: every backend against the float64 reference, and that against plain modules."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numerics import (
    ISAS,
    check_every_value_is_written_and_equal_in_every_run,
    check_value_and_gradients,
    error_of,
    examples,
    memory_filled_with_nan,
    opcheck,
    value_and_gradients,
)
from torch import Tensor
from torch.nn import functional as F

from pnfs.errors import PnfsError
from pnfs.kernels import batch_stats, checks, mixed_sum, native, use_backend
from pnfs.kernels.checks import STORAGE_CPU
from pnfs.kernels.registry import op_costs

DTYPES = {torch.float32: 2e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}
if native.triton_interpreted():  # which cuts bfloat16 off
    DTYPES[torch.bfloat16] = 2**-7

needs_cpp = pytest.mark.skipif(
    not native.has_function("_cpu", "mixed_sum")[0],
    reason=native.has_function("_cpu", "mixed_sum")[1] or "-",
)
BACKENDS = [
    pytest.param("torch", "cpu"),
    pytest.param("cpp", "cpu", marks=needs_cpp),
    pytest.param("triton", "cpu"),
    pytest.param("triton", "cuda", marks=pytest.mark.gpu),
]
TRITON = BACKENDS[2:]
on_every_backend = pytest.mark.parametrize(("backend", "device"), BACKENDS)
on_triton = pytest.mark.parametrize(("backend", "device"), TRITON)
# Of random shapes; Triton's interpreter takes milliseconds per program.
EXAMPLES = 3 if native.triton_interpreted() else 30


@dataclass(frozen=True)
class Case:
    """The arguments of one call."""

    x: Tensor | None
    branches: list[Tensor]
    means: list[Tensor]
    variances: list[Tensor]
    weights: Tensor
    relu: list[bool]

    @property
    def tensors(self) -> list[Tensor]:
        plain = [] if self.x is None else [self.x]
        return [*plain, *self.branches, *self.means, *self.variances, self.weights]

    @property
    def arguments(self) -> tuple[Any, ...]:
        """As the registered ops take them."""
        return self.x, self.branches, self.means, self.variances, self.weights, self.relu, 1e-5

    def with_tensors(self, tensors: tuple[Tensor, ...]) -> Case:
        rest = list(tensors)
        x = None if self.x is None else rest.pop(0)
        n = len(self.branches)
        return Case(x, rest[:n], rest[n : 2 * n], rest[2 * n : 3 * n], rest[-1], self.relu)

    def map(self, change: Callable[[Tensor], Tensor]) -> Case:
        """The same with all stacked maps changed."""
        x = None if self.x is None else change(self.x)
        return replace(self, x=x, branches=[change(y) for y in self.branches])

    def double(self) -> Case:
        return self.with_tensors(tuple(tensor.double() for tensor in self.tensors))

    def call(self, *tensors: Tensor) -> Tensor:
        c = self.with_tensors(tensors)
        return mixed_sum(c.x, c.branches, c.means, c.variances, c.weights, relu=c.relu)


def random_case(
    shape: tuple[int, int, int, int, int],
    branches: int = 2,
    *,
    skip: bool = True,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> Case:
    generator = torch.Generator().manual_seed(seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator)

    def maps() -> Tensor:
        p, n, c, h, w = shape
        return normal(p, n, h, w, c).permute(0, 1, 4, 2, 3).to(dtype)

    p, c = shape[0], shape[2]
    return Case(
        maps() if skip else None,
        [maps() for _ in range(branches)],
        [normal(p, c) / 4 for _ in range(branches)],
        [normal(p, c).square() + 0.1 for _ in range(branches)],
        normal(p, branches + skip),
        [bool((seed + b) % 3) for b in range(branches)],
    )


def run(case: Case, device: str = "cpu") -> list[Tensor]:
    """The output and the gradients of all tensors."""
    return value_and_gradients(case.call, [tensor.to(device) for tensor in case.tensors])


def check(case: Case, backend: str, device: str) -> list[Tensor]:
    with use_backend(backend):
        have = run(case, device)
    dtype = case.branches[0].dtype if case.branches else case.x.dtype  # type: ignore[union-attr]
    out = have[0]
    assert out.dtype == dtype
    assert out.permute(0, 1, 3, 4, 2).is_contiguous()
    assert [result.dtype for result in have[1:]] == [tensor.dtype for tensor in case.tensors]
    with use_backend("torch"):
        check_value_and_gradients(case.call, have, case.double().tensors, DTYPES[dtype])
    return have


def test_the_reference_equals_batch_norms_and_a_sum() -> None:
    """With batch statistics, output and gradients are those of the plain layers, per part."""
    case = random_case((3, 4, 5, 6, 7)).double()

    def layers(x: Tensor, *rest: Tensor) -> Tensor:
        *branches, weights = rest
        parts = []
        for p in range(3):
            total = weights[p, 0] * x[p]
            for b, y in enumerate(branches):
                z = F.batch_norm(y[p], None, None, training=True)
                total = total + weights[p, 1 + b] * (F.relu(z) if case.relu[b] else z)
            parts.append(total)
        return torch.stack(parts)

    def op(x: Tensor, *rest: Tensor) -> Tensor:
        *branches, weights = rest
        means, variances = zip(*(batch_stats(y) for y in branches), strict=True)
        return mixed_sum(x, branches, means, variances, weights, relu=case.relu)

    inputs = [case.x, *case.branches, case.weights]
    for have, want in zip(
        value_and_gradients(op, inputs), value_and_gradients(layers, inputs), strict=True
    ):
        assert error_of(have, want) < 1e-12


def test_gradcheck_of_the_reference() -> None:
    case = random_case((2, 2, 3, 2, 2)).double()
    leaves = tuple(tensor.requires_grad_() for tensor in case.tensors)
    assert torch.autograd.gradcheck(case.call, leaves)


@on_every_backend
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("branches", [1, 2, 4])
@pytest.mark.parametrize("skip", [True, False])
def test_equals_the_float64_reference(
    backend: str, device: str, dtype: torch.dtype, branches: int, skip: bool
) -> None:
    if backend == "cpp" and dtype not in STORAGE_CPU:
        pytest.skip("not a type of the CPU kernels")
    if (backend, device) == ("triton", "cpu") and branches != 2 and dtype != torch.float32:
        pytest.skip("Triton's interpreter: two branches run the same lines")
    check(random_case((3, 2, 64, 6, 5), branches, skip=skip, dtype=dtype), backend, device)


@on_every_backend
def test_any_shape(backend: str, device: str) -> None:
    @examples(EXAMPLES, device)
    @given(data=st.data())
    def any_case(data: st.DataObject) -> None:
        channels = st.one_of(st.integers(1, 20), st.sampled_from([32, 48, 64, 80, 130]))
        shape = (
            data.draw(st.integers(1, 8)),
            data.draw(st.integers(0, 3)),
            data.draw(channels),
            data.draw(st.integers(1, 5)),
            data.draw(st.integers(1, 5)),
        )
        branches = data.draw(st.integers(0, 3))
        skip = True if branches == 0 else data.draw(st.booleans())
        seed = data.draw(st.integers(0, 99))
        check(random_case(shape, branches, skip=skip, seed=seed), backend, device)

    any_case()


@on_every_backend
def test_sums_over_many_pixels(backend: str, device: str) -> None:
    """More units of work than one per part; gradients of statistics are sums over 6144 pixels."""
    if (backend, device) == ("triton", "cpu"):
        pytest.skip("Triton's interpreter: too many programs")
    check(random_case((2, 2, 64, 64, 48)), backend, device)


@on_every_backend
def test_a_mean_far_above_the_deviation(backend: str, device: str) -> None:
    case = random_case((2, 3, 20, 6, 5))
    offsets = [1e3 * var.sqrt() for var in case.variances]
    branches = [
        y + offset[:, None, :, None, None] for y, offset in zip(case.branches, offsets, strict=True)
    ]
    means = [mean + offset for mean, offset in zip(case.means, offsets, strict=True)]
    check(replace(case, branches=branches, means=means), backend, device)


@on_every_backend
def test_any_layout(backend: str, device: str) -> None:
    case = random_case((3, 2, 16, 6, 5))
    contiguous = check(case.map(lambda x: x.contiguous()), backend, device)
    strided = check(case.map(lambda x: torch.stack((x, x), dim=-1)[..., 0]), backend, device)
    shared = check(case.map(lambda x: x[:1].expand_as(x)), backend, device)
    assert torch.equal(contiguous[0], strided[0])
    assert not torch.equal(contiguous[0], shared[0])


def test_parts_that_share_a_map_are_not_copied() -> None:
    x = torch.randn(2, 4, 5, 16).permute(0, 3, 1, 2).expand(3, 2, 16, 4, 5)
    assert checks.as_stacked(x) is x


@on_every_backend
def test_with_statistics_of_the_branches_themselves(backend: str, device: str) -> None:
    """batch_stats and mixed_sum together have the gradient of a batch normalisation."""
    case = random_case((2, 3, 24, 5, 6))

    def call(x: Tensor, *rest: Tensor) -> Tensor:
        *branches, weights = rest
        means, variances = zip(*(batch_stats(y) for y in branches), strict=True)
        return mixed_sum(x, branches, means, variances, weights, relu=case.relu)

    inputs = [case.x, *case.branches, case.weights]
    with use_backend("torch"):
        want = value_and_gradients(call, [tensor.double() for tensor in inputs])
    with use_backend({"mixed_sum": backend}):
        have = value_and_gradients(call, [tensor.to(device) for tensor in inputs])
    for result, right in zip(have, want, strict=True):
        assert error_of(result, right) < 2e-6


@needs_cpp
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", STORAGE_CPU)
def test_every_instruction_set(
    isa: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PNFS_ISA", isa)
    for channels in (3, 22, 64):
        check(random_case((2, 2, channels, 5, 6), dtype=dtype), "cpp", "cpu")


@needs_cpp
def test_every_value_is_written_and_equal_in_every_run() -> None:
    case = random_case((3, 3, 80, 17, 19))
    check_every_value_is_written_and_equal_in_every_run(lambda: run(case))


@needs_cpp
@pytest.mark.parametrize("dtype", STORAGE_CPU)
def test_opcheck(dtype: torch.dtype) -> None:
    for case in (
        random_case((2, 2, 5, 3, 4), dtype=dtype),
        random_case((1, 1, 16, 1, 1), 1, skip=False),
    ):
        opcheck("mixed_sum_cpp", *case.arguments)


@on_triton
@pytest.mark.parametrize("shape", [(2, 2, 20, 9, 8), (1, 1, 3, 1, 1)])
def test_programs_that_take_several_steps(
    backend: str, device: str, shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every value is written, and the same ones in every run."""
    monkeypatch.setattr("pnfs.kernels.triton.maps.PROGRAMS", 3)
    case = random_case(shape, 4)  # type: ignore[arg-type]
    with memory_filled_with_nan():
        first, second = (check(case, backend, device) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@on_triton
def test_opcheck_of_triton(backend: str, device: str) -> None:
    case = random_case((2, 1, 5, 3, 2))
    case = case.with_tensors(tuple(tensor.to(device) for tensor in case.tensors))
    opcheck("mixed_sum_triton", *case.arguments)


def test_what_a_gpu_kernel_does_not_take(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "backend_available", lambda *_: (True, ""))
    monkeypatch.setattr(native, "backend_fits", lambda *_: (True, ""))
    small = random_case((1, 1, 2, 1, 1))
    for case, message in [
        (random_case((1, 1, 2, 1, 1), 8), "9 terms, takes up to 8"),
        (small.double(), "x is float64, takes float32, bfloat16, float16"),
    ]:
        with use_backend("triton"), pytest.raises(PnfsError, match=message):
            run(case)


def test_costs_of_the_gpu_count_the_sums_between_its_two_kernels() -> None:
    pytest.importorskip("triton", reason="triton is not installed")
    case = random_case((3, 2, 40, 32, 24))
    case = case.with_tensors(tuple(t.to("meta") for t in case.tensors))
    args = (case.x, *case.arguments)
    outputs = torch.ops.pnfs.mixed_sum_triton_backward.default(*args)
    cost = op_costs["pnfs::mixed_sum_triton_backward"](args, outputs)
    # Two sums per term, part and channel of 48 blocks of 32 pixels, written and read.
    assert (cost.launches, cost.scratch) == (2, 2 * 4 * 3 * 3 * 2 * 48 * 40)


@needs_cpp
def test_torch_compile_keeps_the_op_and_its_gradient() -> None:
    case = random_case((2, 2, 16, 4, 4))

    @torch.compile(fullgraph=True, backend="aot_eager")
    def call(*tensors: Tensor) -> Tensor:
        c = case.with_tensors(tensors)
        return mixed_sum(c.x, c.branches, c.means, c.variances, c.weights, relu=c.relu) * 2

    have = value_and_gradients(call, case.tensors)
    for a, b in zip(have, run(case), strict=True):
        assert torch.equal(a, 2 * b)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"x": None, "branches": [], "means": [], "variances": [], "relu": []},
            "needs x or a branch",
        ),
        ({"relu": [True]}, "relu must have one entry per branch, 2, not 1"),
        ({"means": []}, "means must have one entry per branch, 2, not 0"),
        ({"weights": torch.zeros(2, 2)}, r"weights must have shape \(2, 3\), not \(2, 2\)"),
        ({"x": torch.zeros(2, 1, 4, 3, 3, dtype=torch.int32)}, "must be float32 or bfloat16 or"),
        ({"x": torch.zeros(2, 1, 4, 3, 4)}, r"branches\[0\] must have shape \(2, 1, 4, 3, 4\)"),
        ({"x": torch.zeros(4, 3, 3)}, "must have shape"),
        ({"x": torch.zeros(2, 1, 4, 3, 3).bfloat16()}, r"branches\[0\] must be bfloat16"),
        ({"means": [torch.zeros(2, 4).double()] * 2}, r"means\[0\] must be float32, not float64"),
        ({"variances": [torch.ones(2, 4), torch.ones(4)]}, r"variances\[1\] must have shape"),
        ({"weights": torch.zeros(2, 3, device="meta")}, "weights is on meta but x is on cpu"),
    ],
)
def test_wrong_arguments_are_named(change: dict[str, Any], message: str) -> None:
    case = replace(random_case((2, 1, 4, 3, 3)), **change)
    with pytest.raises(PnfsError, match=message):
        mixed_sum(case.x, case.branches, case.means, case.variances, case.weights, relu=case.relu)


@needs_cpp
@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_other_types_run_on_the_reference(dtype: torch.dtype) -> None:
    case = random_case((2, 1, 4, 3, 3), dtype=dtype)
    case = case.double() if dtype == torch.float64 else case
    with use_backend("cpp"), pytest.raises(PnfsError, match="x is float.., takes float32, bfloat1"):
        run(case)
    run(case)
