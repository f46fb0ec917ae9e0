"""What callers and torch rely on in vector_heatmap_loss: what is refused and by which words,
opcheck, torch.compile, costs, every value written and the same in every run."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from keypoint_vectors import APART, ONE, SHARED
from torch._subclasses.fake_tensor import FakeTensorMode
from vector_heatmap_loss_cases import loss_and_gradients, needs_cpp, on_every_backend, random_case

from pnfs.errors import PnfsError
from pnfs.kernels import use_backend, vector_heatmap_loss
from pnfs.kernels.registry import op_costs


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
