"""What a training run reads: people for the weights, for α and β, and held out for the score."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from pnfs import distributed
from pnfs.config import Config
from pnfs.data import load_people
from pnfs.data.batch import Batch
from pnfs.data.loader import Loader, make_loader
from pnfs.data.prefetch import Prepare, Side


class TrainingData:
    """The loaders of one process.

    Attributes:
        people, held_out: train and val split.
        loader: batches of the weights: of all people, or of half of them where α and β have the
            other half.
        architecture_loader: batches of α and β, or None. It runs on from step to step and has a
            place of its own in the data.
    """

    def __init__(self, config: Config) -> None:
        rank, world = distributed.rank(), distributed.world()
        self.people, self.held_out = distributed.together(  # synthetic people are rendered once
            lambda: [
                load_people(config.data, config.model.skeleton_table, split)
                for split in ("train", "val")
            ]
        )
        split = config.search.bilevel and config.model.family == "pnfs"

        def loader(half: Any) -> Loader:
            return make_loader(self.people, config, train=True, rank=rank, world=world, half=half)

        self.loader = loader("weights" if split else None)
        self.architecture_loader = loader("architecture") if split else None
        self._held: Iterator[Batch] | None = None
        self._noticed = False

    def held(self) -> Batch:
        """The next batch of the people kept for α and β."""
        if self._held is None:
            assert self.architecture_loader is not None
            self._held = _endless(self.architecture_loader)
        return next(self._held)

    def prefetch(self, prepare: Prepare, side: Side | None) -> None:
        """Batches are made ahead, on `side`; see `Loader.prefetch`."""
        for loader in self._loaders():
            loader.prefetch(prepare, side)

    def ahead(self) -> None:
        """Called when a step is launched: the next batches are prepared meanwhile."""
        for loader in self._loaders():
            loader.ahead()

    def new_problems(self) -> list[str]:
        """One line for each sample left out since the last call."""
        return [line for loader in self._loaders() for line in loader.new_problems()]

    def new_notice(self) -> str | None:
        """Why the cache takes no more; once, though each worker finds out for itself."""
        lines = [line for loader in self._loaders() for line in loader.new_notices()]
        if self._noticed or not lines:
            return None
        self._noticed = True
        return lines[0]

    @property
    def skipped(self) -> int:
        """Broken samples since the start of training."""
        return sum(loader.skipped for loader in self._loaders())

    def state(self) -> dict[str, Any]:
        """Where training stands, for `load_state` with any number of processes."""
        held = self.architecture_loader
        return {**self.loader.state(), "architecture": None if held is None else held.state()}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Go on from a `state()`."""
        self.loader.load_state(state)
        if self.architecture_loader is not None and state.get("architecture"):
            self.architecture_loader.load_state(state["architecture"])

    def _loaders(self) -> list[Loader]:
        return [x for x in (self.loader, self.architecture_loader) if x is not None]


def _endless(loader: Loader) -> Iterator[Batch]:
    """Epoch after epoch. It must not know `TrainingData`: in a cycle with it, workers would outlive
    the run, and the process would wait for them at its end."""
    while True:
        yield from loader
