"""Batch normalisation, an optional residual and the activation in one op.

Axes: N batch, C channels, H W. Neither the normalised map nor a mask is saved: the backward pass
recomputes what it needs from x. In a training step that reads and writes 8 maps where batch
normalisation and activation for themselves take 12.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor

from pnfs.errors import PnfsError
from pnfs.kernels import checks, native
from pnfs.kernels.checks import ACTIVATIONS, STORAGE, STORAGE_CPU, Activation, Verdict, activate
from pnfs.kernels.registry import Backend, OpCost, register_op

Forward = tuple[Tensor, Tensor, Tensor]


def batch_norm_act(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    mean: Tensor | None = None,
    var: Tensor | None = None,
    residual: Tensor | None = None,
    activation: Activation = "none",
    eps: float = 1e-5,
) -> Forward:
    """Normalise, add, activate. Differentiable in every tensor.

        y = act(weight (x - mean) / sqrt(var + eps) + bias + residual)

    Without `mean` and `var` they are those of x over N, H and W, as in training, and x's gradient
    goes through them too.

    Args:
        x: (N, C, H, W), float32, bfloat16, float16 or float64. Channels-last is taken without a
            copy.
        weight, bias: (C,), float32 (float64 for float64 maps).
        mean, var: (C,), given statistics, biased, of the same dtype. Both or neither.
        residual: like x, or None for none.
        activation: "none", "relu" or "relu6".
        eps: of the batch normalisation.

    Returns:
        y: (N, C, H, W), channels-last, dtype of x; arithmetic is in float32 (float64 for float64).
        mean, var: (C,), the batch's statistics, var biased; NaN for an empty batch. They are not
            differentiable. Empty (0,) tensors where statistics were given.

    Raises:
        PnfsError: a shape, dtype or device that does not fit, one of `mean` and `var` without the
            other, an unknown activation.
    """
    checks.check_tensor("x", x, (None,) * 4, *STORAGE, torch.float64)
    wide = torch.promote_types(x.dtype, torch.float32)
    if (mean is None) != (var is None):
        raise PnfsError("mean and var must be given both or neither")
    per_channel = {"weight": weight, "bias": bias, "mean": mean, "var": var}
    for name, tensor in per_channel.items():
        if tensor is not None:
            checks.check_tensor(name, tensor, (x.shape[1],), wide)
    if residual is not None:
        checks.check_tensor("residual", residual, tuple(x.shape), x.dtype)
    checks.check_same_device(x=x, **per_channel, residual=residual)
    checks.check_choice("activation", activation, ACTIVATIONS)
    code = ACTIVATIONS.index(activation)
    x, residual = channels_last(x), None if residual is None else channels_last(residual)
    return cast(Forward, OP(x, weight, bias, mean, var, residual, code, float(eps)))


def batch_norm_act_reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    mean: Tensor | None,
    var: Tensor | None,
    residual: Tensor | None,
    activation: int,
    eps: float,
) -> Forward:
    """The definition; see `batch_norm_act`. `activation` is an index into `ACTIVATIONS`."""
    z = x.to(weight.dtype)
    weight, bias = (
        weight.contiguous(),
        bias.contiguous(),
    )  # torch misreads strided ones
    results = weight.new_empty(0), weight.new_empty(0)
    if mean is None or var is None:
        with torch.no_grad():
            var, mean = torch.var_mean(z, dim=(0, 2, 3), correction=0)
        results = mean, var
        z = torch.batch_norm(z, weight, bias, None, None, True, 0.0, eps, True)
    elif mean.requires_grad or var.requires_grad:  # torch.batch_norm would give them no gradient
        scale = weight * (var + eps).rsqrt()
        z = (z - mean[:, None, None]) * scale[:, None, None] + bias[:, None, None]
    else:
        z = torch.batch_norm(z, weight, bias, mean, var, False, 0.0, eps, True)
    z = z if residual is None else z + residual
    y = activate(z, ACTIVATIONS[activation])
    return channels_last(y.to(x.dtype)), *results


def channels_last(x: Tensor) -> Tensor:
    """`x` (N, C, H, W), copied unless its channels are adjacent."""
    return x.contiguous(memory_format=torch.channels_last)


# The backends take the arguments of the reference. Their gradients take the gradient of y and what
# the forward pass took and found; they return those of x, weight, bias, mean, var and residual,
# (0,) where there is none. Without an activation the residual's is that of y.


def _empty_like(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.channels_last)


def _empty(x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor | None, *_: Any) -> Forward:
    shape = weight.shape if mean is None else (0,)
    stats = [torch.empty(shape, dtype=weight.dtype, device=x.device) for _ in range(2)]
    return _empty_like(x), stats[0], stats[1]


def _empty_backward(
    gy: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    mean: Tensor,
    var: Tensor,
    residual: Tensor | None,
    activation: int,
    batch: bool,
    eps: float,
) -> list[Tensor]:
    """`residual` is given where the activation's gradient depends on it."""
    given = (0,) if batch else weight.shape
    shapes = (weight.shape, weight.shape, given, given)
    small = [torch.empty(shape, dtype=weight.dtype, device=x.device) for shape in shapes]
    g_residual = weight.new_empty(0, dtype=x.dtype) if residual is None else _empty_like(x)
    return [_empty_like(x), *small, g_residual]


