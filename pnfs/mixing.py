"""The weights that kernels mix with (Eq. 1 and 2), of a whole fabric at once.

A kernel takes the weights of its terms, (P, T). Each is a sum of entries of softmax(α) or
softmax(β), times a factor. Picked one by one, forward and backward, they would be a hundred calls
of a training step on a dozen numbers each; all of one softmax are one product with a matrix.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pnfs.kernels import calls
from pnfs.liveness import Parts


@dataclass(frozen=True)
class Mix:
    """What one call mixes.

    Attributes:
        parts: the P parts of its maps.
        row: of softmax(α) or softmax(β).
        terms: per term, the columns whose weights are added.
    """

    parts: Parts
    row: int
    terms: tuple[tuple[int, ...], ...]


class MixTable(nn.Module):
    """The weights of many mixes from the softmax that they share.

    Attributes:
        matrix: 1 where a weight has an entry of the softmax, else 0; not a part of the state dict.
        factor: of all weights. Not in the matrix: products that are rounded make a sum of two
            depend on its order.
    """

    matrix: Tensor

    def __init__(self, shape: tuple[int, ...], mixes: Sequence[Mix], factor: float) -> None:
        """`shape`: of the softmax, (all parts, rows, columns)."""
        super().__init__()
        self.factor = factor
        parts, rows, columns = shape
        self.shapes = [(len(mix.parts), len(mix.terms)) for mix in mixes]
        matrix = torch.zeros(sum(p * t for p, t in self.shapes), parts * rows * columns)
        weight = 0
        for mix in mixes:
            for part in mix.parts:
                for term in mix.terms:
                    for column in term:
                        matrix[weight, (part * rows + mix.row) * columns + column] = 1
                    weight += 1
        self.register_buffer("matrix", matrix, persistent=False)

    def forward(self, softmax: Tensor) -> list[Tensor]:
        """(all parts, rows, columns) → per mix (P, T)."""
        with calls.without_autocast(softmax.device.type):
            weights = self.factor * torch.mv(self.matrix, softmax.flatten())
        pieces = weights.split([p * t for p, t in self.shapes])
        return [piece.view(shape) for piece, shape in zip(pieces, self.shapes, strict=True)]
