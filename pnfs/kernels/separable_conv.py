"""Depthwise 3×3 and 1×1 convolution in one pass, with batch norm and activation on load (Eq. 1).

Axes: P parts, N batch, C channels in, O channels out, H W; maps are stacked, (P, N, C, H, W), and
channels-last inside each part. A separable convolution is a chain ReLU → BN → depthwise → 1×1; what
lies between the two convolutions is never stored, and neither is the normalised input: the
statistics of an output travel beside it as (P, O) tensors, and its consumer normalises on load.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional as F

from pnfs.errors import PnfsError
from pnfs.kernels import checks, native
from pnfs.kernels.batch_stats import statistics_gradients
from pnfs.kernels.checks import ACTIVATIONS, STORAGE, STORAGE_CPU, Activation, Verdict, activate
from pnfs.kernels.registry import Backend, OpCost, register_op
from pnfs.kernels.shared import PassOn, SharedMap, unshared


def separable_conv(
    x: Tensor | SharedMap,
    pointwise: Tensor,
    *,
    depthwise: Tensor | None = None,
    bias: Tensor | None = None,
    mean: Tensor | None = None,
    var: Tensor | None = None,
    gamma: Tensor | None = None,
    beta: Tensor | None = None,
    activation: Activation = "relu",
    dilation: int = 1,
    stats: bool = True,
    eps: float = 1e-5,
) -> tuple[Tensor, Tensor, Tensor]:
    """Normalise, convolve, and take the statistics of the result. Differentiable in every tensor.

        z = activation(gamma (x - mean) / sqrt(var + eps) + beta)   x itself without `mean`, `var`
        t = depthwise 3×3 convolution of z          z itself without `depthwise`
        y[p, n, o, h, w] = sum_c pointwise[p, o, c] t[p, n, c, h, w] + bias[p, o]

    The depthwise convolution pads z with `dilation` zeros on every side, so that H and W stay.

    Args:
        x: (P, N, C, H, W), float32, bfloat16, float16 or float64. Any layout; channels-last inside
            each part is taken without a copy, and so are parts that share one map (stride 0). A
            `SharedMap` is passed on: its next readers' gradients are added in this op's own pass.
        pointwise: (P, O, C). This and the other weights: float32 or the dtype of `x`.
        depthwise: (P, C, 3, 3), or None for a plain 1×1 convolution.
        bias: (P, O) or None.
        mean, var: (P, C), statistics of x, biased; those of its batch, as this function returns
            them, or running ones. float32 (float64 for float64 maps). Both or neither.
        gamma, beta: (P, C), scale and shift after the normalisation, as `mean`; each may be None.
        activation: "none", "relu" or "relu6", after the normalisation.
        dilation: of the depthwise convolution, in pixels.
        stats: whether to compute `mean_y` and `var_y`.
        eps: of the batch normalisation.

    Returns:
        y: (P, N, O, H, W), channels-last inside, dtype of `x`; sums are in float32 (float64 for
            float64).
        mean_y, var_y: (P, O), mean and biased variance of y over N, H and W, float32 (float64 for
            float64); empty (0,) tensors without `stats`. A gradient in them, which a consumer that
            normalises on load returns, flows back into y: autograd composes the two to the gradient
            of a batch normalisation.

    Raises:
        PnfsError: a shape, dtype or device that does not fit, one of `mean` and `var` without the
            other, gamma or beta without them, an unknown activation, a dilation below 1.
    """
    shared = x if isinstance(x, SharedMap) else None
    x = unshared(x)
    checks.check_tensor("x", x, (None,) * 5, *STORAGE, torch.float64)
    p, _, c, h, w = x.shape
    checks.check_tensor("pointwise", pointwise, (p, None, c))
    o = pointwise.shape[1]
    if not (p and c and o and h and w):
        raise PnfsError(
            f"x {tuple(x.shape)} and pointwise {tuple(pointwise.shape)} must have parts, channels "
            "and pixels"
        )
    wide = torch.promote_types(x.dtype, torch.float32)
    shapes: dict[str, tuple[Tensor | None, tuple[int, ...]]] = {
        "pointwise": (pointwise, (p, o, c)),
        "depthwise": (depthwise, (p, c, 3, 3)),
        "bias": (bias, (p, o)),
    }
    for name, (tensor, shape) in shapes.items():
        if tensor is not None:
            checks.check_tensor(name, tensor, shape, *dict.fromkeys((wide, x.dtype)))
    norm = {"mean": mean, "var": var, "gamma": gamma, "beta": beta}
    checks.check_norm((p, c), wide, **norm)
    checks.check_choice("activation", activation, ACTIVATIONS)
    if dilation < 1:
        raise PnfsError(f"dilation must be at least 1, not {dilation}")
    checks.check_same_device(x=x, pointwise=pointwise, depthwise=depthwise, bias=bias, **norm)
    weights = [None if tensor is None else tensor.to(wide) for tensor, _ in shapes.values()]
    args = (
        checks.as_stacked(x), *weights, mean, var, int(dilation), bool(stats), float(eps),
        gamma, beta, activation,
    )  # fmt: skip
    return cast(tuple[Tensor, Tensor, Tensor], _PASS_ON(shared, *args))


def separable_conv_reference(
    x: Tensor,
    pointwise: Tensor,
    depthwise: Tensor | None,
    bias: Tensor | None,
    mean: Tensor | None,
    var: Tensor | None,
    dilation: int,
    stats: bool,
    eps: float,
    gamma: Tensor | None = None,
    beta: Tensor | None = None,
    activation: str = "relu",
) -> tuple[Tensor, Tensor, Tensor]:
    """The definition; see `separable_conv`. Weights are float32, or float64 for float64 maps."""
    parts = []
    for p, part in enumerate(x.to(pointwise.dtype).unbind(0)):
        if mean is not None and var is not None:
            scale = (var[p] + eps).rsqrt()
            scale = (scale if gamma is None else scale * gamma[p])[:, None, None]
            part = (part - mean[p, :, None, None]) * scale
            part = part if beta is None else part + beta[p, :, None, None]
            part = activate(part, activation)
        if depthwise is not None:
            taps = depthwise[p, :, None]
            part = F.conv2d(part, taps, padding=dilation, dilation=dilation, groups=len(taps))
        y = F.conv2d(part, pointwise[p, :, :, None, None], None if bias is None else bias[p])
        parts.append(y.permute(0, 2, 3, 1))
    y = torch.stack(parts).permute(0, 1, 4, 2, 3)
    if stats:
        var_y, mean_y = torch.var_mean(y, dim=(1, 3, 4), correction=0)
    else:
        mean_y, var_y = y.new_empty(0), y.new_empty(0)
    return y.to(x.dtype), mean_y, var_y


# The backends take the arguments of the reference. Their gradients take, beside what the forward
# pass took, the gradients of y, mean_y and var_y, and y and mean_y where the last two have one.

Forward = tuple[Tensor, Tensor, Tensor]


def _empty(x: Tensor, pointwise: Tensor, *rest: Any) -> Forward:
    stats = rest[5]
    p, n, _, h, w = x.shape
    o = pointwise.shape[1]
    y = checks.empty_stacked((p, n, o, h, w), x)
    shape = (p, o) if stats else (0,)
    mean, var = (torch.empty(shape, dtype=torch.float32, device=x.device) for _ in range(2))
    return y, mean, var


def _empty_backward(
    x: Tensor,
    pointwise: Tensor,
    depthwise: Tensor | None,
    mean: Tensor | None,
    var: Tensor | None,
    dilation: int,
    eps: float,
    gamma: Tensor | None,
    beta: Tensor | None,
    activation: str,
    has_bias: bool,
    gy: Tensor,
    y: Tensor | None,
    mean_y: Tensor | None,
    g_mean_y: Tensor | None,
    g_var_y: Tensor | None,
    more: Tensor | None = None,
) -> list[Tensor]:
    """Gradients of x, pointwise, depthwise, bias, mean, var, gamma and beta; (0,) where there is
    none."""
    p, o, c = pointwise.shape
    shapes = [
        (p, o, c),
        (0,) if depthwise is None else (p, c, 3, 3),
        (p, o) if has_bias else (0,),
        *((0,) if tensor is None else (p, c) for tensor in (mean, var, gamma, beta)),
    ]
    weights = [torch.empty(shape, dtype=torch.float32, device=x.device) for shape in shapes]
    return [checks.empty_stacked(x.shape, x), *weights]


def _forward(
    run: Callable[..., None],
    x: Tensor,
    pointwise: Tensor,
    depthwise: Tensor | None,
    bias: Tensor | None,
    mean: Tensor | None,
    var: Tensor | None,
    dilation: int,
    stats: bool,
    eps: float,
    gamma: Tensor | None = None,
    beta: Tensor | None = None,
    activation: str = "relu",
) -> Forward:
    results = _empty(x, pointwise, depthwise, bias, mean, var, dilation, stats, eps)
    weights = checks.contiguous(pointwise, depthwise, bias)
    norm = checks.contiguous(mean, var, gamma, beta)
    code = ACTIVATIONS.index(cast(Activation, activation))
    run(x, weights, norm, results, dilation, code, eps)
    return results


def _gradients(
    run: Callable[..., None],
    x: Tensor,
    pointwise: Tensor,
    depthwise: Tensor | None,
    mean: Tensor | None,
    var: Tensor | None,
    dilation: int,
    eps: float,
    gamma: Tensor | None,
    beta: Tensor | None,
    activation: str,
    has_bias: bool,
    gy: Tensor,
    y: Tensor | None,
    mean_y: Tensor | None,
    g_mean_y: Tensor | None,
    g_var_y: Tensor | None,
    more: Tensor | None = None,
) -> list[Tensor]:
    """`more` is as x's gradient, and is added to it."""
    gradients = _empty_backward(
        x, pointwise, depthwise, mean, var, dilation, eps, gamma, beta, activation, has_bias,
        gy, y, mean_y, g_mean_y, g_var_y,
    )  # fmt: skip
    weights = checks.contiguous(pointwise, depthwise)
    norm = checks.contiguous(mean, var, gamma, beta)
    of_stats = [y, *checks.contiguous(mean_y, g_mean_y, g_var_y)]
    code = ACTIVATIONS.index(cast(Activation, activation))
    run(x, weights, norm, gy, of_stats, more, gradients, has_bias, dilation, code, eps)
    return gradients


