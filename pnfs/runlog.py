"""The run folder: who may write it, what stands beside the checkpoints, and what the screen shows.

RUN/config.yaml      the resolved configuration
RUN/run.json         one entry per start: command line, git commit, versions, device, configuration
RUN/metrics.jsonl    one JSON object per line: {"event": "train" or "eval", "step", …}
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from pnfs.checkpoint import MODEL, is_run
from pnfs.config import Config, dump_config, load_config, override_config, parse_config
from pnfs.errors import PnfsError
from pnfs.info import package_versions
from pnfs.search import ARCHITECTURE
from pnfs.statefile import is_unfinished, reason, sync_folder, write_json, write_text

CONFIG, RUN, METRICS, LOCK = "config.yaml", "run.json", "metrics.jsonl", ".lock"


def open_run(out: Path, *, resume: bool, overwrite: bool) -> IO[str]:
    """Claim a run folder for writing; it stays claimed until the returned lock file is closed.

    A fresh run needs an empty or absent folder, or one with a run and `overwrite`; nothing is
    removed here (see `discard_run`). The lock dies with its process, so a killed run leaves no
    stale one.

    Raises:
        PnfsError: the folder is not empty, not a run, in use by another process, or unwritable.
    """
    if resume and not is_run(out):
        raise PnfsError(
            f"{out}: no run to resume here (no {CONFIG} and {RUN}); drop --resume to start one"
        )
    try:
        out.mkdir(parents=True, exist_ok=True)
        occupied = any(entry.name != LOCK and not is_unfinished(entry) for entry in out.iterdir())
        if occupied and not resume and not overwrite:
            raise PnfsError(
                f"{out}: not empty; add --resume to continue the run in it, --overwrite to discard "
                "it, or choose another --out"
            )
        if occupied and overwrite and not resume and not is_run(out):
            raise PnfsError(f"{out}: holds files that no run wrote; choose another --out")
        lock = (out / LOCK).open("a+", encoding="utf-8")
    except OSError as error:
        raise PnfsError(
            f"{out}: cannot be written ({reason(error)}); choose another --out"
        ) from None
    _lock(lock, out)
    for entry in filter(is_unfinished, out.iterdir()):
        entry.unlink(missing_ok=True)
    return lock


def discard_run(out: Path) -> None:
    """Remove what a run wrote into `out`, and nothing else. Until it is gone it can be resumed, or
    discarded again: what marks the folder as a run's goes last."""
    for folder in ("checkpoints", "tensorboard"):
        shutil.rmtree(out / folder, ignore_errors=True)
    for name in (METRICS, MODEL, ARCHITECTURE, CONFIG, RUN):
        (out / name).unlink(missing_ok=True)


def _lock(lock: IO[str], out: Path) -> None:
    try:
        import fcntl
    except ImportError:  # no POSIX locks on this platform
        return
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.seek(0)
        holder = lock.read().strip() or "unknown"
        lock.close()
        raise PnfsError(
            f"{out}: in use by another training process ({holder}); wait for it or choose "
            "another --out"
        ) from None
    except OSError:
        return  # a file system without locks
    lock.truncate(0)
    lock.write(f"pid {os.getpid()} on {platform.node()}")
    lock.flush()


def run_config(run: Path, overrides: tuple[str, ...] | list[str] = ()) -> Config:
    """The configuration that a run was started with, with `overrides` on top.

    Raises:
        PnfsError: `run` is not a run folder.
    """
    if (run / CONFIG).is_file():
        return load_config(run / CONFIG, overrides)
    starts = _starts(run)  # a run that was killed before it wrote config.yaml has it there
    if not starts or "config" not in starts[-1]:
        raise PnfsError(
            f"{run}: not a run folder (no {CONFIG}); give one that `pnfs train --out` wrote"
        )
    return override_config(parse_config(starts[-1]["config"], where=str(run / RUN)), overrides)


def _starts(run: Path) -> list[dict[str, Any]]:
    """The entries of run.json; none if it cannot be read."""
    try:
        starts: list[dict[str, Any]] = json.loads((run / RUN).read_text(encoding="utf-8"))["starts"]
    except (ValueError, KeyError, OSError):
        return []
    return starts


