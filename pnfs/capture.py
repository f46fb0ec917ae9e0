"""The same work again and again as one launch: a CUDA graph, recorded once per input shapes.

A GPU step of a pose network is hundreds of kernels of a few microseconds each; launched one by one
from Python, most of the time goes into launching. Where nothing but the contents of tensors changes
from call to call, the kernels are recorded once and replayed.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

Work = Callable[..., tuple[Tensor, ...]]
Signature = tuple[tuple[torch.Size, tuple[int, ...], torch.dtype], ...]

WARM_UP = 3  # calls of one signature before it is recorded: caches, workspaces, optimiser state
MAX_GRAPHS = 2  # each keeps its own activations: one for whole batches, one for a rest


class Recorder(Protocol):
    """Records work on one device."""

    def aside(self) -> contextlib.AbstractContextManager[None]:
        """Where work runs that is not recorded."""
        ...

    def record(self, work: Work, inputs: tuple[Tensor, ...]) -> Recording:
        """Records `work(*inputs)` without running it."""
        ...


@dataclass(frozen=True)
class Recording:
    """Replaying reads `inputs` and overwrites `outputs`."""

    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    replay: Callable[[], None]


class CudaRecorder:
    """CUDA graphs. All work, recorded or not, runs on one side stream: autograd ties the addition
    of gradients to the stream that a parameter was first used on, and recording on another one
    would have to wait for it, which is not allowed."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)

    @contextlib.contextmanager
    def aside(self) -> Iterator[None]:
        outer = torch.cuda.current_stream(self._stream.device)
        self._stream.wait_stream(outer)
        with torch.cuda.stream(self._stream):
            yield
        outer.wait_stream(self._stream)

    def record(self, work: Work, inputs: tuple[Tensor, ...]) -> Recording:
        fixed = tuple(torch.empty_like(x).copy_(x) for x in inputs)
        graph = torch.cuda.CUDAGraph()
        # Other threads go on allocating meanwhile, as the DataLoader's that pins batches does.
        with torch.cuda.graph(graph, stream=self._stream, capture_error_mode="thread_local"):
            outputs = work(*fixed)
        return Recording(fixed, outputs, graph.replay)


def recorder_for(device: torch.device) -> Recorder | None:
    """What records work on `device`; None where it has no graphs."""
    return CudaRecorder(device) if device.type == "cuda" else None


class Captured:
    """`work`, which returns a tuple of tensors; replayed where its inputs' shapes have come before.

    For equal shapes, strides and dtypes the work must launch the same kernels on the same memory:
    what differs from call to call it must read from tensors that stay in place (its inputs,
    weights, a learning rate), and it must not wait for the device. The first `WARM_UP` calls of
    each signature are ordinary ones, and so are those of a third and further signature.

    Attributes:
        refused: why nothing is recorded (any more), or None. A recording that fails sets it, and
            the work then runs as ordinary calls.
    """

    def __init__(
        self,
        work: Work,
        recorder: Recorder | None,
        *,
        refused: str | None = None,
        after_failure: Callable[[], None] = lambda: None,
    ) -> None:
        """
        Args:
            recorder: None where the device has no graphs.
            refused: a reason against recording that is known beforehand.
            after_failure: called when a recording failed half-way, to mend Python's state.
        """
        self.work, self.recorder, self.refused = work, recorder, refused
        self.after_failure = after_failure
        self.recordings: dict[Signature, Recording] = {}
        self._seen: dict[Signature, int] = {}

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """The outputs; those of a replay are overwritten by the next one."""
        if self.recorder is None:
            return self.work(*inputs)
        signature = tuple((x.shape, x.stride(), x.dtype) for x in inputs)
        recording = self.recordings.get(signature)
        if recording is None and self._worth_recording(signature):
            recording = self._record(self.recorder, signature, inputs)
        if recording is None:
            with self.recorder.aside():
                return self.work(*inputs)
        for fixed, x in zip(recording.inputs, inputs, strict=True):
            fixed.copy_(x, non_blocking=True)
        recording.replay()
        return recording.outputs

    def _worth_recording(self, signature: Signature) -> bool:
        if self.refused is not None or len(self.recordings) == MAX_GRAPHS:
            return False
        count = self._seen.get(signature, 0)
        self._seen[signature] = count + 1
        return count >= WARM_UP

    def _record(
        self, recorder: Recorder, signature: Signature, inputs: tuple[Tensor, ...]
    ) -> Recording | None:
        try:
            recording = recorder.record(self.work, inputs)
        except RuntimeError as error:
            self.refused = f"recording it failed: {str(error).splitlines()[0]}"
            self.after_failure()
            return None
        self.recordings[signature] = recording
        return recording