Small = Sequence[Tensor | None]


def _call(
    function: str, tensors: Small, x: Tensor, pointwise: Tensor, dilation: int, code: int,
    eps: float,
) -> None:  # fmt: skip
    p, n, c, h, w = x.shape
    o = pointwise.shape[1]
    native.call(
        "_cpu", function, checks.addresses(tensors),
        (p, n, c, o, h, w, x.stride(0), dilation, code), eps, checks.DTYPE_CODES[x.dtype],
        shapes=f"x {tuple(x.shape)}, O = {o}",
    )  # fmt: skip


def _cpp(x: Tensor, weights: Any, norm: Small, results: Forward, *options: Any) -> None:
    _call("separable_conv", [x, *weights, *norm, *results], x, weights[0], *options)


def _cpp_backward(
    x: Tensor, weights: Any, norm: Small, gy: Tensor, of_stats: Small, more: Tensor | None,
    gradients: list[Tensor], has_bias: bool, *options: Any,
) -> None:  # fmt: skip
    y, mean_y, *g_stats = of_stats
    tensors = [x, *weights, *norm, y, mean_y, gy, *g_stats, more, *gradients]
    _call("separable_conv_backward", tensors, x, weights[0], *options)


def _triton(
    x: Tensor, weights: Any, norm: Small, results: Forward, dilation: int, code: int, eps: float
) -> None:
    # Imported at the first call: triton takes a second to load and exists on Linux alone.
    from pnfs.kernels.triton.separable_conv import launch

    pointwise, depthwise, bias = weights
    launch(x, pointwise, depthwise, bias, norm, code, dilation, eps, *results)


