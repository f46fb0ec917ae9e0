"""vector_heatmap_loss: every backend against the float64 reference, and that against loops."""

from __future__ import annotations

import math

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
    assert_close_to,
    doubled,
    draw_kind,
    random_vectors,
    skip_if_interpreted,
    skip_unless_taken,
)
from numerics import examples
from vector_heatmap_loss_cases import (
    check,
    loss_and_gradients,
    needs_cpp,
    on_every_backend,
    random_case,
)

from pnfs.kernels import use_backend


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
