"""Real `pnfs train` processes, killed, out of disk or shut out: nothing is lost but time."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest
from commands import Commands
from runs import assert_same_run, small_config

from pnfs.checkpoint import list_checkpoints
from pnfs.config import dump_config
from pnfs.runlog import open_run

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")

WORKERS = (0, 2)
# Both optimisers, two loaders, a schedule that moves every step, rows after every step.
SETTINGS = (
    "search.strategy=first-order",
    "search.lr_schedule=cosine",
    "search.log_every=1",
    "train.lr_schedule=cosine",
    "train.checkpoint_every=1",
    "train.epochs=3",
)


@pytest.fixture(scope="module")
def commands() -> Iterator[Commands]:
    commands = Commands()
    yield commands
    commands.close()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One configuration file per number of workers."""
    folder = tmp_path_factory.mktemp("runs")
    for workers in WORKERS:
        config = small_config(folder / "people", *SETTINGS, f"data.workers={workers}")
        (folder / f"workers-{workers}.yaml").write_text(dump_config(config))
    return folder


@pytest.fixture(scope="module")
def whole(commands: Commands, folder: Path) -> Path:
    """An uninterrupted run without workers: what all others must equal."""
    run = folder / "whole"
    status, shown = commands.run("train", "--config", folder / "workers-0.yaml", "--out", run)
    assert status == 0, shown
    return run


def train_or_resume(folder: Path, run: Path, workers: int) -> list[object]:
    """What a script that is started again and again would type."""
    if (run / "run.json").is_file():
        return ["train", "--resume", "--out", run]
    return ["train", "--config", folder / f"workers-{workers}.yaml", "--out", run]


# When to kill: at an operation on files, some seconds after the start, or some seconds after the
# first checkpoint that the process writes.
Moment = tuple[str, float]


def killed(commands: Commands, arguments: list[object], run: Path, moment: Moment) -> bool:
    """Run a command and kill it; false if it was finished before."""
    kind, when = moment
    before = list_checkpoints(run)
    process = commands.start(*arguments, die_at=int(when) if kind == "operation" else None)
    if kind != "operation":
        deadline = time.monotonic() + 60
        while kind == "checkpoint" and list_checkpoints(run) == before:
            assert time.monotonic() < deadline
            time.sleep(0.002)
            if not is_running(process):
                break
        time.sleep(when)
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)
    status, shown = commands.wait()
    assert status in (0, -signal.SIGKILL), shown
    return status != 0


def kill_and_resume(
    commands: Commands, folder: Path, whole: Path, workers: int, moments: Iterable[Moment]
) -> tuple[int, int]:
    """Kill runs at every one of `moments`, compare each finished one with `whole`.

    Returns:
        Kills and finished runs.
    """
    run, kills, finished = folder / f"killed-{workers}", 0, 0
    for moment in moments:
        while not killed(commands, train_or_resume(folder, run, workers), run, moment):
            assert_same_run(whole, run)
            finished += 1
            shutil.rmtree(run)
        kills += 1
    status, shown = commands.run(*train_or_resume(folder, run, workers))
    assert status == 0, shown
    assert_same_run(whole, run)
    shutil.rmtree(run)
    return kills, finished + 1


SOME: dict[int, list[Moment]] = {
    0: [("start", 0.1), ("operation", 30), ("checkpoint", 0.03), ("operation", 77)],
    2: [("checkpoint", 0.1), ("operation", 41)],
}


@pytest.mark.parametrize("workers", WORKERS)
def test_a_killed_run_resumes_to_the_same_bits(
    commands: Commands, folder: Path, whole: Path, workers: int
) -> None:
    kills, _ = kill_and_resume(commands, folder, whole, workers, SOME[workers])
    assert kills == len(SOME[workers])


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="needs /proc")
def test_a_killed_process_takes_its_data_workers_along(commands: Commands, folder: Path) -> None:
    run = folder / "orphans"
    process = commands.start(*train_or_resume(folder, run, 2))
    deadline = time.monotonic() + 60
    while not list_checkpoints(run):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    started = descendants(process)
    assert len(started) >= 3  # the fork server and two workers
    os.kill(process, signal.SIGKILL)
    commands.wait()
    while any(map(is_running, started)):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def descendants(process: int) -> list[int]:
    children = Path(f"/proc/{process}/task/{process}/children").read_text().split()
    return [x for child in map(int, children) for x in (child, *descendants(child))]


def is_running(process: int) -> bool:
    """Not gone, and not a zombie that nobody has waited for."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rsplit(")")[-1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.mark.slow
@pytest.mark.parametrize("workers", WORKERS)
def test_25_kills_at_random_moments_leave_no_trace(
    commands: Commands, folder: Path, whole: Path, workers: int
) -> None:
    draw = random.Random(workers)
    begin = 4.0 if workers else 1.5  # seconds that cover the start and the first steps

    def moment() -> Moment:
        kind = draw.choice(["start", "checkpoint", "checkpoint", "operation"])
        if kind == "operation":
            return kind, draw.randint(1, 200)
        return kind, draw.uniform(0, begin if kind == "start" else 0.3)

    kills, finished = kill_and_resume(
        commands, folder, whole, workers, [moment() for _ in range(25)]
    )
    print(f"{kills} kills, {finished} runs, workers {workers}")
    assert kills == 25


def test_a_disk_that_fills_up_is_one_line_and_the_run_goes_on_later(
    commands: Commands, folder: Path, whole: Path
) -> None:
    run = folder / "full"
    arguments = train_or_resume(folder, run, 0)
    assert killed(commands, arguments, run, ("checkpoint", 0.0))
    last = list_checkpoints(run)[-1]
    room = (last / "training.safetensors").stat().st_size - 1
    status, shown = commands.run("train", "--resume", "--out", run, file_limit=room)
    errors = [line for line in shown.splitlines() if line.startswith("error: ")]
    assert status == 2 and len(errors) == 1 and shown.rstrip().endswith(errors[0])
    assert "training.safetensors: cannot be written (File too large); free disk" in errors[0]
    assert list_checkpoints(run)[-1] == last
    status, shown = commands.run("train", "--resume", "--out", run)
    assert status == 0 and f"resumed from {last}" in shown
    assert_same_run(whole, run)


def test_a_second_process_on_a_run_folder_is_refused_in_one_line(
    commands: Commands, folder: Path
) -> None:
    run = folder / "claimed"
    with open_run(run, resume=False, overwrite=False):
        status, shown = commands.run(*train_or_resume(folder, run, 0))
    assert status == 2 and len(shown.splitlines()) == 1
    assert f"in use by another training process (pid {os.getpid()} on " in shown


def test_a_run_killed_before_its_configuration_was_written_resumes(
    commands: Commands, folder: Path, whole: Path
) -> None:
    run = folder / "early"
    assert killed(commands, train_or_resume(folder, run, 0), run, ("checkpoint", 0.0))
    (run / "config.yaml").unlink()
    shutil.rmtree(run / "checkpoints")
    status, shown = commands.run("train", "--resume", "--out", run)
    assert status == 0, shown
    assert_same_run(whole, run)
    assert (run / "config.yaml").read_text() == (whole / "config.yaml").read_text()
