"""Checkpoints: complete, atomic, and readable without pickle.

    RUN/model.safetensors        best weights so far by AP or PCKh
    RUN/checkpoints/step-00001200-epoch-0003/
        model.safetensors        weights, with the configuration inside
        training.safetensors     optimiser, random states, strategy, …
        state.json               the same state's tree; size and CRC of both files

A checkpoint folder appears under its final name by one rename, after everything in it is on disk,
so a kill at any moment leaves the previous one; `state.json` says what the other two must look
like, so a damaged one is recognised and the one before it is used.
"""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.optim import Optimizer

from pnfs.backbones.weights import state_dict_differences
from pnfs.config import Config, parse_config
from pnfs.errors import PnfsError, did_you_mean
from pnfs.model import build_model
from pnfs.statefile import (
    checksum,
    pack,
    read_tensors,
    reason,
    sync_folder,
    unpack,
    write_json,
    write_tensors,
)

FORMAT = "pnfs-1"
KEEP = 2  # checkpoints that stay on disk; the best weights are kept beside them
MODEL, TRAINING, STATE = "model.safetensors", "training.safetensors", "state.json"


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that was read and verified.

    Attributes:
        path: its folder.
        step: optimiser steps taken when it was written.
        model: the model's state dict, on the CPU.
        training: what was given to `save_checkpoint`, tensors on the CPU.
    """

    path: Path
    step: int
    model: dict[str, Tensor]
    training: dict[str, Any]


def save_checkpoint(
    run: Path,
    *,
    step: int,
    epoch: int,
    model: nn.Module,
    training: Mapping[str, Any],
    config: Config,
) -> Path:
    """Write RUN/checkpoints/step-XXXXXXXX-epoch-XXXX and drop all but the newest `KEEP`.

    Step and epoch together name a moment of a run; if its checkpoint is there already, it stays.

    Args:
        run: the run folder.
        step: optimiser steps taken so far.
        epoch: epochs finished, evaluation included.
        model: its state dict is stored with the configuration, so that `load_model` reads it alone.
        training: nested state (see `statefile.pack`) that a resumed run needs.

    Raises:
        PnfsError: unwritable folder or full disk; earlier checkpoints are untouched.
    """
    folder = run / "checkpoints"
    final = folder / f"step-{step:08d}-epoch-{epoch:04d}"
    if final.is_dir() and _problem(final) is None:
        return final
    partial = folder / f".{final.name}.tmp"
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    except OSError as error:
        raise PnfsError(
            f"{folder}: cannot be written ({reason(error)}); choose another --out"
        ) from None
    try:
        save_weights(partial / MODEL, model, config, {"step": step})
        tree, tensors = pack(dict(training))
        write_tensors(partial / TRAINING, tensors, {"format": FORMAT})
        files = {
            name: {"bytes": (partial / name).stat().st_size, "crc32": checksum(partial / name)}
            for name in (MODEL, TRAINING)
        }
        write_json(
            partial / STATE, {"format": FORMAT, "step": step, "files": files, "training": tree}
        )
        shutil.rmtree(final, ignore_errors=True)  # there only if it is damaged
        partial.rename(final)
    except (OSError, PnfsError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        if isinstance(error, PnfsError):
            raise
        raise PnfsError(
            f"{final}: cannot be written ({reason(error)}); free disk space or choose another --out"
        ) from None
    sync_folder(folder)
    for old in list_checkpoints(run)[:-KEEP]:
        shutil.rmtree(old, ignore_errors=True)
    return final


def list_checkpoints(run: Path) -> list[Path]:
    """Checkpoint folders of a run, oldest first; not verified."""
    return sorted(path for path in (run / "checkpoints").glob("step-*") if path.is_dir())


def load_checkpoint(run: Path, *, warn: Callable[[str], None] = print) -> Checkpoint | None:
    """The newest checkpoint of a run that is whole, or None for a run without checkpoints.

    Damaged ones that are newer are named through `warn`, one line each, and left where they are.

    Raises:
        PnfsError: there are checkpoints, and none can be read.
    """
    folders = list_checkpoints(run)
    for folder in reversed(folders):
        problem = _problem(folder)
        if problem is None:
            state = json.loads((folder / STATE).read_text(encoding="utf-8"))
            training = unpack(state["training"], read_tensors(folder / TRAINING))
            return Checkpoint(folder, state["step"], read_tensors(folder / MODEL), training)
        warn(f"warning: checkpoint {folder} is damaged ({problem}); using the one before it")
    if folders:
        raise PnfsError(
            f"{run}: no checkpoint can be read, the newest is {folders[-1].name} "
            f"({_problem(folders[-1])}); restore one, or start again with --overwrite"
        )
    return None


def drop_checkpoints_after(run: Path, last: Path | None) -> None:
    """Remove checkpoints beyond `last` (damaged ones that were passed over) and unfinished ones."""
    doomed = [path for path in list_checkpoints(run) if last is None or path.name > last.name]
    for path in [*doomed, *(run / "checkpoints").glob(".step-*.tmp")]:
        shutil.rmtree(path, ignore_errors=True)


def _problem(folder: Path) -> str | None:
    """Why a checkpoint folder cannot be used, or None if it is whole."""
    try:
        state = json.loads((folder / STATE).read_text(encoding="utf-8"))
        if state["format"] != FORMAT:
            return f"format {state['format']!r}, expected {FORMAT!r}"
        for name, expected in state["files"].items():
            size = (folder / name).stat().st_size
            if size != expected["bytes"]:
                return f"{name} has {size} bytes, expected {expected['bytes']}"
            if checksum(folder / name) != expected["crc32"]:
                return f"{name} has changed since it was written"
    except OSError as error:
        return f"{Path(error.filename or folder).name}: {reason(error)}"
    except (ValueError, KeyError, TypeError):
        return f"{STATE} is not what was written"
    return None


def save_weights(path: Path, model: nn.Module, config: Config, facts: Mapping[str, Any]) -> None:
    """Write a model as one file that `load_model` reads alone: weights, configuration, `facts`."""
    metadata = {
        "format": FORMAT,
        "config": json.dumps(config.model_dump(mode="json")),
        "facts": json.dumps(dict(facts)),
    }
    write_tensors(path, model.state_dict(), metadata)


def read_metadata(path: Path) -> tuple[Config, dict[str, Any]]:
    """Configuration and facts of a file that `save_weights` wrote.

    Raises:
        PnfsError: missing or truncated file, or one that this package did not write.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
    except (OSError, SafetensorError) as error:
        raise PnfsError(
            f"{path}: cannot be read as safetensors ({reason(error)}); it is missing, truncated or "
            "of another format"
        ) from None
    if metadata.get("format") != FORMAT or "config" not in metadata:
        raise PnfsError(
            f"{path}: holds no pnfs model (format {metadata.get('format')!r}); backbone weights of "
            "others go to model.backbone_weights, published models through pnfs.compat"
        )
    config = parse_config(json.loads(metadata["config"]), where=str(path))
    return config, json.loads(metadata.get("facts", "{}"))