def _triton_backward(
    x: Tensor, weights: Any, norm: Small, gy: Tensor, of_stats: Small, more: Tensor | None,
    gradients: list[Tensor], has_bias: bool, dilation: int, code: int, eps: float,
) -> None:  # fmt: skip
    from pnfs.kernels.triton.separable_conv import launch_backward

    pointwise, depthwise = weights
    launch_backward(
        x, pointwise, depthwise, norm, code, dilation, eps, has_bias, gy, of_stats, more, gradients
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Forward) -> None:
    x, pointwise, depthwise, bias, mean, var, ctx.dilation, stats, ctx.eps, *rest = inputs
    gamma, beta, ctx.activation = rest
    ctx.has_bias = bias is not None
    y, mean_y, _ = output
    results = (y, mean_y) if stats else ()
    ctx.save_for_backward(x, pointwise, depthwise, mean, var, gamma, beta, *results)
    ctx.set_materialize_grads(False)


def _backward(
    launch: Callable[..., Any],
    ctx: Any,
    gy: Tensor | None,
    g_mean_y: Tensor | None,
    g_var_y: Tensor | None,
    *more: Tensor,
) -> tuple[Any, ...]:
    x, pointwise, depthwise, mean, var, gamma, beta, *results = ctx.saved_tensors
    if gy is None:
        p, n, _, h, w = x.shape
        gy = checks.empty_stacked((p, n, pointwise.shape[1], h, w), x).zero_()
    gx, g_pointwise, *rest = launch(
        x, pointwise, depthwise, mean, var, ctx.dilation, ctx.eps,
        gamma, beta, ctx.activation, ctx.has_bias,
        checks.dense_stacked(gy), *statistics_gradients(results, g_mean_y, g_var_y),
        *map(checks.dense_stacked, more),
    )  # fmt: skip
    of_weights = [g if g.numel() else None for g in rest]
    return (gx, g_pointwise, *of_weights[:4], None, None, None, *of_weights[4:], None)


