"""Every Triton kernel, run on the CPU by Triton's interpreter in one process of its own: see
conftest.py. What fails there is shown here, per op."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from pnfs import kernels

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed"
)


@pytest.fixture(scope="module")
def interpreted() -> str:
    """The output of pytest over this folder with TRITON_INTERPRET=1."""
    here = Path(__file__).resolve().parent
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-v", "-p", "no:cacheprovider", "-p", "no:xdist", here],
        env={**environment, "TRITON_INTERPRET": "1"},
        cwd=here.parents[1],
        capture_output=True,
        text=True,
    )
    return done.stdout + done.stderr


OPS = [name for name, op in kernels.ops().items() if "triton" in op.backends]


@pytest.mark.parametrize("name", [*OPS, "triton_tuning"])
def test_the_triton_cases_of_every_op_pass(name: str, interpreted: str) -> None:
    pattern = rf"test_{name}(?:_interface)?\.py::\S+ (PASSED|FAILED|ERROR)"
    outcomes = re.findall(pattern, interpreted)
    assert outcomes, f"no case of {name} ran:\n{interpreted[-3000:]}"
    assert set(outcomes) == {"PASSED"}, interpreted[-10000:]
