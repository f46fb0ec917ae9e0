"""What the tests of differentiable ops share: gradients, comparison, and two ways to find reads of
memory that nobody wrote and sums whose order depends on threads; torch's own checks of an op."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from hypothesis import settings
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from pnfs.kernels import native, use_backend

# Values of PNFS_ISA, the instruction sets that CPU kernels are compiled for, that this CPU has.
_ABLE = native.module("_cpu").instruction_sets() if native.module_available("_cpu")[0] else []
ISAS = [isa for isa in ("portable", "avx2", "avx512") if isa in _ABLE]
# Those that products of bfloat16 are compiled for.
BF16_ISAS = [*ISAS, *(isa for isa in ("avx512_bf16", "amx") if isa in _ABLE)]


def examples(count: int, device: str) -> settings:
    """Of a test with random arguments: `count` of them, on a GPU a third, because there most have
    Triton compile kernels anew."""
    return settings(max_examples=-(-count // 3) if device == "cuda" else count, deadline=None)


def value_and_gradients(
    call: Callable[..., Tensor | tuple[Tensor, ...]], inputs: Sequence[Tensor], seed: int = 0
) -> list[Tensor]:
    """`call(*inputs)`, then the gradients of a random, smooth weighting of its results."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    results = call(*leaves)
    outputs = results if isinstance(results, tuple) else (results,)
    return [*outputs, *torch.autograd.grad(outputs, leaves, _weights(outputs, seed))]


def _weights(outputs: Sequence[Tensor], seed: int) -> list[Tensor]:
    """Multiples of 1/8: equal in every dtype."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(-16, 17, out.shape, generator=generator).to(out) / 8 for out in outputs]


def sizes_of_terms(
    call: Callable[..., Tensor], inputs: Sequence[Tensor], seed: int = 0
) -> list[Tensor]:
    """Of the gradients of `value_and_gradients`, each a sum over the values of `call(*inputs)`: the
    root of the sum of the squares of its terms, estimated from 32 sums with random signs. Rounding
    scales with it where the terms of a sum cancel."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    out = call(*leaves)
    (weights,) = _weights([out], seed)
    generator = torch.Generator().manual_seed(seed)
    squares = [torch.zeros_like(leaf) for leaf in leaves]
    for _ in range(32):
        signs = torch.randint(0, 2, out.shape, generator=generator).to(out) * 2 - 1
        sums = torch.autograd.grad(out, leaves, signs * weights, retain_graph=True)
        for total, each in zip(squares, sums, strict=True):
            total += each.square() / 32
    return [total.sqrt() for total in squares]


def check_value_and_gradients(
    call: Callable[..., Tensor], have: Sequence[Tensor], inputs: Sequence[Tensor], tolerance: float
) -> None:
    """`have` is `value_and_gradients(call, inputs)`: `inputs` are those of the call in float64, and
    `call` takes the reference. An error may be `tolerance` of the values' size, and, of a gradient,
    of the size of the terms it sums."""
    want = value_and_gradients(call, inputs)
    sizes: list[Tensor] | None = None
    for i, (result, right) in enumerate(zip(have, want, strict=True)):
        error = error_of(result, right)
        if error > tolerance and i > 0:
            sizes = sizes or sizes_of_terms(call, inputs)
            error = error_of(result, right, sizes[i - 1])
        assert error <= tolerance


def error_of(have: Tensor, want: Tensor, sizes: Tensor | None = None) -> float:
    """Largest |have - want| over the largest |want|, or over 1 where that is smaller, or over the
    `sizes` of the terms that `want` sums up, where those are larger."""
    assert have.shape == want.shape
    if not have.numel():
        return 0.0
    have, want = have.detach().double().cpu(), want.detach().double().cpu()
    assert torch.equal(have.isfinite(), want.isfinite())
    have, want = have.nan_to_num(0, 0, 0), want.nan_to_num(0, 0, 0)
    scale = want.abs().max().clamp(min=1)
    if sizes is not None:
        scale = scale.maximum(sizes)
    return float(((have - want).abs() / scale).max())


@contextmanager
def memory_filled_with_nan() -> Iterator[None]:
    """Inside, uninitialised tensors hold NaN."""
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def results_by_threads(call: Callable[[], list[Tensor]]) -> list[list[Tensor]]:
    """The results with 1, 2, 3 and again 1 thread."""
    before = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3, 1):
            torch.set_num_threads(count)
            results.append(call())
    finally:
        torch.set_num_threads(before)
    return results


def check_every_value_is_written_and_equal_in_every_run(call: Callable[[], list[Tensor]]) -> None:
    """`call` on the C++ kernels, with several numbers of threads."""
    with use_backend("cpp"), memory_filled_with_nan():
        first, *others = results_by_threads(call)
    assert not any(tensor.isnan().any() for tensor in first)
    for other in others:
        assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


def opcheck(op: str, *args: Any) -> None:
    """torch's checks of `pnfs::op` called with `args`, whose tensors of floating-point numbers
    require a gradient. The slowest one traces the call with sizes that are symbols, where no dtype
    decides anything: in float32 alone."""

    def leaf(value: Any) -> Any:
        is_map = isinstance(value, Tensor) and value.is_floating_point()
        return value.detach().requires_grad_() if is_map else value

    leaves = tree_map(leaf, args)
    checks = ["test_schema", "test_autograd_registration", "test_faketensor"]
    dtypes = {x.dtype for x in tree_leaves(leaves) if isinstance(x, Tensor) and x.requires_grad}
    if dtypes <= {torch.float32}:
        checks.append("test_aot_dispatch_dynamic")
    torch.library.opcheck(getattr(torch.ops.pnfs, op).default, leaves, test_utils=checks)
