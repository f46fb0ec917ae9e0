"""What travels from the loader to the model: raw pixels, affines and joints, never a heatmap."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from pnfs import kernels
from pnfs.config import EvalProfile
from pnfs.data.transforms import MEAN, STD


@dataclass(frozen=True, eq=False)
class Sample:
    """One crop, before batching; the fields are those of `Batch` without the leading axis."""

    crop: np.ndarray  # uint8 (h, w, 3), a view of the decoded image
    matrix: np.ndarray
    flip: bool
    joints: np.ndarray
    weights: np.ndarray
    to_image: np.ndarray
    index: int


@dataclass(frozen=True, eq=False)
class Batch:
    """N samples with K joints each.

    Attributes:
        pixels: uint8 (B,), the crops' bytes back to back, blue-green-red; a crop is the part of the
            image that its affine touches.
        offsets: int64 (N,), first byte of each crop. sizes: int32 (N, 2), height and width.
        matrices: float32 (N, 2, 3), network-input pixel -> crop pixel, before mirroring.
        flips: bool (N,), whether the input is mirrored after the warp.
        joints: float32 (N, K, 2), x, y in network-input pixels, mirroring included; 0 where the
            weight is 0.
        weights: float32 (N, K), 1 for a labelled joint inside the input, else 0.
        to_image: float64 (N, 2, 3), network-input pixel (mirroring included) -> image pixel.
        indices: int64 (N,), positions in the dataset's people.
        skipped: broken samples that were left out.
        problems: one line for each of them.
        notices: lines for the user about how the batch was made.
    """

    pixels: Tensor
    offsets: Tensor
    sizes: Tensor
    matrices: Tensor
    flips: Tensor
    joints: Tensor
    weights: Tensor
    to_image: Tensor
    indices: Tensor
    skipped: int = 0
    problems: tuple[str, ...] = ()
    notices: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.indices)

    def _named(self) -> dict[str, Tensor]:
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return {name: value for name, value in values.items() if isinstance(value, Tensor)}

    def tensors(self) -> list[Tensor]:
        """Everything that takes memory."""
        return list(self._named().values())

    def _each(self, change: Any) -> Batch:
        return replace(self, **{name: change(t) for name, t in self._named().items()})

    def to(self, device: torch.device | str, *, non_blocking: bool = True) -> Batch:
        """The same batch with its tensors on `device`."""
        return self._each(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Batch:
        """The same batch in page-locked memory (the DataLoader calls this)."""
        return self._each(lambda tensor: tensor.pin_memory())

    def images(
        self,
        *,
        size: tuple[int, int],
        profile: EvalProfile = "standard",
        dtype: torch.dtype = torch.float32,
        mirrored: bool = False,
    ) -> Tensor:
        """The network's input: warped, mirrored, normalised with ImageNet's mean and deviation.

        Args:
            size: (H, W); the one that the loader was made for.
            profile: `standard` gives red-green-blue; `posenfs` blue-green-red, with the constants
                still in the order red, green, blue.
            mirrored: mirror every sample once more (the second pass of the flip test).

        Returns:
            (N, 3, H, W) in `dtype`, channels-last.
        """
        return kernels.crop_normalize(
            self.pixels,
            self.offsets,
            self.sizes,
            self.matrices,
            ~self.flips if mirrored else self.flips,
            size=size,
            mean=MEAN,
            std=STD,
            order="rgb" if profile == "standard" else "bgr",
            dtype=dtype,
        )

    def prepared(
        self,
        device: torch.device | str,
        *,
        size: tuple[int, int],
        profile: EvalProfile = "standard",
        dtype: torch.dtype = torch.float32,
        flip: bool = False,
    ) -> PreparedBatch:
        """The same batch on `device`, with `images` of these settings made; nothing waits.

        Args:
            flip: the mirrored input is made as well.
        """
        moved = self.to(device)
        made = {
            (size, profile, dtype, mirrored): moved.images(
                size=size, profile=profile, dtype=dtype, mirrored=mirrored
            )
            for mirrored in ((False, True) if flip else (False,))
        }
        return PreparedBatch(**{f.name: getattr(moved, f.name) for f in fields(Batch)}, made=made)


@dataclass(frozen=True, eq=False)
class PreparedBatch(Batch):
    """A batch that holds the network's input already.

    Attributes:
        made: what `images` hands out, by size, profile, dtype and mirrored; it makes what is not
            among them.
    """

    made: Mapping[tuple[tuple[int, int], EvalProfile, torch.dtype, bool], Tensor] = field(
        default_factory=dict
    )

    def tensors(self) -> list[Tensor]:
        return [*super().tensors(), *self.made.values()]

    def _each(self, change: Any) -> Batch:
        made = {settings: change(images) for settings, images in self.made.items()}
        return replace(cast(PreparedBatch, super()._each(change)), made=made)

    def images(
        self,
        *,
        size: tuple[int, int],
        profile: EvalProfile = "standard",
        dtype: torch.dtype = torch.float32,
        mirrored: bool = False,
    ) -> Tensor:
        found = self.made.get((size, profile, dtype, mirrored))
        if found is not None:
            return found
        return super().images(size=size, profile=profile, dtype=dtype, mirrored=mirrored)


def collate(
    samples: Sequence[Sample],
    num_keypoints: int,
    problems: Sequence[str] = (),
    notices: Sequence[str] = (),
) -> Batch:
    """Join samples; none gives an empty batch."""

    def stack(name: str, dtype: Any, *shape: int) -> Tensor:
        values = [getattr(sample, name) for sample in samples]
        return torch.from_numpy(np.asarray(values, dtype).reshape(len(samples), *shape))

    lengths = [sample.crop.size for sample in samples]
    ends = np.cumsum([0, *lengths], dtype=np.int64)
    pixels = np.empty(int(ends[-1]), np.uint8)
    for sample, start, end in zip(samples, ends[:-1], ends[1:], strict=True):
        pixels[start:end].reshape(sample.crop.shape)[...] = sample.crop
    heights_widths = np.array([sample.crop.shape[:2] for sample in samples], np.int32)
    return Batch(
        pixels=torch.from_numpy(pixels),
        offsets=torch.from_numpy(ends[:-1].copy()),
        sizes=torch.from_numpy(heights_widths.reshape(-1, 2)),
        matrices=stack("matrix", np.float32, 2, 3),
        flips=stack("flip", np.bool_),
        joints=stack("joints", np.float32, num_keypoints, 2),
        weights=stack("weights", np.float32, num_keypoints),
        to_image=stack("to_image", np.float64, 2, 3),
        indices=stack("index", np.int64),
        skipped=len(problems),
        problems=tuple(problems),
        notices=tuple(notices),
    )
