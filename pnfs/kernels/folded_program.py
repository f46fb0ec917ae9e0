"""Programs of `folded_network`: their steps, their text, and the plan of one for one image size.

A buffer is a map of one image at one scale; a step reads some buffers and writes one, and finds its
weights by offset in one tensor. Axes: C channels, H W rows and columns, K keypoints, d components.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import astuple, dataclass, fields
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

NONE = -1  # no buffer, no weights
LINEAR, RELU, RELU6 = range(3)  # activations
LANES = 16  # channels and packed columns are padded to a multiple of this
COARSEST = 5  # log2 of the coarsest scale: sizes are multiples of 32


@dataclass(frozen=True)
class Buffer:
    """A map (C, H / 2^level, W / 2^level) of an image of H × W.

    Attributes:
        level: log2 of its scale; 0 is the image's own.
        channels: C.
        pad: zeros around it, in pixels, that convolutions read.
        parent: the buffer whose channels from `offset` on these are, or NONE.
    """

    level: int
    channels: int
    pad: int = 0
    parent: int = NONE
    offset: int = 0


@dataclass(frozen=True)
class Load:
    """out = input number `source`."""

    source: int
    out: int


@dataclass(frozen=True)
class Conv:
    """out = act(W * g(source) + bias + pre_scale·pre + upsampled(up)) + post_scale·post.

    W is 1×1, or 3×3 with padding 1, of `stride`. g is the identity, or, with `taps`, a depthwise
    3×3 of `stride` and `dilation` with bias and activation, and, with `expand`, a 1×1 with bias and
    activation before that. Without `weight` there is no product, only the other terms. upsampled is
    bilinear by 2 with aligned corners. `bias` is one vector, or with `borders` four: of the
    interior, of the left column, of the top row, of the corner that both share.
    """

    source: int
    out: int
    channels: int  # that W reads
    outputs: int
    bias: int
    weight: int = NONE
    kernel: int = 1
    stride: int = 1
    borders: bool = False
    act: int = LINEAR
    taps: int = NONE
    taps_bias: int = NONE
    taps_act: int = LINEAR
    dilation: int = 1
    expand: int = NONE
    expand_bias: int = NONE
    expand_act: int = LINEAR
    pre: int = NONE
    pre_scale: int = NONE
    up: int = NONE
    post: int = NONE
    post_scale: int = NONE


@dataclass(frozen=True)
class Pool:
    """out = scale·pool(source) + shift + post_scale·post; 3×3, stride 1, the map's pixels alone."""

    source: int
    out: int
    largest: bool  # else the mean
    scale: int
    shift: int
    post: int = NONE
    post_scale: int = NONE


@dataclass(frozen=True)
class Head:
    """scores[keypoints] += squash(W x + bias) of every part; see `vector_heatmap`.

    Row k·d + c of a part's W gives component c of its k-th keypoint.
    """

    depth: int  # d
    sources: tuple[int, ...]  # per part
    weights: tuple[int, ...]
    biases: tuple[int, ...]
    keypoints: tuple[tuple[int, ...], ...]


Step = Load | Conv | Pool | Head
KINDS: tuple[type[Any], ...] = (Load, Conv, Pool, Head)


@dataclass(frozen=True)
class Program:
    """Steps in the order of one image's computation.

    Attributes:
        inputs: per input its level; the first is the finest.
        keypoints: K.
        bfloat16: whether the products (W, expand, the head's) round their operands to bfloat16;
            sums, depthwise taps and maps stay as they are. `pack` stores such matrices as pairs.
    """

    inputs: tuple[int, ...]
    keypoints: int
    buffers: tuple[Buffer, ...]
    steps: tuple[Step, ...]
    bfloat16: bool = False

    def text(self) -> str:
        steps = [[KINDS.index(type(step)), *astuple(step)] for step in self.steps]
        buffers = [astuple(buffer) for buffer in self.buffers]
        tree = [self.inputs, self.keypoints, buffers, steps, self.bfloat16]
        return json.dumps(tree, separators=(",", ":"))


@lru_cache(maxsize=16)
def parse(text: str) -> Program:
    """The inverse of `Program.text`."""

    def frozen(value: Any) -> Any:
        return tuple(map(frozen, value)) if isinstance(value, list) else value

    inputs, keypoints, buffers, steps, bfloat16 = json.loads(text)
    return Program(
        frozen(inputs),
        keypoints,
        tuple(Buffer(*row) for row in buffers),
        tuple(KINDS[kind](*map(frozen, row)) for kind, *row in steps),
        bfloat16,
    )


