"""Calls of torch ops of ours: who sees them, and one gradient however they are made."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from pnfs.kernels.registry import torch_op

Results = tuple[Tensor, list[Tensor]]


def _scaled(
    x: Tensor, ys: list[Tensor], z: Tensor | None, triple: list[bool], times: int = 2
) -> Results:
    first = x * times if z is None else x * times + z
    return first, [y * (3 if three else 1) for y, three in zip(ys, triple, strict=True)]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Results) -> None:
    _, _, z, ctx.triple, ctx.times = inputs
    ctx.has_z = z is not None
    ctx.set_materialize_grads(False)


NEEDS: list[tuple[bool, ...]] = []  # what each backward pass was told


def _backward(ctx: Any, g: Tensor | None, gs: list[Tensor | None]) -> tuple[Any, ...]:
    NEEDS.append(ctx.needs_input_grad)
    g_ys = [
        None if g_y is None else g_y * (3 if three else 1)
        for g_y, three in zip(gs, ctx.triple, strict=True)
    ]
    return None if g is None else g * ctx.times, g_ys, g if ctx.has_z else None, None, None


def _doubled(x: Tensor) -> Tensor:
    return x * 2


SCALED = torch_op(
    "calls_scaled", _scaled, _scaled, ["cpu"],
    setup_context=_setup_context, backward=_backward,
)  # fmt: skip
DOUBLED = torch_op("calls_doubled", _doubled, torch.empty_like, ["cpu"])  # without a gradient
DISPATCHED = torch.ops.pnfs.calls_scaled.default


class Seen(TorchDispatchMode):
    """Notes what passes the dispatcher."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))


class Functions(TorchFunctionMode):
    """As Seen, of functions that Python calls."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


class Subclass(Tensor):
    pass


def _inputs(with_z: bool = True) -> tuple[Any, ...]:
    x, y0, y1, z = (torch.randn(3, requires_grad=True) for _ in range(4))
    return x, [y0, y1], z if with_z else None, [True, False], 5


@pytest.mark.parametrize("with_z", [True, False])
@pytest.mark.parametrize("read", ["first", "one of the list", "all"])
@pytest.mark.parametrize(
    ("call", "watched"),
    [(SCALED, nullcontext), (SCALED, Seen), (DISPATCHED, nullcontext)],
    ids=["direct", "watched", "dispatched"],
)
def test_values_and_gradients_are_the_same_however_it_is_called(
    call: Callable[..., Any], watched: Any, read: str, with_z: bool
) -> None:
    x, (y0, y1), z, *options = _inputs(with_z)
    context: AbstractContextManager[Any] = watched()
    with context:
        first, rest = call(x, [y0, y1], z, *options)
        assert isinstance(rest, list)
        wanted = {"first": [first], "one of the list": [rest[0]], "all": [first, *rest]}[read]
        sum(t.sum() for t in wanted).backward()
    of_first, of_list = read != "one of the list", read != "first"
    want = [
        (x, 5 if of_first else None),
        (y0, 3 if of_list else None),
        (y1, 1 if read == "all" else None),
        *([(z, 1 if of_first else None)] if with_z else []),
    ]
    for tensor, gradient in want:
        if gradient is None:
            assert tensor.grad is None
        else:
            assert torch.equal(tensor.grad, torch.full((3,), float(gradient)))


@pytest.mark.parametrize("call", [SCALED, DISPATCHED], ids=["direct", "dispatched"])
def test_defaults_are_filled_in(call: Callable[..., Any]) -> None:
    x, *rest = _inputs()
    (gradient,) = torch.autograd.grad(call(x, *rest[:-1])[0].sum(), x)
    assert torch.equal(gradient, torch.full((3,), 2.0))


def test_a_gradient_knows_what_is_wanted_of_it() -> None:
    x, (y0, y1), z, *options = _inputs()
    first, rest = SCALED(x.detach(), [y0.detach(), y1], z, *options)
    (first.sum() + rest[1].sum()).backward()
    assert NEEDS[-1][:4] == (False, False, True, True)


def test_nothing_is_kept_where_no_gradient_is_wanted() -> None:
    args = _inputs()
    with torch.no_grad():
        first, rest = SCALED(*args)
    assert not first.requires_grad and not any(t.requires_grad for t in rest)
    detached = (args[0].detach(), [y.detach() for y in args[1]], None, *args[3:])
    assert not SCALED(*detached)[0].requires_grad


def test_results_may_be_changed_in_place() -> None:
    x, *rest = _inputs()
    first, _ = SCALED(x, *rest)
    (gradient,) = torch.autograd.grad(first.mul_(10).sum(), x)
    assert torch.equal(gradient, torch.full((3,), 50.0))


def test_who_watches_the_dispatcher_sees_every_call() -> None:
    x, *rest = _inputs()
    with Seen() as seen:
        SCALED(x, *rest)
        with torch.no_grad():
            SCALED(x, *rest)
    assert seen.names.count("pnfs::calls_scaled") == 2
    with Functions() as functions:
        SCALED(x, *rest)
    assert "pnfs.calls_scaled.default" in functions.names
    with torch.profiler.profile() as profile:
        SCALED(x, *rest)
    assert "pnfs::calls_scaled" in {event.name for event in profile.events()}


@pytest.mark.parametrize("place", ["argument", "list"])
def test_a_subclass_of_tensor_is_left_to_the_dispatcher(place: str) -> None:
    x, (y0, y1), *rest = _inputs()
    special = torch.randn(3).as_subclass(Subclass)
    args = (special, [y0, y1], *rest) if place == "argument" else (x, [special, y1], *rest)
    first, others = SCALED(*args)
    assert isinstance(first, Subclass) and isinstance(others[0], Subclass)


def test_another_device_is_left_to_the_dispatcher() -> None:
    x, ys, z, *options = _inputs()
    first, _ = SCALED(x.to("meta"), [y.to("meta") for y in ys], z.to("meta"), *options)
    assert first.is_meta


def test_a_transform_of_functorch_is_refused_with_torchs_words() -> None:
    x, *rest = _inputs()
    with pytest.raises(RuntimeError, match="functorch transforms"):
        torch.func.grad(lambda x: SCALED(x, *rest)[0].sum())(x.detach())


def test_a_gradient_of_an_op_without_one_warns_as_torchs_own() -> None:
    x = torch.randn(3, requires_grad=True)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        DOUBLED(x).sum().backward()
    assert any("autograd kernel was not registered" in str(w.message) for w in caught)


def test_opcheck_and_compilation() -> None:
    args = _inputs()
    torch.library.opcheck(DISPATCHED, args)
    compiled = torch.compile(
        lambda *args: SCALED(*args)[0] + 1, backend="aot_eager", fullgraph=True
    )
    (want,), (got,) = (
        torch.autograd.grad(call(*args).sum(), args[0])
        for call in (lambda *args: SCALED(*args)[0] + 1, compiled)
    )
    assert torch.equal(want, got)
