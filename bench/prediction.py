"""What an H200 should take, from bytes, operations and launches, beside what one took.

A prediction is counted, not tuned: bytes over the memory's rate, operations over the unit's, each
launch from Python at its price. A step in a CUDA graph takes the larger of the first two, one
without at least its launches. Where no results file of such a GPU holds the case, it says so.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch

import pnfs
from pnfs.costs import Costs

GPU = "H200"
BYTES_PER_SECOND = 4.3e12  # a copy, read plus written
FLOPS_PER_SECOND = {"fp32": 67e12, "bf16": 989e12}
SECONDS_PER_LAUNCH = 4e-6
PRESET, SIZE, BATCHES = "ours-1", (256, 192), (24, 128, 512)

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Prediction:
    """Seconds that each of the three needs alone."""

    memory: float
    arithmetic: float
    launching: float

    @property
    def replayed(self) -> float:
        """In a CUDA graph."""
        return max(self.memory, self.arithmetic)

    @property
    def launched(self) -> float:
        return max(self.replayed, self.launching)


def predict(bytes_: float, flops: float, launches: int, precision: str) -> Prediction:
    return Prediction(
        bytes_ / BYTES_PER_SECOND,
        flops / FLOPS_PER_SECOND[precision],
        launches * SECONDS_PER_LAUNCH,
    )


def steps() -> Iterator[tuple[str, str, Costs, Prediction]]:
    """(op, case, costs, prediction) of training steps and evaluation on the GPU's kernels."""
    model = pnfs.build_model(pnfs.load_config(PRESET, [f"model.input_size={list(SIZE)}"]).model)
    height, width = SIZE
    for op, mode, factor in (("training step", "train", 6), ("evaluation", "eval", 2)):
        for batch in (*(() if mode == "train" else (1,)), *BATCHES):
            for precision in ("fp32", "bf16"):
                low = precision == "bf16"
                where = "cuda" if torch.cuda.is_available() else "cpu"  # of the hollow tensors
                with torch.autocast(where, torch.bfloat16) if low else nullcontext():
                    costs = pnfs.count_costs(model, SIZE, batch, mode, device="cuda")
                flops = factor * costs.conv_macs * batch
                case = f"{PRESET} {height}x{width} batch {batch} {precision}"
                yield op, case, costs, predict(costs.bytes, flops, costs.launches, precision)


def measured(contents: Sequence[Row], op: str, case: str) -> tuple[float, float | None] | None:
    """Seconds that a GPU of this kind took: in a CUDA graph, and without one if that is known."""
    for content in contents:
        if GPU not in content["device"]:
            continue
        for row in content["results"]:
            if (row["op"], row["case"]) == (op, case):
                plain = row["against"].get("ours without graph")
                return row["time"]["median_us"] / 1e6, plain and plain["median_us"] / 1e6
    return None


def shown(found: float | None, predicted: float) -> str:
    """Measured milliseconds and how many times the predicted ones they are."""
    return "not measured" if found is None else f"{1e3 * found:.3g} ({found / predicted:.2f}×)"


def lines(contents: Sequence[Row]) -> list[str]:
    """The report's section."""
    text = [
        f"## Predicted for one {GPU}, and measured where one was there",
        "",
        f"{BYTES_PER_SECOND / 1e12:.1f} TB/s, {FLOPS_PER_SECOND['fp32'] / 1e12:.0f} TFLOP/s in "
        f"float32 and {FLOPS_PER_SECOND['bf16'] / 1e12:.0f} in bfloat16, "
        f"{1e6 * SECONDS_PER_LAUNCH:.0f} µs per launch from Python; launches and bytes as "
        '`count_costs(device="cuda")` counts them. Predicted in a CUDA graph: the larger of '
        "memory and arithmetic; without: of those and launching. What no GPU has shown says so.",
        "",
        "| step | launches | GB | memory ms | arithmetic ms | launching ms "
        "| in a graph: predicted | measured | without: predicted | measured |",
        "|---|---:|---:|---:|---:|---:|---:|---|---:|---|",
    ]
    calls: Mapping[str, Any] = {}
    for op, case, costs, guess in steps():
        calls = calls or costs.calls  # of the first: training at the smallest batch in float32
        found = measured(contents, op, case)
        graph, plain = (None, None) if found is None else found
        cells = (
            f"{op}, {case}",
            str(costs.launches),
            f"{costs.bytes / 1e9:.2f}",
            *(f"{1e3 * s:.3g}" for s in (guess.memory, guess.arithmetic, guess.launching)),
            f"{1e3 * guess.replayed:.3g}",
            shown(graph, guess.replayed),
            f"{1e3 * guess.launched:.3g}",
            shown(plain, guess.launched),
        )
        text.append("| " + " | ".join(cells) + " |")
    text += ["", *call_lines(calls), "", *kernel_lines(contents)]
    return text


def call_lines(calls: Mapping[str, Any]) -> list[str]:
    """Where the bytes of a training step go."""
    total = sum(traffic.bytes for traffic in calls.values())
    text = [
        f"Calls of a training step at batch {BATCHES[0]}, float32, that move 1 % or more:",
        "",
        "| call | launches | GB | predicted ms |",
        "|---|---:|---:|---:|",
    ]
    for name, traffic in sorted(calls.items(), key=lambda pair: -pair[1].bytes):
        if traffic.bytes >= 0.01 * total:
            seconds = traffic.bytes / BYTES_PER_SECOND
            text.append(
                f"| `{name}` | {traffic.launches} | {traffic.bytes / 1e9:.2f} "
                f"| {1e3 * seconds:.3g} |"
            )
    return text


def kernel_lines(contents: Sequence[Row]) -> list[str]:
    """The ops' benchmark cases: what must move, whatever device the case was counted on."""
    text = [
        "Ops, forward and backward in their benchmark's shapes:",
        "",
        "| op | case | MB | predicted µs | measured µs |",
        "|---|---|---:|---:|---|",
    ]
    seen: set[tuple[str, str]] = set()
    for content in contents:
        for row in content["results"]:
            key = row["op"], row["case"]
            whole = row.get("images") is not None or "float32" not in row["case"]
            if key in seen or whole or row["op"] == "folded_network":
                continue
            seen.add(key)
            seconds = row["time"]["median_us"] / 1e6
            guess = predict(row["gb_s"] * 1e9 * seconds, row["gflop_s"] * 1e9 * seconds, 1, "fp32")
            found = measured(contents, *key)
            took = None if found is None else found[0] * 1e3
            text.append(
                f"| {row['op']} | {row['case']} | {row['gb_s'] * 1e3 * seconds:.1f} "
                f"| {1e6 * guess.replayed:.3g} | {shown(took, guess.replayed * 1e3)} |"
            )
    return text