def write_record(out: Path, config: Config, *, device: str, world: int, step: int) -> None:
    """Write config.yaml and add this start to run.json."""
    starts = _starts(out)
    starts.append(
        {
            "command": sys.argv,
            "step": step,
            "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "preset": config.preset,
            "git_commit": git_commit(),
            "device": device,
            "processes": world,
            "versions": package_versions(),
            "config": config.model_dump(mode="json"),
        }
    )
    write_json(out / RUN, {"starts": starts})  # first: it marks the folder as a run's (`is_run`)
    write_text(out / CONFIG, dump_config(config))


def git_commit() -> str | None:
    """Commit of the package's source tree, `+changes` if it differs from it; None outside git."""
    root = Path(__file__).resolve().parent
    try:
        say = ["git", "-C", str(root)]
        commit = subprocess.run(
            [*say, "rev-parse", "HEAD"], capture_output=True, text=True, timeout=10
        )
        status = subprocess.run(
            [*say, "status", "--porcelain", "."], capture_output=True, text=True, timeout=10
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    if commit.returncode:
        return None
    return commit.stdout.strip() + ("+changes" if status.stdout.strip() else "")


class Metrics:
    """metrics.jsonl, and TensorBoard's event files if asked for.

    `position` is flushed to disk before a checkpoint stores it; a resumed run cuts the file there,
    so that rows of steps that are taken again do not stand in it twice. TensorBoard hides what it
    has of steps after `step`.
    """

    def __init__(
        self, out: Path, *, position: int = 0, step: int = 0, tensorboard: bool = False
    ) -> None:
        self._path = out / METRICS
        with self._plain_errors():
            self._file = self._path.open("ab")
            if self._file.tell() > position:
                self._file.truncate(position)
                self._file.seek(0, os.SEEK_END)
        sync_folder(out)
        self._board = _summary_writer(out / "tensorboard", step + 1) if tensorboard else None

    @contextlib.contextmanager
    def _plain_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise PnfsError(
                f"{self._path}: cannot be written ({reason(error)}); free disk space or choose "
                "another --out"
            ) from None

    def write(self, event: str, values: Mapping[str, Any]) -> None:
        """Append one row. `values` holds `step` and `epoch`; numbers go to TensorBoard too.

        A number that is not finite becomes null: JSON has no NaN.
        """
        finite = {
            name: None if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in values.items()
        }
        row = json.dumps({"event": event, **finite}) + "\n"
        with self._plain_errors():
            self._file.write(row.encode())
            self._file.flush()
        if self._board is not None:
            for name, value in finite.items():
                if isinstance(value, int | float) and name not in ("step", "epoch"):
                    self._board.add_scalar(f"{event}/{name}", value, values["step"])

    def position(self) -> int:
        """Length of the file in bytes, all of it on disk."""
        with self._plain_errors():
            self._file.flush()
            os.fsync(self._file.fileno())
            return self._file.tell()

    def close(self) -> None:
        with contextlib.suppress(OSError):  # of a row that did not fit on the disk, told already
            self._file.close()
        if self._board is not None:
            self._board.close()


def _summary_writer(folder: Path, first_step: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise PnfsError(
            "train.tensorboard: the package tensorboard is not installed; pip install 'pnfs[log]'"
        ) from None
    return SummaryWriter(str(folder), purge_step=first_step)


class Screen:
    """What a training run shows: a live bar on a terminal, else a plain line every few seconds."""

    def __init__(
        self, total_steps: int, step: int, *, quiet: bool = False, every: float = 10.0
    ) -> None:
        self._total = total_steps
        self._every = every
        self._quiet = quiet
        self._last = 0.0
        self._bar: Any = None
        if not quiet and sys.stdout.isatty():
            from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

            columns = (
                "{task.description}",
                BarColumn(),
                TextColumn("{task.completed}/{task.total}"),
            )
            self._bar = Progress(
                *columns, TimeRemainingColumn(), TextColumn("{task.fields[status]}")
            )
            self._task = self._bar.add_task("train", total=total_steps, completed=step, status="")
            self._bar.start()

    def update(self, step: int, status: str) -> None:
        """After a step; `status` is loss, rate and times in a few words."""
        if self._quiet:
            return
        if self._bar is not None:
            self._bar.update(self._task, completed=step, status=status)
        elif time.monotonic() - self._last >= self._every or step == self._total:
            self._last = time.monotonic()
            print(f"step {step}/{self._total}  {status}", flush=True)

    def line(self, text: str) -> None:
        """A line that stays."""
        if self._quiet:
            return
        if self._bar is not None:
            self._bar.console.print(text, highlight=False, markup=False)
        else:
            print(text, flush=True)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
