"""What α and β are doing: rows for metrics.jsonl, and the rule that ends a collapse to skip."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from pnfs.architecture import entropy
from pnfs.fabric import Fabric
from pnfs.search.macs import find_fabrics


class Monitor:
    """Reads α, β and their gradients; changes nothing."""

    def __init__(self, model: nn.Module) -> None:
        self.fabrics = find_fabrics(model)

    @torch.no_grad()
    def row(self) -> dict[str, Any]:
        """Means over all mixes of live cells: entropies in nats, shares of skip and zero. Norms of
        the gradients of α and β, together and apart, as their last step used them: with clipping,
        penalty and decay (None where there are none). Per fabric softmax(α) (P, E, O) and
        softmax(β) (P, cells, 3)."""
        if not self.fabrics:
            return {}
        fabrics = self.fabrics.values()
        return {
            "alpha_entropy": _mean([entropy(_live(f)[0]) for f in fabrics]),
            "beta_entropy": _mean([entropy(_live(f)[1]) for f in fabrics]),
            "skip_share": self.share("skip"),
            "zero_share": self.share("zero"),
            "architecture_gradient": _norm([p for f in fabrics for p in (f.alpha, f.beta)]),
            "alpha_gradient": _norm([f.alpha for f in fabrics]),
            "beta_gradient": _norm([f.beta for f in fabrics]),
            "fabrics": {
                name: dict(zip(("alpha", "beta"), map(_rounded, f.mixing_weights()), strict=True))
                for name, f in self.fabrics.items()
            },
        }

    @torch.no_grad()
    def share(self, operation: str) -> float | None:
        """Mean softmax(α) of an operation over edges and parts; None where nobody has it."""
        shares = [
            _live(f)[0][..., f.topology.operations.index(operation)]
            for f in self.fabrics.values()
            if operation in f.topology.operations
        ]
        return _mean(shares) if shares else None


def _live(fabric: Fabric) -> tuple[Tensor, Tensor]:
    """Mixing weights that are in use: α's (P', E, O) of the parts that have a cell, β's (mixes, 3)
    of live cells."""
    alpha, beta = fabric.mixing_weights()
    places = [(part, cell.row.beta_row) for cell in fabric.plan.cells for part in cell.parts]
    parts, rows = zip(*places, strict=True)
    return alpha[sorted(set(parts))], beta[list(parts), list(rows)]


def _norm(parameters: list[nn.Parameter]) -> float | None:
    """Of all their gradients together; None without any."""
    norms = [p.grad.norm() for p in parameters if p.grad is not None]
    return torch.stack(norms).norm().item() if norms else None


def _mean(values: list[Tensor]) -> float:
    return float(torch.cat([value.flatten() for value in values]).double().mean())


def _rounded(weights: Tensor) -> list[Any]:
    rounded: list[Any] = weights.double().mul(1e5).round().div(1e5).tolist()
    return rounded
