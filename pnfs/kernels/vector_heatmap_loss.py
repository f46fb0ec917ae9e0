"""The training loss straight from keypoint vectors (Eq. 6), its gradient in the same pass.

Score maps and Gaussian targets never exist in memory: a kernel reads each vector once, compares its
squashed length with the Gaussian at that cell, and writes the gradient at once.
Axes as in `pnfs.kernels.vector_heatmap`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor

from pnfs.errors import PnfsError
from pnfs.kernels import checks, native
from pnfs.kernels.registry import NATIVE_DEVICES, Backend, OpCost, register_op, torch_op
from pnfs.kernels.vector_heatmap import (
    HALVES,
    addresses_and_strides,
    can_run_cpp,
    can_run_triton,
    check_vectors,
    empty_gradients,
    lined_up,
    shape_of,
    vector_heatmap_reference,
)


def vector_heatmap_loss(
    vectors: Sequence[Tensor],
    parts: Sequence[Sequence[int]],
    joints: Tensor,
    weights: Tensor,
    *,
    sigma: float,
    stride: float = 4,
) -> Tensor:
    """Mean over images and all K keypoints of ½ · w · mean over cells of (p - g)².

    p is the score map of `vector_heatmap`, g the Gaussian of `render_targets`. A keypoint of weight
    0 counts in the mean and nowhere else: whatever its joint and its vectors hold, NaN included, it
    adds 0 to the loss, and its vectors get gradient 0. Differentiable in `vectors`. An empty batch
    has loss 0.

    Args:
        vectors: per part (N, k, d, h, w), before the squash, float32, bfloat16 or float16 (float64:
            by the reference backend).
        parts: per part the keypoint indices of its k maps; together they hold all of 0..K-1.
        joints: (N, K, 2) x, y in network-input pixels; taken as float32.
        weights: (N, K), 0 masks a keypoint; taken as float32.
        sigma: σ of the Gaussians in cells.
        stride: input pixels per cell.

    Returns:
        Scalar, float32 (float64 for float64 vectors).

    Raises:
        PnfsError: a shape, dtype or device that does not fit, σ or stride not positive.
    """
    num_keypoints = joints.shape[1] if joints.dim() == 3 else 0
    flat, keypoints = check_vectors(vectors, parts, num_keypoints)
    n = flat[0].shape[0]
    checks.check_tensor("joints", joints, (n, num_keypoints, 2))
    checks.check_tensor("weights", weights, (n, num_keypoints))
    checks.check_same_device(vectors=flat[0], joints=joints, weights=weights)
    if not (sigma > 0 and stride > 0):
        raise PnfsError(f"sigma and stride must be positive, not {sigma} and {stride}")
    joints, weights = joints.detach().float(), weights.detach().float()
    loss: Tensor = OP(flat, joints, weights, keypoints, float(sigma), float(stride))
    return loss


def render_targets(
    joints: Tensor,
    size: tuple[int, int],
    *,
    sigma: float,
    stride: float = 4,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Gaussian score maps with peak 1 at each joint's cell: exp(-r² / 2σ²).

    The cell is min(int(x / stride + ½), size - 1) on each axis, as in the published code; the
    formula itself is rendered (the published code blurs a delta, which is wrong near the border).

    Args:
        joints: (N, K, 2) x, y in network-input pixels.
        size: (h, w) of the score maps.
        sigma: σ in cells.
        stride: input pixels per cell.
        dtype: of the result; the joints' by default.

    Returns:
        (N, K, h, w).
    """
    height, width = size
    dtype = dtype or joints.dtype
    x, y = (joints / stride + 0.5).trunc().to(dtype).unbind(-1)
    x, y = x.clamp(max=width - 1)[..., None], y.clamp(max=height - 1)[..., None]
    xs = torch.arange(width, dtype=dtype, device=joints.device)
    ys = torch.arange(height, dtype=dtype, device=joints.device)
    dx2 = (xs - x).square()
    dy2 = (ys - y).square()
    scale = -0.5 / (sigma * sigma)
    return torch.exp(scale * dy2)[..., :, None] * torch.exp(scale * dx2)[..., None, :]


