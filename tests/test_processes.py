"""Two processes: the same parameters at every moment, the same result as one, one end for all.

What can share a start of two interpreters does: two_ranks.py runs once, and its checks are tests.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from runs import assert_same_run, batches_seen, rows_of, small_config, state_of
from two_ranks import CHECKS, three_epochs

from pnfs.checkpoint import list_checkpoints
from pnfs.config import dump_config
from pnfs.data import load_people
from pnfs.runlog import run_config
from pnfs.train import train


def torchrun(*command: object) -> subprocess.Popen[str]:
    """Start a command as two processes on the CPU."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",  # docs/scaling.md: for --max-restarts
    }
    return subprocess.Popen(
        [*launcher, *map(str, command)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment,
    )


def end(process: subprocess.Popen[str]) -> str:
    """Wait for it; what it printed."""
    try:
        return process.communicate(timeout=240)[0]
    finally:
        process.kill()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where two_ranks.py was."""
    folder = tmp_path_factory.mktemp("two")
    config = three_epochs(folder, "sync")
    people = load_people(config.data, config.model.skeleton_table, "train")
    with batches_seen() as seen:  # two steps of the second epoch
        begun = len(people) // config.train.batch_size + 2
        train(config, folder / "one-then-two", quiet=True, stop_at=begun)
    (folder / "seen-by-one.json").write_text(json.dumps(seen))
    (folder / "output.txt").write_text(
        end(torchrun(Path(__file__).with_name("two_ranks.py"), folder))
    )
    return folder


@pytest.mark.parametrize("check", CHECKS)
def test_two_ranks(folder: Path, check: str) -> None:
    for rank in (0, 1):
        passed = json.loads((folder / f"passed-{rank}.json").read_text())
        if check not in passed:
            failure = folder / f"failed-{rank}.txt"
            said = failure if failure.is_file() else folder / "output.txt"
            pytest.fail(f"rank {rank}: {said.read_text()[-4000:]}")


def test_rank_0_alone_speaks(folder: Path) -> None:
    assert (folder / "output.txt").read_text().count("boxes: ") == 1  # of eval_command


def test_an_interrupted_run_of_two_ranks_resumes_bit_for_bit(folder: Path) -> None:
    assert_same_run(folder / "whole", folder / "signalled")  # twice: in a step, in an evaluation


def test_a_run_of_two_processes_equals_one(folder: Path, tmp_path: Path) -> None:
    config = small_config(folder / "people", "train.batch_size=16", "train.epochs=1")
    train(config, tmp_path / "one", quiet=True)
    first, second = (rows_of(run, "train")[0] for run in (tmp_path / "one", folder / "two"))
    assert first["step"] == second["step"]
    assert first["loss"] == pytest.approx(second["loss"], rel=1e-5)
    # Adam turns rounding in gradients that vanish into steps, so weights are compared in float64
    # (two_ranks.py); running statistics that had been lost would be off by most of their own size.
    (whole, _), (shared, _) = state_of(tmp_path / "one"), state_of(folder / "two")
    for kind, start in ("running_mean", 0.0), ("running_var", 1.0):
        keys = [key for key in whole if key.endswith(kind)]
        have, want = (torch.cat([t[k].flatten() for k in keys]) - start for t in (shared, whole))
        assert (have - want).norm() < 0.02 * want.norm()


def rates_of(run: Path) -> set[tuple[int, float]]:
    """Epochs and their learning rates, after warming up."""
    return {(row["epoch"], row["lr"]) for row in rows_of(run, "train") if row["epoch"]}


def test_one_process_goes_on_as_two_without_missing_or_repeating_anybody(folder: Path) -> None:
    run = folder / "one-then-two"
    config = run_config(run)
    count = len(load_people(config.data, config.model.skeleton_table, "train"))
    one, two = (json.loads((folder / f"seen-by-{who}.json").read_text()) for who in ("one", "two"))
    steps = (count - 8) // 8  # that two processes still make in the epoch, 4 people each
    epoch = [*one[-2:], *(batch for share in two for batch in share[:steps])]
    people = [index for batch in epoch for index in batch]
    assert len(people) == len(set(people)) == 8 + 8 * steps
    # Schedules go by the place in the data: each epoch has its rate, however many steps it took.
    assert rates_of(run) == rates_of(folder / "whole") and len(rates_of(run)) == 2
    assert [row["epoch"] for row in rows_of(run, "eval")] == [1, 2, 3]


def test_two_processes_go_on_as_one(folder: Path) -> None:
    run = folder / "two-then-one"
    result = train(run_config(run), run, resume=True, quiet=True)
    assert result.stopped_by is None
    assert rates_of(run) == rates_of(folder / "whole")
    assert [row["epoch"] for row in rows_of(run, "eval")] == [1, 2, 3]


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert process.poll() is None, end(process)
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.slow
def test_torchrun_restarts_stops_and_resumes(tmp_path: Path) -> None:
    """Rank 0 is killed and torchrun starts both anew; torchrun is told to end; one process ends."""
    settings = ["train.epochs=12", "train.eval_every=0", "train.checkpoint_every=1"]
    config, run = small_config(tmp_path / "people", *settings), tmp_path / "run"
    (tmp_path / "config.yaml").write_text(dump_config(config))
    command = ["--max-restarts=1", "-m", "pnfs.train", "--config", tmp_path / "config.yaml"]
    process = torchrun(*command, "--overwrite", "--out", run)
    wait_for(lambda: bool(list_checkpoints(run)), process)
    first = list_checkpoints(run)[-1].name
    os.kill(int((run / ".lock").read_text().split()[1]), signal.SIGKILL)
    wait_for(lambda: len(json.loads((run / "run.json").read_text())["starts"]) == 2, process)
    resumed = json.loads((run / "run.json").read_text())["starts"][1]["step"]
    assert resumed >= int(first.split("-")[1])
    wait_for(lambda: f"{resumed + 2:08d}" in list_checkpoints(run)[-1].name, process)
    process.send_signal(signal.SIGTERM)
    shown = end(process)
    assert process.returncode != 0
    step = int(list_checkpoints(run)[-1].name.split("-")[1])
    assert shown.count(f"stopped by SIGTERM after step {step}, checkpoint written") == 1
    assert step >= resumed + 2
    done = train(run_config(run), run, resume=True, quiet=True)
    assert done.stopped_by is None and done.metrics and done.step > step
