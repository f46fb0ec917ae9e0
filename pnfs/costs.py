"""What a model costs: parameters, multiply-adds, kernel launches and bytes moved.

The model runs once on tensors that have shapes but no memory, so counting takes seconds at any
size. Every call that reaches PyTorch's dispatcher is seen, whichever module or function made it.
`python -m pnfs.costs` prints the table of presets.
"""

from __future__ import annotations

import contextlib
import copy
import math
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pnfs.config import ModelConfig, list_presets, load_config
from pnfs.errors import PnfsError
from pnfs.head import pose_loss
from pnfs.kernels import native
from pnfs.kernels.registry import OpCost, op_costs
from pnfs.model import build_model

Mode = Literal["eval", "train"]

# Calls that allocate or ask without touching memory.
_FREE = {"aten::empty", "aten::empty_like", "aten::empty_strided", "prim::device"}
_FREE |= {"aten::new_empty", "aten::new_empty_strided"}
# In-place calls that overwrite their target without reading it.
_OVERWRITES = {"aten::copy_", "aten::fill_", "aten::zero_"}
# 1×1 convolutions of several parts may run as matrix products; position of the left factor.
_MATRIX_PRODUCTS = {"aten::mm": 0, "aten::bmm": 0, "aten::addmm": 1, "aten::baddbmm": 1}

# (params, multiply-adds) as the paper prints them. Its tool divides by 2^30 and counts the
# parameters of separable and atrous convolutions twice; of the fabric backbones it gives
# parameters alone (Table VIII's text), of whole models on them nothing.
PAPER = {
    "branchnet-1": ("12.8M", "23.7G"),
    "branchnet-2": ("12.6M", "22.8G"),
    "fabric-1": ("backbone 5.8M", "–"),
    "fabric-2": ("backbone 6.8M", "–"),
    "fabric-3": ("backbone 10.5M", "–"),
    "hrnet-w32": ("28.5M", "9.5G"),
    "hrnet-w32-vec8": ("28.5M", "9.6G"),
    "hrnet-w48": ("63.6M", "32.9G"),
    "mobilenet-p3-d1": ("3.3M", "1.1G"),
    "mobilenet-p3-d4": ("3.3M", "1.1G"),
    "mobilenet-p3-d8": ("3.3M", "1.2G"),
    "mobilenet-p3-d16": ("3.3M", "1.2G"),
    "ours-1": ("6.1M", "4.0G"),
    "ours-2": ("27.5M", "11.4G"),
    "ours-3": ("15.8M pruned", "14.8G pruned"),
    "ours-a": ("5.2M", "4.6G"),
    "ours-b": ("16.4M", "9.4G"),
    "ours-c": ("12.9M", "8.3G"),
    "simplebaseline-r50": ("34.0M", "12.0G"),
    "simplebaseline-r50-vec8": ("34.0M", "12.1G"),
    "simplebaseline-r152": ("68.6M", "20.9G"),
}


@dataclass(frozen=True)
class ModuleCosts:
    """The share of one top-level sub-module."""

    params: int
    conv_macs: int


@dataclass(frozen=True)
class Traffic:
    """Launches and bytes of all calls of one name."""

    launches: int
    bytes: int


@dataclass(frozen=True)
class Costs:
    """Costs of one model at one input size.

    Attributes:
        params: weights that a forward pass uses, α and β left out.
        architecture_params: α and β that a forward pass uses.
        conv_macs: multiply-adds of the convolutions (transposed ones included) in the forward pass
            of **one** image; biases, normalisation, interpolation and mixing are not counted.
        launches: calls that move data in one step; a call that only changes a view is free. On a
            GPU each is at least one kernel.
        bytes: read and written by these calls in one step, every tensor once per call and per
            direction, elements that a broadcast repeats counted once.
        saved: bytes that the forward pass keeps for the backward pass, weights and images left out;
            0 in `eval`.
        modules: top-level sub-module -> its share of `params` and `conv_macs`.
        calls: name of a torch op -> its share of `launches` and `bytes`.
    """

    params: int
    architecture_params: int
    conv_macs: int
    launches: int
    bytes: int
    saved: int
    modules: Mapping[str, ModuleCosts] = field(hash=False)
    calls: Mapping[str, Traffic] = field(hash=False)


