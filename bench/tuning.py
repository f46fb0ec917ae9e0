"""Measures the configurations of the Triton kernels on whole steps of preset ours-1.

python bench/tuning.py --out FOLDER             # leaves the choices in FOLDER/kernels.json
python bench/tuning.py --out FOLDER --dry-run   # chooses without a GPU, and measures nothing
python bench/tuning.py --compile-only           # into Triton's cache, the defaults alone
"""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch

from pnfs.kernels.triton import aot, tuning


def compile_one(arch: int, index: int, name: str, dtype: torch.dtype) -> None:
    with tuning.candidate(index):
        aot.compile_calls(partial(aot.CALLS[name], aot.PRESET, aot.BATCH, dtype), arch)


def compile_all(arch: int, candidates: int) -> None:
    """Into Triton's cache, on all cores: most of the time that tuning takes.

    candidates: how many of each kernel's configurations.
    """
    if arch not in aot.ARCHITECTURES:
        return
    tasks = itertools.product([arch], range(candidates), aot.CALLS, aot.DTYPES)
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(os.cpu_count(), mp_context=context) as pool:
        list(pool.map(compile_one, *zip(*tasks, strict=True)))


def architecture() -> int:
    """Of the current GPU, such as 90."""
    major, minor = torch.cuda.get_device_capability()
    return 10 * major + minor


def dry_tuner(path: Path) -> tuning.Tuner:
    def timer(run: Any) -> float:
        run()
        return 1.0

    return tuning.Tuner(path, timer=timer, device=lambda like: "no GPU")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="the folder")
    parser.add_argument("--batch", type=int, nargs="+", default=[aot.BATCH, 128])
    parser.add_argument("--seconds", type=float, default=tuning.BUDGET, help="of measuring")
    parser.add_argument("--dry-run", action="store_true", help="without a GPU")
    parser.add_argument("--compile-only", action="store_true", help="measure nothing")
    options = parser.parse_args()
    if options.compile_only:
        if not options.dry_run:
            compile_all(architecture(), 1)
        return
    if options.out is None:
        parser.error("--out is missing: the folder that the choices go into")
    path = options.out / "kernels.json"
    if options.dry_run:
        tuner = dry_tuner(path)
    else:
        compile_all(architecture(), tuning.MOST)
        tuner = tuning.Tuner(path, budget=options.seconds)
    with tuning.tuned(tuner):
        for batch, dtype, name in itertools.product(options.batch, aot.DTYPES, aot.CALLS):
            call = partial(aot.CALLS[name], aot.PRESET, batch, dtype)
            if options.dry_run:
                aot.walk(call, 90, lambda *_: None)
            else:
                call(device="cuda")
            print(f"{name}, batch {batch}, {dtype}: {tuner.measured} cases measured", flush=True)
    for case, entry in tuner.choices.items():
        print(f"{case}: {entry['config']} of {entry['us']} us")


if __name__ == "__main__":
    main()
