"""Compare the search strategies on the demo, as the paper's Table II does on MPII.

    python docs/make_search_table.py [--out runs/search-table] [--seeds 0 1 2]

Trains preset `tiny` with every strategy and seed, one run after another, and writes
search_table.json and the table between the markers of search.md. Runs that are there already are
not repeated; one that was stopped (Ctrl-C, SIGTERM, a crash) is resumed. `--from-json` writes the
table anew from search_table.json and trains nothing.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from pnfs.checkpoint import MODEL
from pnfs.config import load_config
from pnfs.data import load_people
from pnfs.info import cpu_name
from pnfs.runlog import METRICS
from pnfs.runtime import keep_heap
from pnfs.search import ARCHITECTURE
from pnfs.statefile import write_json
from pnfs.train import train

DOCS = Path(__file__).resolve().parent
PRESET = "tiny"
STRATEGIES = ("sync", "random", "first-order", "second-order", "gumbel")
BEGIN, END = "<!-- table: make_search_table.py -->", "<!-- end of table -->"


def run_all(out: Path, seeds: Sequence[int]) -> list[dict[str, Any]]:
    """Train what is missing; one row per run, or those until a signal stopped the work."""
    rows = []
    for seed in seeds:
        for strategy in STRATEGIES:
            folder = out / f"{strategy}-{seed}"
            if not is_complete(folder):
                settings = [
                    f"search.strategy={strategy}",
                    f"search.seed={seed}",
                    f"train.seed={seed}",
                    f"data.root={json.dumps(str((out / 'data').resolve()))}",
                ]
                config = load_config(PRESET, settings)
                result = train(config, folder, resume=folder.exists(), quiet=True)
                if result.stopped_by is not None:
                    print(f"stopped in {folder}; call again to go on", flush=True)
                    return rows
            rows.append(row_of(folder, strategy, seed))
            print(json.dumps(rows[-1]), flush=True)
    return rows


def is_complete(folder: Path) -> bool:
    """Whether the run has been scored: preset tiny is scored once, at its end."""
    return (folder / ARCHITECTURE).exists() and (folder / MODEL).exists()


def row_of(folder: Path, strategy: str, seed: int) -> dict[str, Any]:
    """AP, seconds per step (median over the rows of metrics.jsonl) and entropies of a run."""
    rows = [json.loads(line) for line in (folder / METRICS).read_text().splitlines()]
    score = [row for row in rows if row["event"] == "eval"][-1]
    batch = load_config(PRESET).train.batch_size
    rates = [row["images_per_second"] for row in rows if row["event"] == "train"]
    return {
        "strategy": strategy,
        "seed": seed,
        "steps": score["step"],
        "AP": score["AP"],
        "AP50": score["AP50"],
        "seconds_per_step": round(batch / statistics.median(rates), 4),
        **entropies(folder / ARCHITECTURE),
    }


def entropies(path: Path) -> dict[str, float]:
    """Mean entropy of α's and of β's mixes over all fabrics, 1 for uniform ones."""
    parts = [
        part
        for fabric in json.loads(path.read_text())["fabrics"].values()
        for part in fabric["parts"].values()
    ]
    result = {}
    for name in ("alpha", "beta"):
        shares = [
            value / math.log(len(part[f"{name}_softmax"][0]))
            for part in parts
            for value in part[f"{name}_entropy"]
        ]
        result[f"{name}_entropy"] = round(statistics.fmean(shares), 4)
    return result


def table(content: dict[str, Any]) -> str:
    lines = [
        "| strategy | seeds | AP | AP, lowest to highest | seconds per step | minutes | "
        "entropy of α | entropy of β |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for strategy in STRATEGIES:
        rows = [row for row in content["runs"] if row["strategy"] == strategy]
        if not rows:
            continue
        scores = [100 * row["AP"] for row in rows]
        seconds = statistics.median(row["seconds_per_step"] for row in rows)
        cells = (
            f"`{strategy}`",
            str(len(rows)),
            spread(scores, 1),
            f"{min(scores):.1f} to {max(scores):.1f}",
            f"{seconds:.2f}",
            f"{seconds * rows[0]['steps'] / 60:.1f}",
            spread([row["alpha_entropy"] for row in rows], 2),
            spread([row["beta_entropy"] for row in rows], 2),
        )
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def spread(values: Sequence[float], digits: int) -> str:
    """Mean ± standard deviation of the sample."""
    mean = f"{statistics.fmean(values):.{digits}f}"
    return mean if len(values) < 2 else f"{mean} ± {statistics.stdev(values):.{digits}f}"


def caption(content: dict[str, Any]) -> str:
    config = load_config(PRESET).train
    steps, threads = content["runs"][0]["steps"], content["threads"]
    lines = (
        f"Preset `{PRESET}`: {content['train_people']} drawn people, scored on "
        f"{content['val_people']} unseen ones;",
        f"{config.epochs} epochs of batch {config.batch_size}, {steps} steps; {threads} "
        f"thread{'s' * (threads > 1)} of {content['device']}, torch {content['torch']}.",
        "AP in percent, mean ± standard deviation over seeds of the initial weights, the order of",
        "the data and the search. Entropies are means over all mixes of all fabrics, 1 for uniform",
        "ones. Made by `python docs/make_search_table.py`.",
    )
    return "\n".join(lines)


def write_table(content: dict[str, Any], page: Path) -> None:
    before, _, rest = page.read_text(encoding="utf-8").partition(BEGIN)
    _, _, after = rest.partition(END)
    text = f"{BEGIN}\n{table(content)}\n\n{caption(content)}\n{END}"
    page.write_text(before + text + after, encoding="utf-8")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=DOCS.parent / "runs" / "search-table")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--from-json", action="store_true", help="train nothing")
    options = parser.parse_args(argv)
    path = DOCS / "search_table.json"
    if not options.from_json:
        keep_heap()
        runs = run_all(options.out, options.seeds)
        if len(runs) < len(options.seeds) * len(STRATEGIES):
            raise SystemExit(1)
        config = load_config(PRESET, [f"data.root={json.dumps(str(options.out / 'data'))}"])
        skeleton = config.model.skeleton_table
        write_json(
            path,
            {
                "device": cpu_name(),
                "threads": torch.get_num_threads(),
                "torch": torch.__version__,
                "train_people": len(load_people(config.data, skeleton, "train")),
                "val_people": len(load_people(config.data, skeleton, "val")),
                "runs": runs,
            },
        )
    write_table(json.loads(path.read_text(encoding="utf-8")), DOCS / "search.md")


if __name__ == "__main__":
    main()
