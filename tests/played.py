"""A GPU's streams and graphs, played by the CPU for tests."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from pnfs.capture import Recording, Work

STEP = torch.zeros(3, dtype=torch.float64)  # what a training step returns


class Player:
    """Plays a CUDA graph on the CPU: a replay runs the work on the recorded inputs again and leaves
    the results in the recorded outputs, which are as large as `output`. As with a graph, recording
    alone changes nothing."""

    def __init__(self, output: Tensor = STEP, broken: bool = False) -> None:
        self.output, self.broken = output, broken
        self.replays = 0

    def aside(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def record(self, work: Work, inputs: tuple[Tensor, ...]) -> Recording:
        if self.broken:
            raise RuntimeError("operation not permitted when stream is capturing\nmore")
        fixed = tuple(torch.full_like(x, 0) for x in inputs)
        outputs = [torch.full_like(self.output, torch.nan)]

        def replay() -> None:
            self.replays += 1
            for kept, new in zip(outputs, work(*fixed), strict=True):
                kept.copy_(new)

        return Recording(fixed, tuple(outputs), replay)


class PlayedMark:
    def __init__(self, side: PlayedSide, number: int) -> None:
        self.side, self.number = side, number

    def query(self) -> bool:
        return self.number <= self.side.passed

    def synchronize(self) -> None:
        self.side.log.append(f"wait for {self.number}")
        self.side.passed = max(self.side.passed, self.number)


class PlayedSide:
    """Does what goes to the side at once, and notes what is asked of it. The device has passed the
    marks up to the number `passed`."""

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
