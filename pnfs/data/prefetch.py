"""The next batch, copied and normalised on a side stream while the device computes.

Once a step is launched the host is free until the step's result is read. `Prefetcher.ahead`, called
in between, takes the next batch from the workers; its copy to the device and its warp then run
beside the step's kernels, and the next step finds its input ready. One batch is made ahead, no
more. A device without streams has no prefetcher: its batches are prepared when they are used.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch
from torch import Tensor

from pnfs.data.batch import Batch

Prepare = Callable[[Batch], Batch]


class Mark(Protocol):
    """A place in the work of a side."""

    def query(self) -> bool:
        """Whether the device has passed it."""
        ...

    def synchronize(self) -> None:
        """Let the host wait for it."""
        ...


class Side(Protocol):
    """Work that runs beside the main work of one device."""

    def aside(self) -> contextlib.AbstractContextManager[Any]:
        """Inside, launches go to the side."""
        ...

    def mark(self) -> Mark:
        """Behind everything launched on the side so far."""
        ...

    def join(self, mark: Mark) -> None:
        """Main work launched from now on waits for `mark`; the host does not."""
        ...

    def hand_over(self, tensor: Tensor) -> None:
        """Main work uses a tensor of the side: when it is freed, the side must not have its memory
        before the main work launched until then is done."""
        ...


class CudaSide:
    """A CUDA stream of its own; the main work is on the stream that is current when it is used."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)

    def aside(self) -> contextlib.AbstractContextManager[Any]:
        return torch.cuda.stream(self._stream)

    def mark(self) -> Mark:
        return self._stream.record_event()

    def join(self, mark: Mark) -> None:
        assert isinstance(mark, torch.cuda.Event)
        torch.cuda.current_stream(self._stream.device).wait_event(mark)

    def hand_over(self, tensor: Tensor) -> None:
        tensor.record_stream(torch.cuda.current_stream(self._stream.device))


def side_for(device: torch.device) -> Side | None:
    """What runs beside the main work of `device`; None where all work is in one line."""
    return CudaSide(device) if device.type == "cuda" else None


class Prefetcher(Iterator[Batch]):
    """The batches of `source` as `prepare` makes them, in order.

    Whatever `source` or `prepare` raises, the end of `source` included, is kept and raised by the
    `next` that it concerns: until then nothing is wrong with the step that runs.
    """

    def __init__(self, source: Iterator[Batch], prepare: Prepare, side: Side) -> None:
        """
        Args:
            source: batches in host memory, pinned if `prepare` is not to wait for their copies.
            prepare: host batch → batch on the device; launches work and need not wait for it.
            side: where that work goes.
        """
        self._source, self._prepare, self._side = source, prepare, side
        self._ready: tuple[Batch, Mark] | Exception | None = None
        # The device may still read them, and freed pinned memory is soon written to again.
        self._copied: deque[tuple[Mark, Batch]] = deque()

    def ahead(self) -> None:
        """Take and prepare the next batch, unless that is done. Waits for `source` alone."""
        if self._ready is not None:
            return
        while self._copied and self._copied[0][0].query():
            self._copied.popleft()
        try:
            self._ready = self._make(next(self._source))
        except Exception as problem:
            self._ready = problem

    def _make(self, host: Batch) -> tuple[Batch, Mark]:
        try:
            with self._side.aside():
                batch = self._prepare(host)
        finally:  # after an error, too: some copies may have been launched
            mark = self._side.mark()
            self._copied.append((mark, host))
        return batch, mark

    def __next__(self) -> Batch:
        self.ahead()
        ready, self._ready = self._ready, None
        if isinstance(ready, Exception):
            try:
                raise ready
            finally:
                del ready  # it knows this frame: a cycle would keep the source's workers
        assert ready is not None
        batch, mark = ready
        self._side.join(mark)
        for tensor in batch.tensors():
            self._side.hand_over(tensor)
        return batch

    def close(self) -> None:
        """Forget the batch made ahead, and let go of `source` and the host batches once the device
        has read them. A later `next` finds the end."""
        self._source, self._ready = iter(()), None
        for mark, _ in self._copied:
            mark.synchronize()
        self._copied.clear()
