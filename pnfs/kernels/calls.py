"""How a torch op of ours is called and differentiated, with little Python.

PyTorch's dispatcher takes longer to reach a function in Python than many kernels run, and the
gradient that `torch.library.register_autograd` builds takes a multiple of that. Here a call that
nobody would see pass the dispatcher is made without it, and the gradient knows from the op's schema
which arguments are lists of tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import _C, Tensor, nn

# Arguments that mean to the dispatcher what they are; a subclass of Tensor may mean something else.
_PLAIN = frozenset((Tensor, nn.Parameter, list, type(None), bool, int, float, str))


def makes_plain_tensors() -> bool:
    """Whether a new tensor is one to keep: no compiler or export, no mode or transform."""
    # Asked first: what torch.compile traces ends here.
    if torch.compiler.is_compiling() or _C._get_tracing_state() is not None:
        return False
    return not (_C._len_torch_dispatch_stack() or _C._are_functorch_transforms_active())


def unwatched(args: Sequence[Any]) -> bool:
    """Whether only autograd would take note of a call with these arguments: no compiler or export,
    no mode, transform or profiler, no subclass of Tensor."""
    if not makes_plain_tensors():
        return False
    if _C._len_torch_function_stack() or _C._autograd._profiler_enabled():
        return False
    return _PLAIN.issuperset(map(type, args)) and all(
        _PLAIN.issuperset(map(type, arg)) for arg in args if type(arg) is list
    )


@torch.compiler.assume_constant_result  # older releases of torch.compile cannot trace the question
def knows_autocast(device: str) -> bool:
    """Whether a device of this type has autocast; "meta" has none."""
    return torch.amp.is_autocast_available(device)


def without_autocast(device: str) -> AbstractContextManager[Any]:
    """Inside, autocast is off on devices of this type, those that have none included."""
    return torch.autocast(device, enabled=False) if knows_autocast(device) else nullcontext()


def needs_gradient(args: Sequence[Any]) -> bool:
    """Whether autograd would note a call with these arguments."""
    return torch.is_grad_enabled() and _C._any_requires_grad(*args)


def differentiable(
    schema: _C.FunctionSchema, setup_context: Callable[..., Any], backward: Callable[..., Any]
) -> Callable[..., Any]:
    """Gives call(run, args): `run(*args)`, below autograd, as a node of autograd's graph.

    Args:
        schema: of the op; among its results only the last may be a list of tensors.
        setup_context, backward: as `torch.library.register_autograd` takes them, but that
            `ctx.needs_input_grad` is flat: a list of tensors has an entry for each, and two
            entries of no meaning end it.
    """
    defaults = [argument.default_value for argument in schema.arguments]
    lists = [i for i, argument in enumerate(schema.arguments) if _is_list(argument)]
    single = len(schema.returns) == 1
    ends_with_list = _is_list(schema.returns[-1])
    before = len(schema.returns) - 1  # tensors before a list

    def structured(tensors: Sequence[Any]) -> tuple[Any, ...]:
        if ends_with_list:
            return (*tensors[:before], list(tensors[before:]))
        return tuple(tensors)

    def forward(ctx: Any, *flat: Any) -> Any:
        run, args = flat[-2:]
        with _C._AutoDispatchBelowAutograd():
            output = run(*args)
            setup_context(ctx, args, output)
        if not ends_with_list:
            return output
        *tensors, last = (output,) if single else output
        return (*tensors, *last)

    def of_inputs(ctx: Any, *grads: Any) -> tuple[Any, ...]:
        gradients = backward(ctx, *structured(grads))
        if not isinstance(gradients, tuple):
            gradients = (gradients,)
        return (*_flat(gradients, lists), None, None)

    methods = {"forward": staticmethod(forward), "backward": staticmethod(of_inputs)}
    node: Any = type(schema.name.replace("::", "_"), (torch.autograd.Function,), methods)

    def call(run: Callable[..., Any], args: Sequence[Any]) -> Any:
        args = (*args, *defaults[len(args) :])  # a caller and the dispatcher may leave them out
        output = node.apply(*_flat(args, lists), run, args)
        if not ends_with_list:
            return output
        results = structured(output)
        return results[0] if single else results

    return call


def _is_list(argument: Any) -> bool:
    return str(argument.type) == "List[Tensor]"


def _flat(values: Sequence[Any], lists: Collection[int]) -> Sequence[Any]:
    """`values` with those at `lists` replaced by their entries."""
    if not lists:
        return values
    flat: list[Any] = []
    for i, value in enumerate(values):
        if i in lists:
            flat.extend(value)
        else:
            flat.append(value)
    return flat


def autograd_kernel(op: Any, call: Callable[..., Any]) -> Callable[..., Any]:
    """What the dispatcher runs where a call of `op` reaches autograd; `call` as `differentiable`
    gives it."""

    def kernel(keyset: _C.DispatchKeySet, *args: Any) -> Any:
        run = partial(op.redispatch, keyset & _C._after_autograd_keyset)
        if needs_gradient(args):
            return call(run, args)
        with _C._AutoDispatchBelowAutograd():
            return run(*args)

    return kernel


def direct(
    op: Any, fn: Callable[..., Any], devices: Collection[str], call: Callable[..., Any] | None
) -> Callable[..., Any]:
    """`op`, whose function is `fn` on `devices`; `call` is its gradient's, if it has one."""

    def launch(*args: Any) -> Any:
        if not unwatched(args) or device_type(args) not in devices:
            return op(*args)
        if needs_gradient(args):
            return op(*args) if call is None else call(fn, args)
        with _C._AutoDispatchBelowAutograd():
            return fn(*args)

    return launch


def device_type(args: Sequence[Any]) -> str:
    """The device type of the first tensor in `args`, looking into lists; "cpu" without one."""
    for arg in args:
        if isinstance(arg, Tensor):
            return arg.device.type
        if isinstance(arg, list | tuple) and arg and isinstance(arg[0], Tensor):
            return arg[0].device.type
    return "cpu"