def _can_run(x: Tensor, *_: Any) -> Verdict:
    return checks.all_of(checks.has_batch(x), checks.has_dtype("x", x.dtype, STORAGE_CPU))


def _can_run_triton(x: Tensor, *_: Any) -> Verdict:
    return checks.all_of(
        checks.has_batch(x), checks.has_dtype("x", x.dtype, STORAGE), checks.fits_triton(x)
    )


def _cost(args: Sequence[Any], outputs: Any) -> OpCost:
    x, pointwise, depthwise = args[:3]
    p, n, c, h, w = x.shape
    macs_of_pixel = pointwise.shape[1] * c + (0 if depthwise is None else 9 * c)
    return OpCost(conv_macs=p * n * h * w * macs_of_pixel)


def _cost_triton(args: Sequence[Any], outputs: Any) -> OpCost:
    """One launch, and with many statistics to merge one more; see `merges` there."""
    from pnfs.kernels.triton.separable_conv import forward_cost

    launches, numbers = forward_cost(*args[:3]) if args[7] else (1, 0)
    return replace(_cost(args, outputs), launches=launches, scratch=2 * 4 * numbers)


def _cost_triton_backward(args: Sequence[Any], outputs: Any) -> OpCost:
    """Two launches, the second to add up what the first has written for it. Before them, with a
    depthwise convolution, one that writes its result and the float32 gradient of that, and reads
    x and the gradient of the whole y for themselves."""
    from pnfs.kernels.triton.separable_conv import partial_elements_backward

    x, pointwise, depthwise, mean, var = args[:5]
    gamma, beta, _, has_bias, gy, y = args[7:13]
    sums = pointwise, depthwise, (mean, var, gamma, beta), has_bias
    scratch = 2 * 4 * partial_elements_backward(x, *sums)
    if depthwise is None:
        return OpCost(2, scratch=scratch)
    maps_read = gy.numel() * (1 if y is None else 2)
    scratch += x.element_size() * (3 * x.numel() + maps_read) + 2 * 4 * x.numel()
    return OpCost(3, scratch=scratch)


OP = register_op("separable_conv", separable_conv_reference)
_BACKENDS: tuple[tuple[Backend, Any, Any, Any, Any, Any], ...] = (
    ("cpp", _cpp, _cpp_backward, _cost, None, _can_run),
    ("triton", _triton, _triton_backward, _cost_triton, _cost_triton_backward, _can_run_triton),
)
for _backend, _fn, _fn_backward, _fn_cost, _fn_backward_cost, _verdict in _BACKENDS:
    OP.register_differentiable(
        _backend, partial(_forward, _fn), _empty,
        partial(_gradients, _fn_backward), _empty_backward, _verdict,
        setup_context=_setup_context, backward=_backward,
        cost=_fn_cost, cost_backward=_fn_backward_cost, like_backward=_empty_backward,
    )  # fmt: skip
_PASS_ON = PassOn(OP, _setup_context, _backward)
