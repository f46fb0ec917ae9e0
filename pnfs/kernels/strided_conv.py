"""3×3 convolution with stride 2 and the statistics of its result, all parts in one call (Eq. 2).

Axes: P parts, N batch, C channels in, O channels out, H W of x; maps are stacked, (P, N, C, H, W),
and channels-last inside each part. It is how a cell reads the finer scale: the mix that follows
normalises the result on load, so its statistics travel beside it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional as F

from pnfs.errors import PnfsError
from pnfs.kernels import checks, native
from pnfs.kernels.batch_stats import batch_stats, statistics_gradients
from pnfs.kernels.checks import STORAGE, STORAGE_CPU, Verdict
from pnfs.kernels.registry import Backend, OpCost, register_op
from pnfs.kernels.shared import PassOn, SharedMap, unshared

Forward = tuple[Tensor, Tensor, Tensor]


def strided_conv(
    x: Tensor | SharedMap,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    stats: bool = True,
) -> Forward:
    """Convolve with stride 2 and take the result's statistics. Differentiable in every tensor.

        y[p, n, o, h, w] = bias[p, o]
            + sum_c,i,j weight[p, o, c, i, j] x[p, n, c, 2 h + i - 1, 2 w + j - 1]

    x is zero outside the map (padding 1).

    Args:
        x: (P, N, C, H, W), float32, bfloat16, float16 or float64. Any layout; channels-last inside
            each part is taken without a copy, and so are parts that share one map (stride 0). A
            `SharedMap` is passed on: its next readers' gradients are added in this op's own pass.
        weight: (P, O, C, 3, 3). This and `bias`: float32 or the dtype of `x`.
        bias: (P, O) or None.
        stats: whether to compute `mean_y` and `var_y`.

    Returns:
        y: (P, N, O, ceil(H / 2), ceil(W / 2)), channels-last inside, dtype of `x`; sums are in
            float32 (float64 for float64).
        mean_y, var_y: (P, O), mean and biased variance of y over N, H and W, float32 (float64 for
            float64); empty (0,) tensors without `stats`.

    Raises:
        PnfsError: a shape, dtype or device that does not fit.
    """
    shared = x if isinstance(x, SharedMap) else None
    x = unshared(x)
    checks.check_tensor("x", x, (None,) * 5, *STORAGE, torch.float64)
    p, _, c, h, w = x.shape
    wide = torch.promote_types(x.dtype, torch.float32)
    allowed = tuple(dict.fromkeys((wide, x.dtype)))
    checks.check_tensor("weight", weight, (p, None, c, 3, 3), *allowed)
    if not (p and c and weight.shape[1] and h and w):
        raise PnfsError(
            f"x {tuple(x.shape)} and weight {tuple(weight.shape)} must have parts, channels and "
            "pixels"
        )
    if bias is not None:
        checks.check_tensor("bias", bias, (p, weight.shape[1]), *allowed)
        bias = bias.to(wide)
    checks.check_same_device(x=x, weight=weight, bias=bias)
    args = (checks.as_stacked(x), weight.to(wide), bias, bool(stats))
    return cast(Forward, _PASS_ON(shared, *args))


def strided_conv_reference(x: Tensor, weight: Tensor, bias: Tensor | None, stats: bool) -> Forward:
    """The definition; see `strided_conv`. Weights are float32, or float64 for float64 maps.

    GPUs convolve in the dtype of x, sums in float32; torch's CPU convolution in bfloat16 gives
    wrong weight gradients for narrow maps.
    """
    dtype = x.dtype if x.is_cuda else weight.dtype
    biases = [None] * len(x) if bias is None else bias.to(dtype).unbind(0)
    parts = [
        F.conv2d(part, taps, of_part, stride=2, padding=1).permute(0, 2, 3, 1)
        for part, taps, of_part in zip(
            x.to(dtype).unbind(0), weight.to(dtype).unbind(0), biases, strict=True
        )
    ]
    y = torch.stack(parts).permute(0, 1, 4, 2, 3)
    none = weight.new_empty(0)
    return (y.to(x.dtype), *(batch_stats(y) if stats else (none, none)))


# The backends take the arguments of the reference. Their gradients take x, the weights, whether
# there is a bias, the gradient of y, and y, mean_y and the gradients of mean_y and var_y where the
# last two have one.


def _empty(x: Tensor, weight: Tensor, bias: Tensor | None, stats: bool) -> Forward:
    p, n, _, h, w = x.shape
    o = weight.shape[1]
    y = checks.empty_stacked((p, n, o, (h + 1) // 2, (w + 1) // 2), x)
    shape = (p, o) if stats else (0,)
    mean, var = (torch.empty(shape, dtype=torch.float32, device=x.device) for _ in range(2))
    return y, mean, var


def _empty_backward(x: Tensor, weight: Tensor, has_bias: bool, *_: Tensor | None) -> list[Tensor]:
    """Gradients of x, weight and bias; (0,) where there is none."""
    g_bias = weight.new_empty(weight.shape[:2] if has_bias else (0,))
    g_weight = torch.empty(weight.shape, dtype=weight.dtype, device=weight.device)
    return [checks.empty_stacked(x.shape, x), g_weight, g_bias]


def _call(function: str, tensors: Sequence[Tensor | None], x: Tensor, weight: Tensor) -> None:
    p, n, c, h, w = x.shape
    native.call(
        "_cpu", function, checks.addresses(tensors),
        (p, n, c, weight.shape[1], h, w, x.stride(0)), checks.DTYPE_CODES[x.dtype],
        shapes=f"x {tuple(x.shape)}, O = {weight.shape[1]}",
    )  # fmt: skip


def _cpp(x: Tensor, weight: Tensor, bias: Tensor | None, stats: bool) -> Forward:
    results = _empty(x, weight, bias, stats)
    _call("strided_conv", [x, *checks.contiguous(weight, bias), *results], x, weight)
    return results


def _cpp_backward(
    x: Tensor,
    weight: Tensor,
    has_bias: bool,
    gy: Tensor,
    y: Tensor | None,
    mean_y: Tensor | None,
    g_mean_y: Tensor | None,
    g_var_y: Tensor | None,
    more: Tensor | None = None,
) -> list[Tensor]:
    """`more` is as x's gradient, and is added to it."""
    gradients = _empty_backward(x, weight, has_bias)
    of_stats = [y, mean_y, gy, *checks.contiguous(g_mean_y, g_var_y), more]
    tensors = [x, weight.contiguous(), *of_stats, *gradients]
    _call("strided_conv_backward", tensors, x, weight)
    return gradients


