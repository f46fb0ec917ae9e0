"""Backends of the ops: which exist, which can run, which one runs.

Every op has the backend `torch`, its plain PyTorch reference: the definition, the fallback and the
oracle of the tests. An op's file registers the others:

    OP = register_op("my_op", reference=my_op_reference)
    OP.register_native("cpp", _cpp, _fake, _can_run)     # _can_run(*args) -> (ok, reason)

    def my_op(x, ...):            # the public function: check the arguments, then dispatch
        return OP(x, ...)

`auto` (the default) picks by the device of the first tensor: on the CPU `cpp`, on a GPU `cuda` or
`triton`, whichever the op registers first, each if it can run, else `torch`. A backend that was
asked for by name and cannot run raises with the reason.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import Any, Literal, get_args

import torch

from pnfs.errors import PnfsError, did_you_mean
from pnfs.kernels import calls, native
from pnfs.kernels.calls import device_type
from pnfs.kernels.checks import RUNS, Verdict

Backend = Literal["torch", "cpp", "triton", "cuda"]
BACKENDS: tuple[str, ...] = get_args(Backend)
AUTO: dict[str, tuple[str, ...]] = {"cpu": ("cpp",), "cuda": ("cuda", "triton")}
# Devices on which a backend's functions are defined; Triton's interpreter and the emulation of CUDA
# take CPU tensors.
NATIVE_DEVICES: dict[str, tuple[str, ...]] = {
    "cpp": ("cpu",),
    "cuda": ("cuda", "cpu"),
    "triton": ("cuda", "cpu"),
}

_ops: dict[str, Op] = {}
# What use_backend asked for: op name -> backend; "*" is every op that is not named.
_AUTO_FOR_ALL: Mapping[str, str] = MappingProxyType({"*": "auto"})
_request: ContextVar[Mapping[str, str]] = ContextVar("pnfs_backend", default=_AUTO_FOR_ALL)


@dataclass(frozen=True)
class Implementation:
    """One backend of one op. `can_run` takes the arguments of `fn` and judges this call only;
    that the backend exists and takes the tensors' device is the registry's business."""

    fn: Callable[..., Any]
    can_run: Callable[..., Verdict]
    symbol: str


class Op:
    """A registered op; calling it dispatches to a backend."""

    def __init__(self, name: str, reference: Callable[..., Any]) -> None:
        self.name = name
        self.reference = reference
        self.backends: dict[str, Implementation] = {
            "torch": Implementation(reference, lambda *args: RUNS, "")
        }
        # backend -> the torch op `<op>_<backend>_backward`
        self.gradients: dict[str, Callable[..., Any]] = {}

    def register(
        self,
        backend: Backend,
        fn: Callable[..., Any],
        can_run: Callable[..., Verdict],
        *,
        symbol: str | None = None,
    ) -> None:
        """Add a backend. `fn` and `can_run` take the positional arguments of the reference.

        `symbol` is the function that the compiled module must offer; the op's name by default.
        """
        if backend in self.backends:
            raise ValueError(f"{self.name} already has the backend {backend}")
        self.backends[backend] = Implementation(fn, can_run, symbol or self.name)

    def register_native(
        self,
        backend: Backend,
        fn: Callable[..., Any],
        fake: Callable[..., Any],
        can_run: Callable[..., Verdict],
        **options: Any,
    ) -> None:
        """Add a backend that torch shall not look into: wraps `fn` by `torch_op` under the name
        `<op>_<backend>` with the reference's signature, then registers it. `options` are those of
        `torch_op`: setup_context, backward, cost."""
        name, devices = f"{self.name}_{backend}", NATIVE_DEVICES[backend]
        launch = torch_op(name, fn, fake, devices, like=self.reference, **options)
        self.register(backend, launch, can_run)

    def register_differentiable(
        self,
        backend: Backend,
        fn: Callable[..., Any],
        fake: Callable[..., Any],
        fn_backward: Callable[..., Any],
        fake_backward: Callable[..., Any],
        can_run: Callable[..., Verdict],
        *,
        setup_context: Callable[..., Any],
        backward: Callable[..., Any],
        cost: Cost | None = None,
        cost_backward: Cost | None = None,
        like_backward: Callable[..., Any] | None = None,
    ) -> None:
        """`register_native` for an op with a gradient, whose kernel becomes the torch op
        `<op>_<backend>_backward`. `backward(launch, ctx, *gradients)` calls that as `launch`."""
        launch = self.gradients[backend] = torch_op(
            f"{self.name}_{backend}_backward",
            fn_backward,
            fake_backward,
            NATIVE_DEVICES[backend],
            like=like_backward,
            cost=cost_backward,
        )
        self.register_native(
            backend, fn, fake, can_run,
            setup_context=setup_context, backward=partial(backward, launch), cost=cost,
        )  # fmt: skip

    def verdict(self, backend: str, args: Sequence[Any]) -> Verdict:
        """Whether `backend` can run this call, and the reason if not."""
        implementation = self.backends.get(backend)
        if implementation is None:
            return False, f"{self.name} has no such backend; it has {', '.join(self.backends)}"
        ok, reason = native.backend_fits(backend, device_type(args))
        if ok:
            ok, reason = native.backend_available(backend, implementation.symbol)
        return implementation.can_run(*args) if ok else (ok, reason)

    @torch.compiler.assume_constant_result  # not for torch.compile to look into
    def has_kernel(self, device: str) -> bool:
        """Whether `auto` has a backend of ours for tensors on a device of this type."""
        return any(
            native.backend_available(backend, implementation.symbol)[0]
            for backend, implementation in self.backends.items()
            if backend in AUTO.get(native.device_for_auto(device), ())
        )

    def choose(self, args: Sequence[Any]) -> str:
        """The backend that this call runs on.

        Raises:
            PnfsError: `use_backend` named one that cannot run this call.
        """
        wanted = _wanted(self.name)
        if wanted == "auto":
            device = native.device_for_auto(device_type(args))
            for backend in self.backends:
                if backend in AUTO.get(device, ()) and self.verdict(backend, args)[0]:
                    return backend
            return "torch"
        ok, reason = self.verdict(wanted, args)
        if not ok:
            raise PnfsError(f"{self.name}: backend '{wanted}' cannot run this call: {reason}")
        return wanted

    def __call__(self, *args: Any) -> Any:
        fn = self.backends[self.choose(args)].fn
        device = device_type(args)
        # An op says itself what it computes in; devices such as "meta" know no autocast.
        if calls.knows_autocast(device) and torch.is_autocast_enabled(device):
            with torch.autocast(device, enabled=False):
                return fn(*args)
        return fn(*args)


def register_op(name: str, reference: Callable[..., Any]) -> Op:
    """Make an op known. `reference` takes positional arguments, and its signature is the op's."""
    if name in _ops:
        raise ValueError(f"op {name} is registered twice")
    op = _ops[name] = Op(name, reference)
    return op


