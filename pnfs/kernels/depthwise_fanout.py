"""Several 3×3 depthwise stencils of one map in one read of it, normalised on load (Eq. 1).

Axes: P parts, N batch, C channels, H W of x, h w of the results; maps are stacked, (P, N, C, H, W),
and channels-last inside each part. A stencil is a convolution, an average pool or a max pool. The
normalised input is never stored, and the statistics of a result travel beside it as (P, C) tensors:
its consumer normalises on load.
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
from pnfs.kernels.checks import ACTIVATIONS, STORAGE, STORAGE_CPU, Activation, Verdict, activate
from pnfs.kernels.registry import Backend, OpCost, register_op

KINDS = ("conv", "avg_pool", "max_pool")
MAX_STENCILS = 8
# In the backends' list of stencils; any other entry is the dilation of a convolution.
AVERAGE_POOL, MAX_POOL = 0, -1

Result = tuple[Tensor, Tensor, Tensor]


def depthwise_fanout(
    x: Tensor,
    kinds: Sequence[str],
    weights: Sequence[Tensor] = (),
    dilations: Sequence[int] | None = None,
    *,
    stride: int = 1,
    mean: Tensor | None = None,
    var: Tensor | None = None,
    gamma: Tensor | None = None,
    beta: Tensor | None = None,
    activation: Activation = "none",
    stats: bool = True,
    eps: float = 1e-5,
) -> list[Result]:
    """Normalise x, apply every stencil, take the statistics of the results. Differentiable.

        z = activation(gamma (x - mean) / sqrt(var + eps) + beta)
        conv:      y[i, j] = sum_ab weight[a, b] z[i s + (a - 1) d, j s + (b - 1) d]
        avg_pool:  the mean of z over the 3×3 window about [i s, j s]
        max_pool:  its maximum there

    per part, image and channel, with stride s and dilation d. z is zero outside the map for a
    convolution; pools leave pixels outside out, also of the count. The gradient of a maximum goes
    to the first of equal values, in rows from the top, as in torch.

    Args:
        x: (P, N, C, H, W), float32, bfloat16, float16 or float64. Any layout; channels-last inside
            each part is taken without a copy, and so are parts that share one map (stride 0).
        kinds: "conv", "avg_pool" or "max_pool" per stencil, 1 to 8 of them.
        weights: (P, C, 3, 3) per convolution, in the order of `kinds`, float32 or the dtype of `x`.
        dilations: per convolution, in pixels; None: all 1.
        stride: 1 or 2, of all stencils.
        mean, var: (P, C), statistics of x, biased; those of its batch, as the producer of x returns
            them, or running ones. float32 (float64 for float64 maps). Both or neither: x itself is
            taken.
        gamma, beta: (P, C), scale and shift after the normalisation, as `mean`; each may be None.
            Only with `mean` and `var`.
        activation: "none", "relu" or "relu6".
        stats: whether to compute the results' statistics.
        eps: of the batch normalisation.

    Returns:
        Per stencil y, mean_y, var_y.
        y: (P, N, C, h, w), h = ceil(H / s), w = ceil(W / s), channels-last inside, dtype of `x`;
            arithmetic is in float32 (float64 for float64).
        mean_y, var_y: (P, C), mean and biased variance of y over N, h and w, float32 (float64 for
            float64); empty (0,) tensors without `stats`. Gradients in them flow back into y.

    Raises:
        PnfsError: an unknown kind or activation, a shape, dtype or device that does not fit, lists
            of unequal length, mean without var, gamma or beta without them, another stride.
    """
    checks.check_tensor("x", x, (None,) * 5, *STORAGE, torch.float64)
    p, _, c, h, w = x.shape
    if not (p and c and h and w):
        raise PnfsError(f"x {tuple(x.shape)} must have parts, channels and pixels")
    if not 1 <= len(kinds) <= MAX_STENCILS:
        raise PnfsError(f"kinds must name 1 to {MAX_STENCILS} stencils, not {len(kinds)}")
    for kind in kinds:
        checks.check_choice("kind", kind, KINDS)
    checks.check_choice("activation", activation, ACTIVATIONS)
    convolutions = sum(kind == "conv" for kind in kinds)
    dilations = [1] * convolutions if dilations is None else dilations
    checks.check_count("weights", weights, convolutions, "convolution")
    checks.check_count("dilations", dilations, convolutions, "convolution")
    if any(dilation < 1 for dilation in dilations):
        raise PnfsError(f"dilations must be at least 1, not {list(dilations)}")
    if stride not in (1, 2):
        raise PnfsError(f"stride must be 1 or 2, not {stride}")
    wide = torch.promote_types(x.dtype, torch.float32)
    for name, tensor in checks.named(weights=weights).items():
        checks.check_tensor(name, tensor, (p, c, 3, 3), *dict.fromkeys((wide, x.dtype)))
    norm = {"mean": mean, "var": var, "gamma": gamma, "beta": beta}
    checks.check_norm((p, c), wide, **norm)
    checks.check_same_device(x=x, **checks.named(weights=weights), **norm)
    dilation = iter(dilations)
    codes = {"avg_pool": AVERAGE_POOL, "max_pool": MAX_POOL}
    stencils = [int(next(dilation)) if kind == "conv" else codes[kind] for kind in kinds]
    results = OP(
        checks.as_stacked(x), stencils, [weight.to(wide) for weight in weights],
        mean, var, gamma, beta, int(stride), activation, bool(stats), float(eps),
    )  # fmt: skip
    count = len(kinds)
    return list(zip(results[:count], results[count : 2 * count], results[2 * count :], strict=True))


def depthwise_fanout_reference(
    x: Tensor,
    stencils: list[int],
    weights: list[Tensor],
    mean: Tensor | None,
    var: Tensor | None,
    gamma: Tensor | None,
    beta: Tensor | None,
    stride: int,
    activation: str,
    stats: bool,
    eps: float,
) -> list[Tensor]:
    """The definition; see `depthwise_fanout`.

    `stencils`: per result the dilation of a convolution, `AVERAGE_POOL` or `MAX_POOL`. Weights are
    float32, or float64 for float64 maps. Returns all maps, then all means, then all variances.
    """
    z = x.to(torch.promote_types(x.dtype, torch.float32))
    if mean is not None and var is not None:
        scale = (var + eps).rsqrt()
        z = (z - _per_channel(mean)) * _per_channel(scale if gamma is None else scale * gamma)
        z = z if beta is None else z + _per_channel(beta)
    z = activate(z, activation)
    maps = []
    weight = iter(weights)
    for stencil in stencils:
        taps = next(weight)[:, :, None] if stencil > 0 else None
        parts = [
            _stencil(part, stencil, None if taps is None else taps[p], stride)
            for p, part in enumerate(z.unbind(0))
        ]
        maps.append(torch.stack([y.permute(0, 2, 3, 1) for y in parts]).permute(0, 1, 4, 2, 3))
    if stats:
        moments = [torch.var_mean(y, dim=(1, 3, 4), correction=0) for y in maps]
    else:
        moments = [(z.new_empty(0), z.new_empty(0)) for _ in maps]
    return [*(y.to(x.dtype) for y in maps), *(m for _, m in moments), *(v for v, _ in moments)]


def _per_channel(values: Tensor) -> Tensor:
    return values[:, None, :, None, None]


def _stencil(z: Tensor, stencil: int, taps: Tensor | None, stride: int) -> Tensor:
    if taps is not None:
        return F.conv2d(z, taps, None, stride, stencil, stencil, groups=len(taps))
    if stencil == AVERAGE_POOL:
        return F.avg_pool2d(z, 3, stride, 1, count_include_pad=False)
    return F.max_pool2d(z, 3, stride, 1)


# The backends take the arguments of the reference. Their gradients take, beside what the forward
# pass took, the gradients of the maps; and where the statistics have any, the maps, their means,
# and the gradients of means and variances.


def _empty(x: Tensor, stencils: list[int], *rest: Any) -> list[Tensor]:
    stride, stats = rest[5], rest[7]
    p, n, c, h, w = x.shape
    shape = (p, n, c, -(-h // stride), -(-w // stride))
    maps = [checks.empty_stacked(shape, x) for _ in stencils]
    of_map = (p, c) if stats else (0,)
    moments = [
        torch.empty(of_map, dtype=torch.float32, device=x.device) for _ in range(2 * len(stencils))
    ]
    return [*maps, *moments]


def _empty_backward(
    x: Tensor,
    stencils: list[int],
    weights: list[Tensor],
    mean: Tensor | None,
    var: Tensor | None,
    gamma: Tensor | None,
    beta: Tensor | None,
    stride: int,
    activation: str,
    eps: float,
    gys: list[Tensor],
    ys: list[Tensor],
    means: list[Tensor],
    g_means: list[Tensor],
    g_vars: list[Tensor],
) -> list[Tensor]:
    """Gradients of x, mean, var, gamma and beta ((0,) where there is none), then the weights."""
    p, _, c, _, _ = x.shape
    shapes: list[tuple[int, ...]] = [
        (0,) if tensor is None else (p, c) for tensor in (mean, var, gamma, beta)
    ]
    shapes += [(p, c, 3, 3)] * len(weights)
    small = [torch.empty(shape, dtype=torch.float32, device=x.device) for shape in shapes]
    return [checks.empty_stacked(x.shape, x), *small]


def _call(
    module: str,
    function: str,
    x: Tensor,
    stencils: list[int],
    stride: int,
    activation: str,
    eps: float,
    *args: Any,
) -> None:
    p, n, c, h, w = x.shape
    size = (p, n, c, h, w, x.stride(0), stride, ACTIVATIONS.index(cast(Activation, activation)))
    dtype, shapes = checks.DTYPE_CODES[x.dtype], f"x {tuple(x.shape)}"
    args = (x.data_ptr(), stencils, *args, size, eps, dtype)
    if module == "_cpu":
        native.call(module, function, *args, shapes=shapes)
        return
    with native.cuda_stream(x.device) as stream:
        backward = function.endswith("_backward")
        floats = native.call(
            module, "depthwise_fanout_scratch", stencils, size, dtype, backward, shapes=shapes
        )
        scratch = torch.empty(floats, dtype=torch.float32, device=x.device)
        native.call(module, function, *args, scratch.data_ptr(), stream, shapes=shapes)


def _forward(
    module: str,
    x: Tensor,
    stencils: list[int],
    weights: list[Tensor],
    mean: Tensor | None,
    var: Tensor | None,
    gamma: Tensor | None,
    beta: Tensor | None,
    stride: int,
    activation: str,
    stats: bool,
    eps: float,
) -> list[Tensor]:
    norm = (mean, var, gamma, beta)
    results = _empty(x, stencils, weights, *norm, stride, activation, stats, eps)
    count = len(stencils)
    moments = results[count:] if stats else []
    weights, kept = [weight.contiguous() for weight in weights], checks.contiguous(*norm)
    _call(
        module, "depthwise_fanout", x, stencils, stride, activation, eps,
        checks.addresses(weights), checks.addresses(kept),
        checks.addresses(results[:count]), checks.addresses(moments[:count]),
        checks.addresses(moments[count:]),
    )  # fmt: skip
    return results


def _gradients(
    module: str,
    x: Tensor,
    stencils: list[int],
    weights: list[Tensor],
    mean: Tensor | None,
    var: Tensor | None,
    gamma: Tensor | None,
    beta: Tensor | None,
    stride: int,
    activation: str,
    eps: float,
    gys: list[Tensor],
    ys: list[Tensor],
    means: list[Tensor],
    g_means: list[Tensor],
    g_vars: list[Tensor],
) -> list[Tensor]:
    norm = (mean, var, gamma, beta)
    gradients = _empty_backward(
        x, stencils, weights, *norm, stride, activation, eps, gys, ys, means, g_means, g_vars
    )
    weights, kept = [weight.contiguous() for weight in weights], checks.contiguous(*norm)
    lists = [gys, ys, means, [g.contiguous() for g in g_means], [g.contiguous() for g in g_vars]]
    _call(
        module, "depthwise_fanout_backward", x, stencils, stride, activation, eps,
        checks.addresses(weights), checks.addresses(kept),
        *(checks.addresses(tensors) for tensors in lists),
        gradients[0].data_ptr(), checks.addresses(gradients[5:]),
        checks.addresses(gradients[1:5]),
    )  # fmt: skip
    return gradients


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    x, ctx.stencils, weights, *norm, ctx.stride, ctx.activation, stats, ctx.eps = inputs
    count = len(ctx.stencils)
    ctx.weights = len(weights)
    ctx.save_for_backward(x, *norm, *weights, *(output[: 2 * count] if stats else ()))
    ctx.set_materialize_grads(False)


def _backward(launch: Callable[..., Any], ctx: Any, grads: list[Tensor | None]) -> tuple[Any, ...]:
    x, *saved = ctx.saved_tensors
    norm, weights, results = saved[:4], saved[4 : 4 + ctx.weights], saved[4 + ctx.weights :]
    count = len(ctx.stencils)
    of_maps, of_moments = grads[:count], grads[count:]
    ys, means = results[:count], results[count:]
    g_means: list[Tensor] = []
    g_vars: list[Tensor] = []
    if any(g is not None for g in of_moments):
        both = [torch.zeros_like(means[0]) if g is None else g for g in of_moments]
        g_means, g_vars = both[:count], both[count:]
    else:
        ys, means = [], []
    p, n, c, h, w = x.shape
    shape = (p, n, c, -(-h // ctx.stride), -(-w // ctx.stride))
    gys = [
        checks.empty_stacked(shape, x).zero_() if g is None else checks.dense_stacked(g)
        for g in of_maps
    ]
    gx, *rest = launch(
        x, ctx.stencils, weights, *norm, ctx.stride, ctx.activation, ctx.eps,
        gys, ys, means, g_means, g_vars,
    )  # fmt: skip
    of_norm = [g if tensor is not None else None for g, tensor in zip(rest[:4], norm, strict=True)]
    return (gx, None, rest[4:], *of_norm, None, None, None, None)


def _can_run(storage: tuple[torch.dtype, ...], x: Tensor, *_: Any) -> Verdict:
    return checks.all_of(checks.has_batch(x), checks.has_dtype("x", x.dtype, storage))


def _can_run_cuda(x: Tensor, stencils: list[int], *rest: Any) -> Verdict:
    largest = max(stencils)
    fits = checks.RUNS if largest <= 2 else checks.no(f"dilation {largest}, takes 1 and 2")
    return checks.all_of(_can_run(STORAGE, x, stencils, *rest), fits)


def _cost(args: Sequence[Any], outputs: Any) -> OpCost:
    return OpCost(conv_macs=9 * len(args[2]) * outputs[0].numel())


def scratch_cuda(x: Tensor, stencils: list[int], stride: int, backward: bool) -> int:
    """Numbers that blocks leave for the second launch to add up; `depthwise_fanout_scratch` of
    csrc/cuda says the same."""
    p, n, c, h, w = x.shape
    quads = 1 if x.dtype == torch.float32 else 2  # groups of four channels in 16 bytes
    packets = -(-c // (4 * quads))
    chunks = -(-packets * quads // 8)
    groups = -(-packets // chunks) * quads
    if not backward:  # sums of every tile of the results
        columns = 12 if stride == 2 else 16
        tiles = n * -(-h // stride // (8 // stride)) * -(-w // stride // columns)
        return len(stencils) * p * tiles * 3 * c
    tiles = n * -(-h // 8) * -(-w // 16)
    per_block = -(-tiles // max(1, 2048 // (p * chunks)))
    sums = 2 + 9 * sum(stencil > 0 for stencil in stencils)
    return p * -(-tiles // per_block) * chunks * sums * groups * 4


def _cost_cuda(args: Sequence[Any], outputs: Any) -> OpCost:
    """With statistics a second launch, which merges them."""
    x, stencils, stride, stats = args[0], args[1], args[7], args[9]
    if not stats:
        return _cost(args, outputs)
    scratch = 2 * 4 * scratch_cuda(x, stencils, stride, backward=False)
    return replace(_cost(args, outputs), launches=2, scratch=scratch)


def _cost_cuda_backward(args: Sequence[Any], outputs: Any) -> OpCost:
    """x's gradient and sums, then a launch that adds these up."""
    return OpCost(2, scratch=2 * 4 * scratch_cuda(args[0], args[1], args[7], backward=True))


OP = register_op("depthwise_fanout", depthwise_fanout_reference)
_BACKENDS: tuple[tuple[Backend, str, Any, Any, Any], ...] = (
    ("cpp", "_cpu", partial(_can_run, STORAGE_CPU), _cost, None),
    ("cuda", "_cuda", _can_run_cuda, _cost_cuda, _cost_cuda_backward),
)
for _backend, _module, _verdict, _fn_cost, _fn_backward_cost in _BACKENDS:
    OP.register_differentiable(
        _backend, partial(_forward, _module), _empty,
        partial(_gradients, _module), _empty_backward, _verdict,
        setup_context=_setup_context, backward=_backward, like_backward=_empty_backward,
        cost=_fn_cost, cost_backward=_fn_backward_cost,
    )  # fmt: skip
