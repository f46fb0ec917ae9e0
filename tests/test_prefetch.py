"""Batches made ahead: the order of what is launched, errors, ends; a run with them is the same run.

Streams are played by the CPU: what goes to the side is done at once, and noted.
"""

from __future__ import annotations

import contextlib
import gc
import weakref
from collections.abc import Iterator
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import assert_same_run, batches_seen, rows_of, small_config
from test_capture import Player
from torch import Tensor

from pnfs.data import Batch, load_people, make_loader
from pnfs.data.batch import collate
from pnfs.data.loader import Loader
from pnfs.data.prefetch import Prefetcher, side_for
from pnfs.data.samples import SampleMaker
from pnfs.data.training import TrainingData
from pnfs.decode import decode, predict_batch
from pnfs.errors import PnfsError
from pnfs.evaluation import evaluate
from pnfs.model import build_model
from pnfs.skeleton import COCO
from pnfs.steps import Stepper, StepResult
from pnfs.train import train


class PlayedMark:
    def __init__(self, side: PlayedSide, number: int) -> None:
        self.side, self.number = side, number

    def query(self) -> bool:
        return self.number <= self.side.passed

    def synchronize(self) -> None:
        self.side.log.append(f"wait for {self.number}")
        self.side.passed = max(self.side.passed, self.number)


class PlayedSide:
    """Notes what is asked of it. The device has passed marks up to the number `passed`."""

    def __init__(self) -> None:
        self.log: list[str] = []
        self.marks, self.passed, self.inside = 0, 0, False
        self.handed: list[int] = []  # addresses

    @contextlib.contextmanager
    def aside(self) -> Iterator[None]:
        self.inside = True
        try:
            yield
        finally:
            self.inside = False

    def mark(self) -> PlayedMark:
        assert not self.inside
        self.marks += 1
        self.log.append(f"mark {self.marks}")
        return PlayedMark(self, self.marks)

    def join(self, mark: Any) -> None:
        self.log.append(f"join {mark.number}")

    def hand_over(self, tensor: Tensor) -> None:
        if self.log[-1] != "hand over":
            self.log.append("hand over")
        self.handed.append(tensor.data_ptr())


def batch(number: int) -> Batch:
    """An empty one, told apart by its first index."""
    return replace(collate([], 17), indices=torch.tensor([number]))


def number_of(batch: Batch) -> int:
    return int(batch.indices[0])


class Feed:
    """A prefetcher over `count` batches on a played side; what happens is in its `log`."""

    def __init__(
        self, count: int, *, bad_source: int | None = None, bad_prepare: int | None = None
    ) -> None:
        self.side = PlayedSide()
        self.log, self.bad_source, self.bad_prepare = self.side.log, bad_source, bad_prepare
        self.hosts: list[weakref.ref[Batch]] = []
        self.batches = Prefetcher(self.source(count), self.prepare, self.side)

    def source(self, count: int) -> Iterator[Batch]:
        for number in range(count):
            if number == self.bad_source:
                raise PnfsError("the source broke")
            host = batch(number)
            self.hosts.append(weakref.ref(host))
            self.log.append(f"take {number}")
            yield host
            del host

    def prepare(self, host: Batch) -> Batch:
        assert self.side.inside
        self.log.append(f"copy {number_of(host)}")
        if number_of(host) == self.bad_prepare:
            raise RuntimeError("the device broke")
        return host.to("cpu")

    def read(self) -> list[str]:
        log, self.log[:] = list(self.log), []
        return log


def test_a_batch_is_launched_ahead_and_waited_for_by_the_next() -> None:
    feed = Feed(3)
    assert number_of(next(feed.batches)) == 0  # nothing was ahead yet
    assert feed.read() == ["take 0", "copy 0", "mark 1", "join 1", "hand over"]
    feed.batches.ahead()
    assert feed.read() == ["take 1", "copy 1", "mark 2"]
    feed.batches.ahead()
    assert feed.read() == []  # one is made ahead, no more
    assert number_of(next(feed.batches)) == 1
    assert feed.read() == ["join 2", "hand over"]
    assert [number_of(b) for b in feed.batches] == [2]


def test_every_tensor_of_a_batch_is_handed_over(tmp_path: Path) -> None:
    config = small_config(tmp_path)
    people = load_people(config.data, COCO, "train")
    settings: dict[str, Any] = {"size": (64, 64), "dtype": torch.bfloat16}
    prepare = partial(Batch.prepared, device="cpu", flip=True, **settings)
    side = PlayedSide()
    source = iter(make_loader(people, config, train=True))
    prepared = next(Prefetcher(source, prepare, side))
    made = [prepared.images(**settings, mirrored=mirrored) for mirrored in (False, True)]
    own = [getattr(prepared, f.name) for f in fields(Batch)]
    tensors = [*made, *(tensor for tensor in own if isinstance(tensor, Tensor))]
    assert sorted(side.handed) == sorted(tensor.data_ptr() for tensor in tensors)
    assert len(tensors) == 11


