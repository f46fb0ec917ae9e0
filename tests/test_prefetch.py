"""Batches made ahead: the order of what is launched, errors, ends, and the loader's counts."""

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
from played import PlayedSide
from runs import small_config
from torch import Tensor

from pnfs.data import Batch, load_people, make_loader
from pnfs.data.batch import collate
from pnfs.data.loader import Loader
from pnfs.data.prefetch import Prefetcher, side_for
from pnfs.data.samples import SampleMaker
from pnfs.errors import PnfsError
from pnfs.skeleton import COCO


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
