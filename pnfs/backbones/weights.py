"""Weights of a backbone: how they start, and how a file fills them."""

from __future__ import annotations

import collections
import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from pnfs.errors import PnfsError

if TYPE_CHECKING:
    from pnfs.backbones.base import Backbone

WRAPPERS = ("state_dict", "model")  # keys under which training scripts keep the state dict
COUNTER = "num_batches_tracked"
SHOWN_KEYS = 3  # per kind of difference, so that the message stays one line


def init_convolutions(module: nn.Module) -> None:
    """Start `module` so that it trains from scratch: convolutions He-normal by fan-out, their
    biases 0, batch normalisations 1 and 0.

    HRNet's own N(0, 0.001) is not used: behind batch normalisation both give the same function, but
    Adam's first steps are huge relative to tiny weights (fitting HRNet-W32 to eight images for 50
    steps left 2.4 times the loss).
    """
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d):
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
        elif isinstance(layer, nn.BatchNorm2d) and layer.affine:
            nn.init.ones_(layer.weight)
            nn.init.zeros_(layer.bias)


def read_state_dict(path: str | Path) -> dict[str, Tensor]:
    """Read a state dict from `.safetensors`, or from a file that torch.save wrote.

    Nothing but tensors, numbers and plain containers is unpickled. A state dict inside
    `{"state_dict": ...}` or `{"model": ...}` is taken out, and a `module.` prefix that all keys
    share is removed.

    Returns:
        name -> tensor on the CPU, in the file's dtypes.

    Raises:
        PnfsError: missing or unreadable file, or a file without a state dict.
    """
    path = Path(path)
    if not path.is_file():
        raise PnfsError(f"weights {path}: no such file; check the path")
    try:
        if path.suffix == ".safetensors":
            tree: Any = load_file(path)
        else:
            with torch.serialization.safe_globals(_numpy_scalars()):
                tree = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged pickle can fail in any way
        raise PnfsError(f"weights {path}: {_why_unreadable(error)}") from None
    return unwrap_state_dict(tree, where=str(path))


def unwrap_state_dict(tree: Any, *, where: str) -> dict[str, Tensor]:
    """Find the state dict in what a weights file held (see `read_state_dict`)."""
    for wrapper in WRAPPERS:
        if isinstance(tree, Mapping) and isinstance(tree.get(wrapper), Mapping):
            tree = tree[wrapper]
    if not isinstance(tree, Mapping) or not tree:
        raise PnfsError(f"weights {where}: holds no state dict; save model.state_dict()")
    strange = [key for key, value in tree.items() if not isinstance(value, Tensor)]
    if strange:
        raise PnfsError(
            f"weights {where}: '{strange[0]}' is not a tensor, so this is no state dict; save "
            "model.state_dict()"
        )
    return strip_prefix({str(key): value for key, value in tree.items()}, "module.")


def strip_prefix(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Remove `prefix` if every key has it, else return the same keys."""
    if not all(key.startswith(prefix) for key in state):
        return dict(state)
    return {key.removeprefix(prefix): value for key, value in state.items()}


def load_backbone_weights(backbone: Backbone, path: str | Path) -> None:
    """Fill `backbone` from a file in torchvision's, HRNet's or our own format, or not at all.

    Of a whole pose model, the tensors under `backbone.` are taken. Those of a known head
    (`backbone.known_heads`) are left out. BatchNorm's counters of batches, which old files lack and
    no forward pass uses, become 0 when missing.

    Raises:
        PnfsError: the file cannot be read, or a tensor is missing, unexpected or of another shape.
    """
    state = read_state_dict(path)
    inner = {key: value for key, value in state.items() if key.startswith("backbone.")}
    if inner:
        state = strip_prefix(inner, "backbone.")
    state = {
        key: value
        for key, value in backbone.rename_keys(state).items()
        if not key.startswith(backbone.known_heads)
    }
    own = backbone.state_dict()
    for key, value in own.items():
        if key.endswith(COUNTER):
            state.setdefault(key, torch.zeros_like(value, device="cpu"))
    differences = state_dict_differences(own, state)
    if differences:
        raise PnfsError(
            f"weights {path} do not fit {backbone.name}: {differences}; give that network's file "
            "or change model.backbone"
        )
    backbone.load_state_dict(state)


def state_dict_differences(own: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> str:
    """The first keys in which `given` differs from `own`, in words; empty if they agree."""
    shapes = [
        f"{key} {tuple(given[key].shape)} instead of {tuple(own[key].shape)}"
        for key in own
        if key in given and given[key].shape != own[key].shape
    ]
    kinds = {
        "missing": [key for key in own if key not in given],
        "unexpected": [key for key in given if key not in own],
        "other shape": shapes,
    }
    return "; ".join(
        f"{kind}: {', '.join(keys[:SHOWN_KEYS])}"
        + (f" and {len(keys) - SHOWN_KEYS} more" if len(keys) > SHOWN_KEYS else "")
        for kind, keys in kinds.items()
        if keys
    )


def _why_unreadable(error: Exception) -> str:
    """What is wrong with a file that did not load, and what to do."""
    message = str(error)
    unsafe = re.search(r"GLOBAL (\S+)", message)
    if isinstance(error, pickle.UnpicklingError) and unsafe:
        return f"holds a {unsafe[1]} beside tensors; save model.state_dict() alone"
    told = isinstance(error, OSError | RuntimeError | SafetensorError) and message
    reason = message.splitlines()[0].split(". ")[0] if told else type(error).__name__
    return f"cannot be read ({reason}); it is damaged, or no .safetensors or torch.save file"


def _numpy_scalars() -> list[Any]:
    """What a pickled NumPy number needs: training scripts keep their best score in the file."""
    scalar = np.float64(0).__reduce__()[0]
    kinds = (np.float32, np.float64, np.int32, np.int64)
    dtypes = [type(np.dtype(kind)) for kind in kinds]
    # files written under NumPy 1 name the module numpy.core, those under NumPy 2 numpy._core
    names = [(scalar, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")]
    return [*names, np.dtype, *dtypes, collections.Counter]
