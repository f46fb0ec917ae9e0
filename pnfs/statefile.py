"""Files that survive a kill: atomic writes, and nested state as one JSON tree plus flat tensors.

Nothing here knows what the state means. A state is built from dicts, lists, tuples, tensors, numpy
arrays, numbers, strings, booleans and None; `pack` splits it into a JSON tree (with placeholders)
and a dict of tensors for safetensors, `unpack` puts it together again. No pickle anywhere: a file
from a stranger can be wrong, but it cannot run code.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import tempfile
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from pnfs.errors import PnfsError

# Keys of the one-entry JSON objects that stand for what JSON cannot say.
TENSOR, TUPLE, MAP, ARRAY = "$tensor", "$tuple", "$map", "$array"


def pack(state: Any) -> tuple[Any, dict[str, Tensor]]:
    """Split nested state into a JSON tree and the tensors that it refers to by name."""
    tensors: dict[str, Tensor] = {}

    def walk(node: Any, name: str) -> Any:
        if node is None or isinstance(node, bool | int | float | str):
            return node
        if isinstance(node, Tensor):
            tensors[name] = node
            return {TENSOR: name}
        if isinstance(node, np.ndarray):
            return {ARRAY: [str(node.dtype), list(node.shape), node.ravel().tolist()]}
        if isinstance(node, np.generic):
            return node.item()
        if isinstance(node, tuple):
            return {TUPLE: [walk(item, f"{name}.{i}") for i, item in enumerate(node)]}
        if isinstance(node, list):
            return [walk(item, f"{name}.{i}") for i, item in enumerate(node)]
        if isinstance(node, Mapping):
            items = [
                (key, walk(value, f"{name}.{key}" if name else str(key)))
                for key, value in node.items()
            ]
            if all(isinstance(key, str) and not key.startswith("$") for key, _ in items):
                return dict(items)
            return {MAP: [[key, value] for key, value in items]}
        raise TypeError(f"state {name or 'root'}: a {type(node).__name__} cannot be stored")

    return walk(state, ""), tensors


def unpack(tree: Any, tensors: Mapping[str, Tensor]) -> Any:
    """The inverse of `pack`."""
    if isinstance(tree, list):
        return [unpack(item, tensors) for item in tree]
    if not isinstance(tree, dict):
        return tree
    if len(tree) == 1:
        ((kind, value),) = tree.items()
        if kind == TENSOR:
            return tensors[value]
        if kind == ARRAY:
            dtype, shape, values = value
            return np.array(values, dtype=dtype).reshape(shape)
        if kind == TUPLE:
            return tuple(unpack(item, tensors) for item in value)
        if kind == MAP:
            return {key: unpack(item, tensors) for key, item in value}
    return {key: unpack(value, tensors) for key, value in tree.items()}


def checksum(path: Path) -> int:
    """CRC-32 of a file's bytes."""
    value = 0
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            value = zlib.crc32(block, value)
    return value


def sync_folder(folder: Path) -> None:
    """Make a rename in `folder` survive a power cut (a no-op where folders cannot be opened)."""
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(handle)
    except OSError:
        pass  # some network file systems refuse; the rename itself was still atomic
    finally:
        os.close(handle)


def is_unfinished(path: Path) -> bool:
    """Whether `path` is a temporary file that a killed `write_atomically` left behind."""
    return path.name.startswith(".") and path.name.endswith(".tmp") and path.is_file()


def write_atomically(path: Path, write: Callable[[Path], None]) -> None:
    """Let `write` fill a temporary file beside `path`, flush it to disk and rename it into place.

    A kill at any moment leaves either the old file or the new one.

    Raises:
        PnfsError: the folder cannot be written or the disk is full; the old file is untouched.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    except (OSError, SafetensorError) as error:
        raise PnfsError(
            f"{path}: cannot be written ({reason(error)}); free disk space or choose another --out"
        ) from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
    sync_folder(path.parent)


def write_text(path: Path, text: str) -> None:
    """Write `text` as UTF-8, atomically."""

    def write(temporary: Path) -> None:
        temporary.write_text(text, encoding="utf-8")

    write_atomically(path, write)


def write_json(path: Path, tree: Any) -> None:
    """Write `tree` as indented JSON, atomically."""
    write_text(path, json.dumps(tree, indent=1) + "\n")


def make_folder(folder: Path) -> None:
    """Make the output folder and see that it can be written, before any work is done.

    Raises:
        PnfsError: it cannot.
    """
    try:
        _probe(folder)
    except OSError as error:
        raise PnfsError(
            f"{folder}: cannot be written ({reason(error)}); choose another --out"
        ) from None


def check_file(path: Path) -> None:
    """Make an output file's folder and see that the file can be written, before any work is done.

    A file that is there already stays as it is.

    Raises:
        PnfsError: it cannot.
    """
    try:
        _probe(path.parent)
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
    except OSError as error:
        raise PnfsError(f"{path}: cannot be written ({reason(error)}); name another file") from None


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write tensors as safetensors, atomically. Tensors that share memory are stored apart."""
    flat = {name: _owned(tensor) for name, tensor in tensors.items()}
    write_atomically(path, lambda temporary: save_file(flat, temporary, dict(metadata)))


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file, on the CPU.

    Raises:
        PnfsError: the file is missing, truncated or not in the safetensors format.
    """
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise PnfsError(
            f"{path}: cannot be read as safetensors ({reason(error)}); it is missing, truncated or "
            "of another format"
        ) from None


def reason(error: Exception) -> str:
    """What went wrong, without Python's or Rust's wrapping, in one short phrase."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    text = re.sub(r"Error while serializing: |I/O error: | \(os error \d+\)", "", str(error))
    return text.splitlines()[0].rstrip(".") if text else type(error).__name__


def _probe(folder: Path) -> None:
    """Make `folder` and write into it; OSError where that fails."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder):
        pass


def _owned(tensor: Tensor) -> Tensor:
    """A contiguous copy in memory of its own, as safetensors wants it."""
    return tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
