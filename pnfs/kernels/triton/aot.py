"""Ahead-of-time compilation of every Triton kernel, without a GPU: registers, spills, occupancy.

python -m pnfs.kernels.triton.aot        # prints the table
"""

from __future__ import annotations

import importlib
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from pnfs.errors import PnfsError
from pnfs.kernels import native
from pnfs.kernels.triton import OPTIONS

ARCHITECTURES = (80, 90, 100)
# Per multiprocessor: bytes of shared memory that blocks can have (one KiB of each is the system's).
SHARED_BYTES = {80: 164 << 10, 90: 228 << 10, 100: 228 << 10}
REGISTERS = 65536
MAX_WARPS = 64
MAX_BLOCKS = 32


@dataclass(frozen=True)
class Variant:
    """One compilation of a kernel, given as a call of it.

    Attributes:
        kernel: the `triton.jit` function.
        name: what is special about this one, for the table.
        args: argument name -> "*fp32" and the like for a tensor, an int or float, or a tuple of
            such. As a launch does, tensors count as aligned to 16 bytes, 1 is built in, multiples
            of 16 are noted.
        constants: the `tl.constexpr` arguments.
        num_warps: warps per program.
    """

    kernel: Any
    name: str
    args: Mapping[str, Any]
    constants: Mapping[str, Any] = field(default_factory=dict)
    num_warps: int = 4


@dataclass(frozen=True)
class Usage:
    """What one compiled kernel takes: `local` is bytes of spilled registers (and of arrays in local
    memory) per thread, `shared` bytes per program, `occupancy` the share of 64 resident warps."""

    op: str
    kernel: str
    variant: str
    arch: int
    registers: int
    local: int
    shared: int
    occupancy: float


def variants(op: str) -> list[Variant]:
    """The variants that the Triton module of an op lists."""
    module = importlib.import_module(f"pnfs.kernels.triton.{op}")
    return cast(list[Variant], module.variants())


def compile_variant(op: str, variant: Variant, arch: int) -> Usage:
    """Compile for compute capability arch/10; Triton keeps the binary in its cache."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature: dict[str, Any] = {}
    constants: dict[tuple[int, ...], Any] = {}
    attributes: dict[tuple[int, ...], list[list[Any]]] = {}
    for index, name in enumerate(variant.kernel.arg_names):
        if name in variant.constants:
            signature[name] = "constexpr"
            constants[(index,)] = variant.constants[name]
        else:
            signature[name] = _describe((index,), variant.args[name], constants, attributes)
    compiled = triton.compile(
        ASTSource(variant.kernel, signature, constants, attributes),
        target=GPUTarget("cuda", arch, 32),
        options={"num_warps": variant.num_warps, **OPTIONS},
    )
    found = _resources(compiled.asm["cubin"], triton.knobs.nvidia.cuobjdump.path)
    shared = compiled.metadata.shared
    return Usage(
        op,
        variant.kernel.__name__,
        variant.name,
        arch,
        registers=found["REG"],
        local=max(found["STACK"], found["LOCAL"]),
        shared=shared,
        occupancy=occupancy(found["REG"], shared, variant.num_warps, arch),
    )


def _describe(
    path: tuple[int, ...],
    value: Any,
    constants: dict[tuple[int, ...], Any],
    attributes: dict[tuple[int, ...], list[list[Any]]],
) -> Any:
    """The type of an argument, or of every element of a tuple; adds what a launch would note."""
    if isinstance(value, tuple):
        return tuple(
            _describe((*path, i), element, constants, attributes) for i, element in enumerate(value)
        )
    if value == 1:
        constants[path] = value
        return "constexpr"
    if isinstance(value, str):
        attributes[path] = [["tt.divisibility", 16]]
        return value
    if isinstance(value, int) and value % 16 == 0:
        attributes[path] = [["tt.divisibility", 16]]
    if isinstance(value, int):
        return "i32" if -(2**31) <= value < 2**31 else "i64"
    return "fp32"


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


def compile_op(op: str, architectures: tuple[int, ...] = ARCHITECTURES) -> list[Usage]:
    """Compile every variant of an op for every architecture.

    Raises:
        PnfsError: this process interprets Triton kernels and cannot compile them.
    """
    if native.triton_interpreted():
        raise PnfsError(
            "TRITON_INTERPRET is set: kernels are interpreted here; unset it to compile"
        )
    return [
        compile_variant(op, variant, arch) for variant in variants(op) for arch in architectures
    ]


def table(usages: list[Usage]) -> str:
    """The figures as a Markdown table."""
    lines = [
        "| op | kernel | variant | arch | registers | spilled bytes | shared bytes | occupancy |",
        "|---|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {u.op} | {u.kernel} | {u.variant} | sm_{u.arch} | {u.registers} | {u.local} "
        f"| {u.shared} | {u.occupancy:.0%} |"
        for u in usages
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    import pnfs.kernels  # registers the ops

    try:
        found = [
            usage
            for name, op in pnfs.kernels.ops().items()
            if "triton" in op.backends
            for usage in compile_op(name)
        ]
    except PnfsError as error:
        sys.exit(f"error: {error}")
    print(table(found))
