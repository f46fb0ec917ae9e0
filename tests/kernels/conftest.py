"""Where the Triton cases run.

A test that is parametrised with `backend` and `device` has its Triton case as ("triton", "cpu") for
Triton's interpreter and ("triton", "cuda") for a GPU. The interpreter works only in a process that
had TRITON_INTERPRET=1 before triton was first imported, and such a process cannot compile kernels.
So an ordinary process leaves the ("triton", "cpu") cases out, a process with the variable runs them
alone, and test_triton_interpreter.py starts the second from the first.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from pnfs.kernels import native

HERE = Path(__file__).resolve().parent


def _is_interpreter_case(item: pytest.Item) -> bool:
    params = getattr(getattr(item, "callspec", None), "params", {})
    return params.get("backend") == "triton" and params.get("device") == "cpu"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    interpreted = native.triton_interpreted()
    left_out = [
        item
        for item in items
        if HERE in item.path.parents and _is_interpreter_case(item) != interpreted
    ]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]
