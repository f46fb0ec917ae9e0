"""The one training loop: one process or many, full or mixed precision, stopped and resumed at will.

`python -m pnfs.train` is `pnfs train`; without arguments it trains the demo's data and preset.

What decides the next weights is either in the checkpoint (weights, optimiser, random states,
strategy, position in the data) or a pure function of the step (learning rate, data order and
augmentation), so a resumed run continues bit for bit on the CPU.
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch

from pnfs import distributed
from pnfs.backbones.weights import load_backbone_weights
from pnfs.checkpoint import (
    Checkpoint,
    find_weights,
    load_weights,
    random_state,
    seed_random,
    set_random_state,
)
from pnfs.config import Config
from pnfs.data import Batch
from pnfs.data.prefetch import side_for
from pnfs.data.training import TrainingData
from pnfs.errors import PnfsError
from pnfs.evaluation import evaluate
from pnfs.evaluation.pckh import PCKH_10, PCKH_50
from pnfs.kernels.triton import tuning
from pnfs.model import build_model
from pnfs.recorder import Recorder
from pnfs.runtime import StoppedBySignal, StopSignals, select_device
from pnfs.schedule import architecture_learning_rate, learning_rate
from pnfs.search import Monitor, build_strategy
from pnfs.statefile import read_tensors
from pnfs.steps import Clock, Stepper

LOG_EVERY = 20  # steps between rows of metrics.jsonl
MAIN_METRICS = ("AP", PCKH_50)  # what "best" means: the first that the evaluation gives
SHOWN_METRICS = ("AP", "AP50", "AP75", "AR", PCKH_50, PCKH_10)
ANOTHER_RANK = "a signal to another process"


@dataclass
class Progress:
    """Where a run stands, beside its position in the data; stored in every checkpoint.

    Attributes:
        step: optimiser steps made, skipped ones included.
        skipped_steps: steps without a finite loss and gradient; nothing was updated in them.
        nonfinite_in_a_row: how many of them were the last ones.
        skipped_samples: broken ones that were left out, on all ranks.
        best: best AP or PCKh so far.
        logged_step: step of the last training row of metrics.jsonl.
        window_loss, window_steps: sum of the losses since then.
    """

    step: int = 0
    skipped_steps: int = 0
    nonfinite_in_a_row: int = 0
    skipped_samples: int = 0
    best: float | None = None
    logged_step: int = 0
    window_loss: float = 0.0
    window_steps: int = 0


@dataclass(frozen=True)
class TrainResult:
    """What a finished (or stopped) run leaves.

    Attributes:
        run: the run folder.
        step: optimiser steps made.
        metrics: of the last evaluation in this process; empty if there was none.
        best: best AP or PCKh so far.
        stopped_by: name of the signal (or `stop_at`) that ended the run early, else None.
        seconds: wall time of this process.
    """

    run: Path
    step: int
    metrics: dict[str, float]
    best: float | None
    stopped_by: str | None
    seconds: float


def train(
    config: Config,
    out: str | Path,
    *,
    resume: bool = False,
    overwrite: bool = False,
    device: str = "auto",
    quiet: bool = False,
    stop_at: int | None = None,
) -> TrainResult:
    """Train a model and leave a run folder.

    Args:
        config: resolved; when resuming, that of the run (see `runlog.run_config`).
        out: the run folder; must be empty or absent unless `resume` or `overwrite`.
        resume: continue from the newest whole checkpoint (from the start if there is none yet).
        overwrite: discard the run that is in `out`.
        device: `auto`, `cpu`, `cuda` or `cuda:N`; under torchrun each process takes its own GPU.
        quiet: print nothing.
        stop_at: checkpoint and leave after this many optimiser steps in all, as SIGTERM would.

    Raises:
        PnfsError: anything that the user can fix, and a loss that stays non-finite.
    """
    tuned = tuning.tuned() if config.train.tune_kernels else contextlib.nullcontext()
    with (
        tuned,
        distributed.group(select_device(device)) as own_device,
        Recorder(config, Path(out), resume=resume, overwrite=overwrite, quiet=quiet) as recorder,
    ):
        return _Trainer(config, recorder, own_device).run(stop_at)


class _Trainer:
    def __init__(self, config: Config, recorder: Recorder, device: torch.device) -> None:
        self.started = time.monotonic()
        self.config, self.recorder, self.device = config, recorder, device
        self.strategy = build_strategy(config)
        self.data = TrainingData(config)
        self.loader, self.people, self.held_out = (
            self.data.loader,
            self.data.people,
            self.data.held_out,
        )
        self.steps_per_epoch = -(-len(self.loader) // config.train.accumulate)
        self.total_steps = self.steps_per_epoch * config.train.epochs

        seed_random(config.train.seed)  # equal on all ranks, and so are the models
        self.model = build_model(config.model).to(device)
        self.progress = Progress()
        self.checkpoint = recorder.restore()
        self.stepper = distributed.together(self._make_stepper)
        if self.checkpoint is not None:
            self._load_checkpoint(self.checkpoint)
        self.stepper.connect()
        prepare = partial(Batch.prepared, device=self.device, **self.stepper.image_settings)
        self.data.prefetch(prepare, side_for(self.device))

        self.monitor = Monitor(self.model)
        self.clock = Clock()
        self.signals = StopSignals()
        self.asked_to_stop = False  # by a signal to any rank, before the end of the last step
        self.last_metrics: dict[str, float] = {}

    def _make_stepper(self) -> Stepper:
        """With the model as a fresh run starts, unless a checkpoint is to be loaded."""
        fresh = self.checkpoint is None
        stepper = Stepper(self.config, self.model, self.strategy, self.device, fresh=fresh)
        if fresh:
            self._load_start()
        return stepper

    def _load_start(self) -> None:
        """The weights that a fresh run starts from, where the configuration names some."""
        backbone, whole = self.config.model.backbone_weights, self.config.train.weights
        if whole:
            path = find_weights(whole)
            load_weights(self.model, read_tensors(path), where=f"train.weights {path}")
        elif backbone:
            load_backbone_weights(self.model.backbone, backbone)  # type: ignore[arg-type]

    # -- the run ---------------------------------------------------------------------------------

    def run(self, stop_at: int | None) -> TrainResult:
        config, progress, loader = self.config, self.progress, self.loader
        self.recorder.begin(
            self.checkpoint,
            device=self.device,
            step=progress.step,
            total=progress.step + self.total_steps - self._position(),
        )
        stopped: str | None = None
        self._say_start()
        with self.signals:
            while loader.epoch < config.train.epochs and stopped is None:
                stopped = self._epoch(stop_at)
        if stopped is not None:
            self.recorder.line(
                f"stopped by {stopped} after step {progress.step}, checkpoint written; "
                f"continue with: pnfs train --resume --out {self.recorder.out}"
            )
        seconds = time.monotonic() - self.started
        return TrainResult(
            self.recorder.out, progress.step, self.last_metrics, progress.best, stopped, seconds
        )

    def _position(self) -> int:
        """Where in the run's `total_steps` the next step stands: what schedules are functions of.

        Steps made with another number of processes or another batch size took other shares of an
        epoch, so this follows the place in the data; without such a change it is `progress.step`.
        """
        left = -(-self.loader.remaining // self.config.train.accumulate)
        return (self.loader.epoch + 1) * self.steps_per_epoch - left

    def _say_start(self) -> None:
        parameters = sum(p.numel() for p in self.model.parameters())
        say = self.recorder.line
        say(f"train: {len(self.people)} people of {self.people.source}")
        if self.people.broken:
            say(
                f"left out: {len(self.people.broken)} broken annotations, the first: "
                f"{self.people.broken[0]}"
            )
        say(f"val:   {len(self.held_out)} people of {self.held_out.source}")
        say(
            f"model: {parameters:,} parameters, strategy {self.strategy.name}, "
            f"{self.config.train.precision} on {distributed.world()} x {self.device.type}; "
            f"{self.total_steps} steps; run folder {self.recorder.out}"
        )
        data, scored = self.config.data.profile, self.config.eval.profile
        if data != scored:
            say(
                f"note: trained with data.profile={data} and scored with eval.profile={scored}, "
                "whose colours and boxes differ; set both to one unless you mean it"
            )
        if self.checkpoint is not None:
            say(f"resumed from {self.checkpoint.path}")
        if self.loader.epoch >= self.config.train.epochs:
            say("the run is complete; to train on, resume with a larger --set train.epochs=N")

    def _epoch(self, stop_at: int | None) -> str | None:
        """The rest of the present epoch and its evaluation. Returns what stopped it, or None."""
        config, loader, progress = self.config.train, self.loader, self.progress
        remaining = loader.remaining
        batches = iter(loader)
        self.model.train()
        while remaining > 0:
            count = min(config.accumulate, remaining)
            self._step(batches, count)
            remaining -= count
            stopped = self._stop_reason(stop_at)
            if stopped or (
                remaining
                and config.checkpoint_every
                and progress.step % config.checkpoint_every == 0
            ):
                self._save()
            if stopped:
                return stopped
        self._log()
        epoch = loader.epoch + 1
        if epoch == config.epochs or (config.eval_every and epoch % config.eval_every == 0):
            self._save()  # an evaluation may take long
            if not self._evaluate(epoch):
                return self.signals.name or ANOTHER_RANK
        next(batches, None)  # moves the loader on to the next epoch
        self._save()
        return None

    def _step(self, batches: Iterator[Batch], count: int) -> None:
        config, progress, position = self.config, self.progress, self._position()
        rate = learning_rate(config.train, position, self.steps_per_epoch)
        skipped_before = self.data.skipped
        result = self.stepper.step(
            batches,
            count,
            index=position,
            total=self.total_steps,
            learning_rate=rate,
            architecture_rate=architecture_learning_rate(config, position, self.steps_per_epoch),
            held=self.data.held,
            ahead=self.data.ahead,
        )
        progress.step += 1
        signals, skipped = distributed.sum_over_ranks(
            [float(self.signals.name is not None), float(self.data.skipped - skipped_before)],
            self.device,
        )
        self.asked_to_stop = signals > 0
        progress.skipped_samples += int(skipped)
        if progress.step % config.search.log_every == 0:
            self._watch_architecture(position)
        for problem in self.data.new_problems():
            self.recorder.line(f"left out: {problem}")
        for news in (self.data.new_notice(), self.stepper.news(), tuning.news()):
            if news is not None:
                self.recorder.line(news)
        self.clock.add(result)
        if result.taken:
            progress.nonfinite_in_a_row = 0
            progress.window_loss += result.loss
            progress.window_steps += 1
        else:
            progress.skipped_steps += 1
            progress.nonfinite_in_a_row += 1
            self.recorder.line(
                f"warning: step {progress.step} skipped, loss or gradient is not finite"
            )
        if progress.nonfinite_in_a_row >= config.train.max_nonfinite_steps:
            raise PnfsError(
                f"train: loss or gradient not finite in {progress.nonfinite_in_a_row} steps in a "
                f"row, up to step {progress.step}; lower train.lr, set train.grad_clip, or use "
                "train.precision=fp32, and resume from the last checkpoint",
                rank=0,  # all ranks agree on it
            )
        rates = self.clock.rates()
        self.recorder.update(
            progress.step,
            f"loss {result.loss:.3e}  lr {rate:.2e}  {rates['images_per_second']:.1f} img/s  "
            f"data {self.clock.data:.2f} s, compute {self.clock.compute:.2f} s",
        )
        if progress.step % LOG_EVERY == 0:
            self._log()

    def _stop_reason(self, stop_at: int | None) -> str | None:
        """What stops all ranks after this step: a signal on any of them, or `stop_at`."""
        if self.asked_to_stop:
            return self.signals.name or ANOTHER_RANK
        return "stop_at" if self.progress.step == stop_at else None

    def _watch_architecture(self, position: int) -> None:
        """A row about α and β, and the rule against a collapse to skip; all ranks decide alike."""
        step, strategy = self.progress.step, self.strategy
        if self.monitor.fabrics:
            heat = strategy.temperature(position, self.total_steps)
            place = {"step": step, "epoch": self.loader.epoch, "temperature": heat}
            self.recorder.row("search", lambda: {**place, **self.monitor.row()})
        limit, share = self.config.search.stop_at_skip, self.monitor.share("skip")
        if limit is not None and share is not None and share > limit and not strategy.stopped_at:
            strategy.stop(step)
            self.recorder.line(
                f"α and β are frozen from step {step} on: skip has {share:.2f} of the mixes"
            )

    # -- evaluation, metrics, checkpoints ----------------------------------------------------------

    def _evaluate(self, epoch: int) -> bool:
        """Score the held-out people; keep the weights if they are best. False if interrupted."""
        started = time.monotonic()
        distributed.copy_from_first(list(self.model.buffers()))  # score what is saved
        try:
            metrics = evaluate(
                self.model,
                self.held_out,
                self.config,
                device=self.device,
                precision=self.config.train.precision,
                stop=lambda: self.signals.name is not None,
            ).metrics
        except StoppedBySignal:
            return False
        self.last_metrics = metrics
        seconds = time.monotonic() - started
        progress = self.progress
        row = {"step": progress.step, "epoch": epoch, **metrics, "seconds": round(seconds, 3)}
        self.recorder.row("eval", lambda: row)
        name = next((name for name in MAIN_METRICS if name in metrics), None)
        better = name is None or progress.best is None or metrics[name] > progress.best
        if better:
            progress.best = metrics[name] if name else None
            facts = {"step": progress.step, "epoch": epoch, "metrics": metrics}
            self.recorder.keep_best(self.model, facts)
        shown = "  ".join(
            f"{key} {value:.4g}" for key, value in metrics.items() if key in SHOWN_METRICS
        )
        best = "  (best)" if better else ""
        self.recorder.line(f"epoch {epoch}: {shown}{best}  [{seconds:.1f} s]")
        return True

    def _log(self) -> None:
        """A row of metrics.jsonl for the steps since the last one, if there were any."""
        progress = self.progress
        if progress.step == progress.logged_step:
            return
        progress.logged_step = progress.step
        mean = progress.window_loss / progress.window_steps if progress.window_steps else None
        row = {
            "step": progress.step,
            "epoch": self.loader.epoch,
            "loss": mean,
            "lr": learning_rate(self.config.train, self._position() - 1, self.steps_per_epoch),
            "skipped_steps": progress.skipped_steps,
            "skipped_samples": progress.skipped_samples,
            **self.clock.rates(),
        }
        self.recorder.row("train", lambda: row)
        self.clock = Clock()
        progress.window_loss, progress.window_steps = 0.0, 0

    def _save(self) -> None:
        """A checkpoint of this moment: after a whole step, so all ranks are in the same state."""
        training = {
            "progress": asdict(self.progress),
            "data": self.data.state(),
            "stepper": self.stepper.state_dict(),
            "strategy": self.strategy.state_dict(),
            "random": random_state(),
        }
        step, epoch = self.progress.step, self.loader.epoch
        self.recorder.save(self.model, training, step=step, epoch=epoch)

    def _load_checkpoint(self, checkpoint: Checkpoint) -> None:
        state = checkpoint.training
        load_weights(self.model, checkpoint.model, where=str(checkpoint.path))
        self.stepper.load_state_dict(state["stepper"])
        self.strategy.load_state_dict(state["strategy"])
        set_random_state(state["random"])
        self.data.load_state(state["data"])
        self.progress = Progress(**state["progress"])


if __name__ == "__main__":
    # The command line is above this module in the import order; it is reached only as a script.
    from pnfs.cli import main

    main(["train", *sys.argv[1:]])
