"""What a process does once before heavy work: device, threads of the heap, processes of the run."""

from __future__ import annotations

import ctypes
import platform

import torch

from pnfs.errors import PnfsError

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_HEAP_BYTES = 1 << 30


def keep_heap() -> None:
    """Let glibc keep freed memory instead of handing it back to the system after every tensor.

    By default each block over 128 KiB to 32 MiB is mapped from the system and unmapped when freed, so
    every activation costs page faults; on the CPU that is up to half of a training step's time. It
    changes the whole process, so the train, eval and predict entry points call it; importing pnfs never
    does. Without effect where the C library is not glibc.
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
            f"device '{name}': {torch.cuda.device_count()} CUDA devices are visible; use --device cpu"
        )
    return device
