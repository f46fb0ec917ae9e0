"""Where the time of a training step goes on a GPU: a table of its kernels.

    python bench/step_profile.py [--preset ours-1] [--batch 24 128] [--precision fp32 bf16]

Steps run without a CUDA graph, so that a kernel has its own line; what the GPU waits between them
is not counted. See `bench/whole_models.py` for times of whole steps.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import sys
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

import torch
import whole_models
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

STEPS, WARM_UP = 3, 3
WIDTH = 90  # characters of a kernel's name


def kernel_times(case: whole_models.Case, device: torch.device) -> dict[str, list[float]]:
    """Microseconds of every launch of STEPS training steps, by kernel; on the CPU, by operator."""
    step = whole_models.Ways(case, device).ours(graph=False)
    for _ in range(WARM_UP):
        step()
    on_gpu = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with profile(activities=activities) as recorded:
        for _ in range(STEPS):
            step()
        if on_gpu:
            torch.cuda.synchronize()
    wanted = DeviceType.CUDA if on_gpu else DeviceType.CPU
    times = defaultdict(list)
    for event in recorded.events():
        if event.device_type == wanted and not event.is_user_annotation:
            times[event.name].append(
                event.self_device_time_total if on_gpu else event.self_cpu_time_total
            )
    return times


def table(times: dict[str, list[float]]) -> Iterable[str]:
    """Per kernel its time in a step, the slowest first."""
    whole = sum(map(sum, times.values()))
    launches = sum(map(len, times.values())) / STEPS
    yield f"{whole / STEPS / 1e3:.3f} ms in kernels, {launches:.0f} launches a step"
    yield "    us a step  share  launches  us a launch  kernel"
    for name, all_ in sorted(times.items(), key=lambda item: -sum(item[1])):
        total, count = sum(all_), len(all_)
        yield (
            f"{total / STEPS:13.1f}  {total / whole:5.1%}  {count / STEPS:8.1f}  "
            f"{total / count:11.2f}  {name[:WIDTH]}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="ours-1")
    parser.add_argument("--batch", type=int, nargs="+", default=[24, 128])
    parser.add_argument("--precision", nargs="+", default=["fp32", "bf16"])
    parser.add_argument("--size", type=int, nargs=2, default=[256, 192], help="height, width")
    parser.add_argument("--out", type=Path, help="write it there too")
    parser.add_argument("--tuned", type=Path, help="kernels.json, with the choices of kernels")
    parser.add_argument("--dry-run", action="store_true", help="on the CPU, with small shapes")
    options = parser.parse_args()
    device = torch.device("cpu" if options.dry_run else "cuda")
    batches, size = ([2], (64, 64)) if options.dry_run else (options.batch, tuple(options.size))
    with contextlib.ExitStack() as stack:
        stack.enter_context(whole_models.tuned_as_in(options.tuned))
        files = [sys.stdout]
        if options.out:
            files.append(stack.enter_context(open(options.out, "w", encoding="utf-8")))
        for batch, precision in itertools.product(batches, options.precision):
            case = whole_models.Case(options.preset, size, batch, precision, training=True)
            with whole_models.products_in(precision):
                times = kernel_times(case, device)
            for file in files:
                print(f"\n{case}: " + "\n".join(table(times)), file=file, flush=True)
            whole_models.release()


if __name__ == "__main__":
    main()
