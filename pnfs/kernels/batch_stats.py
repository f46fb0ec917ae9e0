"""Batch statistics of feature maps in one read: mean and biased variance per part and channel.

Axes: P parts, N batch, C channels, H W; maps are stacked, (P, N, C, H, W), and channels-last inside
each part.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from pnfs.kernels import checks, native
from pnfs.kernels.checks import STORAGE, STORAGE_CPU, Verdict
from pnfs.kernels.registry import Backend, OpCost, register_op


def batch_stats(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance over N, H and W. Differentiable.

        mean = sum(x) / M
        var  = sum((x - mean)^2) / M,   M = N H W

    A mean that is large against the deviation costs no accuracy: sums are taken about a value near
    the mean, and partial sums are merged in float64.

    Args:
        x: (P, N, C, H, W), or (N, C, H, W) for maps without parts; float32, bfloat16, float16 or
            float64. Any layout; channels-last inside each part is taken without a copy, and so are
            parts that share one map (stride 0).

    Returns:
        mean, var: (P, C), or (C,) for maps without parts; float32 (float64 for float64). NaN where
        there is nothing to count (M = 0).

    Raises:
        PnfsError: another number of axes or another dtype.
    """
    if x.ndim == 4:
        mean, var = batch_stats(x[None])
        return mean[0], var[0]
    checks.check_tensor("x", x, (None,) * 5, *STORAGE, torch.float64)
    return cast(tuple[Tensor, Tensor], OP(checks.as_stacked(x)))


def batch_stats_reference(x: Tensor) -> tuple[Tensor, Tensor]:
    """The definition; see `batch_stats`."""
    values = x.to(torch.promote_types(x.dtype, torch.float32))
    var, mean = torch.var_mean(values, dim=(1, 3, 4), correction=0)
    return mean, var


def _empty(x: Tensor) -> tuple[Tensor, Tensor]:
    shape = (x.shape[0], x.shape[2])
    return (
        torch.empty(shape, dtype=torch.float32, device=x.device),
        torch.empty(shape, dtype=torch.float32, device=x.device),
    )


def _empty_backward(x: Tensor, mean: Tensor, g_mean: Tensor, g_var: Tensor) -> Tensor:
    return checks.empty_stacked(x.shape, x)


def _cpp(x: Tensor) -> tuple[Tensor, Tensor]:
    mean, var = _empty(x)
    native.call(
        "_cpu", "batch_stats",
        x.data_ptr(), x.stride(0), mean.data_ptr(), var.data_ptr(),
        _size(x), checks.DTYPE_CODES[x.dtype],
        shapes=f"x {tuple(x.shape)}",
    )  # fmt: skip
    return mean, var


def _cpp_backward(x: Tensor, mean: Tensor, g_mean: Tensor, g_var: Tensor) -> Tensor:
    gx = _empty_backward(x, mean, g_mean, g_var)
    mean, g_mean, g_var = mean.contiguous(), g_mean.contiguous(), g_var.contiguous()
    native.call(
        "_cpu", "batch_stats_backward",
        x.data_ptr(), x.stride(0), mean.data_ptr(), g_mean.data_ptr(), g_var.data_ptr(),
        gx.data_ptr(), _size(x), checks.DTYPE_CODES[x.dtype],
        shapes=f"x {tuple(x.shape)}",
    )  # fmt: skip
    return gx


def _triton(x: Tensor) -> tuple[Tensor, Tensor]:
    # Imported at the first call: triton takes a second to load and exists on Linux alone.
    from pnfs.kernels.triton.batch_stats import launch

    mean, var = _empty(x)
    if not x.numel():
        return mean.fill_(torch.nan), var.fill_(torch.nan)
    launch(x, mean, var)
    return mean, var


def _triton_backward(x: Tensor, mean: Tensor, g_mean: Tensor, g_var: Tensor) -> Tensor:
    from pnfs.kernels.triton.batch_stats import launch_backward

    gx = _empty_backward(x, mean, g_mean, g_var)
    if x.numel():
        launch_backward(x, mean.contiguous(), g_mean.contiguous(), g_var.contiguous(), gx)
    return gx


def _size(x: Tensor) -> tuple[int, int, int]:
    p, n, c, h, w = x.shape
    return p, n * h * w, c


def _setup_context(ctx: Any, inputs: tuple[Tensor], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs, output[0])


def statistics_gradients(
    saved: Sequence[Tensor], g_mean: Tensor | None, g_var: Tensor | None
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """For ops that return statistics beside their result y: y, its mean, and the gradients of mean
    and variance as a kernel takes them, all None where neither has one.

    Args:
        saved: y and its mean, or nothing where no statistics were wanted.
    """
    if not saved or (g_mean is None and g_var is None):
        return None, None, g_mean, g_var
    y, mean = saved
    g_mean, g_var = (torch.zeros_like(mean) if g is None else g for g in (g_mean, g_var))
    return y, mean, g_mean, g_var


def _backward(launch: Callable[..., Any], ctx: Any, g_mean: Tensor, g_var: Tensor) -> Any:
    x, mean = ctx.saved_tensors
    return launch(x, mean, g_mean, g_var)


def _can_run_cpp(x: Tensor) -> Verdict:
    return checks.has_dtype("x", x.dtype, STORAGE_CPU)


def _can_run_triton(x: Tensor) -> Verdict:
    return checks.has_dtype("x", x.dtype, STORAGE)


def _cost_triton(args: Sequence[Any], outputs: tuple[Tensor, Tensor]) -> OpCost:
    """The second launch reads what the first has written for it."""
    from pnfs.kernels.triton.batch_stats import partial_elements

    return OpCost(launches=2, scratch=2 * 4 * partial_elements(args[0]))


OP = register_op("batch_stats", batch_stats_reference)
_BACKENDS: tuple[tuple[Backend, Any, Any, Any, Any], ...] = (
    ("cpp", _cpp, _cpp_backward, None, _can_run_cpp),
    ("triton", _triton, _triton_backward, _cost_triton, _can_run_triton),
)
for _backend, _fn, _fn_backward, _cost, _can_run in _BACKENDS:
    OP.register_differentiable(
        _backend, _fn, _empty, _fn_backward, _empty_backward, _can_run,
        setup_context=_setup_context, backward=_backward, cost=_cost,
    )  # fmt: skip
