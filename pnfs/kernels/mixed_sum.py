"""The mixed operation of an edge (Eq. 1): a weighted sum of normalised branches and their input.

Axes: P parts, N batch, C channels, H W, and B branches; maps are stacked, (P, N, C, H, W), and
channels-last inside each part. Branches come as the convolutions and pools made them: their batch
normalisation and activation happen here, on load, and are never stored.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional as F

from pnfs.errors import PnfsError
from pnfs.kernels import checks, native
from pnfs.kernels.checks import STORAGE, STORAGE_CPU, Verdict
from pnfs.kernels.registry import Backend, OpCost, register_op

TRITON_TERMS = 8  # at most, of a sum that one Triton kernel takes


def mixed_sum(
    x: Tensor | None,
    branches: Sequence[Tensor],
    means: Sequence[Tensor],
    variances: Sequence[Tensor],
    weights: Tensor,
    *,
    relu: Sequence[bool],
    eps: float = 1e-5,
) -> Tensor:
    """Eq. 1 from the branches' raw outputs.

        out = weights[:, 0] x + sum_b weights[:, b] act_b((y_b - mean_b) / sqrt(var_b + eps))

    Without `x`, the branches' weights start at column 0. Differentiable in every tensor, the
    statistics included: with batch statistics that were computed from the branches, autograd
    composes this to the gradient of a batch normalisation.

    Args:
        x: (P, N, C, H, W), the term without normalisation (`skip`), or None for none. Any layout;
            channels-last inside each part is taken without a copy, and so are parts that share one
            map (stride 0).
        branches: B tensors as `x`, of one dtype: float32, bfloat16, float16 or float64. Arithmetic
            is in float32, or in float64 for float64.
        means, variances: B tensors (P, C) each, float32 (float64 for float64 maps); variances are
            biased, those of the batch or running ones.
        weights: (P, B + 1) with `x`, (P, B) without; dtype of the statistics. softmax(α), scaled or
            not.
        relu: per branch whether act_b is a ReLU; else it is the identity.
        eps: of the batch normalisations.

    Returns:
        (P, N, C, H, W), channels-last inside, dtype of the maps.

    Raises:
        PnfsError: no term, or a number of tensors, a shape, dtype or device that does not fit.
    """
    maps = [*branches] if x is None else [x, *branches]
    if not maps:
        raise PnfsError("mixed_sum needs x or a branch")
    named = {"means": means, "variances": variances}
    for name, items in {**named, "relu": relu}.items():
        checks.check_count(name, items, len(branches), "branch")
    checks.check_tensor("x or branches[0]", maps[0], (None,) * 5, *STORAGE, torch.float64)
    p, _, c, _, _ = maps[0].shape
    for i, branch in enumerate(branches):
        checks.check_tensor(f"branches[{i}]", branch, tuple(maps[0].shape), maps[0].dtype)
    dtype = torch.promote_types(maps[0].dtype, torch.float32)
    for name, items in named.items():
        for i, item in enumerate(items):
            checks.check_tensor(f"{name}[{i}]", item, (p, c), dtype)
    checks.check_tensor("weights", weights, (p, len(maps)), dtype)
    checks.check_same_device(x=x, **checks.named(branches=branches, **named), weights=weights)
    return cast(
        Tensor,
        OP(
            None if x is None else checks.as_stacked(x),
            [checks.as_stacked(y) for y in branches],
            list(means),
            list(variances),
            weights,
            [bool(flag) for flag in relu],
            float(eps),
        ),
    )


def mixed_sum_reference(
    x: Tensor | None,
    branches: Sequence[Tensor],
    means: Sequence[Tensor],
    variances: Sequence[Tensor],
    weights: Tensor,
    relu: Sequence[bool],
    eps: float,
) -> Tensor:
    """The definition; see `mixed_sum`."""
    columns = [column[:, None, None, None, None] for column in weights.unbind(1)]
    terms = [] if x is None else [columns[0] * x]
    first = len(terms)
    for b, (y, mean, var) in enumerate(zip(branches, means, variances, strict=True)):
        mean, var = mean[:, None, :, None, None], var[:, None, :, None, None]
        z = (y - mean) * (var + eps).rsqrt()
        terms.append(columns[first + b] * (F.relu(z) if relu[b] else z))
    like = branches[0] if x is None else x
    return checks.as_stacked(sum(terms[1:], terms[0]).to(like.dtype))


# The backends take the arguments of the reference. Results: `_forward`'s out; `_backward`'s
# gradients of x (if there is one) and the branches, of means and variances (B, P, C), of weights.


def _empty(x: Tensor | None, branches: Sequence[Tensor], *_: Any) -> Tensor:
    like = branches[0] if x is None else x
    return checks.empty_stacked(like.shape, like)


def _empty_backward(
    g: Tensor,
    x: Tensor | None,
    branches: Sequence[Tensor],
    means: Sequence[Tensor],
    variances: Sequence[Tensor],
    weights: Tensor,
    *_: Any,
) -> tuple[list[Tensor], Tensor, Tensor, Tensor]:
    maps = [*branches] if x is None else [x, *branches]
    shape = (len(branches), g.shape[0], g.shape[2])
    return (
        [checks.empty_stacked(y.shape, y) for y in maps],
        torch.empty(shape, dtype=weights.dtype, device=weights.device),
        torch.empty(shape, dtype=weights.dtype, device=weights.device),
        torch.empty(weights.shape, dtype=weights.dtype, device=weights.device),
    )


def _cpp(
    x: Tensor | None,
    branches: Sequence[Tensor],
    means: Sequence[Tensor],
    variances: Sequence[Tensor],
    weights: Tensor,
    relu: Sequence[bool],
    eps: float,
) -> Tensor:
    maps = [*branches] if x is None else [x, *branches]
    out = _empty(x, branches)
    stats, weights = [checks.contiguous(*s) for s in (means, variances)], weights.contiguous()
    native.call(
        "_cpu", "mixed_sum",
        checks.addresses(maps), [y.stride(0) for y in maps],
        *map(checks.addresses, stats), weights.data_ptr(),
        relu, eps, out.data_ptr(), _size(out), checks.DTYPE_CODES[out.dtype],
        shapes=f"maps {tuple(out.shape)}",
    )  # fmt: skip
    return out


def _cpp_backward(
    g: Tensor,
    x: Tensor | None,
    branches: Sequence[Tensor],
    means: Sequence[Tensor],
    variances: Sequence[Tensor],
    weights: Tensor,
    relu: Sequence[bool],
    eps: float,
) -> tuple[list[Tensor], Tensor, Tensor, Tensor]:
    maps = [*branches] if x is None else [x, *branches]
    gradients = _empty_backward(g, x, branches, means, variances, weights)
    g_maps, g_means, g_variances, g_weights = gradients
    stats, weights = [checks.contiguous(*s) for s in (means, variances)], weights.contiguous()
    native.call(
        "_cpu", "mixed_sum_backward",
        g.data_ptr(), g.stride(0), checks.addresses(maps), [y.stride(0) for y in maps],
        *map(checks.addresses, stats), weights.data_ptr(), relu, eps,
        checks.addresses(g_maps), g_means.data_ptr(), g_variances.data_ptr(), g_weights.data_ptr(),
        _size(g), checks.DTYPE_CODES[g.dtype],
        shapes=f"maps {tuple(g.shape)}",
    )  # fmt: skip
    return gradients


def _triton(
    x: Tensor | None,
    branches: Sequence[Tensor],
    means: Sequence[Tensor],
    variances: Sequence[Tensor],
    weights: Tensor,
    relu: Sequence[bool],
    eps: float,
) -> Tensor:
    # Imported at the first call: triton takes a second to load and exists on Linux alone.
    from pnfs.kernels.triton.mixed_sum import launch

    maps = [*branches] if x is None else [x, *branches]
    out = _empty(x, branches)
    launch(maps, (means, variances), weights, eps, out, **_kinds(x, relu))
    return out


def _triton_backward(
    g: Tensor,
    x: Tensor | None,
    branches: Sequence[Tensor],
    means: Sequence[Tensor],
    variances: Sequence[Tensor],
    weights: Tensor,
    relu: Sequence[bool],
    eps: float,
) -> tuple[list[Tensor], Tensor, Tensor, Tensor]:
    from pnfs.kernels.triton.mixed_sum import launch_backward

    maps = [*branches] if x is None else [x, *branches]
    gradients = _empty_backward(g, x, branches, means, variances, weights)
    g_maps, g_means, g_variances, g_weights = gradients
    launch_backward(
        g, maps, (means, variances), weights, eps, g_maps, (g_means, g_variances), g_weights,
        **_kinds(x, relu),
    )  # fmt: skip
    return gradients


def _kinds(x: Tensor | None, relu: Sequence[bool]) -> dict[str, Any]:
    """Per term, for the Triton kernels: its statistics' index, or -1, and whether it has a ReLU."""
    plain = 0 if x is None else 1
    return {
        "slots": (*(-1,) * plain, *range(len(relu))),
        "relus": (*(False,) * plain, *map(bool, relu)),
    }


