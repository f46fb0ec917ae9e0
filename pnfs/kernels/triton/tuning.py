"""Which of a kernel's configurations runs: the default, or the fastest one measured on this GPU.

A `Tunable` is a kernel with a short list of `Config`s, the first of which is its default. Outside
of `tuned(...)` the default runs, always: results then depend on nothing but the code and the GPU.
Inside, the first launch of a kernel on a device, type and size measures every configuration and
keeps the fastest, in memory and in one JSON file of the user's cache folder.

Configurations add in different orders, so a choice decides last digits. With the same file results
are the same in every run: what it holds is taken, also by a process that has just measured
otherwise, so that the ranks of a run agree and the run that filled the file can be repeated.
Training keeps its choices in its checkpoints and resumes with them.

Nothing is measured while a CUDA graph is recorded, while torch.compile traces, in Triton's
interpreter or without a GPU, nor after `BUDGET` seconds of measuring in one process: the default
runs. Sizes that follow the batch count by the next power of two, and no configuration compiles
anew for another size: see `UNSPECIALISED` in `pnfs.kernels.triton.maps`.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import threading
import time
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from pnfs.errors import PnfsError
from pnfs.kernels import native
from pnfs.statefile import write_json

BUDGET = 300.0  # seconds that a process measures; other ranks wait meanwhile, and not for ever
# Of the default's time that another configuration must stay below: noise decides nothing.
GAIN = 0.97
WARM_UP_MS, MEASURE_MS = 2, 15  # of one configuration
FORMAT = 1  # of the file
MOST = 4  # configurations of a kernel: each is compiled when it is measured
MEASURED = range(90, 100)  # compute capabilities, times ten, on which the lists were measured

log = logging.getLogger("pnfs")
T = TypeVar("T")


@dataclass(frozen=True)
class Config:
    """One way to launch a kernel.

    Attributes:
        num_warps: of a program.
        scale: elements that a program holds, over those that the launcher would give it.
    """

    num_warps: int
    scale: float = 1.0


class Tunable:
    """A kernel and its configurations, the default first.

    Attributes:
        kernel: what `triton.jit` made.
        name: the kernel's; one of a kind, as choices are kept under it.
    """

    def __init__(self, kernel: Any, *measured: Config, elsewhere: Sequence[Config] = ()) -> None:
        """
        Args:
            measured: the configurations.
            elsewhere: on GPUs other than `MEASURED`, where these would spill registers.
        """
        assert 1 <= len(measured) <= MOST and len(elsewhere) <= MOST
        self.kernel, self._measured, self._elsewhere = kernel, measured, tuple(elsewhere)
        self.name: str = kernel.fn.__name__

    @property
    def candidates(self) -> tuple[Config, ...]:
        """The configurations for the GPU that kernels are launched on now, or compiled for."""
        if not self._elsewhere or native.triton_interpreted():
            return self._measured
        from triton.runtime.driver import driver

        arch = driver.active.get_current_target().arch
        return self._measured if arch in MEASURED else self._elsewhere

    def launch(self, run: Callable[[Config], T], like: Tensor, batch: int, *exact: Hashable) -> T:
        """`run(config)` with the configuration that is to run.

        Args:
            run: launches on the current stream; called several times where configurations are
                measured, so it may read nothing that it writes.
            like: a tensor of the launch, for its device and dtype.
            batch: the size that changes from call to call.
            exact: all else that decides the speed: channels, sizes of a map, kinds.
        """
        if _forced is not None:
            return run(self.candidates[min(_forced, len(self.candidates) - 1)])
        if _tuner is None:
            return run(self.candidates[0])
        return run(_tuner.config(self, run, like, batch, exact))

    def version(self) -> str:
        """Of what a measured time is about: Triton, and the source of the kernel and of all that it
        calls."""
        import triton

        return f"{triton.__version__} {self.kernel.cache_key[:16]}"


# index of the candidate that every kernel runs with, the last one if it has fewer; see `candidate`
_forced: int | None = None
_tuner: Tuner | None = None  # of the process: backward passes run in threads of autograd


@contextlib.contextmanager
def candidate(index: int) -> Iterator[None]:
    """Inside, every kernel runs with its configuration of this index, the last if it has fewer."""
    global _forced
    before, _forced = _forced, index
    try:
        yield
    finally:
        _forced = before


@contextlib.contextmanager
def tuned(tuner: Tuner | None = None) -> Iterator[Tuner]:
    """Inside, kernels run with the fastest of their configurations; see the module. Gives the
    tuner, which holds the choices."""
    global _tuner
    before, _tuner = _tuner, tuner or Tuner(cache_file())
    try:
        yield _tuner
    finally:
        _tuner = before


def choices() -> dict[str, dict[str, Any]]:
    """Those that `tuned` has made or taken so far; see `Tuner`."""
    return {} if _tuner is None else dict(_tuner.choices)


def restore(choices: Mapping[str, dict[str, Any]]) -> None:
    """Inside `tuned`, run with these choices, of an earlier part of the run."""
    if _tuner is not None:
        _tuner.restore(choices)


def news() -> str | None:
    """See `Tuner.news`."""
    return None if _tuner is None else _tuner.news()


def cache_file() -> Path:
    """kernels.json in $PNFS_CACHE, $XDG_CACHE_HOME/pnfs or ~/.cache/pnfs."""
    own, general = os.environ.get("PNFS_CACHE"), os.environ.get("XDG_CACHE_HOME")
    if own:
        return Path(own) / "kernels.json"
    return Path(general or os.path.expanduser("~/.cache")) / "pnfs" / "kernels.json"


def device_name(like: Tensor) -> str | None:
    """The GPU that a launch can be measured on now; None if it cannot."""
    if like.device.type != "cuda" or native.triton_interpreted():
        return None
    if torch.compiler.is_compiling() or torch.cuda.is_current_stream_capturing():
        return None
    major, minor = torch.cuda.get_device_capability(like.device)
    return f"{torch.cuda.get_device_name(like.device)} {major}.{minor}"


def milliseconds(run: Callable[[], Any]) -> float:
    """The median of a few launches, memory read anew; infinite if the GPU cannot run it, or has not
    the 256 MB to sweep its cache with."""
    from triton.runtime.errors import TritonError
    from triton.testing import do_bench

    try:
        return do_bench(run, warmup=WARM_UP_MS, rep=MEASURE_MS, return_mode="median")
    except (TritonError, torch.OutOfMemoryError):
        return math.inf


def bucket(batch: int) -> int:
    """The next power of two: sizes that share a choice."""
    return 1 << max(0, batch - 1).bit_length()


class Tuner:
    """The choices of a process.

    Attributes:
        choices: by kernel, device, dtype and sizes, in one line of text: {"version", "config",
            "us"}, as the file has them; "us" are the measured times of all configurations.
        measured: how many of them this process measured.
    """

    def __init__(
        self,
        path: Path | None,
        *,
        timer: Callable[[Callable[[], Any]], float] = milliseconds,
        device: Callable[[Tensor], str | None] = device_name,
        budget: float = BUDGET,
    ) -> None:
        """
        Args:
            path: the file; None keeps choices in memory alone.
            timer: milliseconds of a call.
            device: see `device_name`.
            budget: seconds of measuring, compilation included.
        """
        self.path, self.choices, self.measured = path, dict[str, dict[str, Any]](), 0
        self._timer, self._device, self._left = timer, device, budget
        self._ready: dict[tuple[Hashable, ...], Config] = {}
        self._told = self._seen = 0  # of `measured`
        self._damaged = False  # the file, and that was said
        self._kept: dict[str, dict[str, Any]] | None = None  # of the file, a checkpoint, and own
        self._lock = threading.RLock()

    def restore(self, choices: Mapping[str, dict[str, Any]]) -> None:
        """Take these, of an earlier part of the run, whatever the file says, and hold them."""
        self.choices.update(choices)
        self._kept = {**self._known(), **choices}
        self._ready.clear()

    def news(self) -> str | None:
        """A line about what was measured since the last one, once nothing was between two calls."""
        settled, self._seen = self._seen == self.measured, self.measured
        if not settled or self._told == self.measured:
            return None
        count, self._told = self.measured - self._told, self.measured
        where = self.path or "this process"
        return f"Triton kernels: measured {count} cases, the choices are kept in {where}"

    def config(
        self,
        tunable: Tunable,
        run: Callable[[Config], Any],
        like: Tensor,
        batch: int,
        exact: tuple[Hashable, ...],
    ) -> Config:
        """The configuration of a launch; see `Tunable.launch`."""
        place = (tunable.name, like.device, like.dtype, bucket(batch), exact)
        found = self._ready.get(place)
        if found is not None:
            return found
        device = self._device(like)
        if device is None:
            return tunable.candidates[0]
        with self._lock:
            dtype = str(like.dtype).removeprefix("torch.")
            sizes = " ".join(map(str, exact))
            key = f"{tunable.name} | {device} | {dtype} | {sizes} | batch {bucket(batch)}"
            self._ready[place] = chosen = self._choose(key, tunable, run)
        return chosen

    def _choose(self, key: str, tunable: Tunable, run: Callable[[Config], Any]) -> Config:
        version = tunable.version()
        known = self._known()
        entry = known.get(key)
        if entry is None or _config_in(entry, version, tunable) is None:
            if self._left > 0:
                entry = self._store(key, self._measure(tunable, run), tunable)
            else:
                entry = _entry(tunable, 0, [])
        self.choices[key] = known[key] = entry
        return _config_in(entry, version, tunable) or tunable.candidates[0]

    def _measure(self, tunable: Tunable, run: Callable[[Config], Any]) -> dict[str, Any]:
        started = time.monotonic()
        times = [self._timer(partial(run, config)) for config in tunable.candidates]
        best = min(range(len(times)), key=times.__getitem__)
        if not times[best] < GAIN * times[0]:
            best = 0
        self.measured += 1
        self._left -= time.monotonic() - started
        if self._left <= 0:
            log.warning("measuring kernels has taken its time; the rest run with their defaults")
        return _entry(tunable, best, times)

    def _known(self) -> dict[str, dict[str, Any]]:
        if self._kept is None:
            self._kept = self._read()
        return self._kept

    def _read(self) -> dict[str, dict[str, Any]]:
        """What the file holds; nothing if there is none, or none that can be read: the next choice
        then replaces it."""
        if self.path is None:
            return {}
        try:
            content = json.loads(self.path.read_text(encoding="utf-8"))
            choices = content["choices"]
            if content["format"] != FORMAT or not isinstance(choices, dict):
                raise ValueError("another format")
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, KeyError, TypeError) as error:
            if not self._damaged:
                log.warning("%s: not read, kernels are tuned anew (%s)", self.path, error)
            self._damaged = True
            return {}
        return choices

    def _store(self, key: str, entry: dict[str, Any], tunable: Tunable) -> dict[str, Any]:
        """The entry that holds from now on: the file's, if another process was first."""
        if self.path is None:
            return entry
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with _locked(self.path.with_suffix(".lock")):
                choices = self._read()
                other = choices.get(key)
                if other is not None and _config_in(other, entry["version"], tunable) is not None:
                    return other
                choices[key] = entry
                write_json(self.path, {"format": FORMAT, "choices": choices})
        except (OSError, PnfsError):
            log.warning("%s: not written, kernels are tuned for this process alone", self.path)
            self.path = None
        return entry


def _entry(tunable: Tunable, index: int, times: list[float]) -> dict[str, Any]:
    return {
        "version": tunable.version(),
        "config": list(astuple(tunable.candidates[index])),
        "us": [None if math.isinf(t) else round(1e3 * t, 2) for t in times],
    }


def _config_in(entry: Any, version: str, tunable: Tunable) -> Config | None:
    """The choice that an entry stands for; None if it is of another version, or is none."""
    try:
        config = Config(*entry["config"]) if entry["version"] == version else None
    except (TypeError, KeyError):
        return None
    return config if config in tunable.candidates else None


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Alone among the processes that write the file. Where there are no locks, choices of one of
    two that write at a time can be lost, and are measured again; the file is whole all the same."""
    with path.open("a") as file:
        with contextlib.suppress(ImportError, OSError):
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def summary(path: Path | None = None) -> str:
    """A line about the file, for `pnfs info`."""
    path = path or cache_file()
    count = len(Tuner(path)._read())
    return f"{count} choices in {path}" if count else f"none in {path}"
