"""Architecture parameters: α (micro, Eq. 1) and β (macro, Eq. 2) of all parts of a fabric.

α has shape (P parts, E edges, O operations), β (P parts, cells, 3 inputs), both logits. One α
serves all cells of a part; every cell has its own β row. They start at zero: uniform mixes.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pnfs.topology import SLOTS, Topology


def new_alpha(topology: Topology, parts: int) -> nn.Parameter:
    """α logits (P, E, O), zero."""
    return nn.Parameter(torch.zeros(parts, len(topology.edges), len(topology.operations)))


def new_beta(topology: Topology, parts: int) -> nn.Parameter:
    """β logits (P, cells, 3), zero."""
    return nn.Parameter(torch.zeros(parts, len(topology.cells), len(SLOTS)))


def mixing_weights(logits: Tensor) -> Tensor:
    """Softmax over the last axis: the weights that Eq. 1 and 2 mix with."""
    return logits.softmax(dim=-1)


def entropy(weights: Tensor) -> Tensor:
    """Entropy in nats of each mix, whose weights are on the last axis, which the result lacks."""
    return torch.special.entr(weights).sum(dim=-1)


@torch.no_grad()
def randomize_(parameters: list[nn.Parameter], seed: int) -> None:
    """Draw every logit from N(0, 1), in place, by seed: the paper's random sampling.

    The draw happens on the CPU, so a seed gives the same architecture on every device.
    """
    generator = torch.Generator().manual_seed(seed)
    for parameter in parameters:
        parameter.copy_(torch.randn(parameter.shape, generator=generator))
