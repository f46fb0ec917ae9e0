"""oks_nms against the reference: one image, and an evaluation's worth of images in one call."""

from __future__ import annotations

from typing import Any

import harness
import numpy as np
import pytest
import torch
from torch import Tensor

from pnfs.kernels import oks_nms
from pnfs.skeleton import COCO


def detections(images: int, per_image: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Keypoints, scores, areas and image numbers: three detections of every person, one of them
    a duplicate."""
    rng = np.random.default_rng(0)
    n = images * per_image
    people = rng.uniform(0, 500, (n // 3 + 1, 17, 2))
    keypoints = np.repeat(people, 3, axis=0)[:n] + rng.normal(0, 1, (n, 17, 2)) * rng.choice(
        [1, 40], (n, 1, 1)
    )
    return (
        torch.from_numpy(keypoints).float(),
        torch.from_numpy(rng.random(n)).float(),
        torch.from_numpy(rng.uniform(5e3, 9e4, n)).float(),
        torch.arange(images).repeat_interleave(per_image),
    )


@pytest.mark.parametrize(("images", "per_image"), [(1, 20), (1, 400), (500, 21)])
@pytest.mark.parametrize(("backend", "device"), harness.backends("oks_nms"))
def bench_oks_nms(measure: Any, backend: str, device: str, images: int, per_image: int) -> None:
    keypoints, scores, areas, groups = (t.to(device) for t in detections(images, per_image))
    sigmas = torch.tensor(COCO.oks_sigmas, device=device)

    def run() -> Tensor:
        return oks_nms(keypoints, scores, areas, sigmas, 0.9, groups=groups if images > 1 else None)

    measure(
        harness.Case(
            op="oks_nms",
            name=f"{images} images of {per_image}",
            backend=backend,
            device=device,
            call=harness.on_backend(backend, run),
            want=harness.on_backend("torch", run)(),
            tolerance=0.0,
            bytes=sum(t.nbytes for t in (keypoints, scores, areas, groups)),
            against={"torch": harness.on_backend("torch", run)},
        )
    )
