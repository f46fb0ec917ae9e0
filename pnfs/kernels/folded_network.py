"""A whole network in evaluation mode as one call: a flat program of convolutions over buffers.

`pnfs.folding` writes programs, `folded_program` says what they consist of, and this file computes
them. All weights lie in one tensor, the convolutions' packed in panels of columns. The program is
text, so that it passes through torch's dispatcher, torch.compile and torch.export as it is.

Axes: N images, C channels, H W rows and columns, K keypoints, d components of a keypoint's vector.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional as F

from pnfs.errors import PnfsError
from pnfs.kernels import checks, native
from pnfs.kernels.checks import Verdict
from pnfs.kernels.folded_program import (
    COARSEST,
    LANES,
    NONE,
    Conv,
    Head,
    Load,
    Pool,
    Program,
    out_buffer,
    parse,
    plan,
    round_up,
    step_cost,
)
from pnfs.kernels.registry import OpCost, register_op


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
        return y.expand(self.inputs[0].shape[0], -1, h, w)

    def bias(self, step: Conv, h: int, w: int) -> Tensor:
        if not step.borders:
            return self.vector(step.bias, step.outputs)[None, :, None, None]
        rows = [round_up(step.outputs) * i + step.bias for i in range(4)]
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
            c, padded = step.channels, round_up(step.channels)
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


def _cost(args: Sequence[Any], outputs: Any) -> OpCost:
    """Every step reads and writes its buffers, and every image reads the weights."""
    inputs, weights, text = args
    program = parse(text)
    n, _, h, w = inputs[0].shape
    macs = floats = 0
    for step in program.steps:
        shift = program.buffers[out_buffer(step)].level - program.inputs[0]
        of_pixel = step_cost(program, step)
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
    steps = plan(program, *inputs[0].shape[2:])
    native.call(
        "_cpu", "folded_network",
        checks.addresses(inputs), [x.stride() for x in inputs], weights.data_ptr(),
        steps.data_ptr(), scores.data_ptr(), len(scores),
        shapes=f"inputs {[tuple(x.shape) for x in inputs]}",
    )  # fmt: skip
    return scores


def _can_run(inputs: Sequence[Tensor], weights: Tensor, program: str) -> Verdict:
    return checks.has_dtype("inputs[0]", inputs[0].dtype, (torch.float32,))


OP = register_op("folded_network", folded_network_reference)
OP.register_native("cpp", _cpp, _empty, _can_run, cost=_cost)