def test_host_batches_are_kept_until_the_device_has_read_them() -> None:
    feed = Feed(4)
    for number in range(3):
        assert number_of(next(feed.batches)) == number
    assert [host() is not None for host in feed.hosts] == [True] * 3
    feed.side.passed = 2
    feed.batches.ahead()
    assert [host() is not None for host in feed.hosts] == [False, False, True, True]


def test_the_end_comes_when_it_is_asked_for() -> None:
    feed = Feed(1)
    next(feed.batches)
    for _ in range(2):
        feed.batches.ahead()
    for _ in range(2):
        with pytest.raises(StopIteration):
            next(feed.batches)


@pytest.mark.parametrize(
    ("broken", "error", "text"),
    [
        ({"bad_source": 1}, PnfsError, "the source broke"),
        ({"bad_prepare": 1}, RuntimeError, "the device broke"),
    ],
    ids=["source", "prepare"],
)
def test_an_error_waits_for_the_batch_that_it_concerns(
    broken: dict[str, int], error: type[Exception], text: str
) -> None:
    feed = Feed(2, **broken)
    assert number_of(next(feed.batches)) == 0
    for _ in range(2):
        feed.batches.ahead()
    feed.read()
    with pytest.raises(error, match=text):
        next(feed.batches)
    assert feed.read() == []  # nothing was waited for or handed over
    with pytest.raises(StopIteration):
        next(feed.batches)


def test_after_an_error_the_host_batch_is_kept_as_well() -> None:
    feed = Feed(1, bad_prepare=0)
    feed.batches.ahead()
    assert feed.read() == ["take 0", "copy 0", "mark 1"] and feed.hosts[0]() is not None
    feed.batches.close()
    assert feed.read() == ["wait for 1"] and feed.hosts[0]() is None


def test_what_ends_the_process_is_not_kept() -> None:
    def interrupted() -> Iterator[Batch]:
        raise KeyboardInterrupt
        yield

    batches = Prefetcher(interrupted(), lambda host: host, PlayedSide())
    with pytest.raises(KeyboardInterrupt):
        batches.ahead()


def test_an_error_leaves_no_cycle_that_would_keep_the_source() -> None:

    def broken() -> Iterator[Batch]:
        raise PnfsError("the source broke")
        yield

    gc.disable()
    try:
        for source in (iter(()), broken()):
            batches = Prefetcher(source, lambda host: host, PlayedSide())
            gone = weakref.ref(batches)
            with contextlib.suppress(StopIteration, PnfsError):
                next(batches)
            del batches
            assert gone() is None
    finally:
        gc.enable()


def test_closing_waits_for_the_copies_and_forgets_the_rest() -> None:
    feed = Feed(3)
    next(feed.batches)
    feed.batches.ahead()
    feed.read()
    feed.batches.close()
    assert feed.read() == ["wait for 1", "wait for 2"]
    assert [host() for host in feed.hosts] == [None, None]
    feed.batches.ahead()
    assert next(feed.batches, None) is None and feed.read() == []


def test_a_cpu_has_no_side() -> None:
    assert side_for(torch.device("cpu")) is None


# -- the loader ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("people")


def loader_of(root: Path, side: PlayedSide | None, workers: int = 0) -> Loader:
    config = small_config(root, f"data.workers={workers}")
    loader = make_loader(load_people(config.data, COCO, "train"), config, train=True)
    loader.prefetch(partial(Batch.prepared, device="cpu", size=(64, 64)), side)
    return loader


def taken(loader: Loader) -> Iterator[list[int]]:
    """People of the batches, each time with the next batch made ahead."""
    for batch in loader:
        loader.ahead()
        yield batch.indices.tolist()


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_that_were_only_made_ahead_are_not_counted(root: Path, workers: int) -> None:
    whole = list(taken(loader_of(root, None)))
    loader, side = loader_of(root, PlayedSide(), workers), PlayedSide()
    loader.prefetch(partial(Batch.prepared, device="cpu", size=(64, 64)), side)
    first = taken(loader)
    assert [next(first) for _ in range(2)] == whole[:2]
    assert side.marks == 3 and loader.state()["consumed"] == 2 * 4
    state = loader.state()
    first.close()  # the batch made ahead is thrown away
    assert side.passed == 3 and loader.state() == state
    assert list(taken(loader)) == whole[2:]
    assert loader.epoch == 1 and loader.consumed == 0
    resumed = loader_of(root, PlayedSide())
    resumed.load_state(state)
    assert list(taken(resumed)) == whole[2:]


