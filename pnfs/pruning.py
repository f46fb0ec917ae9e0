"""Pruning: leave out what mixing weights of zero make useless, and prove that nothing changed.

plan    softmax(α), softmax(β) up to a threshold are dropped; the topology table, border copies
        included, says which cells, operations, connections and reduce convolutions die of it
apply   the same model without them, its other weights copied
verify  on real inputs: how far dropping moves the scores (masking), and that removing moves them
        no further (removal)
"""

from __future__ import annotations

import copy
import itertools
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from pnfs.config import DroppedConfig, ModelConfig, PruningConfig
from pnfs.costs import Costs, count_costs
from pnfs.errors import PnfsError
from pnfs.fabric import Cell, Fabric
from pnfs.folding import for_evaluation
from pnfs.liveness import Dropped, Parts
from pnfs.model import PoseNet, build_model
from pnfs.operations import PartConv2d, select_parts
from pnfs.topology import SLOTS

REMOVAL_LIMIT = 1e-6
TIMED_RUNS = 5


@dataclass(frozen=True)
class Removed:
    """One thing that pruning took out of one part.

    Attributes:
        kind: `cell` (all of it); of live cells `operation` and `connection` (an input, with its
            convolution and batch norm if it has them); `reduce` (of a pyramid level).
        name: part, place and, where it applies, edge and operation or input.
        params, conv_macs: what it held and what it cost per image.
    """

    kind: str
    name: str
    params: int
    conv_macs: int


@dataclass(frozen=True)
class PruningReport:
    """What was removed, what that changed, and what it saved.

    Attributes:
        threshold: mixing weights up to it were dropped.
        masking_error: largest |dense - masked| score on the inputs: the price of dropping.
        removal_error: largest |masked - pruned| score: the price of removing, at most 1e-6. Both
            are measured in float64.
        removed: everything that went, part by part.
        before, after: costs of one evaluation of one image at the model's input size: parameters
            and multiply-adds of the modules; launches and bytes as evaluation makes them, folded
            where it folds.
        seconds_before, seconds_after: median time of one such forward pass over the inputs.
    """

    threshold: float
    masking_error: float
    removal_error: float
    removed: tuple[Removed, ...]
    before: Costs
    after: Costs
    seconds_before: float
    seconds_after: float
    images: int

    def of_kind(self, kind: str) -> list[str]:
        """Names of the removed cells, operations, connections or reduce convolutions."""
        return [item.name for item in self.removed if item.kind == kind]

    @property
    def removed_cells(self) -> list[str]:
        return self.of_kind("cell")

    @property
    def removed_operations(self) -> list[str]:
        return self.of_kind("operation")

    def as_dict(self) -> dict[str, Any]:
        """Everything as JSON takes it."""
        tree = asdict(self)
        for key in ("before", "after"):
            costs = getattr(self, key)
            tree[key] = {k: getattr(costs, k) for k in ("params", "conv_macs", "launches", "bytes")}
        return tree

    def text(self) -> str:
        """The report for people."""
        lines = [f"{'':<22}{'before':>16}{'after':>16}"]
        for name, label in (
            ("params", "parameters"),
            ("conv_macs", "conv multiply-adds"),
            ("bytes", "bytes moved"),
            ("launches", "launches"),
        ):
            old, new = getattr(self.before, name), getattr(self.after, name)
            lines.append(f"{label:<22}{old:>16,}{new:>16,}")
        milliseconds = (1e3 * self.seconds_before, 1e3 * self.seconds_after)
        label = f"ms for {self.images} image{'s' if self.images != 1 else ''}"
        lines.append(f"{label:<22}{milliseconds[0]:>16.1f}{milliseconds[1]:>16.1f}")
        lines += ["", f"removed, with mixing weights up to {self.threshold:g} dropped:"]
        for kind in ("cell", "operation", "connection", "reduce"):
            items = [item for item in self.removed if item.kind == kind]
            params, macs = sum(i.params for i in items), sum(i.conv_macs for i in items)
            plural = {"reduce": "reduce convolutions"}.get(kind, f"{kind}s")
            lines.append(f"  {len(items)} {plural}: {params:,} parameters, {macs:,} multiply-adds")
        lines += [
            "",
            f"masking error {self.masking_error:.3g}: dropping moves no score by more",
            f"removal error {self.removal_error:.3g}: removing what was dropped adds no more "
            f"(limit {REMOVAL_LIMIT:g})",
        ]
        return "\n".join(lines)


