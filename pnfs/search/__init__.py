"""How α and β are found: the strategies of `search.strategy`, one registry."""

from pnfs.search.strategies import (
    STRATEGIES,
    ParameterGroups,
    StepContext,
    Strategy,
    build_strategy,
)

__all__ = ["STRATEGIES", "ParameterGroups", "StepContext", "Strategy", "build_strategy"]
