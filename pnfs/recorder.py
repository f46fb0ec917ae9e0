"""What a training run reads from and writes into its folder.

Rank 0 alone does it, so no other process needs the disk; what fails there fails on every rank.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pnfs import distributed
from pnfs.checkpoint import (
    MODEL,
    Checkpoint,
    drop_checkpoints_after,
    load_checkpoint,
    save_checkpoint,
    save_weights,
)
from pnfs.config import Config
from pnfs.runlog import Metrics, Screen, discard_run, open_run, write_record
from pnfs.search import ARCHITECTURE, find_fabrics, save_architecture

POSITION = "metrics_position"  # in a checkpoint's state: the length of metrics.jsonl at its moment


class Recorder:
    """The run folder and the screen of one run; every method is called on every rank.

    Used as a context: until its end the folder belongs to this run.
    """

    def __init__(
        self, config: Config, out: Path, *, resume: bool, overwrite: bool, quiet: bool
    ) -> None:
        """Claim the folder; nothing in it changes before `begin`.

        Raises:
            PnfsError: see `open_run`.
        """
        self.config, self.out, self.resume = config, out, resume
        self._quiet = quiet or distributed.rank() > 0
        self._open = contextlib.ExitStack()
        self._metrics: Metrics | None = None
        self._screen: Screen | None = None

        def claim() -> None:
            self._open.enter_context(open_run(out, resume=resume, overwrite=overwrite))

        distributed.on_first(claim)

    def __enter__(self) -> Recorder:
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    def restore(self) -> Checkpoint | None:
        """The newest whole checkpoint; None for a fresh run or one that has none yet.

        Raises:
            PnfsError: there are checkpoints, and none can be read.
        """
        if not self.resume:
            return None
        return distributed.from_first(lambda: load_checkpoint(self.out, warn=self._print))

    def begin(
        self, checkpoint: Checkpoint | None, *, device: torch.device, step: int, total: int
    ) -> None:
        """Everything that can be refused has been: discard an older run, and what is newer than
        `checkpoint`; `step` of `total` steps are made."""

        def open_files() -> None:
            if not self.resume:
                discard_run(self.out)
            drop_checkpoints_after(self.out, None if checkpoint is None else checkpoint.path)
            world = distributed.world()
            write_record(self.out, self.config, device=str(device), world=world, step=step)
            position = 0 if checkpoint is None else checkpoint.training[POSITION]
            board = self.config.train.tensorboard
            self._metrics = Metrics(self.out, position=position, step=step, tensorboard=board)
            self._open.callback(self._metrics.close)

        distributed.on_first(open_files)
        self._screen = Screen(total, step, quiet=self._quiet)
        self._open.callback(self._screen.close)

    def _print(self, text: str) -> None:
        if not self._quiet:
            print(text)

    def line(self, text: str) -> None:
        """A line on the screen that stays."""
        assert self._screen is not None
        self._screen.line(text)

    def update(self, step: int, status: str) -> None:
        """The screen after a step."""
        assert self._screen is not None
        self._screen.update(step, status)

    def row(self, event: str, make: Callable[[], Mapping[str, Any]]) -> None:
        """A row of metrics.jsonl, made on rank 0."""

        def write() -> None:
            assert self._metrics is not None
            self._metrics.write(event, make())

        distributed.on_first(write)

    def save(self, model: nn.Module, training: Mapping[str, Any], *, step: int, epoch: int) -> None:
        """A checkpoint; see `save_checkpoint`."""

        def write() -> None:
            assert self._metrics is not None
            save_checkpoint(
                self.out,
                step=step,
                epoch=epoch,
                model=model,
                training={**training, POSITION: self._metrics.position()},
                config=self.config,
            )

        distributed.on_first(write)

    def keep_best(self, model: nn.Module, facts: Mapping[str, Any]) -> None:
        """model.safetensors, and the architecture where there is one."""

        def write() -> None:
            save_weights(self.out / MODEL, model, self.config, facts)
            if find_fabrics(model):
                source = {"run": str(self.out), "strategy": self.config.search.strategy, **facts}
                save_architecture(model, self.out / ARCHITECTURE, source)

        distributed.on_first(write)