def prune(
    model: nn.Module, threshold: float = 0.0, images: Tensor | None = None
) -> tuple[PoseNet, PruningReport]:
    """A smaller model that gives the same scores as `model` with small mixing weights at zero.

    Args:
        model: a `PoseNet`; it is not changed. A pruned one can be pruned again.
        threshold: softmax(α) and softmax(β) up to it are dropped; the largest of each mix stays.
            At 0 only weights that are exactly zero go.
        images: (N, 3, H, W) normalised network input on the model's device, for the errors and the
            times; random by default, real ones tell more.

    Returns:
        The pruned model, in eval mode, and the report.

    Raises:
        PnfsError: no PoseNet, a threshold outside [0, 1), or a removal error above 1e-6 (a bug: the
            pruned model must not be used).
    """
    if not isinstance(model, PoseNet):
        raise PnfsError(f"prune: needs a PoseNet with part fabrics, not {type(model).__name__}")
    if not 0 <= threshold < 1:
        raise PnfsError(f"prune: threshold {threshold} must be at least 0 and below 1")
    if images is None:
        height, width = model.config.input_size
        device = next(model.parameters()).device
        images = torch.randn(2, 3, height, width).to(device)
    dense = copy.deepcopy(model).eval()
    small, masking, removal = remove(dense, threshold, images)
    if not removal <= REMOVAL_LIMIT:
        raise PnfsError(
            f"prune: the pruned model's scores differ by {removal:.3g} from the masked one's, "
            f"more than {REMOVAL_LIMIT:g}; nothing was written, please report this"
        )
    used = [for_evaluation(network, images.device, "fp32") for network in (dense, small)]
    before, after = (_seconds(network, images) for network in used)
    report = PruningReport(
        threshold=threshold,
        masking_error=masking,
        removal_error=removal,
        removed=tuple(_removed(model, small)),
        before=_costs(dense, used[0]),
        after=_costs(small, used[1]),
        seconds_before=before,
        seconds_after=after,
        images=len(images),
    )
    return small, report


def remove(model: PoseNet, threshold: float, images: Tensor) -> tuple[PoseNet, float, float]:
    """Plan, apply and measure: the pruned model, its masking and its removal error on `images`.

    The errors are those of the mathematics, in float64: deep networks magnify the rounding of
    float32, which may sum in another order where there are fewer terms, past any bound worth
    having. `model` must be in eval mode, and stays as it is.
    """
    plans = [_find_dropped(fabric, threshold) for fabric in _fabrics(model)]
    small = _apply(model, plans)
    dense = copy.deepcopy(model).double()
    masked = copy.deepcopy(dense)
    for fabric, dropped in zip(_fabrics(masked), plans, strict=True):
        _mask(fabric, dropped)
    with torch.no_grad():
        networks = (dense, masked, copy.deepcopy(small).double())
        scores = [network(images.double()) for network in networks]
    masking, removal = (_distance(a, b) for a, b in itertools.pairwise(scores))
    return small, masking, removal


def _fabrics(model: PoseNet) -> list[Fabric]:
    """The part fabrics, then a fabric backbone's."""
    inner = getattr(model.backbone, "fabric", None)
    return [model.fabric, *([inner] if isinstance(inner, Fabric) else [])]


def _part_names(config: ModelConfig) -> tuple[list[str], list[str]]:
    """Names of the parts of the part fabrics, and of a fabric backbone."""
    return list(config.part_table), ["backbone"]


def _distance(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max()) if a.numel() else 0.0


def _costs(model: PoseNet, used: nn.Module) -> Costs:
    """Parameters and multiply-adds of `model`, launches and bytes of what evaluation runs."""
    costs, moved = (count_costs(m, model.config.input_size) for m in (model, used))
    return replace(costs, launches=moved.launches, bytes=moved.bytes)


@torch.no_grad()
def _seconds(model: nn.Module, images: Tensor) -> float:
    """Median time of a forward pass."""
    times = []
    for _ in range(TIMED_RUNS + 1):
        started = time.perf_counter()
        model(images)
        if images.device.type == "cuda":
            torch.cuda.synchronize(images.device)
        times.append(time.perf_counter() - started)
    return statistics.median(times[1:])


# -- plan --------------------------------------------------------------------------------------


def _find_dropped(fabric: Fabric, threshold: float) -> Dropped:
    """Mixing weights up to the threshold, the largest of each mix spared."""
    with torch.no_grad():
        found = []
        for weights in fabric.mixing_weights():
            small = weights <= threshold
            small.scatter_(2, weights.argmax(2, keepdim=True), False)
            found.append(frozenset((p, row, column) for p, row, column in small.nonzero().tolist()))
    return Dropped(*found)


def _mask(fabric: Fabric, dropped: Dropped) -> None:
    with torch.no_grad():
        for logits, indices in (
            (fabric.alpha, dropped.operations),
            (fabric.beta, dropped.inputs),
        ):
            for index in indices:
                logits[index] = -torch.inf


