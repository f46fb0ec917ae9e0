"""Ahead-of-time compilation of the Triton kernels, without a GPU: registers, spills, occupancy.

    python -m pnfs.kernels.triton.aot                            # prints the table
    python -m pnfs.kernels.triton.aot --out docs/kernels-gpu.md  # and writes it, with words

What is compiled is what is launched: the ops run on tensors that have shapes but no memory, as on a
GPU of the wanted architecture, and every launch compiles its kernel instead. So a table holds
exactly the variants that those calls need, each under the first shape that needed it.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._mode_utils import no_dispatch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from pnfs.errors import PnfsError
from pnfs.kernels import checks, native, registry

ARCHITECTURES = (80, 90, 100)
# Per multiprocessor: bytes of shared memory that blocks can have (one KiB of each is the system's).
SHARED_BYTES = {80: 164 << 10, 90: 228 << 10, 100: 228 << 10}
REGISTERS = 65536
MAX_WARPS = 64
MAX_BLOCKS = 32


@dataclass(frozen=True)
class Usage:
    """What one compiled kernel takes.

    Attributes:
        op, kernel: of which op, and the kernel's name.
        shape: dtype and shape of the first map of the first call that needed it.
        launches: how often the calls launched it.
        local: bytes of spilled registers (and of arrays in local memory) per thread.
        shared: bytes per program.
        occupancy: the share of 64 resident warps that the limits of a multiprocessor allow.
    """

    op: str
    kernel: str
    shape: str
    arch: int
    launches: int
    num_warps: int
    num_stages: int
    registers: int
    local: int
    shared: int
    occupancy: float


class _Gpu:
    """Stands for Triton's driver: a GPU that one can compile for."""

    def __init__(self, arch: int) -> None:
        self.arch = arch

    def get_current_device(self) -> int:
        return self.arch  # kernels are kept per device

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.arch, 32)


