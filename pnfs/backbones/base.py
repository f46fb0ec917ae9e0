"""What every backbone offers."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor, nn

from pnfs.backbones.weights import load_backbone_weights


class Backbone(nn.Module):
    """Images (N, 3, H, W), H and W multiples of 32 → a tuple of feature maps, 1/4 first.

    A pyramid has four maps (N, channels[level], H / s, W / s), s = 4, 8, 16, 32. Maps are
    channels-last, the faster layout for these networks, whatever the images are.

    Attributes:
        name: what error messages call the network.
        channels: widths of the maps.
        known_heads: prefixes of keys in published files that belong to a head, not to the backbone.
    """

    name: str
    channels: tuple[int, ...]
    known_heads: ClassVar[tuple[str, ...]] = ()

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Images (N, 3, H, W), any layout → the maps."""
        return self.maps(images.contiguous(memory_format=torch.channels_last))

    def maps(self, images: Tensor) -> tuple[Tensor, ...]:
        """The network, from channels-last images."""
        raise NotImplementedError

    def rename_keys(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """A published state dict under this module's key names."""
        return state

    def load_weights(self, path: str | Path) -> None:
        """Fill from a weights file, completely or not at all; see `load_backbone_weights`."""
        load_backbone_weights(self, path)