def test_without_a_side_batches_stay_with_the_host(root: Path) -> None:
    loader = loader_of(root, None)
    assert type(next(iter(loader))) is Batch
    loader.ahead()
    assert loader.consumed == 4


def test_too_many_broken_samples_are_an_error_when_they_are_used(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any) -> Any:
        raise PnfsError("a broken image")

    loader = loader_of(root, PlayedSide())
    batches = iter(loader)
    next(batches)
    monkeypatch.setattr(SampleMaker, "make", broken)
    loader.ahead()
    assert loader.skipped == 0 and loader.new_problems() == []
    with pytest.raises(PnfsError, match="a broken image"):
        next(batches)


def test_the_prepared_input_is_the_one_asked_for(root: Path) -> None:
    plain = next(iter(loader_of(root, None)))
    prepared = plain.prepared("cpu", size=(64, 64), profile="posenfs", flip=True)
    moved = prepared.to("cpu")
    for settings in (
        {"profile": "posenfs"},
        {"profile": "posenfs", "mirrored": True},
        {"profile": "standard"},
        {"profile": "posenfs", "dtype": torch.bfloat16},
    ):
        want = plain.images(size=(64, 64), **settings)
        assert torch.equal(prepared.images(size=(64, 64), **settings), want)
        assert torch.equal(moved.images(size=(64, 64), **settings), want)
    assert moved.images(size=(64, 64), profile="posenfs") is prepared.images(
        size=(64, 64), profile="posenfs"
    )
    assert len(prepared) == len(plain) and isinstance(prepared.pixels, Tensor)


# -- runs ------------------------------------------------------------------------------------------

RUNS: dict[str, tuple[str, ...]] = {
    "sync": ("search.strategy=sync",),
    "two loaders": ("search.strategy=second-order",),
    "accumulated": ("search.strategy=first-order", "train.accumulate=3"),
}


@pytest.fixture
def side(monkeypatch: pytest.MonkeyPatch) -> PlayedSide:
    side = PlayedSide()
    for module in ("pnfs.train", "pnfs.evaluation.runner"):
        monkeypatch.setattr(f"{module}.side_for", lambda device: side)
    return side


