"""Turns bench/results/*.json into docs/performance.md with bar charts.

    pytest bench/ && python bench/report.py

Of several results of one device the newest counts, case by case, so that a part of the benchmarks
can be measured again; a file whose cases are gone is to be deleted. Nothing is typed by hand: a
figure that no file holds does not appear.
"""

from __future__ import annotations

import argparse
import json
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import prediction

ROOT = Path(__file__).resolve().parents[1]
RESULTS, DOCS = ROOT / "bench" / "results", ROOT / "docs"
WHOLE = (
    "training step", "evaluation", "photographs to keypoints", "training samples",
    "training from files",
)  # fmt: skip
OURS, OTHERS = "#1f6f8b", "#b9c4c9"

Row = dict[str, Any]


def newest(folder: Path) -> list[dict[str, Any]]:
    """Of every device, by name, the result with the most cases, each of its rows the newest of all
    its results; "measured" are the runs that rows are from, (date, commit, number of rows)."""
    found: dict[str, list[dict[str, Any]]] = {}
    for path in folder.glob("*.json"):
        content = json.loads(path.read_text(encoding="utf-8"))
        if not content.get("dry_run"):
            found.setdefault(content["device"], []).append(content)
    return [merged(found[device]) for device in sorted(found)]


def merged(contents: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Results of one device as one; see `newest`."""
    rows: dict[tuple[str, ...], tuple[tuple[str, str], Row]] = {}
    for content in sorted(contents, key=lambda content: content["date"]):
        for row in content["results"]:
            run = content["date"], content["commit"]
            rows[row["op"], row["case"], row["backend"]] = run, row
    counts = Counter(run for run, _ in rows.values())
    widest = max(contents, key=lambda content: (len(content["results"]), content["date"]))
    ordered = sorted(rows.values(), key=lambda item: (item[1]["op"], item[1]["case"]))
    return {
        **widest,
        "results": [row for _, row in ordered],
        "measured": [(*run, count) for run, count in sorted(counts.items())],
    }


def is_whole(row: Row) -> bool:
    return row["op"] in WHOLE


def figures(value: float) -> str:
    """Three of them, or all before the point."""
    return f"{value:.3g}" if value < 100 else f"{value:.0f}"


def milliseconds(microseconds: float) -> str:
    return figures(microseconds / 1e3)


def limit(row: Row) -> str:
    """Achieved rate and share of the roof that is nearer."""
    flops = row.get("percent_of_fma") or 0
    if flops > row["percent_of_copy"]:
        return f"{row['gflop_s']:.0f} GFLOP/s, {flops:.0f} %"
    return f"{row['gb_s']:.1f} GB/s, {row['percent_of_copy']:.0f} %"


def table(rows: Sequence[Row]) -> list[str]:
    lines = [
        "| what | case | backend | ms | p20 to p80 | rate, % of roof | times longer, same run |",
        "|---|---|---|---:|---:|---:|---|",
    ]
    for row in rows:
        time = row["time"]
        ratios = ", ".join(f"{name} {value:.2f}" for name, value in row["ratio"].items())
        cells = (
            row["op"],
            row["case"],
            row["backend"],
            milliseconds(time["median_us"]),
            f"{milliseconds(time['p20_us'])} to {milliseconds(time['p80_us'])}",
            limit(row),
            ratios or "–",
        )
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def chart_whole(rows: Sequence[Row], path: Path) -> None:
    """Images per second of every way, one panel per case."""
    figure, panels = plt.subplots(
        len(rows), 1, figsize=(8, sum(0.9 + 0.32 * len(r["against"]) for r in rows)),
        squeeze=False, layout="constrained",
    )  # fmt: skip
    for panel, row in zip(panels[:, 0], rows, strict=True):
        times = {name: other["median_us"] for name, other in row["against"].items()}
        times["pnfs"] = row["time"]["median_us"]
        names = sorted(times, key=lambda name: -times[name])
        rates = [row["images"] * 1e6 / times[name] for name in names]
        bars = panel.barh(names, rates, color=[OURS if n == "pnfs" else OTHERS for n in names])
        panel.bar_label(bars, [figures(rate) for rate in rates], padding=3, fontsize=8)
        panel.set_title(f"{row['op']}: {row['case']}", fontsize=9, loc="left")
        panel.set_xlabel("images per second", fontsize=8)
        finish(panel, max(rates))
    figure.savefig(path, dpi=150)
    plt.close(figure)


def telling(rows: Sequence[Row]) -> list[Row]:
    """At most three float32 rows of every op, those that take longest."""
    chosen: dict[str, list[Row]] = {}
    for row in sorted(rows, key=lambda row: -row["time"]["median_us"]):
        of_op = chosen.setdefault(row["op"], [])
        if len(of_op) < 3 and "float16" not in row["case"] and ratios_of(row):
            of_op.append(row)
    return [row for op in sorted(chosen) for row in chosen[op]]


def ratios_of(row: Row) -> dict[str, float]:
    """Ratios to the reference and to its compiled form."""
    return {way: row["ratio"][way] for way in ("torch", "compile") if way in row["ratio"]}


def chart_ops(rows: Sequence[Row], path: Path) -> None:
    """How many times longer the reference and its compiled form take; 1 is ours."""
    rows = telling(rows)
    figure, panel = plt.subplots(figsize=(8, 1.2 + 0.34 * len(rows)), layout="constrained")
    height = 0.38
    for index, (way, colour, label) in enumerate(
        (("torch", OTHERS, "reference"), ("compile", "#5d7a85", "torch.compile of it"))
    ):
        pairs = [(i, ratios_of(row)[way]) for i, row in enumerate(rows) if way in ratios_of(row)]
        places, values = [i + (index - 0.5) * height for i, _ in pairs], [v for _, v in pairs]
        bars = panel.barh(places, values, height, color=colour, label=label)
        panel.bar_label(bars, [f"{value:.1f}" for value in values], padding=3, fontsize=7)
    panel.axvline(1, color=OURS, linewidth=1.5, label="pnfs")
    names = [f"{row['op']}  {row['case'].replace(' forward+backward', '')}" for row in rows]
    panel.set_yticks(range(len(rows)), names)
    panel.set_ylim(len(rows) - 0.4, -0.6)
    panel.set_xscale("log")
    panel.set_xlabel("times longer than pnfs (logarithmic)", fontsize=8)
    panel.legend(fontsize=8, frameon=False, loc="lower right")
    panel.tick_params(labelsize=7)
    panel.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def finish(panel: Any, largest: float) -> None:
    panel.set_xlim(0, 1.12 * largest)
    panel.tick_params(labelsize=8)
    panel.spines[["top", "right"]].set_visible(False)


def section(content: dict[str, Any], images: Path) -> list[str]:
    """The text of one device; draws its charts."""
    rows: list[Row] = content["results"]
    key = re.sub(r"[^a-z0-9]+", "-", content["device"].lower()).strip("-")
    versions = ", ".join(f"{name} {version}" for name, version in content["versions"].items())
    runs = content["measured"]
    commits = ", ".join(
        f"commit `{commit}`, {date[:10]}" + (f" ({count} rows)" if len(runs) > 1 else "")
        for date, commit, count in runs
    )
    lines = [
        f"## {content['device']}",
        "",
        f"{content['threads']} threads; {commits}; "
        f"{versions}. Measured roofs: copy {content['copy_gb_s']:.0f} GB/s, "
        f"float32 multiply-add {content['fma_gflop_s']:.0f} GFLOP/s.",
        "",
    ]
    for title, chosen, draw in (
        ("Whole models", [row for row in rows if is_whole(row)], chart_whole),
        ("Ops", [row for row in rows if not is_whole(row)], chart_ops),
    ):
        if chosen:
            picture = images / f"speed-{key}-{title.split()[0].lower()}.png"
            draw(chosen, picture)
            lines += [f"### {title}", "", *table(chosen), ""]
            lines += [f"![{title} on {content['device']}](images/{picture.name})", ""]
    return lines


HEAD = """# Performance

Written by `python bench/report.py` from `bench/results/`; `pytest bench/` measures. Every output
was compared with the float64 reference before it was timed. Times are medians over rounds in which
all ways ran in turn, ratios medians of the rounds' ratios: above 1, pnfs is that many times faster.
`torch` is the op's plain PyTorch reference, `compile` torch.compile of it; `eager`, `channels-last`
and `folded` are the published network as plain modules (`bench/plain_model.py`). Rates count the
bytes that must at least move, or the multiply-adds that the model needs, against the roof that is
nearer; small maps stay in the caches and pass 100 % of the memory's, and an evaluation pass that of
float32's multiply-adds where folding has made some needless or the operands are bfloat16. The heap
is kept for every contestant (`pnfs.runtime.keep_heap`), as `pnfs train`, `eval` and `predict` do.
"""


def write_report(results: Path = RESULTS, docs: Path = DOCS, *, predicted: bool = True) -> Path:
    """Write docs/performance.md and its charts; returns its path.

    Args:
        predicted: with a section of `prediction.py`.

    Raises:
        SystemExit: there is no result.
    """
    contents = newest(results)
    if not contents:
        raise SystemExit(f"error: {results} holds no results; run pytest bench/ first")
    (docs / "images").mkdir(parents=True, exist_ok=True)
    lines = [HEAD]
    for content in contents:
        lines += section(content, docs / "images")
    if predicted:
        lines += prediction.lines(contents)
    path = docs / "performance.md"
    path.write_text("\n".join(lines).rstrip() + "\n", encoding="utf-8")
    return path


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    print(write_report())
