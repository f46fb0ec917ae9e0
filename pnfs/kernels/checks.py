"""The one place for checks of dtype, device, shape and memory layout of tensors.

Two kinds. `check_*` raise PnfsError: the argument is wrong for every backend. The others return a
`Verdict`: the argument is legal, but this backend may not take it; the registry then picks another
backend, or shows the reason when the backend was asked for by name.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from pnfs.errors import PnfsError, did_you_mean

Verdict = tuple[bool, str]
RUNS: Verdict = (True, "")

# Codes of csrc/core/dtypes.h.
DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
STORAGE = tuple(DTYPE_CODES)  # types that compiled kernels keep maps in
STORAGE_CPU = (torch.float32, torch.bfloat16)  # those of the CPU's
TRITON_PIXELS = 2**30  # of a part: Triton kernels count them in 32 bits


Activation = Literal["none", "relu", "relu6"]
ACTIVATIONS: tuple[Activation, ...] = ("none", "relu", "relu6")  # index: the code of the kernels


def activate(x: Tensor, activation: str) -> Tensor:
    """One of `ACTIVATIONS`, by name."""
    return {"none": lambda z: z, "relu": F.relu, "relu6": F.relu6}[activation](x)


def no(reason: str) -> Verdict:
    """The verdict "cannot run", with the reason as a user reads it."""
    return (False, reason)


def check_tensor(
    name: str, tensor: Tensor, shape: tuple[int | None, ...], *dtypes: torch.dtype
) -> None:
    """Raise unless `tensor` has `shape` (None = any length) and one of `dtypes` (none = any).

    Raises:
        PnfsError: names the argument, what it must be and what it is.
    """
    given = tensor.shape
    fits = len(given) == len(shape)
    if fits:
        for want, have in zip(shape, given, strict=True):  # a generator takes twice as long
            if want is not None and want != have:
                fits = False
    if not fits:
        wanted = ", ".join("any" if n is None else str(n) for n in shape)
        raise PnfsError(f"{name} must have shape ({wanted}), not {tuple(given)}")
    if dtypes and tensor.dtype not in dtypes:
        allowed = " or ".join(short_name(dtype) for dtype in dtypes)
        raise PnfsError(f"{name} must be {allowed}, not {short_name(tensor.dtype)}")


def check_count(name: str, items: Sequence[Any], count: int, per: str) -> None:
    """Raise unless the list `items` has `count` entries, one per `per`.

    Raises:
        PnfsError: names the argument and both numbers.
    """
    if len(items) != count:
        raise PnfsError(f"{name} must have one entry per {per}, {count}, not {len(items)}")


def named(**lists: Sequence[Tensor]) -> dict[str, Tensor]:
    """The tensors of several lists under the names that messages use: `means[0]`, ..."""
    return {f"{name}[{i}]": item for name, items in lists.items() for i, item in enumerate(items)}


def check_same_device(**tensors: Tensor | None) -> None:
    """Raise unless all tensors (None is skipped) are on the device of the first.

    Raises:
        PnfsError: names the two arguments and their devices.
    """
    first_name, first = "", None
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        if first is None:
            first_name, first = name, tensor
        elif tensor.device != first.device:
            raise PnfsError(
                f"{name} is on {tensor.device} but {first_name} is on {first.device}; "
                "move them to one device"
            )


def has_dtype(name: str, dtype: torch.dtype, allowed: tuple[torch.dtype, ...]) -> Verdict:
    """Whether `dtype` is one that the backend takes."""
    if dtype in allowed:
        return RUNS
    return no(f"{name} is {short_name(dtype)}, takes {', '.join(map(short_name, allowed))}")


def is_contiguous(**tensors: Tensor | None) -> Verdict:
    """Whether every tensor (None is skipped) is contiguous in its default, row-major layout."""
    for name, tensor in tensors.items():
        if tensor is not None and not tensor.is_contiguous():
            return no(f"{name} is not contiguous (strides {tensor.stride()})")
    return RUNS


def check_choice(name: str, value: str, allowed: Sequence[str]) -> None:
    """Raise unless `value` is one of `allowed`.

    Raises:
        PnfsError: names the argument, what is allowed and the nearest of that.
    """
    if value not in allowed:
        raise PnfsError(
            f"{name} '{value}' is unknown; use {', '.join(allowed)}{did_you_mean(value, allowed)}"
        )


def check_norm(
    shape: tuple[int, int],
    dtype: torch.dtype,
    *,
    mean: Tensor | None,
    var: Tensor | None,
    gamma: Tensor | None,
    beta: Tensor | None,
) -> None:
    """Raise unless these normalise a map on load: `shape` is (P, C).

    Raises:
        PnfsError: a shape or dtype, mean without var, gamma or beta without them.
    """
    given = {"mean": mean, "var": var, "gamma": gamma, "beta": beta}
    for name, tensor in given.items():
        if tensor is not None:
            check_tensor(name, tensor, shape, dtype)
    if (mean is None) != (var is None):
        raise PnfsError("mean and var must be given both or neither")
    if mean is None and not (gamma is None and beta is None):
        raise PnfsError("gamma and beta need mean and var")


def is_dense_image(name: str, tensor: Tensor) -> Verdict:
    """Whether an (N, C, H, W) tensor is contiguous or channels-last, without gaps."""
    if tensor.is_contiguous() or tensor.is_contiguous(memory_format=torch.channels_last):
        return RUNS
    return no(f"{name} is neither contiguous nor channels-last (strides {tensor.stride()})")


def all_of(*verdicts: Verdict) -> Verdict:
    """The first verdict that says no, else `RUNS`."""
    for verdict in verdicts:
        if not verdict[0]:
            return verdict
    return RUNS


def short_name(dtype: torch.dtype) -> str:
    """`float32` for `torch.float32`."""
    return str(dtype).removeprefix("torch.")


def as_stacked(x: Tensor) -> Tensor:
    """`x` (P, N, C, H, W) in the layout of stacked feature maps: channels-last inside each part.

    The parts may lie any distance apart, 0 for a map that all of them share. Copies only a tensor
    that is laid out otherwise.
    """
    if x.stride()[1:] == stacked_strides(x.shape)[1:]:  # a look at x[0] would be part of the graph
        return x
    if not len(x) or x[0].is_contiguous(memory_format=torch.channels_last):
        return x
    return dense_stacked(x)


def dense_stacked(g: Tensor) -> Tensor:
    """`g` (P, N, C, H, W) as a stacked map whose parts lie back to back."""
    if g.stride() == stacked_strides(g.shape):
        return g
    return g.permute(0, 1, 3, 4, 2).contiguous().permute(0, 1, 4, 2, 3)


def empty_stacked(shape: Sequence[int], like: Tensor) -> Tensor:
    """An uninitialised (P, N, C, H, W), channels-last inside, with dtype and device of `like`."""
    return like.new_empty_strided(shape, stacked_strides(shape))


def stacked_strides(shape: Sequence[int]) -> tuple[int, ...]:
    """Those of a stacked map (P, N, C, H, W) whose parts lie back to back."""
    _, n, c, h, w = shape
    return n * h * w * c, h * w * c, 1, w * c, c


def has_batch(x: Tensor) -> Verdict:
    """Whether there is anything to compute."""
    return RUNS if x.numel() else no("the batch is empty")


def fits_triton(x: Tensor) -> Verdict:
    """Whether a stacked map has as few pixels as Triton kernels count."""
    pixels = x.shape[1] * x.shape[3] * x.shape[4]
    return (
        RUNS
        if pixels < TRITON_PIXELS
        else no(f"{pixels} pixels in a part, takes less than {TRITON_PIXELS}")
    )


def contiguous(*tensors: Tensor | None) -> list[Tensor | None]:
    """The tensors in their default layout, None where there is none."""
    return [None if tensor is None else tensor.contiguous() for tensor in tensors]


def address(tensor: Tensor | None) -> int:
    """Where the data lie, 0 for none and for an empty one. The caller keeps `tensor` alive."""
    return 0 if tensor is None else tensor.data_ptr()


def addresses(tensors: Sequence[Tensor | None]) -> list[int]:
    """Where the tensors' data lie, as compiled functions take them; see `address`."""
    return [address(tensor) for tensor in tensors]