@contextmanager
def launches_go_to(arch: int, launch: Callable[..., Any]) -> Iterator[None]:
    """Inside, ops run on their Triton kernels as on a GPU of compute capability arch/10, and
    `launch(run, kernel, args, grid, options)` is called in place of each launch, where
    `run(kernel, *args, grid=grid, warmup=True, **options)` compiles.

    Raises:
        PnfsError: this process interprets Triton kernels and cannot compile them.
    """
    if native.triton_interpreted():
        raise PnfsError(
            "TRITON_INTERPRET is set: kernels are interpreted here; unset it to compile"
        )
    from triton.runtime.driver import driver
    from triton.runtime.jit import JITFunction

    run = JITFunction.run

    def instead(kernel: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        return launch(run, kernel, args, grid, options)

    on_triton = {name: "triton" for name, op in registry.ops().items() if "triton" in op.backends}
    before = driver._active
    driver.set_active(_Gpu(arch))
    try:
        with (
            native.gpu_assumed(),
            registry.use_backend(on_triton),
            mock.patch.object(JITFunction, "run", instead),
        ):
            yield
    finally:
        driver._active = before  # None too: no GPU is looked for


class _Calls(TorchDispatchMode):
    """Sees calls of ops on tensors without memory, and runs the function behind each on others."""

    def __init__(self) -> None:
        super().__init__()
        self.op = self.shape = ""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        name = func._schema.name
        if name in registry.op_functions and "_triton" in name:
            self.op = name.removeprefix("pnfs::").partition("_triton")[0]
            with no_dispatch():
                hollow = tree_map_only(Tensor, _hollow, list(args))
                self.shape = _describe(hollow)
                registry.op_functions[name](*hollow)
        return func(*args, **(kwargs or {}))


def _hollow(tensor: Tensor) -> Tensor:
    return torch.empty_strided(
        tensor.size(), tensor.stride(), dtype=tensor.dtype, device=torch.device("meta")
    )


def _describe(args: Sequence[Any]) -> str:
    first = next(leaf for leaf in tree_leaves(args) if isinstance(leaf, Tensor))
    return f"{checks.short_name(first.dtype)} {'×'.join(map(str, first.shape))}"


def walk(
    call: Callable[[], Any],
    arch: int,
    launch: Callable[..., Any],
    calls: _Calls | None = None,
) -> None:
    """Run `call()` with `launch` in place of launches, as `launches_go_to` has it. Tensors that
    `call` makes have shapes alone; it may differentiate."""
    with (
        launches_go_to(arch, launch),
        torch.autograd.set_multithreading_enabled(False),  # modes belong to a thread
        FakeTensorMode(allow_non_fake_inputs=True),
        calls or _Calls(),
    ):
        call()


def compile_calls(
    call: Callable[[], Any],
    arch: int,
    change: Callable[[dict[str, Any]], dict[str, Any]] = lambda options: options,
) -> list[Usage]:
    """Compile every kernel that `call()` launches, for compute capability arch/10; Triton keeps the
    binaries in its cache.

    Args:
        call: uses ops; see `walk`.
        arch: 80, 90 or 100.
        change: of the constants and options of every launch.

    Raises:
        PnfsError: this process interprets Triton kernels and cannot compile them.
    """
    calls = _Calls()
    found: dict[str, Usage] = {}

    def compile_launch(run: Any, kernel: Any, args: Any, grid: Any, options: Any) -> None:
        compiled = run(kernel, *args, grid=grid, warmup=True, **change(options))
        known = found.get(compiled.hash)
        if known is None:
            known = _usage(calls, kernel, compiled, arch)
        found[compiled.hash] = replace(known, launches=known.launches + 1)

    walk(call, arch, compile_launch, calls)
    return list(found.values())


def _usage(calls: _Calls, kernel: Any, compiled: Any, arch: int) -> Usage:
    import triton

    found = _resources(compiled.asm["cubin"], triton.knobs.nvidia.cuobjdump.path)
    meta = compiled.metadata
    return Usage(
        op=calls.op,
        kernel=kernel.fn.__name__,
        shape=calls.shape,
        arch=arch,
        launches=0,
        num_warps=meta.num_warps,
        num_stages=meta.num_stages,
        registers=found["REG"],
        local=max(found["STACK"], found["LOCAL"]),
        shared=meta.shared,
        occupancy=occupancy(found["REG"], meta.shared, meta.num_warps, arch),
    )


def _resources(cubin: bytes, cuobjdump: str) -> dict[str, int]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        command = [cuobjdump, "-res-usage", str(path)]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return {name: int(number) for name, number in re.findall(r"\b([A-Z]+):(\d+)", text)}


def occupancy(registers: int, shared: int, num_warps: int, arch: int) -> float:
    """Resident warps over the 64 possible, from the limits of one multiprocessor."""
    per_warp = -(-registers * 32 // 256) * 256  # registers are given out 256 at a time
    blocks = min(
        MAX_BLOCKS,
        MAX_WARPS // num_warps,
        REGISTERS // (per_warp * num_warps),
        SHARED_BYTES[arch] // (shared + 1024),
    )
    return blocks * num_warps / MAX_WARPS


def specialisations(call: Callable[[], Any], arch: int = 90) -> dict[str, set[str]]:
    """Per kernel that `call()` launches, the keys by which Triton tells its compilations apart;
    nothing is compiled."""
    from triton import knobs

    found: dict[str, set[str]] = {}
    emptied = set()

    def note(*, key: str, fn: Any, **_: Any) -> bool:
        found.setdefault(fn.name, set()).add(key)
        return True  # leave it

    def look(run: Any, kernel: Any, args: Any, grid: Any, options: Any) -> None:
        if kernel not in emptied:  # of what was compiled before, which nobody would be asked about
            kernel.device_caches.pop(arch, None)
            emptied.add(kernel)
        run(kernel, *args, grid=grid, warmup=True, **options)

    with mock.patch.object(knobs.runtime, "jit_cache_hook", note):
        walk(call, arch, look)
    return found


def table(usages: Sequence[Usage]) -> str:
    """The figures as a Markdown table."""
    lines = [
        "| op | kernel | first map | arch | launches | warps | stages | registers | spilled bytes "
        "| shared bytes | occupancy |",
        "|---|---|---|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    lines += [
        f"| {u.op} | {u.kernel} | {u.shape} | sm_{u.arch} | {u.launches} | {u.num_warps} "
        f"| {u.num_stages} | {u.registers} | {u.local} | {u.shared} | {u.occupancy:.0%} |"
        for u in usages
    ]
    return "\n".join(lines)


def training_step(preset: str, batch: int, dtype: torch.dtype, device: str = "cpu") -> None:
    """Forward pass, loss and gradients of a preset under autocast, on inputs of any values."""
    from pnfs.config import load_config
    from pnfs.head import pose_loss
    from pnfs.model import build_model

    config = load_config(preset, SIZE).model
    with torch.device(device), torch.autocast(device, dtype, enabled=dtype != torch.float32):
        model, keypoints = build_model(config), config.skeleton_table.num_keypoints
        joints, weights = torch.empty(batch, keypoints, 2), torch.empty(batch, keypoints)
        images = torch.empty(batch, 3, *config.input_size)
        loss = pose_loss(model, images, joints, weights, sigma=2.0)
    torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)


def evaluation(preset: str, batch: int, dtype: torch.dtype, device: str = "cpu") -> None:
    """Scores of images and of mirrored ones, and keypoints from both, as `training_step`."""
    from pnfs.config import load_config
    from pnfs.kernels import decode_heatmaps
    from pnfs.model import build_model

    config = load_config(preset, SIZE).model
    autocast = torch.autocast(device, dtype, enabled=dtype != torch.float32)
    with torch.device(device), torch.no_grad(), autocast:
        model = build_model(config).eval()
        images = torch.empty(batch, 3, *config.input_size)
        scores = model(images)
        permutation = list(range(scores.shape[1]))
        mirrored = model(images)
        decode_heatmaps(scores, torch.empty(batch, 2, 3), flipped=mirrored, permutation=permutation)


PRESET, SIZE, BATCH = "ours-1", ["model.input_size=[256, 192]"], 24
DTYPES = (torch.float32, torch.bfloat16)
CALLS: dict[str, Callable[..., None]] = {
    "training step": training_step,
    "evaluation": evaluation,
}
INTRODUCTION = f"""\
# Triton kernels: registers, shared memory, occupancy

Written by `python -m pnfs.kernels.triton.aot --out docs/kernels-gpu.md`, without a GPU: nothing
here is a measured time. The ops of whole steps of preset {PRESET} at 256×192, batch {BATCH}, run
on tensors without memory, and each launch compiles its kernel for compute capability 8.0, 9.0
and 10.0 instead of running it. One row is one compilation, under dtype and shape of the first map
that needed it; `launches` counts the launches that share it. Spilled bytes are local memory per
thread, shared bytes are per program. Occupancy is an estimate: resident warps over 64, from
registers, shared memory and the limits of one multiprocessor. Other batch sizes run the same
compilations.
"""


def document(architectures: Sequence[int] = ARCHITECTURES) -> str:
    """docs/kernels-gpu.md."""
    import triton

    parts = [INTRODUCTION, f"triton {triton.__version__}, torch {torch.__version__}."]
    for name, call in CALLS.items():
        for dtype in DTYPES:
            parts.append(f"## {name}, {checks.short_name(dtype)}")
            run = partial(call, PRESET, BATCH, dtype)
            found = [usage for arch in architectures for usage in compile_calls(run, arch)]
            parts.append(table(sorted(found, key=_order)))
    return "\n\n".join(part.strip() for part in parts) + "\n"


def _order(usage: Usage) -> tuple[Any, ...]:
    return usage.op, usage.kernel, usage.shape, usage.arch


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m pnfs.kernels.triton.aot", description=__doc__)
    parser.add_argument("--out", type=Path, help="file to write instead of the terminal")
    parser.add_argument("--arch", type=int, nargs="+", choices=ARCHITECTURES, default=ARCHITECTURES)
    options = parser.parse_args(arguments)
    try:
        text = document(options.arch)
    except PnfsError as error:
        sys.exit(f"error: {error}")
    if options.out is None:
        print(text, end="")
    else:
        options.out.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
