"""vector_heatmap_loss: every backend against the float64 reference, and that against loops."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from keypoint_vectors import (
    APART,
    DTYPES,
    EXAMPLES,
    LAYOUTS,
    ONE,
    ROUNDING,
    SHARED,
    Parts,
    assert_close_to,
    backends,
    doubled,
    draw_kind,
    random_vectors,
    skip_if_interpreted,
    skip_unless_taken,
)
from numerics import examples
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from pnfs.errors import PnfsError
from pnfs.kernels import native, use_backend, vector_heatmap_loss
from pnfs.kernels.registry import op_costs

on_every_backend = backends("vector_heatmap_loss")
needs_cpp = pytest.mark.skipif(
    not native.has_function("_cpu", "vector_heatmap_loss")[0], reason="pnfs._cpu is not built"
)


@dataclass
class Case:
    """The arguments of one call."""

    vectors: list[Tensor]
    parts: Parts
    joints: Tensor
    weights: Tensor
    options: dict[str, float] = field(default_factory=lambda: {"sigma": 2.0})

    def loss(self, vectors: list[Tensor] | None = None) -> Tensor:
        given = self.vectors if vectors is None else vectors
        device = given[0].device
        joints, weights = self.joints.to(device), self.weights.to(device)
        return vector_heatmap_loss(given, self.parts, joints, weights, **self.options)


def random_case(
    parts: Parts, shape: tuple[int, int, int, int], *, seed: int = 0, **options: Any
) -> Case:
    """Joints inside and up to two cells outside of the map, on multiples of 1/8 pixel; one keypoint
    in three is masked, others have weights of any size."""
    n, _, h, w = shape
    k = 1 + max(k for part in parts for k in part)
    generator = torch.Generator().manual_seed(seed)
    joints = torch.rand(n, k, 2, generator=generator) * torch.tensor([w + 4, h + 4]) * 4 - 8
    weights = torch.rand(n, k, generator=generator) * 2
    weights[torch.rand(n, k, generator=generator) < 0.33] = 0
    return Case(
        random_vectors(parts, shape, seed=seed, **options), parts, (joints * 8).round() / 8, weights
    )


def loss_and_gradients(
    case: Case, vectors: list[Tensor] | None = None, factor: float = 1.0
) -> tuple[Tensor, tuple[Tensor, ...]]:
    vectors = case.vectors if vectors is None else vectors
    loss = case.loss(vectors)
    return loss, torch.autograd.grad(loss * factor, vectors)


def check(case: Case, backend: str, factor: float = 1.0) -> None:
    dtype = case.vectors[0].dtype
    with use_backend(backend):
        loss, gradients = loss_and_gradients(case, factor=factor)
        with torch.no_grad():
            alone = case.loss()
    with use_backend("torch"):
        want, want_gradients = loss_and_gradients(case, doubled(case.vectors), factor)
    assert loss.dtype == torch.float32
    assert loss.shape == ()
    assert alone.item() == loss.item()
    assert loss.item() == pytest.approx(want.item(), rel=1e-6)
    assert all(g.dtype == dtype for g in gradients)
    rounded_twice = 2 if factor != 1 else 1
    # A part without a visible keypoint has no gradient to compare with; hence the loss's scale.
    scale = max((g.abs().max().item() for g in want_gradients if g.numel()), default=0)
    assert_close_to(
        [torch.cat([g.detach().cpu().double().flatten() for g in gradients])],
        [torch.cat([g.flatten() for g in want_gradients])],
        rounded_twice * ROUNDING[dtype] + (6e-8 / scale if dtype == torch.float16 and scale else 0),
    )


@pytest.mark.parametrize("d", [1, 3])
def test_the_reference_equals_the_equation(d: int) -> None:
    case = random_case(SHARED, (2, d, 4, 3))
    vectors = doubled(case.vectors)
    total = 0.0
    for n in range(2):
        for k in range(5):
            cell = [
                min(int(case.joints[n, k, axis].item() / 4 + 0.5), (3, 4)[axis] - 1)
                for axis in (0, 1)
            ]
            squares = 0.0
            for y in range(4):
                for x in range(3):
                    score = 0.0
                    for part, tensor in zip(SHARED, vectors, strict=True):
                        for slot, keypoint in enumerate(part):
                            if keypoint == k:
                                v = tensor[n, slot, :, y, x]
                                squared = (v @ v).item()
                                score += v.item() if d == 1 else squared / (1 + squared)
                    r2 = (x - cell[0]) ** 2 + (y - cell[1]) ** 2
                    squares += (score - math.exp(-r2 / (2 * 2.0**2))) ** 2
            total += 0.5 * case.weights[n, k].item() * squares / 12
    with use_backend("torch"):
        assert case.loss(vectors).item() == pytest.approx(total / 10, rel=1e-7)


@on_every_backend
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("d", [1, 4, 8, 13, 16])
def test_equals_the_float64_reference(
    backend: str, device: str, dtype: torch.dtype, d: int
) -> None:
    skip_unless_taken(backend, dtype)
    if d in (4, 16):
        skip_if_interpreted(backend, device, "d = 8 runs the same lines")
    for layout in ("contiguous", "channels-last"):
        case = random_case(SHARED, (2, d, 2, 19), layout=layout, dtype=dtype, device=device)
        check(case, backend)


@on_every_backend
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("d", [1, 8])
def test_every_layout(backend: str, device: str, layout: str, d: int) -> None:
    check(random_case(APART, (2, d, 3, 17), layout=layout, device=device), backend)


@on_every_backend
def test_any_shape(backend: str, device: str) -> None:
    @examples(EXAMPLES, device)
    @given(data=st.data())
    def any_case(data: st.DataObject) -> None:
        parts, shape, layout = draw_kind(data)
        case = random_case(
            parts, shape, layout=layout, device=device, seed=data.draw(st.integers(0, 9))
        )
        case.options = {
            "sigma": data.draw(st.sampled_from([0.5, 2.0, 3.0, 40.0])),
            "stride": data.draw(st.sampled_from([1, 4, 8])),
        }
        check(case, backend)

    any_case()


@on_every_backend
@pytest.mark.parametrize("layout", ["contiguous", "channels-last"])
def test_a_large_case_runs_on_several_threads_and_past_the_caches(
    backend: str, device: str, layout: str
) -> None:
    skip_if_interpreted(backend, device, "too many programs")
    case = random_case(((0, 1),), (16, 8, 136, 136), layout=layout, device=device)
    check(case, backend)


@on_every_backend
@pytest.mark.parametrize("factor", [3.0, -0.5, 0.0])
def test_the_gradient_that_arrives_is_multiplied_in(
    backend: str, device: str, factor: float
) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        check(random_case(SHARED, (1, 8, 3, 5), dtype=dtype, device=device), backend, factor)


@on_every_backend
def test_float16_gradients_do_not_vanish_where_the_loss_is_scaled(
    backend: str, device: str
) -> None:
    skip_unless_taken(backend, torch.float16)
    case = random_case(APART, (2, 8, 16, 16), dtype=torch.float16, device=device)
    case.weights.fill_(1e-4)
    scale = 2.0**20
    with use_backend(backend):
        _, gradients = loss_and_gradients(case, factor=scale)
    with use_backend("torch"):
        _, want = loss_and_gradients(case, doubled(case.vectors), scale)
    assert all(g.abs().max().item() / scale < 3e-8 for g in gradients)  # 0 if it were not scaled
    assert_close_to(gradients, want, ROUNDING[torch.float16])


@on_every_backend
def test_backward_twice_over_one_graph(backend: str, device: str) -> None:
    case = random_case(SHARED, (2, 8, 3, 4), device=device)
    with use_backend(backend):
        loss = case.loss()
        first = torch.autograd.grad(loss * 2, case.vectors, retain_graph=True)
        kept = [g.clone() for g in first]
        second = torch.autograd.grad(loss * 6, case.vectors)
    for a, b, copy in zip(first, second, kept, strict=True):
        assert torch.equal(a, copy)
        torch.testing.assert_close(b, 3 * a)


@on_every_backend
def test_one_part_alone_may_want_a_gradient(backend: str, device: str) -> None:
    case = random_case(APART, (2, 8, 3, 4), device=device)
    with use_backend(backend):
        _, both = loss_and_gradients(case)
        case.vectors[0] = case.vectors[0].detach()
        (gradient,) = torch.autograd.grad(case.loss(), case.vectors[1:])
    torch.testing.assert_close(gradient, both[1])


@on_every_backend
@pytest.mark.parametrize("layout", ["contiguous", "channels-last"])
@pytest.mark.parametrize("d", [1, 3, 8])
def test_a_masked_keypoint_changes_nothing_whatever_it_holds(
    backend: str, device: str, layout: str, d: int
) -> None:
    bad = torch.tensor([math.nan, math.inf, -math.inf])
    for dtype in (torch.float32, torch.bfloat16):
        case = random_case(APART, (3, d, 2, 5), layout=layout, dtype=dtype, device=device)
        case.weights[:] = 1
        case.weights[:, 4] = 0
        with use_backend(backend):
            want, want_gradients = loss_and_gradients(case)
            case.joints[:, 4] = bad[:, None]
            with torch.no_grad():
                case.vectors[1][:, 1] = bad.to(device)[:, None, None, None].to(dtype)
            loss, gradients = loss_and_gradients(case)
        assert torch.equal(loss, want)
        assert all(torch.equal(a, b) for a, b in zip(gradients, want_gradients, strict=True))
        assert not gradients[1][:, 1].any()
        assert gradients[1][:, 0].any()


@on_every_backend
def test_targets_far_away_infinite_and_on_the_border(backend: str, device: str) -> None:
    case = random_case(ONE, (5, 4, 6, 7), device=device)
    case.weights.fill_(1)
    case.joints[0] = math.inf  # the last cell, as of any joint beyond the map
    case.joints[1] = -math.inf
    case.joints[2] = torch.tensor([[1e30, 0.0], [-1e30, 0], [3e9, 5], [-3e9, 5]])
    case.joints[3] = torch.tensor([[27.9, 23.9], [28, 24], [1.99, 2], [-1.99, -2]])
    case.joints[4] = torch.tensor([[-6.0, -6.1], [-5.9, 30], [2.01, 25.9], [26, 22]])
    check(case, backend)


@on_every_backend
def test_a_joint_that_is_nan_is_not_hidden(backend: str, device: str) -> None:
    case = random_case(ONE, (1, 4, 6, 7), device=device)
    case.weights.fill_(1)
    case.joints[0, 2, 0] = math.nan
    with use_backend(backend):
        loss, (gradient,) = loss_and_gradients(case)
    assert loss.isnan()
    assert gradient[:, 2].isnan().all()
    assert not gradient[:, [0, 1, 3]].isnan().any()


@on_every_backend
def test_an_empty_batch_has_loss_zero(backend: str, device: str) -> None:
    case = random_case(SHARED, (0, 8, 4, 3), device=device)
    with use_backend(backend):
        loss, gradients = loss_and_gradients(case)
    assert loss.item() == 0
    assert [g.shape for g in gradients] == [v.shape for v in case.vectors]


@on_every_backend
def test_strided_joints_and_weights(backend: str, device: str) -> None:
    case = random_case(SHARED, (2, 4, 3, 5), device=device)
    case.joints = torch.stack((case.joints, case.joints), dim=-1)[..., 0]
    case.weights = case.weights.T.contiguous().T
    assert not case.joints.is_contiguous()
    assert not case.weights.is_contiguous()
    check(case, backend)


def test_gradcheck() -> None:
    cases = [random_case(SHARED, (2, d, 2, 3)) for d in (1, 3)]
    for case in cases:
        assert torch.autograd.gradcheck(lambda *v, c=case: c.loss(list(v)), doubled(case.vectors))


@needs_cpp
@pytest.mark.parametrize("layout", ["contiguous", "channels-last"])
def test_the_kernels_gradient_is_the_slope_of_the_kernel(layout: str) -> None:
    case = random_case(SHARED, (1, 8, 4, 3), layout=layout)
    directions = random_vectors(SHARED, (1, 8, 4, 3), seed=1)
    step = 1e-2
    with use_backend("cpp"):
        _, gradients = loss_and_gradients(case)
        ahead, behind = (
            case.loss([v + sign * step * u for v, u in zip(case.vectors, directions, strict=True)])
            for sign in (1, -1)
        )
    slope = (ahead.double() - behind.double()) / (2 * step)
    along = sum((g.double() * u).sum() for g, u in zip(gradients, directions, strict=True))
    assert slope.item() == pytest.approx(along.item(), rel=1e-3)


@on_every_backend
@pytest.mark.parametrize("layout", ["contiguous", "channels-last"])
@pytest.mark.parametrize("d", [1, 8, 11])
def test_every_value_is_written_and_equal_in_every_run(
    monkeypatch: pytest.MonkeyPatch, backend: str, device: str, layout: str, d: int
) -> None:
    if backend == "torch":
        pytest.skip("torch's own sums may depend on the number of threads")
    shape = (1, d, 3, 21) if (backend, device) == ("triton", "cpu") else (3, d, 21, 19)
    case = random_case(SHARED, shape, layout=layout, device=device)
    real = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *a, **k: real(*a, **k).fill_(math.nan))
    threads = torch.get_num_threads()
    runs = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            with use_backend(backend):
                loss, gradients = loss_and_gradients(case)
            runs.append([loss, *gradients])
    finally:
        torch.set_num_threads(threads)
    assert not any(tensor.isnan().any() for tensor in runs[0])
    assert all(torch.equal(a, b) for run in runs for a, b in zip(runs[0], run, strict=True))


@needs_cpp
def test_without_a_gradient_none_is_written() -> None:
    case = random_case(SHARED, (2, 8, 4, 3))
    flat = [k for part in SHARED for k in part]
    args = (case.vectors, case.joints, case.weights, flat, 2.0, 4.0)
    op = torch.ops.pnfs.vector_heatmap_loss_cpp.default
    loss, gradients = op(*args, False)
    again, written = op(*args, True)
    assert gradients == []
    assert torch.equal(loss, again)
    assert [g.stride() for g in written] == [v.stride() for v in case.vectors]


@needs_cpp
@pytest.mark.parametrize("layout", ["contiguous", "channels-last", "columns"])
def test_opcheck(layout: str) -> None:
    flat = [k for part in SHARED for k in part]
    for dtype in (torch.float32, torch.bfloat16):
        case = random_case(SHARED, (2, 4, 3, 2), layout=layout, dtype=dtype)
        args = (case.vectors, case.joints, case.weights, flat, 2.0, 4.0)
        ops = torch.ops.pnfs
        torch.library.opcheck(ops.vector_heatmap_loss_cpp.default, (*args, True))
        torch.library.opcheck(ops.vector_heatmap_loss_cpp_gradient.default, (*args, torch.ones(())))
    gradients = [torch.randn(3), torch.randn(2, 2)]
    torch.library.opcheck(ops.vector_heatmap_loss_scaled.default, (gradients, torch.tensor(2.0)))


@needs_cpp
def test_under_torch_compile() -> None:
    case = random_case(SHARED, (2, 8, 4, 3))
    with use_backend("cpp"):
        compiled = torch.compile(lambda *v: case.loss(list(v)) * 3, backend="aot_eager")
        loss = compiled(*case.vectors)
        gradients = torch.autograd.grad(loss, case.vectors)
        want, want_gradients = loss_and_gradients(case, factor=3)
    torch.testing.assert_close(loss, want * 3)
    torch.testing.assert_close(gradients, want_gradients)


@needs_cpp
def test_its_cost_is_one_read_and_one_write_of_the_vectors() -> None:
    with FakeTensorMode(allow_non_fake_inputs=True), use_backend("cpp"):
        vectors = [torch.empty(24, 17, 8, 64, 48)]
        args = (vectors, torch.empty(24, 17, 2), torch.empty(24, 17), list(range(17)), 2.0, 4.0)
        for wanted in (False, True):
            outputs = torch.ops.pnfs.vector_heatmap_loss_cpp.default(*args, wanted)
            cost = op_costs["pnfs::vector_heatmap_loss_cpp"]((*args, wanted), outputs)
            small = 24 * 17 * 3 * 4 + 4
            assert cost.launches == 1
            assert cost.bytes == (1 + wanted) * vectors[0].numel() * 4 + small


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"joints": torch.zeros(2, 5)}, "no part predicts|must hold distinct|joints must have"),
        ({"joints": torch.zeros(1, 5, 2)}, r"joints must have shape \(2, 5, 2\)"),
        ({"weights": torch.zeros(2, 4)}, r"weights must have shape \(2, 5\)"),
        ({"weights": torch.zeros(2, 5, device="meta")}, "weights is on meta"),
        ({"sigma": 0.0}, "sigma and stride must be positive, not 0.0 and 4"),
        ({"sigma": math.nan}, "sigma and stride must be positive"),
        ({"stride": -4}, "sigma and stride must be positive"),
        ({"parts": ONE}, "an entry per part"),
    ],
)
def test_wrong_arguments_are_named(change: dict[str, Any], message: str) -> None:
    case = random_case(APART, (2, 8, 4, 3))
    arguments = {
        "vectors": case.vectors,
        "parts": APART,
        "joints": case.joints,
        "weights": case.weights,
        "sigma": 2.0,
        **change,
    }
    with pytest.raises(PnfsError, match=message):
        vector_heatmap_loss(**arguments)
