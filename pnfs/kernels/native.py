"""Loads the compiled modules `_cpu`, `_cuda` and `_jpeg` of pnfs, or says why one is missing.

`setup.py` records in `pnfs/_build_info.json` what it built and why it left something out; this
module reads that record and never raises for a missing module: the reference backend still works.
"""

from __future__ import annotations

import ctypes
import functools
import importlib
import importlib.util
import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from pnfs.errors import PnfsError
from pnfs.kernels.checks import RUNS, Verdict, no

RECORD = Path(__file__).resolve().parents[1] / "_build_info.json"
REBUILD = "rebuild with `pip install -e .`"

_emulated: ModuleType | None = None  # stands for pnfs._cuda, see emulated_cuda


@functools.cache
def build_record() -> dict[str, Any]:
    """What `setup.py` wrote: per module whether it was built, the reason if not, and the flags."""
    try:
        record: dict[str, Any] = json.loads(RECORD.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return record


@functools.cache
def _load(name: str) -> tuple[ModuleType | None, str]:
    if importlib.util.find_spec(f"pnfs.{name}") is None:
        entry = build_record().get("modules", {}).get(name, {})
        return None, entry.get("reason") or f"pnfs.{name} is not built; {REBUILD}"
    try:
        if name == "_cpu":
            _share_openmp()
        return importlib.import_module(f"pnfs.{name}"), ""
    except (ImportError, OSError) as error:
        return None, f"pnfs.{name} cannot be loaded ({error}); {REBUILD}"


def _share_openmp() -> None:
    """Make the OpenMP runtime that torch has loaded visible to `pnfs._cpu`.

    torch's wheels bring their own libgomp, under a name that varies, and a second copy would mean a
    second pool of threads beside torch's. So `pnfs._cpu` is linked against none, and its symbols
    are found in the copy that is loaded already; without one, in the system's.
    """
    loaded = [
        line.split(maxsplit=5)[-1].strip()
        for line in Path("/proc/self/maps").read_text(encoding="utf-8").splitlines()
        if "omp" in line
    ]
    runtimes = [path for path in loaded if re.search(r"/lib(gomp|iomp5|omp)\b[^/]*$", path)]
    runtimes.sort(key=lambda path: "/torch" not in path)  # torch's own before another package's
    ctypes.CDLL(runtimes[0] if runtimes else "libgomp.so.1", mode=ctypes.RTLD_GLOBAL)


def module(name: str) -> ModuleType:
    """The compiled module `_cpu`, `_cuda` or `_jpeg`.

    Raises:
        PnfsError: it is missing; the message has the reason.
    """
    if name == "_cuda" and _emulated is not None:
        return _emulated
    found, reason = _load(name)
    if found is None:
        raise PnfsError(reason)
    return found


def call(name: str, function: str, *args: Any, shapes: str) -> Any:
    """Call `function` of the compiled module `name`.

    Raises:
        PnfsError: the arguments do not fit together, with `shapes` for the reader.
        RuntimeError: the launch failed; names the op and `shapes`.
    """
    try:
        return getattr(module(name), function)(*args)
    except IndexError as error:
        raise PnfsError(f"{function}: {error} ({shapes})") from None
    except RuntimeError as error:
        raise RuntimeError(f"{function}: {error} ({shapes})") from None


@contextmanager
def cuda_stream(device: torch.device) -> Iterator[int]:
    """Inside, `device` is the current one; gives the handle of its current stream, for `call`."""
    if device.type == "cuda":
        with torch.cuda.device(device):
            yield torch.cuda.current_stream().cuda_stream
    else:  # emulated: a launch returns when it is done
        yield 0


@contextmanager
def emulated_cuda(compiled: ModuleType) -> Iterator[None]:
    """Inside, the backend `cuda` takes CPU tensors and runs in `compiled`.

    That is `pnfs._cuda` as a C++ compiler makes it of the same sources, see
    csrc/cuda/host_emulation.h: for tests without a GPU.
    """
    global _emulated
    before, _emulated = _emulated, compiled
    try:
        yield
    finally:
        _emulated = before


def module_available(name: str) -> Verdict:
    """Whether the compiled module `name` can be loaded."""
    found, reason = _load(name)
    return RUNS if found is not None else no(reason)


@functools.cache
def has_function(name: str, function: str) -> Verdict:
    """Whether the compiled module `name` is there and offers `function`."""
    ok, reason = module_available(name)
    if ok and not hasattr(module(name), function):
        return no(f"pnfs.{name} was built before {function} existed; {REBUILD}")
    return ok, reason


@functools.cache
def cuda_visible() -> bool:
    """Whether torch sees a CUDA device; asked once per process."""
    return torch.cuda.is_available()


_gpu_assumed = False


@contextmanager
def gpu_assumed() -> Iterator[None]:
    """Inside, GPU kernels count as runnable on tensors of any device, and `auto` chooses as on a
    GPU: for callers that look at launches and make none."""
    global _gpu_assumed
    before, _gpu_assumed = _gpu_assumed, True
    try:
        yield
    finally:
        _gpu_assumed = before


def device_for_auto(device: str) -> str:
    """The device type that `auto` chooses a backend for, with tensors on `device`."""
    return "cuda" if _gpu_assumed else device


def triton_interpreted() -> bool:
    """Whether Triton kernels run on the CPU in Triton's interpreter (TRITON_INTERPRET=1)."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "yes", "on", "y")


@functools.cache
def _triton_installed() -> bool:
    return importlib.util.find_spec("triton") is not None


@torch.compiler.assume_constant_result
def backend_available(backend: str, function: str) -> Verdict:
    """Whether `backend` can run at all in this process, on any device."""
    if backend == "cpp":
        return has_function("_cpu", function)
    if backend == "cuda" and (_gpu_assumed or _emulated is not None):
        return RUNS
    if backend == "cuda":
        verdict = has_function("_cuda", function)
        return verdict if not verdict[0] or cuda_visible() else no("no CUDA device is visible")
    if backend == "triton":
        if not _triton_installed():
            return no("triton is not installed")
        if not (_gpu_assumed or cuda_visible() or triton_interpreted()):
            return no("no CUDA device is visible and TRITON_INTERPRET is not set")
    return RUNS


def backend_fits(backend: str, device: str) -> Verdict:
    """Whether `backend` works on tensors of the device type `device`."""
    if backend in ("cuda", "triton") and _gpu_assumed:
        return RUNS
    if backend == "torch" or device == {"cpp": "cpu", "cuda": "cuda", "triton": "cuda"}[backend]:
        return RUNS
    if backend == "triton" and device == "cpu":
        return RUNS if triton_interpreted() else no("CPU tensors need TRITON_INTERPRET=1")
    if backend == "cuda" and device == "cpu" and _emulated is not None:
        return RUNS
    return no(f"it does not take {device} tensors")
