"""Images to network input: affine crop, flip, channel order and normalisation in one pass.

Axes: N crops, H and W the output's rows and columns. The warp is that of `cv2.warpAffine` with
INTER_LINEAR, WARP_INVERSE_MAP and a zero border, without the rounding to whole grey levels and to
1/32 pixel that cv2 does.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, cast

import torch
from torch import Tensor

from pnfs.errors import PnfsError
from pnfs.kernels import checks, native
from pnfs.kernels.checks import STORAGE, Verdict
from pnfs.kernels.registry import register_op


def crop_normalize(
    pixels: Tensor,
    offsets: Tensor,
    sizes: Tensor,
    matrices: Tensor,
    flips: Tensor,
    *,
    size: tuple[int, int],
    mean: Sequence[float],
    std: Sequence[float],
    order: Literal["rgb", "bgr"] = "rgb",
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Warp, flip and normalise a batch of uint8 crops of any sizes.

    With g the bilinear grey level 0..255 of the crop at the mapped position, a tap outside the crop
    counting 0, output channel c is `(g / 255 - mean[c]) / std[c]`. Nothing is differentiable.

    Args:
        pixels: (B,) uint8, the bytes of all crops back to back; a crop is height × width × 3,
            row-major, channels in the order in which OpenCV decodes (BGR).
        offsets: (N,) int64, first byte of each crop.
        sizes: (N, 2) int32, (height, width) of each crop in pixels.
        matrices: (N, 2, 3) float32, output pixel (x, y, 1) -> crop pixel (x, y). Integer
            coordinates are pixel centres.
        flips: (N,) bool, mirror the output: column x shows what column W-1-x would.
        size: (H, W) of the output in pixels.
        mean, std: three numbers in the order of the output's channels, grey levels in 0..1.
        order: "rgb": output channel c is source channel 2-c; "bgr": source channel c.
        dtype: float32, bfloat16 or float16 (float64: by the reference backend).

    Returns:
        (N, 3, H, W) of `dtype` in channels-last memory format.

    Raises:
        PnfsError: a shape, dtype or device that does not fit, a std of 0; on the CPU also a crop
            that does not lie within `pixels`. On a GPU, where looking would mean to wait, such a
            crop gives NaN.
    """
    checks.check_tensor("pixels", pixels, (None,), torch.uint8)
    checks.check_tensor("offsets", offsets, (None,), torch.int64)
    n = offsets.shape[0]
    checks.check_tensor("sizes", sizes, (n, 2), torch.int32)
    checks.check_tensor("matrices", matrices, (n, 2, 3), torch.float32)
    checks.check_tensor("flips", flips, (n,), torch.bool)
    checks.check_same_device(
        pixels=pixels, offsets=offsets, sizes=sizes, matrices=matrices, flips=flips
    )
    height, width = size
    if height < 1 or width < 1:
        raise PnfsError(f"size must be a positive (height, width), not {tuple(size)}")
    if len(mean) != 3 or len(std) != 3 or not all(std):
        raise PnfsError(f"mean and std must be 3 numbers, std not 0: got {mean} and {std}")
    if order not in ("rgb", "bgr"):
        raise PnfsError(f"order must be 'rgb' or 'bgr', not {order!r}")
    if dtype not in (*STORAGE, torch.float64):
        raise PnfsError(f"dtype must be a float32, bfloat16 or float16, not {dtype}")
    args = (pixels, offsets, sizes, matrices, flips, height, width, list(mean), list(std))
    return cast(Tensor, OP(*args, order == "rgb", dtype))