def _size(x: Tensor) -> tuple[int, int]:
    n, c, h, w = x.shape
    return n * h * w, c


def _cpp(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    mean: Tensor | None,
    var: Tensor | None,
    residual: Tensor | None,
    activation: int,
    eps: float,
) -> Forward:
    results = _empty(x, weight, bias, mean)
    y, *own = results
    stats = own if mean is None or var is None else [mean.contiguous(), var.contiguous()]
    norm = [*stats, weight.contiguous(), bias.contiguous()]
    native.call(
        "_cpu", "batch_norm_act",
        x.data_ptr(), checks.address(residual), checks.addresses(norm), y.data_ptr(), _size(x),
        mean is None, eps, activation, checks.DTYPE_CODES[x.dtype],
        shapes=f"x {tuple(x.shape)}",
    )  # fmt: skip
    return results


def _cpp_backward(
    gy: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    mean: Tensor,
    var: Tensor,
    residual: Tensor | None,
    activation: int,
    batch: bool,
    eps: float,
) -> list[Tensor]:
    gradients = _empty_backward(gy, x, weight, bias, mean, var, residual, activation, batch, eps)
    gx, *small, g_residual = gradients
    norm = [tensor.contiguous() for tensor in (mean, var, weight, bias)]
    native.call(
        "_cpu", "batch_norm_act_backward",
        gy.data_ptr(), x.data_ptr(), checks.address(residual), checks.addresses(norm),
        gx.data_ptr(), checks.address(g_residual), checks.addresses(small), _size(x),
        batch, eps, activation, checks.DTYPE_CODES[x.dtype],
        shapes=f"x {tuple(x.shape)}",
    )  # fmt: skip
    return gradients


def _triton(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    mean: Tensor | None,
    var: Tensor | None,
    residual: Tensor | None,
    activation: int,
    eps: float,
) -> Forward:
    # Imported at the first call: triton takes a second to load and exists on Linux alone.
    from pnfs.kernels.triton import batch_norm_once
    from pnfs.kernels.triton.batch_norm_act import launch

    results = _empty(x, weight, bias, mean)
    y, *own = results
    batch = mean is None or var is None
    stats = own if mean is None or var is None else [mean.contiguous(), var.contiguous()]
    small = weight.contiguous(), bias.contiguous(), stats[0], stats[1]
    if x.numel() and batch and batch_norm_once.takes(x):
        batch_norm_once.launch(x, *small, residual, activation, eps, y)
    elif x.numel():
        launch(x, *small, residual, activation, batch, eps, y)
    else:
        _fill(own, torch.nan)
    return results


def _triton_backward(
    gy: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    mean: Tensor,
    var: Tensor,
    residual: Tensor | None,
    activation: int,
    batch: bool,
    eps: float,
) -> list[Tensor]:
    from pnfs.kernels.triton import batch_norm_once
    from pnfs.kernels.triton.batch_norm_act import launch_backward

    gradients = _empty_backward(gy, x, weight, bias, mean, var, residual, activation, batch, eps)
    small = weight.contiguous(), bias.contiguous(), mean.contiguous(), var.contiguous()
    if x.numel() and batch and batch_norm_once.takes(x):
        batch_norm_once.launch_backward(gy, x, *small, residual, activation, eps, gradients)
    elif x.numel():
        launch_backward(gy, x, *small, residual, activation, batch, eps, gradients)
    else:
        _fill(gradients, 0)
    return gradients