def heatmap_loss(scores: Tensor, target: Tensor, weights: Tensor) -> Tensor:
    """Mean over images and all K keypoints of ½ · w · mean over cells of (score - target)² (Eq. 6).

    Args:
        scores: (N, K, h, w) predicted.
        target: (N, K, h, w).
        weights: (N, K), 0 masks a keypoint, which stays in the denominator.

    Returns:
        Scalar in float32 (float64 for float64 input); 0 for an empty batch.
    """
    wide = scores.float() if scores.dtype in HALVES else scores
    per_joint = 0.5 * weights * (wide - target).square().mean(dim=(2, 3))
    return per_joint.where(weights != 0, 0).sum() / max(1, weights.numel())


def vector_heatmap_loss_reference(
    vectors: list[Tensor],
    joints: Tensor,
    weights: Tensor,
    keypoints: list[int],
    sigma: float,
    stride: float,
) -> Tensor:
    """The definition; see `vector_heatmap_loss`. Joints and weights are float32."""
    present = weights != 0
    wide = [v.float() if v.dtype in HALVES else v for v in vectors]
    counts = [v.shape[1] for v in vectors]
    visible = present[:, keypoints].split(counts, dim=1)  # per part (N, k)
    masked = [v.where(see[:, :, None, None, None], 0) for v, see in zip(wide, visible, strict=True)]
    scores = vector_heatmap_reference(masked, keypoints, weights.shape[1])
    joints = joints.where(present[..., None], 0)
    size = (scores.shape[2], scores.shape[3])
    target = render_targets(joints, size, sigma=sigma, stride=stride, dtype=scores.dtype)
    return heatmap_loss(scores, target, weights)


# A backend's forward op returns the loss and, if asked, its gradient as if what arrives at the loss
# were 1, as it mostly is; the backward pass then has nothing to read or write. Its gradient op
# computes the gradient alone. Both have the reference's arguments, and one more.


def _outputs(
    vectors: list[Tensor], joints: Tensor, with_gradients: bool
) -> tuple[Tensor, list[Tensor]]:
    loss = torch.empty((), dtype=torch.float32, device=joints.device)
    return loss, empty_gradients(*lined_up(vectors)) if with_gradients else []


def _forward(
    vectors: list[Tensor],
    joints: Tensor,
    weights: Tensor,
    keypoints: list[int],
    sigma: float,
    stride: float,
    with_gradients: bool,
) -> tuple[Tensor, list[Tensor]]:
    """The signature of the forward ops, and what they allocate."""
    return _outputs(vectors, joints, with_gradients)


def _gradient(
    vectors: list[Tensor],
    joints: Tensor,
    weights: Tensor,
    keypoints: list[int],
    sigma: float,
    stride: float,
    grad: Tensor,
) -> list[Tensor]:
    """The signature of the gradient ops, and what they allocate. `grad` is that of the loss."""
    return _outputs(vectors, joints, True)[1]


def _cpp(
    vectors: list[Tensor],
    joints: Tensor,
    weights: Tensor,
    keypoints: list[int],
    sigma: float,
    stride: float,
    with_gradients: bool,
    gain: float = 1.0,
) -> tuple[Tensor, list[Tensor]]:
    vectors, _ = lined_up(vectors)
    loss, gradients = _outputs(vectors, joints, with_gradients)
    joints, weights = joints.contiguous(), weights.contiguous()
    size = shape_of(vectors, weights.shape[1])
    native.call(
        "_cpu", "vector_heatmap_loss",
        *addresses_and_strides(vectors), *addresses_and_strides(gradients),
        [v.shape[1] for v in vectors], keypoints, joints.data_ptr(), weights.data_ptr(),
        loss.data_ptr(), size, sigma, stride, gain, checks.DTYPE_CODES[vectors[0].dtype],
        shapes=f"N, K, d, h, w = {size}",
    )  # fmt: skip
    return loss, gradients


def _cpp_gradient(*args: Any) -> list[Tensor]:
    vectors, joints, weights, keypoints, sigma, stride, grad = args
    return _cpp(vectors, joints, weights, keypoints, sigma, stride, True, float(grad))[1]