def crop_normalize_reference(
    pixels: Tensor,
    offsets: Tensor,
    sizes: Tensor,
    matrices: Tensor,
    flips: Tensor,
    height: int,
    width: int,
    mean: Sequence[float],
    std: Sequence[float],
    rgb: bool,
    dtype: torch.dtype,
) -> Tensor:
    """The definition; see `crop_normalize`.

    With (sx, sy) = matrix · (x, y, 1), x0 = floor(sx), y0 = floor(sy), fx = sx - x0, fy = sy - y0:

        g = (1-fy) ((1-fx) p[y0, x0]   + fx p[y0, x0+1])
          +    fy  ((1-fx) p[y0+1, x0] + fx p[y0+1, x0+1])

    Positions are computed in float64, grey levels in float32 (float64 for a float64 result).
    """
    device = pixels.device
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    crop_height, crop_width = (side.reshape(-1, 1, 1).long() for side in sizes.unbind(1))
    end = offsets + sizes.long().prod(1) * 3
    fits = (offsets >= 0) & (sizes > 0).all(1) & (end <= pixels.shape[0])
    if device.type == "cpu" and not torch.compiler.is_compiling() and not bool(fits.all()):
        raise PnfsError(
            f"crop_normalize: crop {int(fits.long().argmin())} does not lie in the "
            f"{pixels.shape[0]} bytes of pixels; check offsets and sizes"
        )
    fits = fits.reshape(-1, 1, 1)
    start = offsets.reshape(-1, 1, 1)
    y = torch.arange(height, dtype=torch.float64, device=device).reshape(1, -1, 1)
    x = torch.arange(width, dtype=torch.float64, device=device).reshape(1, 1, -1)
    x = torch.where(flips.reshape(-1, 1, 1), width - 1 - x, x)
    m = matrices.double().reshape(-1, 2, 3, 1, 1)
    sx = m[:, 0, 0] * x + m[:, 0, 1] * y + m[:, 0, 2]
    sy = m[:, 1, 0] * x + m[:, 1, 1] * y + m[:, 1, 2]
    reads = (sx > -1) & (sy > -1) & (sx < crop_width) & (sy < crop_height)
    sx, sy = sx.where(reads, -2.0), sy.where(reads, -2.0)  # far, infinite and NaN: nothing is read
    x0, y0 = sx.floor(), sy.floor()
    fx, fy = sx - x0, sy - y0

    grey = torch.zeros((*sx.shape, 3), dtype=compute, device=device)
    channel = torch.arange(3, device=device)
    for row in (0, 1):
        for column in (0, 1):
            ty, tx = (y0 + row).long(), (x0 + column).long()
            inside = (ty >= 0) & (ty < crop_height) & (tx >= 0) & (tx < crop_width) & fits
            weight = (fy if row else 1 - fy) * (fx if column else 1 - fx) * inside
            address = ((start + (ty * crop_width + tx) * 3) * inside)[..., None] + channel
            tap = pixels[address] if pixels.numel() else address
            grey = grey + weight.to(compute)[..., None] * tap.to(compute)

    grey = grey.where(fits[..., None], float("nan"))
    if rgb:
        grey = grey.flip(3)
    scale, bias = (torch.tensor(v, dtype=compute, device=device) for v in _affine(mean, std))
    return (grey * scale + bias).to(dtype).permute(0, 3, 1, 2)


def _affine(mean: Sequence[float], std: Sequence[float]) -> tuple[list[float], list[float]]:
    """scale and bias with `grey·scale + bias = (grey/255 - mean) / std`, per output channel."""
    return [1 / (255 * s) for s in std], [-m / s for m, s in zip(mean, std, strict=True)]


# The backends take the arguments of the reference.


def _empty(*args: Any) -> Tensor:
    pixels, offsets, height, width, dtype = args[0], args[1], args[5], args[6], args[10]
    shape = (offsets.shape[0], height, width, 3)
    return torch.empty(shape, dtype=dtype, device=pixels.device).permute(0, 3, 1, 2)


def _run(module: str, args: Sequence[Any], *stream: int) -> Tensor:
    tensors, (height, width, mean, std, rgb, dtype) = args[:5], args[5:]
    inputs: list[Tensor] = [tensor.contiguous() for tensor in tensors]
    addresses = [tensor.data_ptr() for tensor in inputs]
    out = _empty(*args)
    n, size = out.shape[0], inputs[0].shape[0]
    native.call(
        module, "crop_normalize",
        addresses[0], size, *addresses[1:], n, height, width, *_affine(mean, std), rgb,
        checks.DTYPE_CODES[dtype], out.data_ptr(), *stream,
        shapes=f"{n} crops in {size} bytes to {tuple(out.shape)}",
    )  # fmt: skip
    return out


def _cpp(*args: Any) -> Tensor:
    return _run("_cpu", args)


def _cuda(*args: Any) -> Tensor:
    with native.cuda_stream(args[0].device) as stream:
        return _run("_cuda", args, stream)


def _can_run(*args: Any) -> Verdict:
    return checks.has_dtype("the result", args[-1], STORAGE)


OP = register_op("crop_normalize", crop_normalize_reference)
OP.register_native("cpp", _cpp, _empty, _can_run)
OP.register_native("cuda", _cuda, _empty, _can_run)
