"""What `pnfs info` shows: versions, what was compiled or why it was not, backends, devices."""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from pnfs import kernels
from pnfs.kernels import native
from pnfs.kernels.registry import Explanation
from pnfs.kernels.triton import tuning

PACKAGES = ("torch", "triton", "numpy", "opencv-python-headless", "pycocotools", "safetensors")


@dataclass(frozen=True)
class Info:
    """The facts, for printing or for a bug report.

    versions: package name -> version, or "not installed".
    build: the record that `setup.py` wrote ({} when the package was never built).
    modules: compiled module -> what it is, or why it is missing, one line.
    backends: the rows of `kernels.explain()`.
    devices: one line per device that torch sees.
    tuned: what is known about the fastest configurations of Triton kernels, one line.
    """

    versions: dict[str, str]
    build: dict[str, Any]
    modules: dict[str, str]
    backends: Explanation
    devices: list[str]
    tuned: str


def collect_info() -> Info:
    """Gather the facts; compiled modules are loaded to see whether they load."""
    build = native.build_record()
    modules = {f"pnfs.{name}": _describe(name, build) for name in ("_cpu", "_cuda", "_jpeg")}
    backends, tuned = kernels.explain(), tuning.summary()
    return Info(package_versions(), build, modules, backends, _devices(), tuned)


def package_versions() -> dict[str, str]:
    """Versions of pnfs, Python and the packages that decide results."""
    own = {"pnfs": _version("pnfs"), "python": platform.python_version()}
    return own | {name: _version(name) for name in PACKAGES}


def print_info() -> None:
    """Print `collect_info()` as plain text to standard output."""
    info = collect_info()
    print("\n".join(f"{name:24}{version}" for name, version in info.versions.items()))
    print("\ncompiled modules")
    for name, line in info.modules.items():
        print(f"  {name:12}{line}")
    print("\nbackends (the reference 'torch' always runs)")
    print("\n".join(f"  {line}" for line in str(info.backends).split("\n")))
    print(f"  tuned Triton kernels: {info.tuned}")
    print("\ndevices")
    print("\n".join(f"  {line}" for line in info.devices))


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def _describe(name: str, build: dict[str, Any]) -> str:
    ok, reason = native.module_available(name)
    if not ok:
        return f"missing: {reason}"
    entry = build.get("modules", {}).get(name, {})
    told = ("-march", "-gencode", "-fopenmp", "-l")
    flags = [flag for flag in entry.get("flags", []) if flag.startswith(told)]
    return f"{entry.get('compiler', 'unknown compiler')}, {' '.join(flags)}"


def cpu_name() -> str:
    """The processor's name where the system tells, else its architecture."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        text = ""
    names = [line.partition(":")[2].strip() for line in text.split("\n") if "model name" in line]
    return names[0] if names else platform.machine()


def _devices() -> list[str]:
    lines = [f"cpu: {cpu_name()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads"]
    if not native.cuda_visible():
        return [*lines, "cuda: no device is visible to torch"]
    for index in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(index)
        memory = device.total_memory / 2**30
        lines.append(
            f"cuda:{index}: {device.name}, sm_{device.major}{device.minor}, {memory:.0f} GiB"
        )
    return lines