def count_costs(
    model: nn.Module,
    size: tuple[int, int],
    batch: int = 1,
    mode: Mode = "eval",
    *,
    device: str = "cpu",
) -> Costs:
    """Count what one step of `model` costs, without computing it.

    Args:
        model: a pose model, or any module from images to a tensor or a tuple of tensors. It is not
            changed, and may lie on any device, `meta` included.
        size: (height, width) of the images in pixels.
        batch: images per step; scales `launches` and `bytes`, not `conv_macs`.
        mode: `eval` is a forward pass without gradients; `train` is forward, loss and backward to
            every parameter (no optimiser step).
        device: `cpu` or `cuda`, whose backends are counted; `use_backend` is obeyed. Without a GPU
            `cuda` counts the Triton kernels that one would run.

    Raises:
        PnfsError: unknown mode or device, a size or batch that is not positive.
    """
    if mode not in ("eval", "train"):
        raise PnfsError(f"count_costs: mode '{mode}' is unknown; use eval or train")
    if batch < 1 or min(size) < 1:
        raise PnfsError(f"count_costs: batch {batch} and size {tuple(size)} must be positive")
    if device not in ("cpu", "cuda"):
        raise PnfsError(f"count_costs: device '{device}' is unknown; use cpu or cuda")
    with contextlib.ExitStack() as stack:
        if device == "cuda" and not torch.cuda.is_available():
            device = "cpu"  # of tensors without memory
            stack.enter_context(native.gpu_assumed())
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        hollow = _hollow_copy(model, device).train(mode == "train")
        images = torch.empty(batch, 3, *size, device=device, memory_format=torch.channels_last)
        counter = _Counter(hollow)
        # one thread: a dispatch mode belongs to the thread that entered it
        with torch.autograd.set_multithreading_enabled(False):
            if mode == "eval":
                with torch.no_grad(), counter:
                    hollow(images)
            else:
                _train_step(hollow, images, counter)
    return counter.costs(batch)


def count_calls(run: Callable[[], Any]) -> tuple[int, int]:
    """Calls that move data and the bytes they move, as in `Costs`, while `run()` computes; the
    backward passes in it are counted too, compiled or exported code is not seen."""
    counter = _Counter(nn.Module())
    with torch.autograd.set_multithreading_enabled(False), counter:
        run()
    return counter.launches, counter.bytes


def _hollow_copy(model: nn.Module, device: str) -> nn.Module:
    """The same module with memoryless parameters and buffers on `device`."""
    memo: dict[int, Any] = {}

    def empty(tensor: Tensor) -> Tensor:
        return torch.empty_strided(
            tensor.size(), tensor.stride(), dtype=tensor.dtype, device=device
        )

    for parameter in model.parameters():
        memo[id(parameter)] = nn.Parameter(empty(parameter), parameter.requires_grad)
    for buffer in model.buffers():
        memo[id(buffer)] = empty(buffer)
    return copy.deepcopy(model, memo)


def _train_step(model: nn.Module, images: Tensor, counter: _Counter) -> None:
    """Forward, loss and backward; what is saved is looked at in between."""
    config = getattr(model, "config", None)
    parameters = [p for p in model.parameters() if p.requires_grad]
    keeping = saved_tensors_hooks(counter.keep, lambda tensor: tensor)
    if isinstance(config, ModelConfig):
        shape = (len(images), config.skeleton_table.num_keypoints)
        joints = torch.empty(*shape, 2, device=images.device)
        weights = torch.empty(shape, device=images.device)
        with counter, keeping:
            loss = pose_loss(model, images, joints, weights, sigma=2.0)
    else:
        with counter, keeping:
            loss = torch.stack([output.sum() for output in tree_leaves(model(images))]).sum()
    for tensor in (*model.parameters(), *model.buffers(), images):
        counter.kept.pop(_memory(tensor), None)
    counter.forward = False
    with counter:
        torch.autograd.grad(loss, parameters, allow_unused=True)


