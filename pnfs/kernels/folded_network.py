"""A whole network in evaluation mode as one call: a flat program of convolutions over buffers.

`pnfs.folding` writes programs, this file defines what they compute. A buffer is a map of one image
at one scale; a step reads some buffers and writes one. All weights lie in one tensor, convolutions
packed in panels of columns; steps refer to them by offset. The program is text, so that it passes
through torch's dispatcher, torch.compile and torch.export as it is.

Axes: N images, C channels, H W rows and columns, K keypoints, d components of a keypoint's vector.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import astuple, dataclass, fields
from functools import lru_cache
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional as F

from pnfs.errors import PnfsError
from pnfs.kernels import checks, native
from pnfs.kernels.checks import Verdict
from pnfs.kernels.registry import OpCost, register_op

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
    """

    inputs: tuple[int, ...]
    keypoints: int
    buffers: tuple[Buffer, ...]
    steps: tuple[Step, ...]

    def text(self) -> str:
        steps = [[KINDS.index(type(step)), *astuple(step)] for step in self.steps]
        buffers = [astuple(buffer) for buffer in self.buffers]
        tree = [self.inputs, self.keypoints, buffers, steps]
        return json.dumps(tree, separators=(",", ":"))


@lru_cache(maxsize=16)
def parse(text: str) -> Program:
    """The inverse of `Program.text`."""

    def frozen(value: Any) -> Any:
        return tuple(map(frozen, value)) if isinstance(value, list) else value

    inputs, keypoints, buffers, steps = json.loads(text)
    return Program(
        frozen(inputs),
        keypoints,
        tuple(Buffer(*row) for row in buffers),
        tuple(KINDS[kind](*map(frozen, row)) for kind, *row in steps),
    )


def folded_network(inputs: Sequence[Tensor], weights: Tensor, program: str) -> Tensor:
    """Run `program`.

    Args:
        inputs: tensors (N, C, H, W) as the program's inputs are: images, or the maps of a pyramid,
            finest first, each level half the size of the one before; any layout, one dtype.
        weights: one-dimensional, of the inputs' dtype; float32 (float64: by the reference).
        program: `Program.text()`.

    Returns:
        Scores (N, K, h, w) at 1/4 of the images' size, contiguous.

    Raises:
        PnfsError: another number of inputs, or a shape, dtype or device that does not fit.
    """
    known = parse(program)
    checks.check_count("inputs", inputs, len(known.inputs), "input of the program")
    checks.check_tensor("inputs[0]", inputs[0], (None,) * 4, torch.float32, torch.float64)
    checks.check_tensor("weights", weights, (None,), inputs[0].dtype)
    n, _, h, w = inputs[0].shape
    unit = 1 << (COARSEST - known.inputs[0])
    if not h or not w or h % unit or w % unit:
        raise PnfsError(f"inputs of {h}×{w} pixels: height and width must be multiples of {unit}")
    channels = {s.source: known.buffers[s.out].channels for s in known.steps if type(s) is Load}
    for i, (x, level) in enumerate(zip(inputs, known.inputs, strict=True)):
        shift = level - known.inputs[0]
        shape = (n, channels.get(i, x.shape[1]), h >> shift, w >> shift)
        checks.check_tensor(f"inputs[{i}]", x, shape, inputs[0].dtype)
    checks.check_same_device(**checks.named(inputs=inputs), weights=weights)
    return cast(Tensor, OP(list(inputs), weights, program))


