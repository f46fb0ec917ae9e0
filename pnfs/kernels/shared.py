"""Maps that several ops read: their gradients are added up where they arise."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pnfs.kernels.registry import Op


@dataclass
class SharedMap:
    """A map with several readers.

    Autograd adds the gradients of a tensor's readers in passes of their own: two reads and a write
    for each. An op that takes a `SharedMap` may instead replace `map` by an alias of it, which is
    for the readers that follow; the gradient of the alias then goes through the op's backward pass,
    which adds it to its own. An op that cannot do so leaves `map` alone, and autograd adds.

    Attributes:
        map: what the next reader takes.
    """

    map: Tensor


def unshared(x: Tensor | SharedMap) -> Tensor:
    """The map itself."""
    return x.map if isinstance(x, SharedMap) else x


class PassOn:
    """Calls of one op whose first argument is a `SharedMap`.

    The backward kernels of its backends `cpp` and `triton` take a last argument more: a gradient to
    add to that of x.
    """

    def __init__(
        self, op: Op, setup_context: Callable[..., Any], backward: Callable[..., Any]
    ) -> None:
        """`setup_context`, `backward`: those of `Op.register_differentiable`; `backward` takes the
        gradient to add, if there is one, after those of the results."""
        self._op = op
        self._functions: dict[str, type[torch.autograd.Function]] = {
            backend: _function(op.backends[backend].fn, launch, setup_context, backward)
            for backend, launch in op.gradients.items()
            if backend in ("cpp", "triton")
        }

    def __call__(self, shared: SharedMap | None, *args: Any) -> Any:
        """`op(*args)`, args[0] being `shared`'s map; passes the map on where it can be done."""
        if shared is None or not (torch.is_grad_enabled() and args[0].requires_grad):
            return self._op(*args)
        function = self._functions.get(self._op.choose(args))
        if function is None:
            return self._op(*args)
        *results, shared.map = function.apply(*args)
        return tuple(results)


def _function(
    launch: Callable[..., Any],
    launch_backward: Callable[..., Any],
    setup_context: Callable[..., Any],
    backward: Callable[..., Any],
) -> type[torch.autograd.Function]:
    class Function(torch.autograd.Function):
        """The op's results and x itself."""

        @staticmethod
        def forward(ctx: Any, *args: Any) -> tuple[Tensor, ...]:
            results = launch(*args)
            setup_context(ctx, args, results)
            return (*results, args[0].view_as(args[0]))

        @staticmethod
        def backward(ctx: Any, *grads: Tensor | None) -> Any:
            *of_results, of_x = grads
            return backward(launch_backward, ctx, *of_results, *(() if of_x is None else (of_x,)))

    return Function
