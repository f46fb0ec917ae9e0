"""Counters of launches: zero, apart where launches may run at a time, and addresses that Triton
compiles no kernel anew for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from pnfs.kernels import tickets

DEVICE = torch.device("cuda", 0)


class Gpu:
    """Stands for torch.cuda: a stream, and whether it is captured. Tensors lie on the CPU."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.stream, self.capturing = 1, False
        zeros = torch.zeros
        monkeypatch.setattr(
            torch, "zeros", lambda *shape, dtype, device: zeros(*shape, dtype=dtype)
        )
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: self)
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: self.capturing)
        for known in ("_of_streams", "_for_captures"):
            monkeypatch.setattr(tickets, known, {})

    @property
    def cuda_stream(self) -> int:
        return self.stream

    def synchronize(self) -> None:
        pass


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Gpu:
    return Gpu(monkeypatch)


def addresses(tensor: Tensor, count: int) -> set[int]:
    assert tensor.dtype == torch.int32 and not tensor.any() and len(tensor) >= count
    return {tensor.data_ptr() + 4 * i for i in range(count)}


def test_launches_of_a_stream_share_counters_those_of_two_do_not(gpu: Any) -> None:
    one = tickets.counters(5, DEVICE)
    assert tickets.counters(3, DEVICE) is one
    gpu.stream = 2
    assert not addresses(one, 5) & addresses(tickets.counters(5, DEVICE), 5)


def test_every_captured_launch_has_its_own(gpu: Any) -> None:
    used = addresses(tickets.counters(7, DEVICE), 7)
    gpu.capturing = True
    kept = []
    for count in (1, 3, 4, 5, 1000) * 3:
        kept.append(tickets.counters(count, DEVICE))
        assert kept[-1].data_ptr() % 16 == kept[0].data_ptr() % 16
        assert not used & addresses(kept[-1], count)
        used |= addresses(kept[-1], count)


def test_a_capture_that_finds_none_left_zeroes_its_own(
    gpu: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu.capturing = True  # and nothing ran before
    assert len(tickets.counters(6, DEVICE)) == 6
    gpu.capturing = False
    monkeypatch.setattr(tickets, "CAPTURED", 8)
    tickets.counters(1, DEVICE)
    gpu.capturing = True
    three = [tickets.counters(4, DEVICE) for _ in range(3)]
    assert len({tensor.data_ptr() for tensor in three}) == 3


def test_more_counters_than_a_stream_has(gpu: Any) -> None:
    many = tickets.COUNTERS + 1
    assert tickets.counters(many, DEVICE) is not tickets.counters(many, DEVICE)
    assert len(tickets.counters(many, DEVICE)) == many
