"""Pose Neural Fabrics: part-specific neural architectures for 2D human pose estimation.

    import pnfs
    config = pnfs.load_config("ours-1")
    model = pnfs.build_model(config.model)         # images (N, 3, H, W) → scores (N, K, H/4, W/4)
    estimator = pnfs.PoseEstimator("runs/a")       # images + boxes → poses

Everything is imported on first use, so `import pnfs` costs next to nothing.
"""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pnfs import compat, kernels
    from pnfs.checkpoint import load_model
    from pnfs.config import Config, dump_config, list_presets, load_config
    from pnfs.costs import count_costs
    from pnfs.errors import PnfsError
    from pnfs.estimator import PoseEstimator
    from pnfs.export import export_onnx, export_program
    from pnfs.folding import fold
    from pnfs.model import PoseNet, build_model
    from pnfs.pruning import prune

try:
    __version__ = version("pnfs")
except PackageNotFoundError:  # run from a source tree that was never installed
    __version__ = "0+unknown"

# public name -> module that defines it
_EXPORTS = {
    "Config": "config",
    "PnfsError": "errors",
    "PoseEstimator": "estimator",
    "PoseNet": "model",
    "build_model": "model",
    "count_costs": "costs",
    "dump_config": "config",
    "export_onnx": "export",
    "export_program": "export",
    "fold": "folding",
    "list_presets": "config",
    "load_config": "config",
    "load_model": "checkpoint",
    "prune": "pruning",
}
_MODULES = ("compat", "kernels")

__all__ = [
    "Config",
    "PnfsError",
    "PoseEstimator",
    "PoseNet",
    "__version__",
    "build_model",
    "compat",
    "count_costs",
    "dump_config",
    "export_onnx",
    "export_program",
    "fold",
    "kernels",
    "list_presets",
    "load_config",
    "load_model",
    "prune",
]


def __getattr__(name: str) -> Any:
    if name in _EXPORTS:
        value = getattr(import_module(f"pnfs.{_EXPORTS[name]}"), name)
    elif name in _MODULES:
        value = import_module(f"pnfs.{name}")
    else:
        raise AttributeError(f"module 'pnfs' has no attribute '{name}'")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