def _triton_backward_cost(args: Sequence[Any], outputs: Any) -> OpCost:
    from pnfs.kernels.triton.mixed_sum import backward_blocks, bytes_of_partials

    p, pixels, c = _size(args[0])
    _, _, blocks = backward_blocks(p, pixels, c, len(outputs[0]))
    return OpCost(launches=2, scratch=2 * bytes_of_partials(outputs[0], blocks))


def _size(x: Tensor) -> tuple[int, int, int]:
    p, n, c, h, w = x.shape
    return p, n * h * w, c


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, branches, means, variances, weights, ctx.relu, ctx.eps = inputs
    ctx.has_x = x is not None
    plain = [] if x is None else [x]
    ctx.save_for_backward(*plain, *branches, *means, *variances, weights)


def _backward(launch: Callable[..., Any], ctx: Any, g: Tensor) -> tuple[Any, ...]:
    *saved, weights = ctx.saved_tensors
    x = saved.pop(0) if ctx.has_x else None
    count = len(saved) // 3
    branches, means, variances = saved[:count], saved[count : 2 * count], saved[2 * count :]
    g_maps, g_means, g_variances, g_weights = launch(
        checks.as_stacked(g), x, branches, means, variances, weights, ctx.relu, ctx.eps
    )
    g_x = g_maps.pop(0) if ctx.has_x else None
    return g_x, g_maps, list(g_means), list(g_variances), g_weights, None, None


def _can_run_cpp(x: Tensor | None, branches: Sequence[Tensor], *_: Any) -> Verdict:
    return checks.has_dtype("x", (branches[0] if x is None else x).dtype, STORAGE_CPU)


def _can_run_triton(x: Tensor | None, branches: Sequence[Tensor], *_: Any) -> Verdict:
    maps = [*branches] if x is None else [x, *branches]
    if len(maps) > TRITON_TERMS:
        return checks.no(f"{len(maps)} terms, takes up to {TRITON_TERMS}")
    return checks.has_dtype("x", maps[0].dtype, STORAGE)


OP = register_op("mixed_sum", mixed_sum_reference)
_BACKENDS: tuple[tuple[Backend, Any, Any, Any, Any], ...] = (
    ("cpp", _cpp, _cpp_backward, None, _can_run_cpp),
    ("triton", _triton, _triton_backward, _triton_backward_cost, _can_run_triton),
)
for _backend, _fn, _fn_backward, _cost, _can_run in _BACKENDS:
    OP.register_differentiable(
        _backend, _fn, _empty, _fn_backward, _empty_backward, _can_run,
        setup_context=_setup_context, backward=_backward, cost_backward=_cost,
    )  # fmt: skip