def ops() -> dict[str, Op]:
    """All registered ops by name."""
    return dict(_ops)


def dispatch(op: str | Op, *args: Any) -> Any:
    """Run an op, by object or by name, on the backend that `use_backend` or `auto` picks."""
    return (_ops[op] if isinstance(op, str) else op)(*args)


@torch.compiler.assume_constant_result  # torch.compile cannot trace a ContextVar: it reads it once
def _wanted(op: str) -> str:
    request = _request.get()
    return request.get(op) or request["*"]


@contextmanager
def use_backend(backend: str | Mapping[str, str]) -> Iterator[None]:
    """Inside the `with`, ops run on `backend`: "auto", "torch", "cpp", "triton" or "cuda".

    A mapping {op: backend} changes those ops alone. The setting belongs to the current thread (and
    async task); the surrounding one returns at the end. Under torch.compile the setting at the time
    of compilation stays.

    Raises:
        PnfsError: unknown op or backend; and, at the call of an op, a backend that cannot run it.
    """
    changes = {"*": backend} if isinstance(backend, str) else dict(backend)
    for name, wanted in changes.items():
        if name != "*" and name not in _ops:
            raise PnfsError(
                f"op '{name}' is unknown; ops are {', '.join(_ops)}{did_you_mean(name, _ops)}"
            )
        if wanted not in ("auto", *BACKENDS):
            allowed = ("auto", *BACKENDS)
            raise PnfsError(
                f"backend '{wanted}' is unknown; use {', '.join(allowed)}"
                f"{did_you_mean(wanted, allowed)}"
            )
    token = _request.set(changes if "*" in changes else {**_request.get(), **changes})
    try:
        yield
    finally:
        _request.reset(token)


@dataclass(frozen=True)
class Row:
    """One line of `explain()`: a backend of an op, as this process stands."""

    op: str
    backend: str
    available: bool
    chosen_on: tuple[str, ...]  # of "cpu", "cuda": where the present setting picks this backend
    reason: str  # why it is not available, else ""


