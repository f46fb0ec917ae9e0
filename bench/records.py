"""Results of benchmarks: rows, the JSON files that hold them, and lines of text."""

from __future__ import annotations

import datetime
import json
import re
import subprocess
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from timing import Roofs, Spread

from pnfs.info import collect_info, cpu_name

RESULTS = Path(__file__).resolve().parent / "results"


@dataclass(frozen=True)
class Result:
    """One row of the JSON; bandwidth in 1e9 bytes per second, of the bytes that must move.

    percent_of_copy, percent_of_fma: of the roofs; the larger one is the roof that limits.
    traffic: way -> calls and bytes that it really makes, as `pnfs.count_costs` counts them; "ours"
        and those of the other ways that can be counted.
    ratio: how many times longer another way takes: the median over rounds in which both ran.
    """

    op: str
    case: str
    backend: str
    device: str
    time: Spread
    error: float
    gb_s: float
    percent_of_copy: float
    gflop_s: float
    percent_of_fma: float
    images: int | None
    peak_mib: float | None
    traffic: dict[str, tuple[int, int]]
    against: dict[str, Spread]
    ratio: dict[str, float]
    skipped: dict[str, str]


def commit() -> str:
    """The commit that was measured, with "-dirty" where the tree differs from it."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    done = subprocess.run(command, cwd=RESULTS.parent, capture_output=True, text=True)
    return done.stdout.strip() or "unknown"


def versions() -> dict[str, str]:
    """Of everything that decides a time; packages that are compared with where installed."""
    found = collect_info().versions
    for package in ("onnxruntime", "openvino"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def describe(device: str, roofs: Roofs) -> dict[str, Any]:
    """What a results file says about where its rows come from."""
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else cpu_name(),
        "threads": torch.get_num_threads(),
        "versions": versions(),
        "commit": commit(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "copy_gb_s": roofs.bytes / 1e9,
        "fma_gflop_s": roofs.flops / 1e9,
    }


def file_name(content: dict[str, Any]) -> str:
    """<device>-<torch>-<commit>.json."""
    key = f"{content['device']}-{torch.__version__}-{content['commit']}"
    return f"{re.sub(r'[^A-Za-z0-9.]+', '-', key).lower()}.json"


def save(results: list[Result], roofs: dict[str, Roofs], folder: Path | None = None) -> list[Path]:
    """Write a file per device into `folder`, bench/results by default; rows of an earlier run under
    the same name stay unless measured again."""
    folder, paths = folder or RESULTS, []
    for device in sorted({result.device for result in results}):
        content = describe(device, roofs[device])
        path = folder / file_name(content)
        rows = {(r.op, r.case, r.backend): asdict(r) for r in results if r.device == device}
        if path.exists():
            old = json.loads(path.read_text(encoding="utf-8"))["results"]
            rows = {(r["op"], r["case"], r["backend"]): r for r in old} | rows
        content["results"] = [rows[key] for key in sorted(rows)]
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        paths.append(path)
    return paths


def table(results: list[Result]) -> list[str]:
    """The results as lines of text."""
    lines = []
    for r in results:
        rates = [f"{r.gb_s:.1f} GB/s = {r.percent_of_copy:.0f} % of copy"]
        if r.gflop_s:
            rates.append(f"{r.gflop_s:.1f} GFLOP/s = {r.percent_of_fma:.0f} % of FMA")
        if r.images:
            rates.append(f"{r.images / r.time.median_us * 1e6:.1f} images/s")
        ratios = [f"{value:.2f}x {name}" for name, value in r.ratio.items()]
        times = f"{r.time.median_us:.1f} us ({r.time.p20_us:.1f} to {r.time.p80_us:.1f})"
        lines.append(
            f"{r.op} {r.case} [{r.backend}]: {times}, {', '.join(rates)}; "
            f"{', '.join(ratios)}; error {r.error:.1e}"
        )
        lines += [f"    without {name}: {reason}" for name, reason in r.skipped.items()]
    return lines
