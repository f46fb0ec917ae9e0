"""Checkpoints of others: the published PoseNFS state dicts, read into our `PoseNet`.

The published code keeps one module per part, in its own order, with its own keypoint order inside a
part; ours stacks the parts on a leading axis in Table I's order. Every published key is translated
to one destination (our tensor, the part's index on its leading axis, a row order), or is known to
be dead weight that no forward pass uses. Anything else is an error.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from pnfs.backbones.weights import read_state_dict
from pnfs.config import ModelConfig
from pnfs.errors import PnfsError
from pnfs.fabric import Fabric
from pnfs.model import PoseNet
from pnfs.topology import Topology

log = logging.getLogger("pnfs")

_S = tuple[int, ...]
# Part names and the keypoint order inside each part, in the published order of parts.
PUBLISHED_PARTS: dict[tuple[str, int], dict[str, _S]] = {
    ("coco", 1): {"whole_body": tuple(range(17))},
    ("coco", 3): {
        "upper_limb_part": (5, 6, 7, 8, 9, 10),
        "head_part": (0, 1, 2, 3, 4),
        "lower_limb_part": (11, 12, 13, 14, 15, 16),
    },
    ("coco", 5): {
        "left_arm_part": (7, 9),
        "right_arm_part": (8, 10),
        "legs_part": (13, 14, 15, 16),
        "head_shoulder_part": (0, 1, 2, 3, 4, 5, 6),
        "hips_part": (11, 12),
    },
    ("coco", 8): {
        "left_upper_arm_part": (5, 7),
        "right_upper_arm_part": (6, 8),
        "left_lower_arm_part": (7, 9),
        "right_lower_arm_part": (8, 10),
        "left_lower_leg_part": (13, 15),
        "right_lower_leg_part": (14, 16),
        "head_shoulder_part": (0, 1, 2, 3, 4, 5, 6),
        "upper_legs_part": (11, 12, 13, 14),
    },
    ("mpii", 1): {"whole_body": tuple(range(16))},
    ("mpii", 3): {
        "upper_limb_part": (3, 4, 5, 6, 7, 8),
        "head_part": (0, 1, 2),
        "lower_limb_part": (9, 10, 11, 12, 13, 14, 15),
    },
    ("mpii", 5): {
        "left_arm_part": (5, 7),
        "right_arm_part": (6, 8),
        "legs_part": (11, 12, 13, 14),
        "head_shoulder_part": (0, 1, 2, 3, 4),
        "hips_part": (15, 9, 10),
    },
    ("mpii", 8): {
        "left_upper_arm_part": (3, 5),
        "right_upper_arm_part": (4, 6),
        "left_lower_arm_part": (5, 7),
        "right_lower_arm_part": (6, 8),
        "left_lower_leg_part": (11, 13),
        "right_lower_leg_part": (12, 14),
        "head_shoulder_part": (0, 1, 2, 3, 4),
        "upper_legs_part": (9, 15, 10, 11, 12),
    },
}


@dataclass(frozen=True)
class Target:
    """Where a published tensor goes.

    Attributes:
        key: our state-dict key.
        part: index on the leading parts axis, or None when our tensor has no such axis.
        rows: which rows of the published tensor, in which order; None takes all.
        dead_rows: how many further rows the tensor may have, which no forward pass uses.
    """

    key: str
    part: int | None = None
    rows: tuple[int, ...] | None = None
    dead_rows: int = 0


DEAD = Target("")  # known, and used by no forward pass
_CELL = re.compile(r"(cell_\d+_\d+)\.(.+)")
_EDGE_OPERATION = re.compile(r"cell_arch\.(\d+)\.ops\.(\d+)\.(?:operation\.)?(\d+)\.(\w+)")
_INPUT = re.compile(r"propress_list\.(\d)\.(?:operation\.(\d)|conv_1x1|(bn))\.(\w+)")


def load_posenfs(source: str | Path | Mapping[str, Tensor], config: ModelConfig) -> PoseNet:
    """Build the `PoseNet` of a published checkpoint.

    What is dead weight in the checkpoint (a stem in every part, MobileNetV2's last block, a second
    input node per cell) is dropped and listed in the log of `pnfs` at level INFO.

    Args:
        source: a state dict, or a file: the released `.tar` (a plain state dict, or one under
            `model`), `.pth` or `.safetensors`; keys may begin with `module.`.
        config: the model it belongs to; `fabric.operations` in the checkpoint's order.

    Raises:
        PnfsError: the configuration has no published layout, or a key is missing, unexpected or of
            another shape; the message names the first.
    """
    model = PoseNet(config)
    if isinstance(source, Mapping):
        state = {key.removeprefix("module."): tensor for key, tensor in source.items()}
    else:
        state = read_state_dict(source)
    converted, dropped = convert_posenfs(state, model)
    model.load_state_dict(converted)
    if dropped:
        log.info(
            "dropped %d tensors that no forward pass uses: %s", len(dropped), ", ".join(dropped)
        )
    return model.eval()


def convert_posenfs(
    state: Mapping[str, Tensor], model: PoseNet
) -> tuple[dict[str, Tensor], list[str]]:
    """Translate a published state dict into `model`'s keys and shapes.

    Returns:
        (state dict that fits `model`, keys that were dropped as dead weight).

    Raises:
        PnfsError: as `load_posenfs`.
    """
    ours = model.state_dict()
    converted = {key: torch.empty_like(tensor) for key, tensor in ours.items()}
    wanted = {(key, part) for key, tensor in ours.items() for part in _slots(key, tensor)}
    translate = _Translator(model)
    dropped: list[str] = []
    for key, tensor in state.items():
        target = translate(key)
        if target is DEAD:
            if not key.endswith("num_batches_tracked"):
                dropped.append(key)
            continue
        if target is None or (target.key, target.part) not in wanted:
            raise PnfsError(
                f"checkpoint key '{key}' does not belong to this model; check model.backbone, "
                "parts and fabric in the configuration"
            )
        value = _used_rows(tensor, target)
        destination = converted[target.key]
        if target.part is not None:
            destination = destination[target.part]
        if value is None or destination.shape != value.shape:
            raise PnfsError(
                f"checkpoint key '{key}' has shape {tuple(tensor.shape)}, this model needs "
                f"{tuple(destination.shape)}; check channels, hidden, vector_dim and operations"
            )
        destination.copy_(value)
        wanted.remove((target.key, target.part))
    if wanted:
        key, part = min(wanted, key=lambda entry: (entry[0], entry[1] or 0))
        where = "" if part is None else f" of part '{list(model.config.part_table)[part]}'"
        raise PnfsError(
            f"checkpoint lacks {len(wanted)} tensors of this model, first '{key}'{where}; check "
            "model.backbone, parts and fabric in the configuration"
        )
    return converted, dropped


def _used_rows(tensor: Tensor, target: Target) -> Tensor | None:
    """The rows that `target` takes; None where the tensor has another number of them."""
    if target.rows is None:
        return tensor
    if tensor.shape[0] - len(target.rows) not in (0, target.dead_rows):
        return None
    return tensor[list(target.rows)]


def _slots(key: str, tensor: Tensor) -> list[int | None]:
    """The pieces of one of our tensors that are filled separately."""
    stacked = key.startswith(("fabric.", "backbone.fabric."))
    return list(range(tensor.shape[0])) if stacked else [None]


class _Translator:
    """Published key -> `Target`, or None for a key that no such model has."""

    def __init__(self, model: PoseNet) -> None:
        config = model.config
        table = config.part_table
        published = PUBLISHED_PARTS.get((config.skeleton, len(table)))
        if published is None or _as_sets(published) != _as_sets(table):
            raise PnfsError(
                f"model.parts: no published checkpoint has these {len(table)} parts for "
                f"{config.skeleton}; use parts 1, 3, 5 or 8"
            )
        ours = [frozenset(keypoints) for keypoints in table.values()]
        self.model = model
        self.part_of = {name: ours.index(frozenset(ks)) for name, ks in published.items()}
        self.reduce_order = [self.part_of[name] for name in published]
        self.head_rows: dict[str, tuple[int, ...]] = {}
        for name, order in published.items():
            own_order = list(table.values())[self.part_of[name]]
            d = config.vector_dim
            self.head_rows[name] = tuple(
                order.index(keypoint) * d + component
                for keypoint in own_order
                for component in range(d)
            )

    def __call__(self, key: str) -> Target | None:
        owner, _, rest = key.partition(".")
        if owner == "backbone":
            return self._backbone(rest)
        if owner == "reduce":
            part, level, leaf = rest.split(".")
            return Target(f"fabric.reduce.{level}.{leaf}", self.reduce_order[int(part)])
        if owner not in self.part_of:
            return None
        part_index = self.part_of[owner]
        if rest.startswith("stem."):
            return DEAD
        if rest.startswith("final_layer.1."):
            leaf = rest.removeprefix("final_layer.1.")
            return Target(f"head.convs.{part_index}.{leaf}", None, self.head_rows[owner])
        return _fabric_target(self.model.fabric, "fabric", rest, part_index)

    def _backbone(self, rest: str) -> Target | None:
        if self.model.config.fabric_backbone is not None and not rest.startswith("stem."):
            fabric = self.model.backbone.fabric
            assert isinstance(fabric, Fabric)
            return _fabric_target(fabric, "backbone.fabric", rest, 0)
        if self.model.config.backbone == "mobilenet_v2" and rest.startswith("features.17."):
            return DEAD
        return Target(f"backbone.{rest}")


def _as_sets(parts: Mapping[str, tuple[int, ...]]) -> set[frozenset[int]]:
    return {frozenset(keypoints) for keypoints in parts.values()}


def _second_input_edges(topology: Topology) -> int:
    """Edges from the second input node that released checkpoints have and no forward pass uses."""
    return topology.hidden


def _fabric_target(fabric: Fabric, prefix: str, rest: str, part: int) -> Target | None:
    """Destination of one fabric's key (`alphas`, `betas`, `cell_L_S.…`)."""
    topology = fabric.topology
    if rest == "alphas":
        rows = tuple(edge.alpha_row for edge in topology.edges)
        return Target(f"{prefix}.alpha", part, rows, dead_rows=_second_input_edges(topology))
    if rest == "betas":
        return Target(f"{prefix}.beta", part)
    cell = _CELL.fullmatch(rest)
    if cell is None or cell[1] not in fabric.cells:
        return None
    base, inner = f"{prefix}.cells.{cell[1]}", cell[2]
    if inner.endswith(".num_batches_tracked"):
        return DEAD
    if inner.startswith("channel_keep."):
        return Target(f"{base}.output.{inner.removeprefix('channel_keep.')}", part)
    if match := _EDGE_OPERATION.fullmatch(inner):
        edge, column, layer, leaf = int(match[1]), int(match[2]), match[3], match[4]
        if 0 <= edge - len(topology.edges) < _second_input_edges(topology):
            return DEAD
        if column >= len(topology.operations):
            return None
        name = topology.operations[column]
        return Target(f"{base}.edges.{edge}.operations.{name}.{layer}.{leaf}", part)
    if match := _INPUT.fullmatch(inner):
        layer = match[2] if match[2] is not None else ("1" if match[3] else "0")
        return Target(f"{base}.inputs.{match[1]}.{layer}.{match[4]}", part)
    return None
