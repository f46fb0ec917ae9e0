"""Batches for training and evaluation: sharded, reproducible, resumable, not upset by broken files.

Workers decode JPEGs and cut out regions; warping, mirroring and normalising the whole batch is one
kernel, called where the model runs.
"""

from __future__ import annotations

import contextlib
import math
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator, Mapping, Sequence
from multiprocessing.context import BaseContext
from typing import Any, Literal, cast

import cv2
import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from pnfs.config import Config
from pnfs.data.batch import Batch, Sample, collate
from pnfs.data.cropcache import CropCache
from pnfs.data.prefetch import Prefetcher, Prepare, Side
from pnfs.data.records import PeopleDataset
from pnfs.data.samples import SampleMaker
from pnfs.errors import PnfsError

__all__ = ["Batch", "Loader", "make_loader"]

Made = tuple[list[Sample], list[str], list[str]]  # samples, problems, notices
Item = tuple[int, int]  # epoch (or round, see ShardedSampler), index into the people
Half = Literal["weights", "architecture"]
MAX_NAMED = 20  # broken samples that are named one by one; the rest are only counted


class ShardedSampler(Sampler[list[Item]]):
    """This process's batches of (epoch, index), from a place that can be saved and set.

    Training: all people in an order drawn from (seed, epoch), cut into global batches of
    `world · batch_size`, of which process `rank` takes the `rank`-th slice; what does not fill a
    global batch is dropped. Fewer people than one global batch make a single smaller one.
    Evaluation: each person once, in order; process `rank` takes every `world`-th. `consumed` counts
    people of all processes and only matters to training.

    With `chosen`, an epoch is as long as without and goes round the chosen people as often as that
    takes, in a new order each time; the item's epoch then counts the rounds.
    """

    def __init__(
        self,
        count: int,
        batch_size: int,
        seed: int,
        train: bool,
        rank: int,
        world: int,
        chosen: np.ndarray | None = None,
    ) -> None:
        self.count, self.train, self.seed, self.rank, self.world = count, train, seed, rank, world
        self.chosen = np.arange(count) if chosen is None else chosen
        self.batch_size = min(batch_size, count // world) if train else batch_size
        self.epoch, self.consumed = 0, 0

    @property
    def stride(self) -> int:
        """People that all processes together take in one training step."""
        return self.batch_size * self.world

    def __len__(self) -> int:
        """Batches of a whole epoch."""
        if self.train:
            return self.count // self.stride
        return math.ceil(len(range(self.rank, self.count, self.world)) / self.batch_size)

    def starts(self) -> range:
        """Positions of the training batches that this epoch still has."""
        return range(self.consumed, self.count - self.stride + 1, self.stride)

    def __iter__(self) -> Iterator[list[Item]]:
        epoch = self.epoch
        if not self.train:
            own = range(self.rank, self.count, self.world)
            for start in range(0, len(own), self.batch_size):
                yield [(epoch, index) for index in own[start : start + self.batch_size]]
            return
        generator = np.random.default_rng([self.seed, epoch])
        rounds = math.ceil(self.count / len(self.chosen))
        order = np.concatenate([generator.permutation(self.chosen) for _ in range(rounds)])
        for start in self.starts():
            first = start + self.rank * self.batch_size
            yield [
                (epoch * rounds + place // len(self.chosen), int(order[place]))
                for place in range(first, first + self.batch_size)
            ]


class _Samples(Dataset[Any]):
    """Makes a whole batch at once, so that broken samples can be left out of it."""

    def __init__(self, maker: SampleMaker, train: bool) -> None:
        self.maker, self.train = maker, train

    def __len__(self) -> int:
        return len(self.maker)

    def __getitems__(self, items: Sequence[Item]) -> Made:
        samples: list[Sample] = []
        problems: list[str] = []
        for epoch, index in items:
            try:
                samples.append(self.maker.make(index, epoch))
            except PnfsError as problem:
                problems.append(str(problem))
        if self.train and not samples:
            # Every process must make every step: the next good sample stands in.
            epoch, last = items[-1]
            for index in range(last + 1, last + len(self.maker)):
                try:
                    samples.append(self.maker.make(index % len(self.maker), epoch))
                    break
                except PnfsError:
                    continue
        notice = self.maker.cache.take_notice() if self.maker.cache is not None else None
        return samples, problems, [] if notice is None else [notice]


class _Collate:
    def __init__(self, num_keypoints: int) -> None:
        self.num_keypoints = num_keypoints

    def __call__(self, made: Made) -> Batch:
        samples, problems, notices = made
        return collate(samples, self.num_keypoints, problems, notices)


def _start_worker(_: int) -> None:
    cv2.setNumThreads(0)  # the workers are the parallelism; torch runs single-threaded there anyway
    # Ctrl-C and a cluster's SIGTERM reach the workers too. The process that trains decides when to
    # stop; workers end when it asks them to, or when it is gone.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A killed process cannot ask its workers to end, and they would wait for it for ever.

    torch's own guard looks at the process that forked the worker: the fork server, which in turn
    lives as long as a worker does.
    """
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _worker_context() -> BaseContext:
    """How worker processes start.

    Forking a process whose OpenMP, OpenCV or CUDA threads are running can deadlock the child: it
    inherits their locks, not their threads. Spawning is safe but imports torch in every worker. The
    fork server is both safe and fast: a clean single-threaded process imports once, workers fork
    from it. As with spawn, a script that trains needs `if __name__ == "__main__":`.
    """
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["pnfs.data.loader"])
    return context


class Loader:
    """Iterating gives the rest of the current epoch and then moves on to the next.

    The state counts the batches that were handed out, not those that workers or a prefetcher made
    ahead, and is independent of both; a resumed loader gives the same batches bit for bit.
    """

    def __init__(
        self,
        dataset: PeopleDataset,
        maker: SampleMaker,
        sampler: ShardedSampler,
        *,
        workers: int,
        max_skipped_fraction: float,
    ) -> None:
        self.dataset = dataset
        self._sampler = sampler
        self._max_skipped = max_skipped_fraction
        self.skipped = 0  # broken samples since the start of training
        self.skipped_in_epoch = 0
        self.first_problem: str | None = dataset.broken[0] if dataset.broken else None
        self._named: set[str] = set()
        self._unreported: list[str] = []
        self._notices: list[str] = []
        self._beside: tuple[Prepare, Side] | None = None
        self._prefetcher: Prefetcher | None = None  # of the present iteration
        self._loader: DataLoader[Any] = DataLoader(
            _Samples(maker, sampler.train),
            batch_sampler=sampler,
            num_workers=workers,
            collate_fn=cast(Any, _Collate(dataset.skeleton.num_keypoints)),
            pin_memory=torch.cuda.is_available(),
            worker_init_fn=_start_worker if workers else None,
            multiprocessing_context=_worker_context() if workers else None,
            persistent_workers=workers > 0,
            # Otherwise each epoch would draw from torch's global stream, and a resumed run would
            # draw once more than an uninterrupted one.
            generator=torch.Generator(),
        )
        self._check_skipped()

    def __len__(self) -> int:
        """Batches of a whole epoch on this process."""
        return len(self._sampler)

    @property
    def epoch(self) -> int:
        """The epoch whose batches are being handed out, from 0."""
        return self._sampler.epoch

    @property
    def consumed(self) -> int:
        """People of this epoch that all processes together were handed."""
        return self._sampler.consumed

    @property
    def remaining(self) -> int:
        """Training batches of this epoch that are still to come on this process."""
        return len(self._sampler.starts())

    def seek(self, epoch: int, consumed: int = 0) -> None:
        """Continue with this epoch, after its first `consumed` people."""
        self._sampler.epoch, self._sampler.consumed = epoch, consumed

    def state(self) -> dict[str, int]:
        """Where training stands, for `load_state` with any number of processes."""
        return {
            "epoch": self.epoch,
            "consumed": self.consumed,
            "skipped": self.skipped,
            "skipped_in_epoch": self.skipped_in_epoch,
        }

    def load_state(self, state: Mapping[str, int]) -> None:
        """Go on from a `state()`."""
        self.seek(state["epoch"], state["consumed"])
        self.skipped, self.skipped_in_epoch = state["skipped"], state["skipped_in_epoch"]

    def new_problems(self) -> list[str]:
        """One line for each sample left out since the last call, each once, `MAX_NAMED` in all."""
        lines, self._unreported = self._unreported, []
        return lines

    def new_notices(self) -> list[str]:
        """Lines for the user since the last call; every worker may have one about the same."""
        lines, self._notices = self._notices, []
        return lines

    def prefetch(self, prepare: Prepare, side: Side | None) -> None:
        """Hand out batches as `prepare` makes them, on `side`, from the next iteration on; without
        a side as the workers make them."""
        self._beside = None if side is None else (prepare, side)

    def ahead(self) -> None:
        """With a side: take and prepare the next batch now, see `Prefetcher.ahead`."""
        if self._prefetcher is not None:
            self._prefetcher.ahead()

    def __iter__(self) -> Iterator[Batch]:
        sampler = self._sampler
        with self._batches() as batches:
            for batch in batches:
                self._notices += batch.notices
                if batch.skipped:
                    self._count(batch)
                # Before it is handed out: a checkpoint made after its step must not repeat it.
                sampler.consumed += sampler.stride
                yield batch
        self.seek(sampler.epoch + 1)
        self.skipped_in_epoch = 0

    @contextlib.contextmanager
    def _batches(self) -> Iterator[Iterator[Batch]]:
        """Of the workers, or through a prefetcher, which is closed at the end."""
        made = iter(self._loader)
        if self._beside is None:
            yield made
            return
        self._prefetcher = prefetcher = Prefetcher(made, *self._beside)
        try:
            yield prefetcher
        finally:
            prefetcher.close()

    def _count(self, batch: Batch) -> None:
        if not self._sampler.train:
            raise PnfsError(batch.problems[0])
        self.skipped += batch.skipped
        self.skipped_in_epoch += batch.skipped
        self.first_problem = self.first_problem or batch.problems[0]
        new = [problem for problem in batch.problems if problem not in self._named]
        self._named.update(new[: MAX_NAMED - len(self._named)])
        self._unreported += [problem for problem in new if problem in self._named]
        self._check_skipped()

    def _check_skipped(self) -> None:
        """Stop when too many of an epoch's samples, broken annotations included, are unusable."""
        share = len(self.dataset.broken) / self._sampler.world
        broken = self.skipped_in_epoch + share
        total = len(self) * self._sampler.batch_size + share
        if self._sampler.train and broken > self._max_skipped * total:
            raise PnfsError(
                f"{self.first_problem} -- with it, {broken:.0f} of {total:.0f} training samples "
                f"are unusable, more than train.max_skipped_fraction={self._max_skipped:g}"
            )


def split_half(dataset: PeopleDataset, half: Half, seed: int) -> np.ndarray:
    """Indices of the people in one of two halves, by `seed`. No image has people in both.

    Raises:
        PnfsError: fewer than two images with people.
    """
    images = sorted({str(person.image_path) for person in dataset.people})
    if len(images) < 2:
        raise PnfsError(f"{dataset.source}: one image cannot be split between weights and α, β")
    order = np.random.default_rng(seed).permutation(len(images))
    mine = order[::2] if half == "weights" else order[1::2]
    names = {images[i] for i in mine}
    return np.array([i for i, p in enumerate(dataset.people) if str(p.image_path) in names])


def make_loader(
    dataset: PeopleDataset,
    cfg: Config,
    *,
    train: bool,
    seed: int | None = None,
    rank: int = 0,
    world: int = 1,
    half: Half | None = None,
) -> Loader:
    """Batches of `dataset`, ready to iterate.

    Training uses `data.profile`, `data.augment` and `train.batch_size`, and leaves broken samples
    out, keeps decoded people in `data.cache` and obeys `data.reduced_decode`; evaluation uses
    `eval.profile` and `eval.batch_size`, and stops at the first broken one.

    Args:
        seed: of order and augmentation; default `train.seed`.
        rank, world: this process and how many there are.
        half: of the people only those on whom the weights, or α and β, are trained (`split_half`).
            An epoch has as many batches as with all people.

    Raises:
        PnfsError: fewer people than processes, too many broken annotations, or a `data.cache` that
            cannot be written.
    """
    if train and len(dataset) < world:
        raise PnfsError(
            f"{dataset.source}: {len(dataset)} people for {world} processes; use fewer processes"
        )
    seed = cfg.train.seed if seed is None else seed
    maker = SampleMaker.of(
        dataset,
        cfg.model.input_size,
        cfg.data.profile if train else cfg.eval.profile,
        cfg.data.augment if train else None,
        seed,
        cache=CropCache(cfg.data.cache, cfg.data.cache_gb) if train and cfg.data.cache else None,
        reduced=train and cfg.data.reduced_decode,
    )
    batch_size = cfg.train.batch_size if train else cfg.eval.batch_size
    chosen = None if half is None else split_half(dataset, half, cfg.search.seed)
    sampler = ShardedSampler(len(dataset), batch_size, seed, train, rank, world, chosen)
    return Loader(
        dataset,
        maker,
        sampler,
        workers=cfg.data.workers,
        max_skipped_fraction=cfg.train.max_skipped_fraction,
    )