def panel_widths(columns: int) -> list[int]:
    """Widths of the panels that `columns` columns of a matrix are packed in: 64, as far as the rest
    then fits panels of 48; narrower ones for few columns."""
    vectors = -(-columns // LANES)
    narrow = {1: [1], 2: [2], 5: [3, 2]}
    if vectors in narrow:
        return [LANES * width for width in narrow[vectors]]
    threes = -vectors % 4
    return [64] * ((vectors - 3 * threes) // 4) + [48] * threes


def pack(matrix: Tensor) -> Tensor:
    """W (outputs, depth) → its panels, each (depth, width), back to back, zeros in the padding."""
    outputs, depth = matrix.shape
    widths = panel_widths(outputs)
    padded = matrix.new_zeros(sum(widths), depth)
    padded[:outputs] = matrix
    return torch.cat([panel.t().reshape(-1) for panel in padded.split(widths)])


def unpack(weights: Tensor, offset: int, outputs: int, depth: int) -> Tensor:
    """The inverse of `pack`, from `weights` at `offset`."""
    panels = []
    for width in panel_widths(outputs):
        panels.append(weights[offset : offset + depth * width].view(depth, width).t())
        offset += depth * width
    return torch.cat(panels)[:outputs]


def folded_network_reference(inputs: Sequence[Tensor], weights: Tensor, program: str) -> Tensor:
    """The definition; see `Conv`, `Pool` and `Head`."""
    return _Interpreter(parse(program), inputs, weights).run()


class _Interpreter:
    def __init__(self, program: Program, inputs: Sequence[Tensor], weights: Tensor) -> None:
        self.program, self.inputs, self.weights = program, inputs, weights
        self.maps: dict[int, Tensor] = {}

    def run(self) -> Tensor:
        scores: Tensor | None = None
        for step in self.program.steps:
            if isinstance(step, Load):
                self.write(step.out, self.inputs[step.source])
            elif isinstance(step, Conv):
                self.write(step.out, self.conv(step))
            elif isinstance(step, Pool):
                self.write(step.out, self.pool(step))
            else:
                scores = self.head(step)
        assert scores is not None
        return scores

    def read(self, buffer: int) -> Tensor:
        view = self.program.buffers[buffer]
        if view.parent == NONE:
            return self.maps[buffer]
        return self.maps[view.parent][:, view.offset : view.offset + view.channels]

    def write(self, buffer: int, x: Tensor) -> None:
        view = self.program.buffers[buffer]
        if view.parent == NONE:
            self.maps[buffer] = x
            return
        if view.parent not in self.maps:
            channels = self.program.buffers[view.parent].channels
            self.maps[view.parent] = x.new_zeros(x.shape[0], channels, *x.shape[2:])
        self.read(buffer).copy_(x)

    def vector(self, offset: int, count: int) -> Tensor:
        return self.weights[offset : offset + count]

    def size(self, buffer: int) -> tuple[int, int]:
        shift = self.program.buffers[buffer].level - self.program.inputs[0]
        return self.inputs[0].shape[2] >> shift, self.inputs[0].shape[3] >> shift

    def conv(self, step: Conv) -> Tensor:
        h, w = self.size(step.out)
        total = self.bias(step, h, w)
        if step.weight != NONE:
            total = total + self.product(step)
        if step.pre != NONE:
            total = total + self.weights[step.pre_scale] * self.read(step.pre)
        if step.up != NONE:
            total = total + F.interpolate(
                self.read(step.up), size=(h, w), mode="bilinear", align_corners=True
            )
        y = activate(total, step.act)
        if step.post != NONE:
            y = y + self.weights[step.post_scale] * self.read(step.post)
        return y.expand(len(self.inputs[0]), -1, -1, -1)

    def bias(self, step: Conv, h: int, w: int) -> Tensor:
        if not step.borders:
            return self.vector(step.bias, step.outputs)[None, :, None, None]
        rows = [_round_up(step.outputs) * i + step.bias for i in range(4)]
        interior, left, top, corner = (self.vector(at, step.outputs) for at in rows)
        bias = interior[:, None, None].repeat(1, h, w)
        bias[:, :, 0] = left[:, None]
        bias[:, 0] = top[:, None]
        bias[:, 0, 0] = corner
        return bias[None]

    def product(self, step: Conv) -> Tensor:
        x = self.read(step.source)
        if step.expand != NONE:
            matrix = unpack(self.weights, step.expand, step.channels, x.shape[1])
            bias = self.vector(step.expand_bias, step.channels)
            x = activate(F.conv2d(x, matrix[:, :, None, None], bias), step.expand_act)
        stride = step.stride
        if step.taps != NONE:
            c, padded = step.channels, _round_up(step.channels)
            taps = self.vector(step.taps, 9 * padded).view(9, padded)[:, :c].t().reshape(c, 1, 3, 3)
            bias = self.vector(step.taps_bias, c)
            x = F.conv2d(x, taps, bias, stride, step.dilation, step.dilation, groups=c)
            x, stride = activate(x, step.taps_act), 1
        k = step.kernel
        matrix = unpack(self.weights, step.weight, step.outputs, k * k * step.channels)
        kernel = matrix.view(step.outputs, k, k, step.channels).permute(0, 3, 1, 2)
        return F.conv2d(x, kernel, None, stride, k // 2)

    def pool(self, step: Pool) -> Tensor:
        x = self.read(step.source)
        if step.largest:
            pooled = F.max_pool2d(x, 3, 1, 1)
        else:
            pooled = F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)
        c = x.shape[1]
        scale, shift = (self.vector(at, c)[:, None, None] for at in (step.scale, step.shift))
        y = scale * pooled + shift
        if step.post != NONE:
            y = y + self.weights[step.post_scale] * self.read(step.post)
        return y

    def head(self, step: Head) -> Tensor:
        maps: list[list[Tensor]] = [[] for _ in range(self.program.keypoints)]
        for source, weight, bias, keypoints in zip(
            step.sources, step.weights, step.biases, step.keypoints, strict=True
        ):
            x = self.read(source)
            rows = len(keypoints) * step.depth
            matrix = unpack(self.weights, weight, rows, x.shape[1])[:, :, None, None]
            v = F.conv2d(x, matrix, self.vector(bias, rows)).unflatten(1, (-1, step.depth))
            squared = v.square().sum(2)
            scores = v.squeeze(2) if step.depth == 1 else squared / (1 + squared)
            for keypoint, score in zip(keypoints, scores.unbind(1), strict=True):
                maps[keypoint].append(score)
        return torch.stack([sum(terms[1:], terms[0]) for terms in maps], dim=1)


def activate(x: Tensor, act: int) -> Tensor:
    """The activation with the code `act`."""
    return (lambda y: y, F.relu, F.relu6)[act](x)


def _round_up(channels: int) -> int:
    return -(-channels // LANES) * LANES


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
    return buffer.channels if buffer.level == 0 else _round_up(buffer.channels)


@lru_cache(maxsize=64)
def _plan(text: str, height: int, width: int) -> Tensor:
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
        sizes.append(0 if buffer.parent != NONE else _round_up(floats) + LANES)
    memory = []
    for times in (range(len(program.steps)), stages):
        lives = [(len(stages), -1)] * len(sizes)
        for time, step in zip(times, program.steps, strict=True):
            for buffer in {_root(program, b) for b in (*_reads(step), *_writes(step))}:
                first, last = lives[buffer]
                lives[buffer] = (min(first, time), max(last, time))
        memory.append(_place(sizes, lives))
    (serial, serial_floats), (staged, staged_floats) = memory
    rows = []
    for buffer, (h, w), view in zip(
        range(len(sizes)), shapes, program.buffers, strict=True
    ):
        root = _root(program, buffer)
        whole = program.buffers[root]
        rows += [serial[root] + view.offset, staged[root] + view.offset]
        rows += [h, w, _pixel_step(whole), view.channels, whole.pad]
    shift = 2 - program.inputs[0]
    header = [len(program.buffers), len(program.steps), program.keypoints]
    header += [height >> shift, width >> shift, serial_floats, staged_floats, max(stages) + 1]
    for step, stage in zip(program.steps, stages, strict=True):
        flat = [int(value) for value in _flat(astuple(step))]
        macs, _ = _step_cost(program, step)
        h, w = shapes[_out_buffer(step)]
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


def _out_buffer(step: Step) -> int:
    return step.sources[0] if isinstance(step, Head) else step.out


def _step_cost(program: Program, step: Step) -> tuple[int, int]:
    """Of one pixel of the step's output: multiply-adds of convolutions, floats read and written."""
    outputs = program.buffers[_out_buffer(step)]

    def pixels(buffer: int) -> float:  # per pixel of the output
        return 4.0 ** (outputs.level - program.buffers[buffer].level)

    floats = sum(pixels(b) * program.buffers[b].channels for b in _reads(step))
    floats += sum(program.buffers[b].channels for b in _writes(step))
    macs = 0.0
    if isinstance(step, Load):
        floats *= 2
    elif isinstance(step, Head):
        floats += program.keypoints
        for source, keypoints in zip(step.sources, step.keypoints, strict=True):
            macs += program.buffers[source].channels * len(keypoints) * step.depth
    elif isinstance(step, Conv) and step.weight != NONE:
        macs = step.kernel**2 * step.channels * step.outputs
        macs += 9 * step.channels if step.taps != NONE else 0
        if step.expand != NONE:
            source = program.buffers[step.source]
            macs += pixels(step.source) * source.channels * step.channels
    return int(macs), int(floats)


def _cost(args: Sequence[Any], outputs: Any) -> OpCost:
    """Every step reads and writes its buffers, and every image reads the weights."""
    inputs, weights, text = args
    program = parse(text)
    n, _, h, w = inputs[0].shape
    macs = floats = 0
    for step in program.steps:
        shift = program.buffers[_out_buffer(step)].level - program.inputs[0]
        of_pixel = _step_cost(program, step)
        macs += (h >> shift) * (w >> shift) * of_pixel[0]
        floats += (h >> shift) * (w >> shift) * of_pixel[1]
    return OpCost(bytes=4 * n * (floats + weights.numel()), conv_macs=n * macs)


def _empty(inputs: Sequence[Tensor], weights: Tensor, program: str) -> Tensor:
    known = parse(program)
    n, _, h, w = inputs[0].shape
    shift = 2 - known.inputs[0]
    return inputs[0].new_empty(n, known.keypoints, h >> shift, w >> shift)


def _cpp(inputs: Sequence[Tensor], weights: Tensor, program: str) -> Tensor:
    scores = _empty(inputs, weights, program)
    plan = _plan(program, *inputs[0].shape[2:])
    native.call(
        "_cpu", "folded_network",
        checks.addresses(inputs), [x.stride() for x in inputs], weights.data_ptr(),
        plan.data_ptr(), scores.data_ptr(), len(scores),
        shapes=f"inputs {[tuple(x.shape) for x in inputs]}",
    )  # fmt: skip
    return scores


def _can_run(inputs: Sequence[Tensor], weights: Tensor, program: str) -> Verdict:
    return checks.has_dtype("inputs[0]", inputs[0].dtype, (torch.float32,))


OP = register_op("folded_network", folded_network_reference)
OP.register_native("cpp", _cpp, _empty, _can_run, cost=_cost)
assert len(fields(Conv)) == 22  # csrc/cpu/folded_network.cpp reads them by number
