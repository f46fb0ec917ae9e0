"""Where the Triton and the CUDA cases run.

A test that is parametrised with `backend` and `device` has its CUDA case as ("cuda", "cuda") for a
GPU and ("cuda", "cpu") for the same sources on the host, see cuda_emulation.py.

A test that is parametrised with `backend` and `device` has its Triton case as ("triton", "cpu") for
Triton's interpreter and ("triton", "cuda") for a GPU. The interpreter works only in a process that
had TRITON_INTERPRET=1 before triton was first imported, and such a process cannot compile kernels.
So an ordinary process leaves the ("triton", "cpu") cases out, a process with the variable runs them
alone, and test_triton_interpreter.py starts the second from the first.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from cuda_emulation import build_module

from pnfs.kernels import native

HERE = Path(__file__).resolve().parent


def _hasten_interpreter() -> None:
    """Leave out what Triton's interpreter spends most of its time on.

    At every launch, and at every call of a jitted function by another, it goes through all of
    triton.language for what it must replace. What is replaced may stay: nothing else uses the
    language in a process that interprets. And it computes every sum and product of integers once
    more with 64 bits to find overflows; maps as small as those here have none.
    """
    from triton.runtime import interpreter

    builder, patch = interpreter.interpreter_builder, interpreter._patch_lang
    builder.options = replace(builder.options, sanitize_overflow=False)
    patched: set[int] = set()

    def patch_once(fn: Callable[..., Any]) -> Any:
        if id(fn.__globals__) not in patched:
            patched.add(id(fn.__globals__))
            patch(fn)
        return SimpleNamespace(restore=lambda: None)

    interpreter._patch_lang = patch_once


if native.triton_interpreted():
    with contextlib.suppress(AttributeError, TypeError):  # a version that is built otherwise
        _hasten_interpreter()


def _is_case(item: pytest.Item, backend: str) -> bool:
    """Whether it runs `backend` without the GPU that this takes."""
    params = getattr(getattr(item, "callspec", None), "params", {})
    return params.get("backend") == backend and params.get("device") == "cpu"


@pytest.fixture(scope="session")
def emulated_module(tmp_path_factory: pytest.TempPathFactory) -> ModuleType:
    """Compiled once, also where several workers of pytest-xdist share a run."""
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent
    with open(folder / "cuda_emulation.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        return build_module(folder)


@pytest.fixture(autouse=True)
def _emulated_cuda(request: pytest.FixtureRequest) -> Iterator[None]:
    if not _is_case(request.node, "cuda"):
        yield
        return
    with native.emulated_cuda(request.getfixturevalue("emulated_module")):
        yield


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    interpreted = native.triton_interpreted()
    left_out = [
        item
        for item in items
        if HERE in item.path.parents and _is_case(item, "triton") != interpreted
    ]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]
