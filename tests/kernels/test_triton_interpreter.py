"""Every Triton kernel, run on the CPU by Triton's interpreter in one process of its own: see
conftest.py. What fails there is shown here, per op."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

from pnfs import kernels

HERE = Path(__file__).resolve().parent

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed"
)


# Kernels loop over numbers that are known at run time.
LOOP = """
import torch
import triton
import triton.language as tl

@triton.jit
def kernel(out, steps):
    total = 0
    for _ in tl.range(steps):
        total += 1
    tl.store(out, total)

kernel[(1,)](torch.zeros(1, dtype=torch.int32), 3)
"""
# What the interpreter of Triton 3.6 says of it under NumPy 2.4, which ended such conversions.
REFUSED = "only 0-dimensional arrays can be converted to Python scalars"


def interpret(*arguments: str | Path) -> str:
    """The output of Python with these arguments and TRITON_INTERPRET=1."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    done = subprocess.run(
        [sys.executable, *arguments],
        env={**environment, "TRITON_INTERPRET": "1"},
        cwd=HERE.parents[1],
        capture_output=True,
        text=True,
    )
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The output of pytest over this folder; skips where the interpreter cannot run `LOOP`."""
    loop = tmp_path_factory.mktemp("interpreter") / "loop.py"
    loop.write_text(LOOP, encoding="utf-8")
    if REFUSED in interpret(loop):
        versions = " under ".join(f"{name} {version(name)}" for name in ("triton", "numpy"))
        pytest.skip(f"the interpreter of {versions} runs no loop: {REFUSED}")
    return interpret("-m", "pytest", "-v", "-p", "no:cacheprovider", "-p", "no:xdist", HERE)


OPS = [name for name, op in kernels.ops().items() if "triton" in op.backends]


@pytest.mark.parametrize("name", [*OPS, "triton_tuning"])
def test_the_triton_cases_of_every_op_pass(name: str, interpreted: str) -> None:
    pattern = rf"test_{name}(?:_interface)?\.py::\S+ (PASSED|FAILED|ERROR)"
    outcomes = re.findall(pattern, interpreted)
    assert outcomes, f"no case of {name} ran:\n{interpreted[-3000:]}"
    assert set(outcomes) == {"PASSED"}, interpreted[-10000:]