def find_weights(run_or_file: str | Path) -> Path:
    """The weights file that a user means: the file itself, or a run's best or newest weights.

    Raises:
        PnfsError: it does not exist, or is a folder without a model.
    """
    path = Path(run_or_file)
    if path.is_file():
        return path
    if not path.exists():
        siblings = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        raise PnfsError(
            f"{path}: no such run folder or file; check the path{did_you_mean(path.name, siblings)}"
        )
    if (path / MODEL).is_file():
        return path / MODEL
    for folder in reversed(list_checkpoints(path)):
        if _problem(folder) is None:
            return folder / MODEL
    raise PnfsError(
        f"{path}: not a run with a model (it holds neither {MODEL} nor checkpoints/); "
        "give the folder that `pnfs train --out` wrote"
    )


def load_model(run_or_file: str | Path, device: str | torch.device = "cpu") -> nn.Module:
    """The model of a run folder or of one `.safetensors` file, on `device`, in eval mode.

    Raises:
        PnfsError: missing or damaged file, no run folder, or weights of another model (names the
            first key that differs).
    """
    path = find_weights(run_or_file)
    config, _ = read_metadata(path)
    model = build_model(config.model)
    load_weights(model, read_tensors(path), where=str(path))
    return model.to(device).eval()


def load_weights(model: nn.Module, weights: Mapping[str, Tensor], *, where: str) -> None:
    """Copy `weights` into the model's own tensors (which keep identity, device and memory format).

    Raises:
        PnfsError: a key is missing, unexpected or of another shape; the first ones are named, and
            the model is unchanged.
    """
    differences = state_dict_differences(model.state_dict(), weights)
    if differences:
        raise PnfsError(f"{where}: this file is of another model: {differences}")
    model.load_state_dict(dict(weights))


def load_optimizer(optimizer: Optimizer, state: Mapping[str, Any]) -> None:
    """`load_state_dict`, with every moment in its parameter's memory format.

    Files hold contiguous tensors; fused optimisers and bit-for-bit resumption want the strides that
    an uninterrupted run would have.
    """
    try:
        optimizer.load_state_dict(dict(state))
    except ValueError as error:
        raise PnfsError(
            f"the checkpoint's optimiser does not fit this model and strategy ({error}); resume "
            "with the settings that the run was started with"
        ) from None
    for parameter, values in optimizer.state.items():
        for name, value in values.items():
            same_shape = isinstance(value, Tensor) and value.shape == parameter.shape
            if same_shape and value.stride() != parameter.stride():
                values[name] = torch.empty_like(parameter).copy_(value)


def seed_random(seed: int) -> None:
    """Seed Python's, numpy's and torch's global generators (every CUDA device too)."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def random_state() -> dict[str, Any]:
    """State of Python's, numpy's and torch's global generators (every CUDA device too)."""
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return {
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "torch": torch.get_rng_state(),
        "cuda": cuda,
    }


def set_random_state(state: Mapping[str, Any]) -> None:
    """Restore what `random_state` returned; CUDA states as far as the devices are there."""
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    for device, value in zip(range(count), state["cuda"], strict=False):
        torch.cuda.set_rng_state(value, device)


def is_run(path: Path) -> bool:
    """Whether `path` is a folder that a training run wrote (or began to write)."""
    return (path / "run.json").is_file()
