"""The input node of a cell (Eq. 2): neighbours of three scales, brought to one and mixed.

Axes: P parts, N batch, C channels, H W, and S sources; maps are stacked, (P, N, C, H, W), and
channels-last inside each part. Sources from other scales come as their convolutions made them:
batch normalisation, upsampling and activation happen here and are never stored.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional as F

from pnfs.errors import PnfsError, did_you_mean
from pnfs.kernels import checks, native
from pnfs.kernels.checks import STORAGE, STORAGE_CPU, Verdict
from pnfs.kernels.mixed_sum import TRITON_TERMS
from pnfs.kernels.registry import Backend, OpCost, register_op

TRANSFORMS = ("same", "down", "up")
SAME, DOWN, UP = range(3)  # inside the op: torch's schemas know no lists of strings


def scale_mix(
    sources: Sequence[Tensor],
    transforms: Sequence[str],
    means: Sequence[Tensor],
    variances: Sequence[Tensor],
    gammas: Sequence[Tensor],
    betas: Sequence[Tensor],
    weights: Tensor,
    *,
    relu: bool,
    down_relu: bool = False,
    eps: float = 1e-5,
) -> Tensor:
    """Eq. 2 from the raw outputs of the convolutions that change the scale.

        h = act(sum_s weights[:, s] T_s(x_s))
        T_same(x) = x
        T_down(x) = bn(x), then a ReLU with `down_relu`
        T_up(x)   = bilinear upsampling by 2 with aligned corners of bn(x)
        bn(x)     = gamma (x - mean) / sqrt(var + eps) + beta

    Differentiable in every tensor, the statistics included: with batch statistics that were
    computed from the sources, autograd composes this to the gradient of a batch normalisation.

    Args:
        sources: S >= 1 tensors of one dtype: float32, bfloat16, float16 or float64. Those of `same`
            and `down` are (P, N, C, H, W), those of `up` (P, N, C, H / 2, W / 2). Any layout;
            channels-last inside each part is taken without a copy, and so are parts that share one
            map (stride 0). Arithmetic is in float32, or in float64 for float64.
        transforms: per source "same", "down" or "up".
        means, variances, gammas, betas: (P, C) each, float32 (float64 for float64 maps), one per
            source that is not `same`, in the sources' order; variances are biased, those of the
            batch or running ones.
        weights: (P, S), dtype of the statistics. softmax(β), scaled or not.
        relu: whether act is a ReLU; else it is the identity.
        down_relu: whether `down` has a ReLU of its own.
        eps: of the batch normalisations.

    Returns:
        (P, N, C, H, W), channels-last inside, dtype of the sources.

    Raises:
        PnfsError: an unknown transform, or a number of tensors, a shape, dtype or device that does
            not fit.
    """
    if not sources:
        raise PnfsError("scale_mix needs a source")
    checks.check_count("transforms", transforms, len(sources), "source")
    for transform in transforms:
        if transform not in TRANSFORMS:
            raise PnfsError(
                f"transform '{transform}' is unknown; use {', '.join(TRANSFORMS)}"
                f"{did_you_mean(transform, TRANSFORMS)}"
            )
    codes = [TRANSFORMS.index(transform) for transform in transforms]
    checks.check_tensor("sources[0]", sources[0], (None,) * 5, *STORAGE, torch.float64)
    p, n, c, h, w = sources[0].shape
    if codes[0] == UP:
        h, w = 2 * h, 2 * w
    for i, (source, code) in enumerate(zip(sources, codes, strict=True)):
        if code == UP and (h % 2 or w % 2):
            raise PnfsError(f"sources[{i}] cannot be scaled by 2 to the others' odd size {h}×{w}")
        size = (h // 2, w // 2) if code == UP else (h, w)
        checks.check_tensor(f"sources[{i}]", source, (p, n, c, *size), sources[0].dtype)
    normalised = len(codes) - codes.count(SAME)
    dtype = torch.promote_types(sources[0].dtype, torch.float32)
    named = {"means": means, "variances": variances, "gammas": gammas, "betas": betas}
    for name, items in named.items():
        checks.check_count(name, items, normalised, "source that is not 'same'")
        for i, item in enumerate(items):
            checks.check_tensor(f"{name}[{i}]", item, (p, c), dtype)
    checks.check_tensor("weights", weights, (p, len(sources)), dtype)
    checks.check_same_device(**checks.named(sources=sources, **named), weights=weights)
    return cast(
        Tensor,
        OP(
            [checks.as_stacked(source) for source in sources],
            codes,
            *(list(items) for items in named.values()),
            weights,
            bool(relu),
            bool(down_relu),
            float(eps),
        ),
    )


def scale_mix_reference(
    sources: Sequence[Tensor],
    transforms: Sequence[int],
    means: Sequence[Tensor],
    variances: Sequence[Tensor],
    gammas: Sequence[Tensor],
    betas: Sequence[Tensor],
    weights: Tensor,
    relu: bool,
    down_relu: bool,
    eps: float,
) -> Tensor:
    """The definition; see `scale_mix`. `transforms` are indices into `TRANSFORMS`."""
    norms = iter(zip(means, variances, gammas, betas, strict=True))
    terms = []
    for source, code, weight in zip(sources, transforms, weights.unbind(1), strict=True):
        term = source
        if code != SAME:
            mean, var, gamma, beta = (s[:, None, :, None, None] for s in next(norms))
            term = gamma * ((source - mean) * (var + eps).rsqrt()) + beta
        if code == DOWN and down_relu:
            term = F.relu(term)
        if code == UP:
            term = upsample(term)
        terms.append(weight[:, None, None, None, None] * term)
    total = sum(terms[1:], terms[0])
    return checks.as_stacked((F.relu(total) if relu else total).to(sources[0].dtype))


def upsample(x: Tensor) -> Tensor:
    """(P, N, C, h, w) → (P, N, C, 2 h, 2 w), bilinear with aligned corners."""
    maps = x.flatten(0, 1)
    scaled = F.interpolate(maps, scale_factor=2, mode="bilinear", align_corners=True)
    return scaled.unflatten(0, x.shape[:2])


# The backends take the arguments of the reference. `_backward` also takes g and the output h, and
# returns the gradients of the sources, of means, variances, gammas and betas together as
# (4, normalised sources, P, C), and of weights.


def _empty(sources: Sequence[Tensor], transforms: Sequence[int], *_: Any) -> Tensor:
    p, n, c, h, w = sources[0].shape
    shape = (p, n, c, 2 * h, 2 * w) if transforms[0] == UP else (p, n, c, h, w)
    return checks.empty_stacked(shape, sources[0])


def _empty_backward(
    g: Tensor,
    h: Tensor,
    sources: Sequence[Tensor],
    transforms: Sequence[int],
    means: Sequence[Tensor],
    variances: Sequence[Tensor],
    gammas: Sequence[Tensor],
    betas: Sequence[Tensor],
    weights: Tensor,
    *_: Any,
) -> tuple[list[Tensor], Tensor, Tensor]:
    norms = (4, len(means), h.shape[0], h.shape[2])
    return (
        [checks.empty_stacked(source.shape, source) for source in sources],
        torch.empty(norms, dtype=weights.dtype, device=weights.device),
        torch.empty(weights.shape, dtype=weights.dtype, device=weights.device),
    )


def _cpp(
    sources: Sequence[Tensor],
    transforms: Sequence[int],
    means: Sequence[Tensor],
    variances: Sequence[Tensor],
    gammas: Sequence[Tensor],
    betas: Sequence[Tensor],
    weights: Tensor,
    relu: bool,
    down_relu: bool,
    eps: float,
) -> Tensor:
    out = _empty(sources, transforms)
    norms = [checks.contiguous(*items) for items in (means, variances, gammas, betas)]
    weights = weights.contiguous()
    native.call(
        "_cpu", "scale_mix",
        checks.addresses(sources), [x.stride(0) for x in sources], transforms,
        [checks.addresses(items) for items in norms], weights.data_ptr(),
        relu, down_relu, eps, out.data_ptr(), tuple(out.shape), checks.DTYPE_CODES[out.dtype],
        shapes=f"h {tuple(out.shape)}",
    )  # fmt: skip
    return out


def _cpp_backward(
    g: Tensor,
    h: Tensor,
    sources: Sequence[Tensor],
    transforms: Sequence[int],
    means: Sequence[Tensor],
    variances: Sequence[Tensor],
    gammas: Sequence[Tensor],
    betas: Sequence[Tensor],
    weights: Tensor,
    relu: bool,
    down_relu: bool,
    eps: float,
) -> tuple[list[Tensor], Tensor, Tensor]:
    arguments = (sources, transforms, means, variances, gammas, betas, weights)
    gradients = g_sources, g_norms, g_weights = _empty_backward(g, h, *arguments)
    norms = [checks.contiguous(*items) for items in (means, variances, gammas, betas)]
    weights = weights.contiguous()
    native.call(
        "_cpu", "scale_mix_backward",
        g.data_ptr(), g.stride(0), h.data_ptr(),
        checks.addresses(sources), [x.stride(0) for x in sources], transforms,
        [checks.addresses(items) for items in norms], weights.data_ptr(), relu, down_relu, eps,
        checks.addresses(g_sources), checks.addresses(g_norms.unbind(0)), g_weights.data_ptr(),
        tuple(h.shape), checks.DTYPE_CODES[h.dtype],
        shapes=f"h {tuple(h.shape)}",
    )  # fmt: skip
    return gradients


def _triton(
    sources: Sequence[Tensor],
    transforms: Sequence[int],
    means: Sequence[Tensor],
    variances: Sequence[Tensor],
    gammas: Sequence[Tensor],
    betas: Sequence[Tensor],
    weights: Tensor,
    relu: bool,
    down_relu: bool,
    eps: float,
) -> Tensor:
    # Imported at the first call: triton takes a second to load and exists on Linux alone.
    from pnfs.kernels.triton.scale_mix import launch

    out = _empty(sources, transforms)
    norms = (means, variances, gammas, betas)
    launch(sources, norms, weights, eps, out, relu=relu, **_kinds(transforms, down_relu))
    return out


def _triton_backward(
    g: Tensor,
    h: Tensor,
    sources: Sequence[Tensor],
    transforms: Sequence[int],
    means: Sequence[Tensor],
    variances: Sequence[Tensor],
    gammas: Sequence[Tensor],
    betas: Sequence[Tensor],
    weights: Tensor,
    relu: bool,
    down_relu: bool,
    eps: float,
) -> tuple[list[Tensor], Tensor, Tensor]:
    from pnfs.kernels.triton.scale_mix import launch_backward

    norms = (means, variances, gammas, betas)
    gradients = g_sources, g_norms, g_weights = _empty_backward(
        g, h, sources, transforms, *norms, weights
    )
    launch_backward(
        g, h, sources, norms, weights, eps, g_sources, g_norms.unbind(0), g_weights,
        relu=relu, **_kinds(transforms, down_relu),
    )  # fmt: skip
    return gradients


def _kinds(transforms: Sequence[int], down_relu: bool) -> dict[str, Any]:
    """Per source, for the Triton kernels: its statistics' index, or -1, whether it has a ReLU of
    its own, and whether it is upsampled."""
    slots = iter(range(len(transforms)))
    return {
        "slots": tuple(-1 if code == SAME else next(slots) for code in transforms),
        "relus": tuple(code == DOWN and down_relu for code in transforms),
        "ups": tuple(code == UP for code in transforms),
    }


def _triton_backward_cost(args: Sequence[Any], outputs: Any) -> OpCost:
    from pnfs.kernels.triton.mixed_sum import bytes_of_partials
    from pnfs.kernels.triton.scale_mix import backward_blocks

    g, _, _, transforms = args[:4]
    _, _, blocks = backward_blocks(g.shape, [code == UP for code in transforms])
    return OpCost(launches=2, scratch=2 * bytes_of_partials(outputs[0], blocks))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    sources, ctx.transforms, *norms, weights, ctx.relu, ctx.down_relu, ctx.eps = inputs
    ctx.save_for_backward(output, weights, *sources, *(s for items in norms for s in items))


def _backward(launch: Callable[..., Any], ctx: Any, g: Tensor) -> tuple[Any, ...]:
    h, weights, *saved = ctx.saved_tensors
    sources, saved = saved[: len(ctx.transforms)], saved[len(ctx.transforms) :]
    count = len(saved) // 4
    norms = [saved[i * count : (i + 1) * count] for i in range(4)]
    g_sources, g_norms, g_weights = launch(
        checks.as_stacked(g), h, sources, ctx.transforms, *norms, weights,
        ctx.relu, ctx.down_relu, ctx.eps,
    )  # fmt: skip
    g_lists = [list(items) for items in g_norms]
    return g_sources, None, *g_lists, g_weights, None, None, None


def _can_run_cpp(sources: Sequence[Tensor], *_: Any) -> Verdict:
    return checks.has_dtype("sources[0]", sources[0].dtype, STORAGE_CPU)


def _can_run_triton(sources: Sequence[Tensor], *_: Any) -> Verdict:
    if len(sources) > TRITON_TERMS:
        return checks.no(f"{len(sources)} sources, takes up to {TRITON_TERMS}")
    n, h, w = (sources[0].shape[axis] for axis in (1, 3, 4))
    if n * h * w >= 2**30:  # it counts them in 32 bits
        return checks.no(f"sources[0] has {n * h * w} pixels per part, takes fewer than 2^30")
    return checks.has_dtype("sources[0]", sources[0].dtype, STORAGE)


OP = register_op("scale_mix", scale_mix_reference)
_BACKENDS: tuple[tuple[Backend, Any, Any, Any, Any], ...] = (
    ("cpp", _cpp, _cpp_backward, None, _can_run_cpp),
    ("triton", _triton, _triton_backward, _triton_backward_cost, _can_run_triton),
)
for _backend, _fn, _fn_backward, _cost, _can_run in _BACKENDS:
    OP.register_differentiable(
        _backend, _fn, _empty, _fn_backward, _empty_backward, _can_run,
        setup_context=_setup_context, backward=_backward, cost_backward=_cost,
    )  # fmt: skip
