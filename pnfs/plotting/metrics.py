"""Reading metrics.jsonl for pictures, whatever is missing in it."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pnfs.errors import PnfsError
from pnfs.runlog import METRICS

Series = tuple[list[float], list[float]]  # steps and values


def read_rows(path: str | Path) -> list[dict[str, Any]]:
    """Rows of `metrics.jsonl` (or the one in a run folder). The last line may be cut off, as after
    a crash.

    Raises:
        PnfsError: no such file, or a line other than the last that is not a JSON object.
    """
    path = Path(path)
    file = path / METRICS if path.is_dir() else path
    try:
        lines = file.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError as error:
        raise PnfsError(
            f"metrics {file}: cannot be read ({error.strerror or error}); "
            f"give a run folder or its {METRICS}"
        ) from None
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if isinstance(row, dict):
            rows.append(row)
        elif line.strip() and number < len(lines):
            raise PnfsError(f"metrics {file}: line {number} is not a JSON object; remove it")
    return rows


def series_of(rows: list[dict[str, Any]], name: str) -> Series:
    """Steps and values of one field, where it is a finite number."""
    points = [(number(row.get("step")), number(row.get(name))) for row in rows]
    kept = [(step, value) for step, value in points if step is not None and value is not None]
    return [step for step, _ in kept], [value for _, value in kept]


@dataclass(frozen=True)
class Curves:
    """One run's series: steps and finite values of the loss, the learning rate and every score."""

    loss: Series
    learning_rate: Series
    scores: dict[str, Series]


def read_curves(path: str | Path) -> Curves:
    """Read `metrics.jsonl` (or the one in a run folder).

    A row with `"event": "eval"` holds `step` and scores, any other `step`, `loss` and `lr`.
    Fields that are missing, null or not finite leave a gap.

    Raises:
        PnfsError: no such file, or a line other than the last that is not a JSON object.
    """
    curves = Curves(([], []), ([], []), {})
    for row in read_rows(path):
        _add(curves, row)
    return curves


def _add(curves: Curves, row: Mapping[str, Any]) -> None:
    """Sort one row's numbers into the series."""
    step = number(row.get("step"))
    if step is None:
        return
    if row.get("event") == "eval":
        names = [name for name in row if name not in ("step", "epoch", "seconds")]
        targets = [(name, curves.scores) for name in names]
    elif row.get("event") == "search":
        return  # about α and β: `pnfs.plotting.search`
    else:
        targets = [("loss", {"loss": curves.loss}), ("lr", {"lr": curves.learning_rate})]
    for name, series in targets:
        value = number(row.get(name))
        if value is not None and value >= 0:  # COCO's −1: nothing of this kind to score
            steps, values = series.setdefault(name, ([], []))
            steps.append(step)
            values.append(value)


def number(value: Any) -> float | None:
    """A finite number, or None for anything else."""
    usable = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if usable else None