def _fill(tensors: Sequence[Tensor], value: float) -> None:
    for tensor in tensors:
        tensor.fill_(value)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Forward) -> None:
    x, weight, bias, mean, var, residual, ctx.activation, ctx.eps = inputs
    ctx.batch = mean is None
    if ctx.batch:
        _, mean, var = output
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)  # for those two: nothing reads them
    ctx.has_residual = residual is not None
    masked = [residual] if ctx.has_residual and ctx.activation else []
    ctx.save_for_backward(x, weight, bias, mean, var, *masked)


def _backward(launch: Callable[..., Any], ctx: Any, gy: Tensor, *_: Any) -> tuple[Any, ...]:
    x, weight, bias, mean, var, *masked = ctx.saved_tensors
    gy = channels_last(gy)
    gx, g_weight, g_bias, g_mean, g_var, g_residual = launch(
        gy, x, weight, bias, mean, var, masked[0] if masked else None,
        ctx.activation, ctx.batch, ctx.eps,
    )  # fmt: skip
    stats = (None, None) if ctx.batch else (g_mean, g_var)
    if ctx.has_residual and not masked:
        g_residual = gy
    return gx, g_weight, g_bias, *stats, g_residual if ctx.has_residual else None, None, None


def _can_run_cpp(x: Tensor, *_: Any) -> Verdict:
    return checks.has_dtype("x", x.dtype, STORAGE_CPU)


def _cost(launches: int, args: Sequence[Any], outputs: Any) -> OpCost:
    """Statistics read x once more than the pass that writes y."""
    x, mean, residual = args[0], args[3], args[5]
    maps = 2 + (mean is None) + (residual is not None)
    return OpCost(launches if mean is None else 1, maps * x.nbytes)


def _cost_backward(launches: int, args: Sequence[Any], outputs: Any) -> OpCost:
    """Sums over gy and x, then gx from both; a residual is read, and its gradient written, by the
    first pass and read, in gy's stead, by the second."""
    x, residual = args[1], args[6]
    return OpCost(launches, (5 if residual is None else 7) * x.nbytes)


def _can_run_triton(x: Tensor, *_: Any) -> Verdict:
    return checks.has_dtype("x", x.dtype, STORAGE)


def _cost_triton(args: Sequence[Any], outputs: Any) -> OpCost:
    from pnfs.kernels.triton import batch_norm_once
    from pnfs.kernels.triton.batch_norm_act import partial_bytes

    if batch_norm_once.takes(args[0]):
        return _cost(1, args, outputs)
    cost = _cost(2, args, outputs)
    return (
        cost
        if cost.launches == 1
        else replace(cost, scratch=partial_bytes(args[0], backward=False))
    )


def _cost_triton_backward(args: Sequence[Any], outputs: Any) -> OpCost:
    """With given statistics x's gradient is written where the sums are taken."""
    from pnfs.kernels.triton import batch_norm_once
    from pnfs.kernels.triton.batch_norm_act import partial_bytes

    x, residual, batch = args[1], args[6], args[8]
    if batch and batch_norm_once.takes(x):
        return _cost_backward(1, args, outputs)
    if batch:
        return replace(_cost_backward(2, args, outputs), scratch=partial_bytes(x, backward=True))
    scratch = partial_bytes(x, backward=True, merged_once=True)
    return OpCost(1, (3 if residual is None else 5) * x.nbytes, scratch=scratch)


OP = register_op("batch_norm_act", batch_norm_act_reference)
_BACKENDS: tuple[tuple[Backend, Any, Any, Any, Any, Any], ...] = (
    ("cpp", _cpp, _cpp_backward, partial(_cost, 1), partial(_cost_backward, 1), _can_run_cpp),
    ("triton", _triton, _triton_backward, _cost_triton, _cost_triton_backward, _can_run_triton),
)
for _backend, _fn, _fn_backward, _fn_cost, _fn_backward_cost, _can_run in _BACKENDS:
    OP.register_differentiable(
        _backend, _fn, _empty, _fn_backward, _empty_backward, _can_run,
        setup_context=_setup_context, backward=_backward,
        cost=_fn_cost, cost_backward=_fn_backward_cost,
    )  # fmt: skip
