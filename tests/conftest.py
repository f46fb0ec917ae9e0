"""Shared fixtures: where the reference material lies, and a clean numeric environment."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """The folder with the published reference figures and real data, beside the repository."""
    folder = Path(__file__).resolve().parents[2] / "shared"
    if not (folder / "reference").is_dir():
        pytest.skip(f"needs the reference material in {folder.name}/ beside the repository")
    return folder


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA GPU, none is visible")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)