def _triton(
    vectors: list[Tensor],
    joints: Tensor,
    weights: Tensor,
    keypoints: list[int],
    sigma: float,
    stride: float,
    with_gradients: bool,
) -> tuple[Tensor, list[Tensor]]:
    # Imported at the first call: triton takes a second to load and exists on Linux alone.
    from pnfs.kernels.triton.vector_heatmap_loss import launch

    _, gradients = _outputs(vectors, joints, with_gradients)
    joints, weights = joints.contiguous(), weights.contiguous()
    return launch(vectors, joints, weights, keypoints, sigma, stride, gradients), gradients


def _triton_gradient(*args: Any) -> list[Tensor]:
    from pnfs.kernels.triton.vector_heatmap_loss import launch

    vectors, joints, weights, keypoints, sigma, stride, grad = args
    gradients = _gradient(*args)
    joints, weights = joints.contiguous(), weights.contiguous()
    launch(vectors, joints, weights, keypoints, sigma, stride, gradients, grad)
    return gradients


def _scale_in_place(gradients: list[Tensor], grad: Tensor) -> None:
    """Multiply by the gradient that arrived at the loss, unless it is 1."""
    if grad.device.type == "cpu":
        if float(grad) != 1:
            torch._foreach_mul_(gradients, float(grad))
    else:  # asking here would wait for the device: a kernel finds out
        from pnfs.kernels.triton.vector_heatmap_loss import launch_scale

        launch_scale(gradients, grad)


def _scaled(gradients: list[Tensor], grad: Tensor) -> list[Tensor]:
    return [(gradient * grad).to(gradient.dtype) for gradient in gradients]


# For torch.compile, which does not let a backward pass change what the forward pass has left, and
# for counting: it costs nothing, as _scale_in_place mostly does.
_scaled_op = torch_op(
    "vector_heatmap_loss_scaled",
    _scaled,
    lambda gradients, grad: [torch.empty_like(gradient) for gradient in gradients],
    ("cpu", "cuda"),
    cost=lambda args, outputs: OpCost(launches=0, bytes=0),
)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, list[Tensor]]) -> None:
    vectors, joints, weights, *ctx.options, _ = inputs
    ctx.save_for_backward(joints, weights, *vectors)
    ctx.gradients = output[1]
    ctx.mark_non_differentiable(*ctx.gradients)
    ctx.set_materialize_grads(False)


OP = register_op("vector_heatmap_loss", vector_heatmap_loss_reference)


def _register(backend: Backend, fn: Any, fn_gradient: Any, launches: int, can_run: Any) -> None:
    devices = NATIVE_DEVICES[backend]
    name = f"vector_heatmap_loss_{backend}"
    gradient_op = torch_op(f"{name}_gradient", fn_gradient, _gradient, devices, like=_gradient)

    def backward(ctx: Any, grad: Tensor | None, _: Any) -> tuple[Any, ...]:
        joints, weights, *vectors = ctx.saved_tensors
        # Handed out once: over a retained graph they are computed anew.
        gradients, ctx.gradients = ctx.gradients, []
        if grad is None:
            gradients = [None] * len(vectors)
        elif gradients and type(grad) is Tensor:
            _scale_in_place(gradients, grad)
        elif gradients:  # traced: a FakeTensor or the like
            gradients = _scaled_op(gradients, grad)
        else:
            gradients = gradient_op(vectors, joints, weights, *ctx.options, grad)
        return gradients, *(None,) * 6

    def cost(args: Sequence[Any], outputs: tuple[Tensor, list[Tensor]]) -> OpCost:
        vectors, joints, weights = args[:3]
        loss, gradients = outputs
        touched = (*vectors, joints, weights, loss, *gradients)
        return OpCost(launches, sum(t.numel() * t.element_size() for t in touched))

    forward_op = torch_op(
        name, fn, _forward, devices,
        like=_forward, setup_context=_setup_context, backward=backward, cost=cost,
    )  # fmt: skip

    def run(vectors: list[Tensor], *args: Any) -> Tensor:
        # Unit gradients would vanish in float16; scaled by the gradient that arrives they do not.
        keep = vectors[0].dtype != torch.float16
        wanted = torch.is_grad_enabled() and any(v.requires_grad for v in vectors)
        return cast(Tensor, forward_op(vectors, *args, keep and wanted)[0])

    OP.register(backend, run, can_run)


_register("cpp", _cpp, _cpp_gradient, 1, can_run_cpp)
_register("triton", _triton, _triton_gradient, 2, can_run_triton)
