"""Expected multiply-adds of the fabrics under softmax(α) and softmax(β), differentiable in both."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from pnfs.fabric import Cell, Fabric, MixedEdge
from pnfs.operations import PartConv2d


def find_fabrics(model: nn.Module) -> dict[str, Fabric]:
    """The fabrics of a model: `parts`, the P part fabrics, and `backbone`, if that is one."""
    own = getattr(model, "fabric", None)
    return {
        "parts" if module is own else "backbone": module
        for module in model.modules()
        if isinstance(module, Fabric)
    }


def expected_macs(model: nn.Module, input_size: tuple[int, int]) -> Tensor:
    """E[MACs] of one image in what α and β choose between, a scalar.

    Σ over parts, cells of Σ_edges Σ_o softmax(α)_o · MACs(o) + Σ_slots softmax(β)_slot · MACs(T):
    each operation and each way between scales counts with the share that its mix gives it. What
    every architecture has (stem, 1×1 outputs, head) is a constant and left out. What pruning
    removed costs nothing.

    Args:
        input_size: height and width of the image in pixels.
    """
    total = torch.zeros(())
    for fabric in find_fabrics(model).values():
        alpha, beta = fabric.mixing_weights()
        of_alpha, of_beta = _macs(fabric, input_size)
        shares = (alpha * of_alpha.to(alpha)).sum() + (beta * of_beta.to(beta)).sum()
        total = total.to(shares) + shares
    return total


def _macs(fabric: Fabric, input_size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Multiply-adds behind each mixing weight: of the operations over all cells where a part has
    them (P, E, O), and of the ways between scales (P, cells, 3)."""
    of_alpha, of_beta = torch.zeros(fabric.alpha.shape), torch.zeros(fabric.beta.shape)
    for plan in fabric.plan.cells:
        row, cell = plan.row, cast(Cell, fabric.cells[plan.row.name])
        pixels = (input_size[0] // row.stride) * (input_size[1] // row.stride)
        for edge, mixed in zip(fabric.topology.edges, cell.edges, strict=True):
            users = cast(MixedEdge, mixed).users
            for name, branch in cast(MixedEdge, mixed).operations.items():
                column = fabric.topology.operations.index(name)
                of_alpha[list(users[name]), edge.alpha_row, column] += pixels * _weights(branch)
        for source, transform, readers in zip(row.inputs, cell.inputs, plan.inputs, strict=True):
            shrunk = 4 if source.transform == "up" else 1
            macs = pixels // shrunk * _weights(transform)
            of_beta[list(readers), row.beta_row, source.slot] += macs
    return of_alpha, of_beta


def _weights(module: nn.Module) -> int:
    """Convolution weights of one part: multiply-adds per output pixel."""
    return sum(m.weight[0].numel() for m in module.modules() if isinstance(m, PartConv2d))
