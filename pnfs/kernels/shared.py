"""Maps that several ops read: their gradients are added up where they arise."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass
class SharedMap:
    """A map with several readers.

    Autograd adds the gradients of a tensor's readers in passes of their own: two reads and a write
    for each. An op that takes a `SharedMap` may instead replace `map` by an alias of it, which is
    for the readers that follow; the gradient of the alias then goes through the op's backward pass,
    which adds it to its own. An op that cannot do so leaves `map` alone, and autograd adds.

    Attributes:
        map: what the next reader takes.
    """

    map: Tensor


def unshared(x: Tensor | SharedMap) -> Tensor:
    """The map itself."""
    return x.map if isinstance(x, SharedMap) else x
