"""How α and β are found: the strategies of `search.strategy`, and architectures as files."""

from pnfs.search.files import (
    ARCHITECTURE,
    StoredFabric,
    load_architecture,
    read_architecture,
    save_architecture,
)
from pnfs.search.macs import expected_macs, find_fabrics
from pnfs.search.monitor import Monitor
from pnfs.search.start import level_heads
from pnfs.search.strategies import STRATEGIES, build_strategy
from pnfs.search.strategy import ParameterGroups, StepContext, Strategy, decay_gradients

__all__ = [
    "ARCHITECTURE",
    "STRATEGIES",
    "Monitor",
    "ParameterGroups",
    "StepContext",
    "StoredFabric",
    "Strategy",
    "build_strategy",
    "decay_gradients",
    "expected_macs",
    "find_fabrics",
    "level_heads",
    "load_architecture",
    "read_architecture",
    "save_architecture",
]