def round_up(channels: int, step: int = LANES) -> int:
    """Channels with their padding to whole vectors, or to a multiple of `step`."""
    return -(-channels // step) * step


# What the C++ walks: the program for one size, as integers. See csrc/cpu/folded_network.cpp.


def _reads(step: Step) -> Iterable[int]:
    if isinstance(step, Head):
        return step.sources
    if isinstance(step, Load):
        return ()
    if isinstance(step, Pool):
        found: tuple[int, ...] = (step.source, step.post)
    else:
        found = (step.source, step.pre, step.up, step.post)
    return tuple(buffer for buffer in found if buffer != NONE)


def _writes(step: Step) -> Iterable[int]:
    return () if isinstance(step, Head) else (step.out,)


def _root(program: Program, buffer: int) -> int:
    parent = program.buffers[buffer].parent
    return buffer if parent == NONE else parent


def _stages(program: Program) -> list[int]:
    """Per step its stage: steps of one stage do not depend on each other."""
    read_at: dict[int, int] = {}
    written_at: dict[int, int] = {}
    stages = []
    for step in program.steps:
        reads = {_root(program, b) for b in _reads(step)}
        writes = {_root(program, b) for b in _writes(step)}
        before = [written_at.get(b, -1) for b in reads | writes]
        before += [read_at.get(b, -1) for b in writes]
        stage = 1 + max(before, default=-1)
        stages.append(stage)
        read_at.update((b, max(stage, read_at.get(b, -1))) for b in reads)
        written_at.update((b, stage) for b in writes)
    return stages


def _place(sizes: Sequence[int], lives: Sequence[tuple[int, int]]) -> tuple[list[int], int]:
    """Offsets of buffers that share memory where their lives (first, last) do not meet; the sum."""
    offsets = [0] * len(sizes)
    placed: list[int] = []
    for buffer in sorted(range(len(sizes)), key=lambda b: lives[b][0]):
        first, last = lives[buffer]
        rivals = [b for b in placed if lives[b][0] <= last and first <= lives[b][1]]
        at = 0
        for rival in sorted(rivals, key=lambda b: offsets[b]):
            if offsets[rival] - at >= sizes[buffer]:
                break
            at = max(at, offsets[rival] + sizes[rival])
        offsets[buffer] = at
        placed.append(buffer)
    return offsets, max((offsets[b] + sizes[b] for b in placed), default=0)


def _pixel_step(buffer: Buffer) -> int:
    """Floats from pixel to pixel; an image's pixels are packed."""
    return buffer.channels if buffer.level == 0 else round_up(buffer.channels)


@lru_cache(maxsize=64)
def plan(text: str, height: int, width: int) -> Tensor:
    """The program for first inputs of height × width, int64: header, buffers, steps."""
    program = parse(text)
    stages = _stages(program)
    shapes = []
    for buffer in program.buffers:
        shift = buffer.level - program.inputs[0]
        shapes.append((height >> shift, width >> shift))
    sizes = []
    for buffer, (h, w) in zip(program.buffers, shapes, strict=True):
        floats = (h + 2 * buffer.pad) * (w + 2 * buffer.pad) * _pixel_step(buffer)
        sizes.append(0 if buffer.parent != NONE else round_up(floats) + LANES)
    memory = []
    for times in (range(len(program.steps)), stages):
        lives = [(len(stages), -1)] * len(sizes)
        for time, step in zip(times, program.steps, strict=True):
            for root in {_root(program, b) for b in (*_reads(step), *_writes(step))}:
                first, last = lives[root]
                lives[root] = (min(first, time), max(last, time))
        memory.append(_place(sizes, lives))
    (serial, serial_floats), (staged, staged_floats) = memory
    rows = []
    for number, view in enumerate(program.buffers):
        (h, w), root = shapes[number], _root(program, number)
        whole = program.buffers[root]
        rows += [serial[root] + view.offset, staged[root] + view.offset]
        rows += [h, w, _pixel_step(whole), view.channels, whole.pad]
    shift = 2 - program.inputs[0]
    header = [len(program.buffers), len(program.steps), program.keypoints]
    header += [height >> shift, width >> shift, serial_floats, staged_floats, max(stages) + 1]
    header.append(int(program.bfloat16))
    for step, stage in zip(program.steps, stages, strict=True):
        flat = [int(value) for value in _flat(astuple(step))]
        macs, _ = step_cost(program, step)
        h, w = shapes[out_buffer(step)]
        cost = macs * w + 8 * w  # a pixel costs something without a product, too
        rows += [len(flat) + 4, KINDS.index(type(step)), stage, cost, *flat]
    return torch.tensor([*header, *rows], dtype=torch.int64)


def _flat(values: Iterable[Any]) -> Iterable[int]:
    """Nested tuples as their lengths and elements."""
    for value in values:
        if isinstance(value, tuple):
            yield len(value)
            yield from _flat(value)
        else:
            yield value


def out_buffer(step: Step) -> int:
    """A buffer of the size of what the step makes."""
    return step.sources[0] if isinstance(step, Head) else step.out


def step_cost(program: Program, step: Step) -> tuple[int, int]:
    """Of one pixel of the step's output: multiply-adds of convolutions, floats read and written."""
    buffers, level = program.buffers, program.buffers[out_buffer(step)].level

    def pixels(buffer: int) -> float:  # per pixel of the output
        return float(4.0 ** (level - buffers[buffer].level))

    floats = sum(pixels(b) * buffers[b].channels for b in _reads(step))
    floats += sum(buffers[b].channels for b in _writes(step))
    macs = 0.0
    if isinstance(step, Load):
        floats *= 2
    elif isinstance(step, Head):
        floats += program.keypoints
        for buffer, keypoints in zip(step.sources, step.keypoints, strict=True):
            macs += buffers[buffer].channels * len(keypoints) * step.depth
    elif isinstance(step, Conv) and step.weight != NONE:
        macs = step.kernel**2 * step.channels * step.outputs
        macs += 9 * step.channels if step.taps != NONE else 0
        if step.expand != NONE:
            macs += pixels(step.source) * buffers[step.source].channels * step.channels
    return int(macs), int(floats)


assert len(fields(Conv)) == 22  # csrc/cpu/folded_network.cpp reads them by number
