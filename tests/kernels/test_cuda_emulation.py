"""CUDA sources on the host: free of races, every barrier needed, every launch checked.

That results are right, the tests of the ops show: their cases ("cuda", "cpu").
"""

from __future__ import annotations

import re
from pathlib import Path
from types import ModuleType

import pytest
import torch
from cuda_emulation import CSRC, HERE, RaceCheck

from pnfs import kernels
from pnfs.kernels import checks, native
from pnfs.kernels.depthwise_fanout import scratch_cuda

OPS = sorted(name for name, op in kernels.ops().items() if "cuda" in op.backends)
KERNELS = sorted(path for path in (CSRC / "cuda").glob("*.cu*"))


def barriers(path: Path) -> list[str]:
    """As file:line."""
    lines = path.read_text(encoding="utf-8").split("\n")
    return [f"{path.name}:{i}" for i, line in enumerate(lines, 1) if "__syncthreads();" in line]


@pytest.fixture(scope="session")
def races(tmp_path_factory: pytest.TempPathFactory) -> RaceCheck:
    return RaceCheck(tmp_path_factory.mktemp("cuda_races"))


def race_found(races: RaceCheck, case: str, skip: str) -> bool:
    return "data race" in races(case, skip=skip).stderr


@pytest.mark.parametrize("op", OPS)
def test_kernels_have_no_race(races: RaceCheck, op: str) -> None:
    done = races(op)
    assert done.returncode == 0, done.stderr


def test_a_planted_race_is_found(races: RaceCheck) -> None:
    done = races("block_sum")
    assert done.returncode == 0, done.stdout + done.stderr
    barrier = barriers(HERE / "cuda_races.cpp")[0]
    assert race_found(races, "block_sum", skip=barrier)


def test_threads_that_wait_for_each_other_end_the_process(races: RaceCheck) -> None:
    done = races("stuck")
    assert done.returncode != 0
    assert "threads wait for each other at different barriers" in done.stderr


@pytest.mark.parametrize("barrier", [b for path in KERNELS for b in barriers(path)])
def test_without_any_one_barrier_there_is_a_race(races: RaceCheck, barrier: str) -> None:
    (op,) = [name for name in OPS if barrier.startswith(name)]
    assert race_found(races, op, skip=barrier)


def test_every_launch_is_checked() -> None:
    """Through PNFS_LAUNCH, which knows the stream and turns an error into an exception."""
    for path in KERNELS:
        text = path.read_text(encoding="utf-8")
        assert "<<<" not in text, path
        kernels_here = set(re.findall(r"\b(\w+_kernel)\(", text))
        launched = set(re.findall(r"PNFS_LAUNCH\(\(?(\w+_kernel)\b", text))
        assert launched <= kernels_here, path
        assert path.suffix != ".cu" or launched, path
    assert (CSRC / "cuda" / "launch.h").read_text(encoding="utf-8").count("<<<") == 1


def test_a_launch_that_fails_names_op_kernel_and_shapes(emulated_module: ModuleType) -> None:
    with native.emulated_cuda(emulated_module):
        args = [0, 0, 0, 0, 0, 0, 1, 1 << 20, 1 << 20, (1,) * 3, (0,) * 3, True, 0, 0, 0]
        with pytest.raises(RuntimeError, match=r"crop_normalize: too many blocks.* \(1 crop\)"):
            native.call("_cuda", "crop_normalize", *args, shapes="1 crop")
        args = [0, 0, 0, 0, 0, 1, 1, 1, 0, 0.5, False, 0, 0, 0]
        with pytest.raises(
            RuntimeError,
            match=r"oks_nms: similar_kernel: launch failed: invalid configuration .* \(1 pose\)",
        ):
            native.call("_cuda", "oks_nms", *args, shapes="1 pose")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("stencils", "stride"), [([1], 1), ([2, -1, 1, 0], 2)])
@pytest.mark.parametrize(
    "shape", [(1, 2, 960, 8, 6), (3, 24, 144, 33, 41), (2, 1, 5, 1, 1), (1, 24, 96, 128, 96)]
)
def test_what_passes_between_the_launches_of_depthwise_fanout(
    emulated_module: ModuleType,
    shape: tuple[int, ...],
    stencils: list[int],
    stride: int,
    dtype: torch.dtype,
) -> None:
    x = torch.empty(shape, dtype=dtype, device="meta")
    size, code = (*shape, x.stride(0), stride, 0), checks.DTYPE_CODES[dtype]
    for backward in (False, True):
        numbers = emulated_module.depthwise_fanout_scratch(stencils, size, code, backward)
        assert scratch_cuda(x, stencils, stride, backward) == numbers


def test_the_emulation_is_gone_after_its_block(emulated_module: ModuleType) -> None:
    before = native.backend_available("cuda", "oks_nms")
    with native.emulated_cuda(emulated_module):
        assert native.backend_available("cuda", "oks_nms")[0]
        assert native.module("_cuda") is emulated_module
    assert native.backend_available("cuda", "oks_nms") == before