def _triton(x: Tensor, weight: Tensor, bias: Tensor | None, stats: bool) -> Forward:
    # Imported at the first call: triton takes a second to load and exists on Linux alone.
    from pnfs.kernels.triton.strided_conv import launch

    results = _empty(x, weight, bias, stats)
    launch(x, weight.contiguous(), checks.contiguous(bias)[0], *results)
    return results


def _triton_backward(
    x: Tensor,
    weight: Tensor,
    has_bias: bool,
    gy: Tensor,
    y: Tensor | None,
    mean_y: Tensor | None,
    g_mean_y: Tensor | None,
    g_var_y: Tensor | None,
    more: Tensor | None = None,
) -> list[Tensor]:
    from pnfs.kernels.triton.strided_conv import launch_backward

    gradients = _empty_backward(x, weight, has_bias)
    of_stats = [y, *checks.contiguous(mean_y, g_mean_y, g_var_y)]
    launch_backward(x, weight.contiguous(), has_bias, gy, of_stats, more, gradients)
    return gradients


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Forward) -> None:
    x, weight, bias, stats = inputs
    ctx.has_bias = bias is not None
    y, mean_y, _ = output
    ctx.save_for_backward(x, weight, *((y, mean_y) if stats else ()))
    ctx.set_materialize_grads(False)


def _backward(
    launch: Callable[..., Any],
    ctx: Any,
    gy: Tensor | None,
    g_mean_y: Tensor | None,
    g_var_y: Tensor | None,
    *more: Tensor,
) -> tuple[Any, ...]:
    x, weight, *results = ctx.saved_tensors
    if gy is None:
        gy = _empty(x, weight, None, False)[0].zero_()
    gx, g_weight, g_bias = launch(
        x,
        weight,
        ctx.has_bias,
        checks.dense_stacked(gy),
        *statistics_gradients(results, g_mean_y, g_var_y),
        *map(checks.dense_stacked, more),
    )
    return gx, g_weight, g_bias if ctx.has_bias else None, None


def _can_run(x: Tensor, *_: Any) -> Verdict:
    return checks.all_of(checks.has_batch(x), checks.has_dtype("x", x.dtype, STORAGE_CPU))


def _cost(args: Sequence[Any], outputs: Any) -> OpCost:
    _, n, _, h, w = outputs[0].shape
    return OpCost(conv_macs=n * h * w * args[1].numel())


def _can_run_triton(x: Tensor, *_: Any) -> Verdict:
    return checks.all_of(
        checks.has_batch(x), checks.has_dtype("x", x.dtype, STORAGE), checks.fits_triton(x)
    )


def _cost_triton(args: Sequence[Any], outputs: Any) -> OpCost:
    """One launch, and with many statistics to merge one more."""
    from pnfs.kernels.triton.strided_conv import forward_cost

    x, weight, _, stats = args
    launches, numbers = forward_cost(x, weight.shape[1]) if stats else (1, 0)
    return replace(_cost(args, outputs), launches=launches, scratch=2 * 4 * numbers)


def _cost_triton_backward(args: Sequence[Any], outputs: Any) -> OpCost:
    """Two launches, the second to add up what the first has written for it; that reads x and the
    gradient of the whole y for the weights, and the latter again for x's gradient."""
    from pnfs.kernels.triton.strided_conv import partial_elements_backward

    x, weight, has_bias, gy, y = args[:5]
    scratch = 2 * 4 * partial_elements_backward(x, weight.shape[1], has_bias)
    return OpCost(2, scratch=scratch + gy.nbytes + (0 if y is None else y.nbytes))


OP = register_op("strided_conv", strided_conv_reference)
_BACKENDS: tuple[tuple[Backend, Any, Any, Any, Any, Any], ...] = (
    ("cpp", _cpp, _cpp_backward, _cost, None, _can_run),
    ("triton", _triton, _triton_backward, _cost_triton, _cost_triton_backward, _can_run_triton),
)
for _backend, _fn, _fn_backward, _fn_cost, _fn_backward_cost, _verdict in _BACKENDS:
    OP.register_differentiable(
        _backend, _fn, _empty, _fn_backward, _empty_backward, _verdict,
        setup_context=_setup_context, backward=_backward,
        cost=_fn_cost, cost_backward=_fn_backward_cost,
    )  # fmt: skip
_PASS_ON = PassOn(OP, _setup_context, _backward)