# -- apply -------------------------------------------------------------------------------------


def _apply(model: PoseNet, plans: Sequence[Dropped]) -> PoseNet:
    """The model that the plans describe, with `model`'s weights, in eval mode."""
    sections = []
    for fabric, dropped, names in zip(
        _fabrics(model), plans, _part_names(model.config), strict=False
    ):
        operations, inputs = dropped.names(fabric.topology, names)
        sections.append(DroppedConfig(operations=tuple(operations), inputs=tuple(inputs)))
    pruning = PruningConfig(**dict(zip(("fabric", "backbone"), sections, strict=False)))
    config = model.config.model_copy(update={"pruning": pruning})
    parameter = next(model.parameters())
    small = cast(PoseNet, build_model(config)).to(parameter.device, parameter.dtype).eval()
    weights = model.state_dict()
    for prefix, fabric in _prefixes(small):
        for name, parts in _parts_of_modules(fabric):
            source = cast(Fabric, model.get_submodule(prefix))
            have = dict(_parts_of_modules(source))[name]
            for key in small.get_submodule(f"{prefix}.{name}").state_dict():
                full = f"{prefix}.{name}.{key}"
                weights[full] = select_parts(weights[full], have, parts)
    own = small.state_dict()
    small.load_state_dict({key: weights[key] for key in own})
    return small


def _prefixes(model: PoseNet) -> list[tuple[str, Fabric]]:
    known = {id(fabric) for fabric in _fabrics(model)}
    return [(n, cast(Fabric, m)) for n, m in model.named_modules() if id(m) in known]


def _parts_of_modules(fabric: Fabric) -> Iterator[tuple[str, Parts]]:
    """Sub-modules with weights of their own for some parts, and which these are."""
    plan = fabric.plan
    everywhere = tuple(range(fabric.parts))
    for level, module in enumerate(fabric.reduce):
        if not isinstance(module, nn.Identity):
            yield f"reduce.{level}", plan.reads[level] if plan.pruned else everywhere
    for name, module in fabric.cells.items():
        cell = cast(Cell, module)
        yield f"cells.{name}.output", cell.plan.parts
        for slot, readers in enumerate(cell.plan.inputs):
            if readers:
                yield f"cells.{name}.inputs.{slot}", readers
        for edge, mixed in enumerate(cell.edges):
            for operation in cast(Any, mixed).operations:
                users = cast(Any, mixed).users[operation]
                yield f"cells.{name}.edges.{edge}.operations.{operation}", users


# -- what went ---------------------------------------------------------------------------------


def _removed(model: PoseNet, small: PoseNet) -> Iterator[Removed]:
    """Everything that `model` computes and `small` does not, part by part."""
    height, width = model.config.input_size
    pixels = [(height // (4 << level)) * (width // (4 << level)) for level in range(5)]
    for old, new, names in zip(
        _fabrics(model), _fabrics(small), _part_names(model.config), strict=False
    ):
        kept = {(name, part) for name, users in _parts_of_modules(new) for part in users}
        sizes: dict[tuple[str, str], list[int]] = {}
        for name, users in _parts_of_modules(old):
            params, weights = _sizes(old.get_submodule(name), len(users))
            for part in users:
                if (name, part) in kept:
                    continue
                kind, label, level = _describe(old, new, name, part)
                total = sizes.setdefault((kind, f"{names[part]} {label}"), [0, 0])
                total[0] += params
                total[1] += weights * pixels[level]
        yield from (Removed(*key, *total) for key, total in sizes.items())


def _sizes(module: nn.Module, parts: int) -> tuple[int, int]:
    """Parameters, and weights of convolutions, of one part."""
    params = sum(p.numel() for p in module.parameters())
    weights = sum(m.weight.numel() for m in module.modules() if isinstance(m, PartConv2d))
    return params // parts, weights // parts


def _describe(old: Fabric, new: Fabric, name: str, part: int) -> tuple[str, str, int]:
    """Kind and name of what removing a sub-module from a part means, and its output's level."""
    path = name.split(".")
    if path[0] == "reduce":
        level = int(path[1])
        return "reduce", f"1/{4 << level}", level
    cell = cast(Cell, old.cells[path[1]])
    level = cell.row.level
    if path[2] == "inputs":
        source = cell.row.inputs[int(path[3])]
        level += source.transform == "up"  # convolves before it upsamples
    if part not in new.plan.parts_of((cell.row.layer, cell.row.level)):
        return "cell", path[1], level
    if path[2] == "inputs":
        return "connection", f"{path[1]} {SLOTS[int(path[3])]}", level
    return "operation", f"{path[1]} edge {path[3]} {path[5]}", level
