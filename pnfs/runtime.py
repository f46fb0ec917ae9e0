"""What concerns the whole process: its heap, its device, and the signals that ask it to stop."""

from __future__ import annotations

import ctypes
import platform
import signal
import threading
import time
from typing import Any

import torch

from pnfs.errors import PnfsError

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_HEAP_BYTES = 1 << 30


def keep_heap() -> None:
    """Let glibc keep freed memory instead of handing it back to the system after every tensor.

    By default each block over 128 KiB to 32 MiB is mapped from the system and unmapped when freed,
    so every activation costs page faults; on the CPU that is up to half of a training step's time.
    It changes the whole process, so the train, eval and predict entry points call it; importing
    pnfs never does. Without effect where the C library is not glibc.
    """
    if platform.libc_ver()[0] != "glibc":
        return
    libc = ctypes.CDLL(None)
    libc.mallopt(_M_MMAP_THRESHOLD, _HEAP_BYTES)
    libc.mallopt(_M_TRIM_THRESHOLD, _HEAP_BYTES)


def select_device(name: str = "auto") -> torch.device:
    """`auto` (CUDA if there is one), `cpu`, `cuda` or `cuda:N`.

    Raises:
        PnfsError: unknown name, or a GPU that is not there.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise PnfsError(f"device '{name}' is unknown; use auto, cpu, cuda or cuda:N") from None
    if device.type not in ("cpu", "cuda"):
        raise PnfsError(f"device '{name}' is not supported; use auto, cpu, cuda or cuda:N")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise PnfsError(
            f"device '{name}': {torch.cuda.device_count()} CUDA devices are visible; "
            "use --device cpu"
        )
    return device


class StoppedBySignal(Exception):
    """Work that may be thrown away ended early, because somebody asked this process to stop."""


class StopSignals:
    """SIGINT and SIGTERM as a wish that work honours at its next safe point.

    Inside the context the first signal sets `name` and nothing else. A later one acts as it would
    have without us, but for the first `ECHO` seconds: torchrun, and a cluster that signals it and
    its processes alike, say everything twice. In a thread other than the main one, where handlers
    cannot be set, nothing is caught.
    """

    ECHO = 3.0

    def __init__(self) -> None:
        self.name: str | None = None
        self._since = 0.0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def _note(self, number: int, _: Any) -> None:
        if self.name is None:
            self.name, self._since = signal.Signals(number).name, time.monotonic()
        elif time.monotonic() - self._since > self.ECHO:
            signal.signal(number, self._before[number])
            signal.raise_signal(number)
