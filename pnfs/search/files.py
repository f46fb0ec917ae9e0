"""architecture.json: Θ, α and β of every part, readable by people and by `search.architecture`."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pnfs.architecture import entropy
from pnfs.errors import PnfsError
from pnfs.fabric import Fabric
from pnfs.liveness import Dropped
from pnfs.search.macs import find_fabrics
from pnfs.statefile import reason, write_json
from pnfs.topology import SLOTS, Topology, build_topology

FORMAT = "pnfs-architecture-1"
ARCHITECTURE = "architecture.json"


def save_architecture(model: nn.Module, path: str | Path, source: Mapping[str, Any]) -> None:
    """Write the architecture of `model` (with fabrics); `source` says where it comes from.

    Logits are stored so that reading gives the same float32 numbers; minus infinity as "-inf".

    Raises:
        PnfsError: the file cannot be written.
    """
    names = {"parts": list(_part_table(model)), "backbone": ["backbone"]}
    tree = {
        "format": FORMAT,
        "source": dict(source),
        "fabrics": {
            which: {
                "topology": _topology(fabric, names[which]),
                "parts": {name: _part(fabric, p) for p, name in enumerate(names[which])},
            }
            for which, fabric in find_fabrics(model).items()
        },
    }
    write_json(Path(path), tree)


@dataclass(frozen=True)
class StoredFabric:
    """One fabric of an architecture file.

    Attributes:
        topology: its table.
        parts: names, in the order of the leading axis.
        alpha, beta: logits (P, edges, operations) and (P, cells, 3), −∞ for what pruning dropped.
    """

    topology: Topology
    parts: tuple[str, ...]
    alpha: Tensor
    beta: Tensor


def read_architecture(path: str | Path) -> tuple[dict[str, StoredFabric], dict[str, Any]]:
    """The fabrics of a file, `parts` and perhaps `backbone`, and where it comes from.

    Raises:
        PnfsError: unreadable, of another format, or damaged.
    """
    path = Path(path)
    tree = _read(path)
    try:
        fabrics = {which: _fabric(stored) for which, stored in tree["fabrics"].items()}
        return fabrics, dict(tree["source"])
    except (AttributeError, KeyError, TypeError, ValueError, RuntimeError):
        raise PnfsError(f"{path}: a damaged architecture file; write it anew") from None


def _fabric(stored: Mapping[str, Any]) -> StoredFabric:
    theta, names = stored["topology"], tuple(stored["parts"])
    table = build_topology(
        layers=theta["layers"],
        channels=theta["channels"],
        hidden=theta["hidden"],
        operations=tuple(theta["operations"]),
        cut=theta["first_layer"],
        reserve=theta["last_layer"] + 1,
    )
    if [row.name for row in table.cells] != theta["cells"]:
        raise ValueError("cells")
    logits = []
    for key, rows, columns in (
        ("alpha", len(table.edges), len(table.operations)),
        ("beta", len(table.cells), len(SLOTS)),
    ):
        parts = [[[float(x) for x in row] for row in stored["parts"][name][key]] for name in names]
        logits.append(torch.tensor(parts).reshape(len(names), rows, columns))
    dropped = Dropped.from_names(
        table, list(names), theta["dropped_operations"], theta["dropped_inputs"]
    )
    for tensor, indices in zip(logits, (dropped.operations, dropped.inputs), strict=True):
        for index in indices:
            tensor[index] = -torch.inf
    return StoredFabric(table, names, *logits)


def _read(path: Path) -> dict[str, Any]:
    """The tree of a file of the right format."""
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise PnfsError(f"{path}: cannot be read ({reason(error)}); check the path") from None
    except ValueError:
        raise PnfsError(f"{path}: not JSON; give a file that a search wrote") from None
    if not isinstance(tree, dict) or tree.get("format") != FORMAT:
        found = tree.get("format") if isinstance(tree, dict) else None
        raise PnfsError(f"{path}: format {found!r}, expected {FORMAT!r}")
    return tree


@torch.no_grad()
def load_architecture(model: nn.Module, path: str | Path) -> None:
    """Copy α and β of a file into those of `model`, in place.

    Raises:
        PnfsError: unreadable, of another format, or of another topology; the first difference is
            named and the model is unchanged.
    """
    path = Path(path)
    tree = _read(path)
    fabrics, stored = find_fabrics(model), tree.get("fabrics", {})
    names = {"parts": list(_part_table(model)), "backbone": ["backbone"]}
    expected = {
        which: {"topology": _topology(fabric, names[which]), "parts": dict.fromkeys(names[which])}
        for which, fabric in fabrics.items()
    }
    difference = _difference(expected, stored, "fabrics")
    if difference is not None:
        raise PnfsError(f"{path}: this architecture is of another topology: {difference}")
    new: list[tuple[Tensor, Tensor]] = []
    for which, fabric in fabrics.items():
        for p, name in enumerate(names[which]):
            for key, own in (("alpha", fabric.alpha[p]), ("beta", fabric.beta[p])):
                try:
                    values = torch.tensor(
                        [[float(x) for x in row] for row in stored[which]["parts"][name][key]],
                        dtype=own.dtype,
                    )
                except (KeyError, TypeError, ValueError):
                    values = torch.empty(0)
                if values.shape != own.shape or not values.softmax(-1).isfinite().all():
                    raise PnfsError(
                        f"{path}: fabrics.{which}.parts.{name}.{key} must be numbers of shape "
                        f"{tuple(own.shape)}; -inf removes one, not a whole row"
                    )
                new.append((own, values))
    for own, values in new:
        own.copy_(values)


def _part_table(model: nn.Module) -> Mapping[str, Any]:
    table: Mapping[str, Any] = model.config.part_table  # type: ignore[union-attr, assignment]
    return table


def _topology(fabric: Fabric, parts: list[str]) -> dict[str, Any]:
    """Θ, the order of α's and β's rows and columns, and the mixing weights that pruning dropped."""
    operations, inputs = fabric.plan.dropped.names(fabric.topology, parts)
    table = fabric.topology
    return {
        "layers": table.layers,
        "first_layer": table.first_layer,
        "last_layer": table.last_layer,
        "channels": table.channels,
        "hidden": table.hidden,
        "profile": fabric.profile,
        "operations": list(table.operations),
        "edges": [[edge.source, edge.target] for edge in table.edges],
        "slots": list(SLOTS),
        "cells": [row.name for row in table.cells],
        "dropped_operations": [list(name) for name in operations],
        "dropped_inputs": [list(name) for name in inputs],
    }


@torch.no_grad()
def _part(fabric: Fabric, p: int) -> dict[str, Any]:
    result: dict[str, Any] = {}
    all_logits, all_weights = (fabric.alpha, fabric.beta), fabric.mixing_weights()
    for name, logits, weights in zip(("alpha", "beta"), all_logits, all_weights, strict=True):
        result[name] = [[_number(x) for x in row] for row in logits[p].tolist()]
        result[f"{name}_softmax"] = weights[p].tolist()
        result[f"{name}_entropy"] = entropy(weights[p].double()).tolist()
    return result


def _number(value: float) -> float | str:
    return value if math.isfinite(value) else str(value)


def _difference(expected: Any, found: Any, where: str) -> str | None:
    """The first place where `found` is not `expected`; values of None are not compared."""
    if isinstance(expected, dict):
        if not isinstance(found, dict) or list(expected) != list(found):
            keys = list(found) if isinstance(found, dict) else found
            return f"{where} has {keys}, the model {list(expected)}"
        for key, value in expected.items():
            difference = None
            if value is not None:
                difference = _difference(value, found[key], f"{where}.{key}")
            if difference is not None:
                return difference
    elif expected != found:
        return f"{where} is {found!r}, the model's {expected!r}"
    return None