class Explanation(list[Row]):
    """The rows of `explain()`; `str()` of it is a table."""

    def __str__(self) -> str:
        lines = [("op", "backend", "runs", "chosen on", "reason")]
        lines += [
            (
                row.op,
                row.backend,
                "yes" if row.available else "no",
                ", ".join(row.chosen_on),
                row.reason,
            )
            for row in self
        ]
        widths = [max(len(line[column]) for line in lines) for column in range(4)]
        return "\n".join(
            "  ".join(
                [*(cell.ljust(width) for cell, width in zip(line, widths, strict=False)), line[4]]
            ).rstrip()
            for line in lines
        )


def explain() -> Explanation:
    """Which backends each op has, whether they can run here, why not, and where each is chosen.

    Arguments of a particular call (dtype, layout) can still rule a backend out; `Op.verdict` tells.
    """
    devices = ("cpu", "cuda") if native.cuda_visible() else ("cpu",)
    rows = Explanation()
    for op in _ops.values():
        able = {
            backend: native.backend_available(backend, implementation.symbol)
            for backend, implementation in op.backends.items()
        }
        wanted = _wanted(op.name)
        chosen = {device: _chosen_without_call(op, able, wanted, device) for device in devices}
        rows += [
            Row(op.name, backend, ok, tuple(d for d in devices if chosen[d] == backend), reason)
            for backend, (ok, reason) in able.items()
        ]
    return rows


def _chosen_without_call(op: Op, able: dict[str, Verdict], wanted: str, device: str) -> str:
    if wanted != "auto":
        return wanted
    candidates = [b for b in op.backends if b in AUTO[device] and able[b][0]]
    return candidates[0] if candidates else "torch"


@dataclass(frozen=True)
class OpCost:
    """What one call of an implementation costs: kernels launched, bytes of memory read and written
    (None: every argument and every result once), multiply-adds of the convolutions in it, and bytes
    read and written besides, of buffers that are neither argument nor result."""

    launches: int = 1
    bytes: int | None = None
    conv_macs: int = 0
    scratch: int = 0


# torch op ("pnfs::name") -> cost(args, outputs), which reads shapes and dtypes only. An op without
# an entry counts as one launch that reads every argument and writes every result once.
Cost = Callable[[Sequence[Any], Any], OpCost]
op_costs: dict[str, Cost] = {}

# torch op ("pnfs::name") -> the function behind it.
op_functions: dict[str, Callable[..., Any]] = {}

# A fragment, because each op's file adds its own definitions.
_library = torch.library.Library("pnfs", "FRAGMENT")


def torch_op(
    name: str,
    fn: Callable[..., Any],
    fake: Callable[..., Any],
    devices: Sequence[str],
    *,
    like: Callable[..., Any] | None = None,
    setup_context: Callable[..., Any] | None = None,
    backward: Callable[..., Any] | None = None,
    cost: Cost | None = None,
) -> Callable[..., Any]:
    """Define `torch.ops.pnfs.<name>` from `fn` and return it, ready to be an op's backend.

    This makes a compiled kernel opaque to torch.compile, torch.export and autograd. It does what
    `torch.library.custom_op` does, with a small part of the Python; see `pnfs.kernels.calls`.

    Args:
        name: `<op>_<backend>`, plus `_backward` for a gradient.
        fn: allocates and returns new tensors; changes no argument and returns none.
        fake: the same arguments; returns empty tensors of the right shape, dtype and strides.
        devices: device types that `fn` takes: "cpu", "cuda".
        like: the function whose annotated signature is the op's, where `fn` itself has none; types
            are those that `torch.library.infer_schema` reads. Usually the reference.
        setup_context, backward: both or neither, see `calls.differentiable`.
        cost: what a call really costs, for `pnfs.count_costs`; see `op_costs`.
    """
    if (backward is None) != (setup_context is None):
        raise ValueError(f"{name}: setup_context and backward belong together")
    schema = torch.library.infer_schema(like or fn, mutates_args=())
    _library.define(f"{name}{schema}", tags=(torch.Tag.needs_exact_strides,))
    for device in devices:
        _library.impl(name, fn, device.upper())
    qualified = f"pnfs::{name}"
    op_functions[qualified] = fn
    torch.library.register_fake(qualified, fake, lib=_library)
    if cost is not None:
        op_costs[qualified] = cost
    op = getattr(torch.ops.pnfs, name).default
    call = None
    if backward is not None and setup_context is not None:
        call = calls.differentiable(op._schema, setup_context, backward)
        _library.impl(name, calls.autograd_kernel(op, call), "Autograd", with_keyset=True)
    return calls.direct(op, fn, devices, call)