class _Counter(TorchDispatchMode):
    """Adds up every call; knows parameters by their memory, so that views of them count too."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.forward = True  # multiply-adds and used parameters are those of the forward pass
        self.launches = 0
        self.bytes = 0
        self.kept: dict[int, Tensor] = {}  # by memory: what autograd saves
        self.calls: dict[str, Traffic] = {}
        self.macs: dict[str, int] = {}
        self.used: set[int] = set()
        self.parameters = {_memory(p): (name, p) for name, p in model.named_parameters()}
        self.architecture = {_memory(p) for p in _architecture_parameters(model)}
        self.owners = [name for name, _ in model.named_children()]

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        outputs = func(*args, **kwargs)
        name = func._schema.name
        if name in _FREE:
            return outputs
        inputs = _tensors((*args, *kwargs.values()))
        results = _tensors([outputs])
        mutates = func._schema.is_mutable  # such a call may return nothing
        if not (results or mutates) or _is_view(func, inputs, results):
            return outputs
        read = list(inputs)
        if name in _OVERWRITES:
            read = [x for x in read if x is not args[0]]
        if self.forward:
            self.used.update(_memory(x) for x in read if _memory(x) in self.parameters)
        if name in op_costs:
            cost = op_costs[name](args, outputs)
        else:
            cost = OpCost(conv_macs=_conv_macs(name, args, results[0]) if results else 0)
        moved = sum(_touched_bytes(x) for x in (*read, *results))
        moved = (moved if cost.bytes is None else cost.bytes) + cost.scratch
        self.launches += cost.launches
        self.bytes += moved
        known = self.calls.get(name, Traffic(0, 0))
        self.calls[name] = Traffic(known.launches + cost.launches, known.bytes + moved)
        if self.forward and cost.conv_macs:
            owner = self._owner(inputs)
            self.macs[owner] = self.macs.get(owner, 0) + cost.conv_macs
        return outputs

    def _owner(self, inputs: Sequence[Tensor]) -> str:
        """The top-level sub-module whose weight a call reads."""
        for x in inputs:
            if _memory(x) in self.parameters:
                return self.parameters[_memory(x)][0].split(".")[0]
        return ""

    def keep(self, tensor: Tensor) -> Tensor:
        """A hook on what autograd saves."""
        self.kept.setdefault(_memory(tensor), tensor)
        return tensor

    def costs(self, batch: int) -> Costs:
        saved = sum(tensor.untyped_storage().nbytes() for tensor in self.kept.values())
        sizes = dict.fromkeys(self.owners, 0)
        architecture = total = 0
        for memory in self.used:
            name, parameter = self.parameters[memory]
            if memory in self.architecture:
                architecture += parameter.numel()
                continue
            total += parameter.numel()
            owner = name.split(".")[0]
            sizes[owner] = sizes.get(owner, 0) + parameter.numel()
        return Costs(
            params=total,
            architecture_params=architecture,
            conv_macs=sum(self.macs.values()) // batch,
            launches=self.launches,
            bytes=self.bytes,
            saved=saved,
            modules={
                owner: ModuleCosts(sizes.get(owner, 0), self.macs.get(owner, 0) // batch)
                for owner in dict.fromkeys((*sizes, *self.macs))
            },
            calls=self.calls,
        )


def _architecture_parameters(model: nn.Module) -> Iterator[nn.Parameter]:
    for module in model.modules():
        find: Callable[[], list[nn.Parameter]] | None
        find = getattr(module, "architecture_parameters", None)
        if find is not None:
            yield from find()


def _tensors(values: Iterable[Any]) -> list[Tensor]:
    """The distinct tensors among a call's arguments or results, which may be lists of tensors."""
    found: dict[int, Tensor] = {}
    for value in values:
        for leaf in value if isinstance(value, list | tuple) else (value,):
            if isinstance(leaf, Tensor):
                found[id(leaf)] = leaf
    return list(found.values())


def _memory(tensor: Tensor) -> int:
    """Identity of the memory that a tensor views."""
    return tensor.untyped_storage()._cdata


def _is_view(func: Any, inputs: Sequence[Tensor], results: Sequence[Tensor]) -> bool:
    """Whether a call returns the memory it was given, unchanged."""
    given = {_memory(x) for x in inputs}
    return not func._schema.is_mutable and all(_memory(x) in given for x in results)


def _touched_bytes(tensor: Tensor) -> int:
    """Bytes of memory that reading or writing all of `tensor` touches."""
    distinct = math.prod(
        size
        for size, stride in zip(tensor.size(), tensor.stride(), strict=True)
        if stride or not size
    )
    return min(distinct * tensor.element_size(), tensor.untyped_storage().nbytes())


def _conv_macs(name: str, args: Sequence[Any], output: Tensor) -> int:
    """Multiply-adds of a forward convolution, or of a 1×1 one that runs as a matrix product."""
    if name == "aten::convolution":
        x, weight, transposed = args[0], args[1], args[6]
        # one output element sums over weight[o]; in a transposed one each input element spreads
        return (x if transposed else output).numel() * weight[0].numel()
    if name in _MATRIX_PRODUCTS:
        return output.numel() * args[_MATRIX_PRODUCTS[name]].shape[-1]
    return 0


def preset_table(names: Sequence[str]) -> str:
    """A markdown table of exact counts beside the paper's figures."""
    lines = [
        "| preset | input | parameters | conv multiply-adds | paper |",
        "|---|---|---:|---:|---|",
    ]
    for name in names:
        config = load_config(name).model
        with torch.device("meta"):
            model = build_model(config)
        costs = count_costs(model, config.input_size)
        height, width = config.input_size
        paper = " / ".join(PAPER.get(name, ("–",)))
        lines.append(
            f"| {name} | {height}×{width} | {costs.params:,} | {costs.conv_macs:,} | {paper} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    print(preset_table(sys.argv[1:] or list_presets()))
