"""Which piece of its activations every value lies on: noted while kernels run, forced on the
reference.

A ReLU has a kink. The sign of a value near it follows the order of a float32 sum, and with the sign
whether a gradient passes. With the same pieces in both runs all else can be compared closely.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from pnfs import kernels

BELOW, LINEAR, ABOVE = 0, 1, 2  # y = 0, y = z, y = 6
Piece = Tensor  # uint8, the activation's shape

_relu, _relu6 = F.relu, F.relu6


def _piece(z: Tensor, top: float | None) -> Piece:
    piece = (z > 0).to(torch.uint8)
    return piece if top is None else piece + (z >= top)


@contextmanager
def _activations(relu: Any, relu6: Any) -> Iterator[None]:
    with patch.object(F, "relu", relu), patch.object(F, "relu6", relu6):
        yield


class NotedPieces(TorchDispatchMode):
    """Inside, the pieces of all activations of a forward pass on the C++ kernels are noted, in the
    order in which the reference meets them.

    Those inside a kernel cannot be seen: they are what the op's reference finds in float64 in what
    the kernel read, so that they are the kernel's but for the rounding of that one op.

    Attributes:
        pieces: one per activation.
    """

    def __init__(self) -> None:
        super().__init__()
        self.pieces: list[Piece] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        space, _, name = func.name().partition("::")
        op = kernels.ops().get(name.removesuffix("_cpp")) if space == "pnfs" else None
        if (space, name) == ("aten", "relu"):
            self.pieces.append(_piece(args[0], None))
        elif op is not None and op.name != "vector_heatmap_loss":  # which has none
            with torch.no_grad(), _activations(self._note_relu, self._note_relu6):
                op.reference(*tree_map(_widened, args))
        return func(*args, **(kwargs or {}))

    def _note_relu(self, z: Tensor) -> Tensor:
        self.pieces.append(_piece(z, None))
        return _relu(z)

    def _note_relu6(self, z: Tensor) -> Tensor:
        self.pieces.append(_piece(z, 6))
        return _relu6(z)


def _widened(value: Any) -> Any:
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value


@contextmanager
def forced_pieces(pieces: Sequence[Piece]) -> Iterator[list[int]]:
    """Inside, the activations of the reference use these pieces, one after the other, whatever the
    values say. Yields per activation how many values lie on another one.

    Raises:
        ValueError: there were fewer activations than pieces.
    """
    left = iter(pieces)
    crossed: list[int] = []

    def forced(z: Tensor, top: float | None) -> Tensor:
        piece = next(left)
        assert piece.shape == z.shape
        crossed.append(int((piece != _piece(z, top)).sum()))
        y = torch.where(piece == LINEAR, z, 0.0)
        return y if top is None else torch.where(piece == ABOVE, top, y)

    with _activations(lambda z: forced(z, None), lambda z: forced(z, 6.0)):
        yield crossed
    if next(left, None) is not None:
        raise ValueError(f"{len(crossed)} activations for {len(pieces)} pieces")