@pytest.mark.parametrize("settings", RUNS.values(), ids=RUNS)
def test_a_run_with_batches_made_ahead_is_the_run_without(
    settings: tuple[str, ...], root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = small_config(root, "train.epochs=4", "train.eval_every=3", *settings)
    train(config, tmp_path / "plain", device="cpu", quiet=True)
    side, player = PlayedSide(), Player()
    for module in ("pnfs.train", "pnfs.evaluation.runner"):
        monkeypatch.setattr(f"{module}.side_for", lambda device: side)
    monkeypatch.setattr("pnfs.steps.recorder_for", lambda device: player)
    train(config, tmp_path / "ahead", device="cpu", quiet=True)
    assert_same_run(tmp_path / "plain", tmp_path / "ahead")
    joined = [int(line.split()[1]) for line in side.log if line.startswith("join")]
    assert len(joined) > 8 and sorted(joined) == list(range(1, side.marks + 1))
    assert player.replays  # of recordings that read their own inputs


def test_the_next_batch_is_prepared_while_the_step_runs(
    side: PlayedSide, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compute, step = Stepper._compute, Stepper.step

    def launched(self: Stepper, *inputs: Tensor) -> tuple[Tensor]:
        side.log.append("launch")
        return compute(self, *inputs)

    def made(self: Stepper, *args: Any, **kwargs: Any) -> StepResult:
        result = step(self, *args, **kwargs)
        side.log.append("result")
        return result

    monkeypatch.setattr(Stepper, "_compute", launched)
    monkeypatch.setattr(Stepper, "step", made)
    config = small_config(root, "search.strategy=none", "train.epochs=1")
    train(config, tmp_path / "run", device="cpu", quiet=True, stop_at=3)
    found = [line for line in side.log if line != "hand over"]
    assert found == [
        "mark 1", "join 1", "launch", "mark 2", "result",
        "join 2", "launch", "mark 3", "result",
        "join 3", "launch", "mark 4", "result",
        "wait for 1", "wait for 2", "wait for 3", "wait for 4",
    ]  # fmt: skip


@pytest.mark.parametrize("stop_at", [1, 5])
def test_a_stopped_run_resumes_to_the_same_bits(
    side: PlayedSide, stop_at: int, root: Path, tmp_path: Path
) -> None:
    config = small_config(root, "search.strategy=first-order", "train.epochs=3")
    with batches_seen() as whole:
        train(config, tmp_path / "whole", device="cpu", quiet=True)
    run = tmp_path / "stopped"
    with batches_seen() as seen:
        train(config, run, device="cpu", quiet=True, stop_at=stop_at)
        train(config, run, device="cpu", quiet=True, resume=True)
    assert seen == whole
    assert_same_run(tmp_path / "whole", run)


def test_a_batch_that_cannot_be_prepared_ends_the_run_at_its_own_step(
    side: PlayedSide, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = Batch.prepared, 0

    def prepared(*args: Any, **kwargs: Any) -> Batch:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise PnfsError("no memory for the third")
        return real(*args, **kwargs)

    monkeypatch.setattr(Batch, "prepared", prepared)
    monkeypatch.setattr("pnfs.train.LOG_EVERY", 1)
    config = small_config(root, "search.strategy=none")
    with pytest.raises(PnfsError, match="no memory for the third"):
        train(config, tmp_path / "run", device="cpu", quiet=True)
    assert [row["step"] for row in rows_of(tmp_path / "run", "train")] == [1, 2]


def test_training_lets_go_of_its_loaders(side: PlayedSide, root: Path) -> None:
    """Workers of a loader that something still knew would outlive the run."""
    config = small_config(root, "search.strategy=first-order")
    data = TrainingData(config)
    data.prefetch(partial(Batch.prepared, device="cpu", size=(64, 64)), side)
    batches = iter(data.loader)
    next(batches), data.held(), data.ahead()
    gone = [weakref.ref(loader) for loader in data._loaders()]
    gc.disable()
    try:
        del data, batches
        assert [loader() for loader in gone] == [None, None]
    finally:
        gc.enable()


# -- evaluation ------------------------------------------------------------------------------------


def test_evaluation_makes_batches_ahead_and_finds_the_same(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = small_config(root, "eval.batch_size=3", "eval.flip=true")
    people = load_people(config.data, COCO, "train")
    torch.manual_seed(0)
    model = build_model(config.model)
    plain = evaluate(model, people, config)
    side = PlayedSide()
    monkeypatch.setattr("pnfs.evaluation.runner.side_for", lambda device: side)

    def launched(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        side.log.append("launch")
        return predict_batch(*args, **kwargs)

    def read(done: int, total: int) -> None:
        side.log.append("result")

    monkeypatch.setattr("pnfs.evaluation.runner.predict_batch", launched)
    found = evaluate(model, people, config, progress=read)
    assert found.predictions == plain.predictions
    lines = [line for line in side.log if line != "hand over"]
    assert lines[:8] == [
        "mark 1", "join 1", "launch", "mark 2", "result", "join 2", "launch", "mark 3",
    ]  # fmt: skip
    assert side.marks == -(-len(people) // 3) and side.passed == side.marks


def test_decoding_copies_nothing_to_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy from the host would wait for the network, and the next batch would be made after."""

    def decoded() -> tuple[Tensor, Tensor]:
        with torch.device("meta"):  # stands for a GPU
            maps, matrices = torch.empty(2, 17, 16, 16), torch.empty(2, 2, 3)
        return decode(maps, matrices, flipped=maps, skeleton=COCO, profile="posenfs")

    def made_on_the_host(*args: Any, **kwargs: Any) -> Tensor:
        raise AssertionError("torch.tensor copies from the host")

    decoded()
    monkeypatch.setattr(torch, "tensor", made_on_the_host)
    assert [x.device.type for x in decoded()] == ["meta", "meta"]


@pytest.mark.gpu
@pytest.mark.parametrize("busy", [0, 20_000_000], ids=["idle", "busy"])
def test_on_a_gpu_batches_made_ahead_are_the_same_bits(busy: int, root: Path) -> None:
    device, settings = torch.device("cuda"), {"size": (64, 64), "dtype": torch.bfloat16}
    plain, ahead = (loader_of(root, None) for _ in range(2))
    ahead.prefetch(partial(Batch.prepared, device=device, **settings), side_for(device))
    for _ in range(3):  # epochs: memory is used again
        for batch, want in zip(ahead, plain, strict=True):
            torch.cuda._sleep(busy)  # the main work is behind
            images, joints = batch.images(**settings) * 1, batch.joints * 1
            ahead.ahead()
            del batch
            host = want.to(device)
            assert torch.equal(images, host.images(**settings))
            assert torch.equal(joints, host.joints)
