"""crop_normalize against the reference, and on the CPU against cv2.warpAffine and numpy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import cv2
import harness
import numpy as np
import pytest
import torch
from torch import Tensor

from pnfs.kernels import crop_normalize

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SIZE = (256, 192)
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}


def people(count: int) -> tuple[list[np.ndarray], np.ndarray]:
    """Photographs' size of smooth noise, and the matrices of rotated, scaled person boxes."""
    rng = np.random.default_rng(0)
    images, matrices = [], []
    for _ in range(count):
        noise = rng.integers(0, 256, (480, 640, 3), dtype=np.uint8)
        images.append(cv2.GaussianBlur(noise, (0, 0), 2))
        angle, scale = rng.normal(0, 20), rng.uniform(0.8, 1.8)
        turn = cv2.getRotationMatrix2D((96, 128), angle, scale)
        turn[:, 2] += (320 - 96, 240 - 128)
        matrices.append(turn)
    return images, np.array(matrices, dtype=np.float32)


def with_cv2(images: list[np.ndarray], matrices: np.ndarray) -> Callable[[], list[Tensor]]:
    """The customary way, as fast as numpy allows: warp, reverse channels, one multiply-add."""
    scale = (1 / (255 * np.array(STD))).astype(np.float32)
    bias = (-np.array(MEAN) / np.array(STD)).astype(np.float32)
    flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP

    def run() -> list[Tensor]:
        out = []
        for image, matrix in zip(images, matrices, strict=True):
            warped = cv2.warpAffine(image, matrix, SIZE[::-1], flags=flags)
            values = cv2.cvtColor(warped, cv2.COLOR_BGR2RGB) * scale
            values += bias
            out.append(torch.from_numpy(values))
        return out

    return run


@pytest.mark.parametrize("dtype", TOLERANCE, ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("count", [1, 24])
@pytest.mark.parametrize(("backend", "device"), harness.backends("crop_normalize"))
def bench_crop_normalize(
    measure: Any, backend: str, device: str, count: int, dtype: torch.dtype
) -> None:
    images, matrices = people(count)
    cv2.setNumThreads(torch.get_num_threads())
    args = [
        torch.from_numpy(np.concatenate([image.reshape(-1) for image in images])),
        torch.arange(count) * images[0].size,
        torch.tensor([image.shape[:2] for image in images], dtype=torch.int32),
        torch.from_numpy(matrices),
        torch.zeros(count, dtype=torch.bool),
    ]

    def run(where: str, out: torch.dtype) -> Callable[[], Tensor]:
        moved = [tensor.to(where) for tensor in args]
        return lambda: crop_normalize(*moved, size=SIZE, mean=MEAN, std=STD, dtype=out)

    against = {"torch": harness.on_backend("torch", run(device, dtype))}
    if device == "cpu":
        against["cv2"] = with_cv2(images, matrices)
    output_bytes = count * 3 * SIZE[0] * SIZE[1] * dtype.itemsize
    # The source pixels that the boxes cover, of which an output pixel reads four.
    area = np.abs(np.linalg.det(matrices[:, :, :2])).clip(max=4).sum() * SIZE[0] * SIZE[1]
    measure(
        harness.Case(
            op="crop_normalize",
            name=f"{count} crops to {SIZE[0]}x{SIZE[1]} {str(dtype)[6:]}",
            backend=backend,
            device=device,
            call=harness.on_backend(backend, run(device, dtype)),
            want=harness.on_backend("torch", run("cpu", torch.float64))(),
            tolerance=TOLERANCE[dtype],
            bytes=output_bytes + int(area * 3),
            against=against,
            approximate=("cv2",),  # its weights are multiples of 1/32
        )
    )
