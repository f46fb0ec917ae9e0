"""What every backbone offers."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from torch import Tensor, nn

from pnfs.backbones.weights import load_backbone_weights


class Backbone(nn.Module):
    """Images (N, 3, H, W), H and W multiples of 32 → a tuple of feature maps, 1/4 first.

    A pyramid has four maps (N, channels[level], H / s, W / s), s = 4, 8, 16, 32.

    Attributes:
        name: what error messages call the network.
        channels: widths of the maps.
        known_heads: prefixes of keys in published files that belong to a head, not to the backbone.
    """

    name: str
    channels: tuple[int, ...]
    known_heads: ClassVar[tuple[str, ...]] = ()

    def rename_keys(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """A published state dict under this module's key names."""
        return state

    def load_weights(self, path: str | Path) -> None:
        """Fill from a weights file, completely or not at all; see `load_backbone_weights`."""
        load_backbone_weights(self, path)
