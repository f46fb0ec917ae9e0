"""decode_heatmaps against the reference, and against torch without its care for NaN."""

from __future__ import annotations

from typing import Any

import harness
import pytest
import torch
from torch import Tensor

from pnfs.kernels import decode_heatmaps
from pnfs.skeleton import COCO

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SHAPE = (17, 64, 48)


def lean_torch(
    heatmaps: Tensor, matrices: Tensor, flipped: Tensor | None, permutation: Tensor
) -> tuple[Tensor, Tensor]:
    """The customary vectorised decode with the shifted flip, in float32."""
    maps = heatmaps.float()
    if flipped is not None:
        mirrored = flipped.flip(3)[:, permutation]
        mirrored[..., 1:] = mirrored[..., :-1].clone()
        maps = (maps + mirrored) * 0.5
    n, k, h, w = maps.shape
    flat = maps.reshape(n, k, h * w)
    score, index = flat.max(2)
    index = index * (score > 0)
    px, py = index % w, index // w
    inside = (px > 1) & (px < w - 1) & (py > 1) & (py < h - 1)
    steps = torch.tensor([1, -1, w, -w], device=maps.device)
    near = flat.gather(2, (index[..., None] + steps).clamp(0, h * w - 1))
    offset = 0.25 * torch.sign(near[..., 0::2] - near[..., 1::2]) * inside[..., None]
    cell = torch.stack((px, py), dim=2) + offset
    xy = cell @ matrices[:, :, :2].mT + matrices[:, None, :, 2]
    return xy, score


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("layout", ["contiguous", "channels-last"])
@pytest.mark.parametrize("flip", [False, True], ids=["plain", "flip"])
@pytest.mark.parametrize("count", [1, 24, 128])
@pytest.mark.parametrize(("backend", "device"), harness.backends("decode_heatmaps"))
def bench_decode_heatmaps(
    measure: Any,
    backend: str,
    device: str,
    count: int,
    flip: bool,
    layout: str,
    dtype: torch.dtype,
) -> None:
    if dtype != torch.float32 and count != 24:
        pytest.skip("half precision is timed at one batch size")
    format_ = torch.channels_last if layout == "channels-last" else torch.contiguous_format
    # Multiples of 1/128: the averages are exact in every dtype, so that no maximum is in doubt.
    maps = [
        (torch.randint(-127, 128, (count, *SHAPE)) / 128)
        .to(device=device, dtype=dtype)
        .contiguous(memory_format=format_)
        for _ in range(1 + flip)
    ]
    flipped = maps[1] if flip else None
    matrices = torch.randn(count, 2, 3, device=device)
    permutation = torch.tensor(COCO.flip_permutation, device=device)

    def run(heatmaps: Tensor, other: Tensor | None) -> tuple[Tensor, Tensor]:
        return decode_heatmaps(
            heatmaps, matrices, flipped=other, permutation=permutation, shift=True
        )

    doubled = None if flipped is None else flipped.double()
    want = harness.on_backend("torch", lambda: run(maps[0].double(), doubled))()
    measure(
        harness.Case(
            op="decode_heatmaps",
            name=f"{count}x{'x'.join(map(str, SHAPE))} {str(dtype)[6:]} {layout}"
            + (" flip" if flip else ""),
            backend=backend,
            device=device,
            call=harness.on_backend(backend, lambda: run(maps[0], flipped)),
            want=want,
            tolerance=2e-6,
            bytes=sum(tensor.nbytes for tensor in maps) + count * SHAPE[0] * 12,
            against={
                "torch": harness.on_backend("torch", lambda: run(maps[0], flipped)),
                "lean torch": lambda: lean_torch(maps[0], matrices, flipped, permutation),
            },
        )
    )
