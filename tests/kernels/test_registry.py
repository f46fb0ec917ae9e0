"""Backends: what is chosen, what is refused and why, and what torch sees."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from pnfs import kernels
from pnfs.errors import PnfsError
from pnfs.kernels import checks, native, registry
from pnfs.kernels.registry import Op, register_op, use_backend


def double_reference(x: Tensor, times: int) -> Tensor:
    return x * 2 * times


def _can_run(x: Tensor, times: int) -> checks.Verdict:
    return checks.all_of(
        checks.has_dtype("x", x.dtype, (torch.float32,)), checks.is_contiguous(x=x)
    )


def _cpp(x: Tensor, times: int) -> Tensor:
    return x * (2.0 * times)


def _save(ctx: Any, inputs: tuple[Tensor, int], output: Tensor) -> None:
    ctx.times = inputs[1]


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
    return grad * 2 * ctx.times, None


@pytest.fixture(scope="module")
def op() -> Iterator[Op]:
    """An op with a working and a missing backend; `cpp` needs no compiled function here."""
    op = register_op("double", double_reference)
    op.register_native(
        "cpp",
        _cpp,
        lambda x, times: torch.empty_like(x),
        _can_run,
        setup_context=_save,
        backward=_backward,
    )
    op.register("triton", double_reference, lambda x, times: checks.no("it is Tuesday"))
    yield op
    del registry._ops["double"]


@pytest.fixture(autouse=True)
def _compiled_function_exists(monkeypatch: pytest.MonkeyPatch) -> None:
    real = native.has_function

    def has_function(module: str, function: str) -> checks.Verdict:
        return checks.RUNS if function == "double" else real(module, function)

    monkeypatch.setattr(native, "has_function", has_function)


def test_auto_prefers_the_native_backend_and_falls_back_to_torch(op: Op) -> None:
    x = torch.randn(3, 4)
    assert op.choose((x, 1)) == "cpp"
    assert op.choose((x.double(), 1)) == "torch"
    assert op.choose((x.t(), 1)) == "torch"
    assert op.choose((x.to("meta"), 1)) == "torch"
    assert torch.equal(op(x, 3), double_reference(x, 3))
    assert torch.equal(kernels.dispatch("double", x, 3), op(x, 3))


@pytest.mark.parametrize(
    ("backend", "x", "reason"),
    [
        ("cpp", torch.zeros(2, dtype=torch.float64), "x is float64, takes float32"),
        ("cpp", torch.zeros(2, 3).t(), "x is not contiguous (strides (1, 3))"),
        ("cpp", torch.zeros(2, device="meta"), "it does not take meta tensors"),
        ("cuda", torch.zeros(2), "double has no such backend; it has torch, cpp, triton"),
    ],
)
def test_a_named_backend_that_cannot_run_says_why(
    op: Op, backend: str, x: Tensor, reason: str
) -> None:
    with use_backend(backend), pytest.raises(PnfsError) as error:
        op(x, 1)
    assert str(error.value) == f"double: backend '{backend}' cannot run this call: {reason}"


def test_triton_on_the_cpu_needs_the_interpreter(op: Op, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with use_backend("triton"), pytest.raises(PnfsError, match="TRITON_INTERPRET=1"):
        op(torch.zeros(2), 1)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with use_backend("triton"), pytest.raises(PnfsError, match="it is Tuesday"):
        op(torch.zeros(2), 1)
    assert op.choose((torch.zeros(2), 1)) == "cpp"  # auto never interprets


def test_a_missing_module_is_a_reason_not_a_crash(op: Op, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "has_function", lambda *_: checks.no("no C++ compiler found"))
    assert op.choose((torch.zeros(2), 1)) == "torch"
    with use_backend("cpp"), pytest.raises(PnfsError, match=r"no C\+\+ compiler found$"):
        op(torch.zeros(2), 1)
    row = next(r for r in kernels.explain() if (r.op, r.backend) == ("double", "cpp"))
    assert (row.available, row.chosen_on, row.reason) == (False, (), "no C++ compiler found")


def test_use_backend_nests_merges_and_returns(op: Op) -> None:
    x = (torch.zeros(2), 1)
    with use_backend("torch"):
        assert op.choose(x) == "torch"
        with use_backend({"double": "cpp"}):
            assert op.choose(x) == "cpp"
            with use_backend("auto"):
                assert op.choose(x) == "cpp"
        with use_backend({"crop_normalize": "cpp"}):
            assert op.choose(x) == "torch"
        with pytest.raises(RuntimeError), use_backend("auto"):
            raise RuntimeError
        assert op.choose(x) == "torch"
    assert op.choose(x) == "cpp"


def test_use_backend_belongs_to_its_thread(op: Op) -> None:
    seen = []
    with use_backend("torch"):
        thread = threading.Thread(target=lambda: seen.append(op.choose((torch.zeros(2), 1))))
        thread.start()
        thread.join()
    assert seen == ["cpp"]


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        ("tritn", "backend 'tritn' is unknown; use auto, torch, cpp, triton, cuda; did you mean"),
        ({"crop_normalise": "cpp"}, "did you mean 'crop_normalize'"),
    ],
)
def test_unknown_names_are_refused_with_the_nearest(request_: Any, message: str) -> None:
    with pytest.raises(PnfsError, match=message), use_backend(request_):
        pass


def test_explain_lists_every_backend_of_every_op(op: Op) -> None:
    rows = kernels.explain()
    assert {(r.op, r.backend) for r in rows} == {
        (name, backend) for name, op in kernels.ops().items() for backend in op.backends
    }
    for name in kernels.ops():
        chosen = [r.backend for r in rows if r.op == name and "cpu" in r.chosen_on]
        assert len(chosen) == 1
    with use_backend("torch"):
        assert all(("cpu" in r.chosen_on) == (r.backend == "torch") for r in kernels.explain())
    table = str(rows).split("\n")
    assert len(table) == len(rows) + 1
    assert table[0].split() == ["op", "backend", "runs", "chosen", "on", "reason"]


def test_native_ops_are_differentiable_traceable_and_pass_opcheck(op: Op) -> None:
    x = torch.randn(3, requires_grad=True)
    (grad,) = torch.autograd.grad(op(x, 3).sum(), x)
    assert torch.equal(grad, torch.full((3,), 6.0))
    torch.library.opcheck(torch.ops.pnfs.double_cpp.default, (x, 3))

    compiled = torch.compile(lambda x: op(x, 3) + 1, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(x), op(x, 3) + 1)
    with use_backend("torch"):
        torch._dynamo.reset()
        assert torch.equal(compiled(x), op(x, 3) + 1)


def test_an_op_or_backend_is_registered_once(op: Op) -> None:
    with pytest.raises(ValueError, match="registered twice"):
        register_op("double", double_reference)
    with pytest.raises(ValueError, match="already has the backend cpp"):
        op.register("cpp", double_reference, _can_run)


@pytest.mark.parametrize("half", [{"setup_context": _save}, {"backward": _backward}])
def test_half_of_a_gradient_is_refused_and_defines_nothing(half: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="setup_context and backward belong together"):
        registry.torch_op("half", _cpp, double_reference, ["cpu"], **half)
    assert not hasattr(torch.ops.pnfs, "half")


def test_dispatch_costs_microseconds(op: Op) -> None:
    """A guard against something slow on the path: 1-2 µs on a free machine, bar far above."""
    import timeit

    x = torch.zeros(2)
    op(x, 1)
    seconds = min(timeit.repeat(lambda: op.choose((x, 1)), number=1000, repeat=5)) / 1000
    assert seconds < 100e-6


def test_checks_name_argument_want_and_have() -> None:
    with pytest.raises(PnfsError, match=r"^boxes must have shape \(any, 4\), not \(3,\)$"):
        checks.check_tensor("boxes", torch.zeros(3), (None, 4))
    with pytest.raises(PnfsError, match="^boxes must be int32 or int64, not float32$"):
        checks.check_tensor("boxes", torch.zeros(3), (3,), torch.int32, torch.int64)
    with pytest.raises(PnfsError, match="^b is on meta but a is on cpu; move them to one device$"):
        checks.check_same_device(a=torch.zeros(1), n=None, b=torch.zeros(1, device="meta"))
    channels_last = torch.zeros(2, 3, 4, 5).contiguous(memory_format=torch.channels_last)
    assert checks.is_dense_image("x", channels_last) == checks.RUNS
    assert not checks.is_dense_image("x", channels_last[..., ::2])[0]
