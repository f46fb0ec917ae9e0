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
    Step,
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
        weights: one-dimensional, of the inputs' dtype; float32 (float64: by the reference). A
            program with products in bfloat16 keeps pairs of these in them, see `pack`.
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


def pack(matrix: Tensor, bfloat16: bool = False) -> Tensor:
    """W (outputs, depth) → its panels, each (depth, width), back to back, zeros in the padding.

    In bfloat16 a panel is (depth / 2, width), depth padded to 32, and each element holds the bits
    of two as one float32: the earlier row's are the low ones.
    """
    outputs, depth = matrix.shape
    widths = panel_widths(outputs)
    padded = matrix.new_zeros(sum(widths), round_up(depth, 32) if bfloat16 else depth)
    padded[:outputs, :depth] = matrix
    if bfloat16:  # finite ones are finite float32, which float64 holds exactly, too
        padded = padded.bfloat16().view(torch.float32).to(matrix.dtype)
    return torch.cat([panel.t().reshape(-1) for panel in padded.split(widths)])


def unpack(
    weights: Tensor, offset: int, outputs: int, depth: int, bfloat16: bool = False
) -> Tensor:
    """The inverse of `pack`, from `weights` at `offset`."""
    rows = round_up(depth, 32) // 2 if bfloat16 else depth
    panels = []
    for width in panel_widths(outputs):
        panels.append(weights[offset : offset + rows * width].view(rows, width).t())
        offset += rows * width
    matrix = torch.cat(panels)
    if bfloat16:
        matrix = matrix.float().contiguous().view(torch.bfloat16).to(weights.dtype)
    return matrix[:outputs, :depth]


def folded_network_reference(inputs: Sequence[Tensor], weights: Tensor, program: str) -> Tensor:
    """The definition; see `Conv`, `Pool` and `Head`."""
    known = parse(program)
    size = (inputs[0].shape[2], inputs[0].shape[3])
    return run_program(known, inputs, [step_tensors(known, s, weights, size) for s in known.steps])


StepTensors = dict[str, Tensor]  # what a step needs of the weights, as torch's functions take it


def step_tensors(
    program: Program, step: Step, weights: Tensor, size: tuple[int, int]
) -> StepTensors:
    """Kernels, biases and scales of a step.

    Args:
        weights: all of the program's.
        size: (height, width) of the first input in pixels.

    Returns:
        Of a `Conv` those that it has of: kernel, bias, expand, expand_bias, taps, taps_bias,
        pre_scale, post_scale. Of a `Pool` scale, shift, post_scale. Of a `Head` weight0, bias0, ….
    """

    def vector(offset: int, count: int) -> Tensor:
        return weights[offset : offset + count]

    def scalars(step: Conv | Pool, *names: str) -> StepTensors:
        offsets = {name: getattr(step, name) for name in names}
        return {name: weights[at] for name, at in offsets.items() if at != NONE}

    if isinstance(step, Conv):
        found = scalars(step, "pre_scale", "post_scale")
        found["bias"] = _bias(program, step, weights, size)
        if step.weight == NONE:
            return found
        if step.expand != NONE:
            channels = program.buffers[step.source].channels
            matrix = unpack(weights, step.expand, step.channels, channels, program.bfloat16)
            found |= {
                "expand": matrix[:, :, None, None],
                "expand_bias": vector(step.expand_bias, step.channels),
            }
        if step.taps != NONE:
            c, padded = step.channels, round_up(step.channels)
            taps = vector(step.taps, 9 * padded).view(9, padded)[:, :c].t().reshape(c, 1, 3, 3)
            found |= {"taps": taps, "taps_bias": vector(step.taps_bias, c)}
        k = step.kernel
        matrix = unpack(weights, step.weight, step.outputs, k * k * step.channels, program.bfloat16)
        found["kernel"] = matrix.view(step.outputs, k, k, step.channels).permute(0, 3, 1, 2)
        return found
    if isinstance(step, Pool):
        c = program.buffers[step.source].channels
        found = {name: vector(getattr(step, name), c)[:, None, None] for name in ("scale", "shift")}
        return found | scalars(step, "post_scale")
    if isinstance(step, Head):
        found = {}
        for i, (source, weight, bias, keypoints) in enumerate(
            zip(step.sources, step.weights, step.biases, step.keypoints, strict=True)
        ):
            rows = len(keypoints) * step.depth
            channels = program.buffers[source].channels
            matrix = unpack(weights, weight, rows, channels, program.bfloat16)
            found |= {f"weight{i}": matrix[:, :, None, None], f"bias{i}": vector(bias, rows)}
        return found
    return {}


def _bias(program: Program, step: Conv, weights: Tensor, size: tuple[int, int]) -> Tensor:
    """(1, outputs, 1, 1), or with borders (1, outputs, height, width)."""
    if not step.borders:
        return weights[step.bias : step.bias + step.outputs][None, :, None, None]
    shift = program.buffers[step.out].level - program.inputs[0]
    rows = [round_up(step.outputs) * i + step.bias for i in range(4)]
    interior, left, top, corner = (weights[at : at + step.outputs] for at in rows)
    bias = interior[:, None, None].repeat(1, size[0] >> shift, size[1] >> shift)
    bias[:, :, 0] = left[:, None]
    bias[:, 0] = top[:, None]
    bias[:, 0, 0] = corner
    return bias[None]


def run_program(
    program: Program, inputs: Sequence[Tensor], tensors: Sequence[StepTensors]
) -> Tensor:
    """The scores, in plain torch functions that write nothing in place: these can be traced.

    Args:
        tensors: per step what `step_tensors` gives; a scale that is left out is 1.
    """
    maps: dict[int, Tensor] = {}
    for step, own in zip(program.steps, tensors, strict=True):
        if isinstance(step, Load):
            y = inputs[step.source]
        elif isinstance(step, Conv):
            y = _conv(program, step, own, maps, inputs[0])
        elif isinstance(step, Pool):
            y = _pool(program, step, own, maps)
        else:
            return _head(program, step, own, maps)
        maps[step.out] = y
        maps.pop(program.buffers[step.out].parent, None)  # if it was read, then before this
    raise PnfsError("a program ends in a head")


def _read(program: Program, maps: dict[int, Tensor], buffer: int) -> Tensor:
    """A buffer's map; one whose views were written is put together of them and of zeros."""
    if buffer in maps:
        return maps[buffer]
    buffers = program.buffers
    views = sorted((view.offset, i) for i, view in enumerate(buffers) if view.parent == buffer)
    ends = [*(offset for offset, _ in views[1:]), buffers[buffer].channels]
    pieces = []
    for (offset, number), end in zip(views, ends, strict=True):
        gap = end - offset - buffers[number].channels
        pieces.append(F.pad(maps[number], (0, 0, 0, 0, 0, gap)) if gap else maps[number])
    maps[buffer] = torch.cat(pieces, dim=1)
    return maps[buffer]


def _conv(
    program: Program, step: Conv, own: StepTensors, maps: dict[int, Tensor], first: Tensor
) -> Tensor:
    total = own["bias"]
    if step.weight != NONE:
        x, stride = _read(program, maps, step.source), step.stride
        if step.expand != NONE:
            y = F.conv2d(_operand(program, x), own["expand"], own["expand_bias"])
            x = activate(y, step.expand_act)
        if step.taps != NONE:
            taps, d, c = own["taps"], step.dilation, step.channels
            x = F.conv2d(x, taps, own["taps_bias"], stride, d, d, groups=c)
            x, stride = activate(x, step.taps_act), 1
        # the usual bias belongs to the convolution: engines then see one operation
        bias = None if step.borders else total.flatten()
        y = F.conv2d(_operand(program, x), own["kernel"], bias, stride, step.kernel // 2)
        total = y + total if step.borders else y
    if step.pre != NONE:
        total = total + _scaled(own, "pre_scale", _read(program, maps, step.pre))
    if step.up != NONE:
        total = total + upsampled(_read(program, maps, step.up))
    y = activate(total, step.act)
    if step.post != NONE:
        y = y + _scaled(own, "post_scale", _read(program, maps, step.post))
    if step.weight == step.pre == step.up == step.post == NONE:
        shift = program.buffers[step.out].level - program.inputs[0]
        y = y.expand(first.shape[0], -1, first.shape[2] >> shift, first.shape[3] >> shift)
    return y


def _operand(program: Program, x: Tensor) -> Tensor:
    return x.bfloat16().to(x.dtype) if program.bfloat16 else x


def _scaled(own: StepTensors, name: str, x: Tensor) -> Tensor:
    return own[name] * x if name in own else x


def upsampled(x: Tensor) -> Tensor:
    """(N, C, h, w) → (N, C, 2 h, 2 w), bilinear with aligned corners."""
    return F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=True)


def _pool(program: Program, step: Pool, own: StepTensors, maps: dict[int, Tensor]) -> Tensor:
    x = _read(program, maps, step.source)
    if step.largest:
        pooled = F.max_pool2d(x, 3, 1, 1)
    else:
        pooled = F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)
    y = own["scale"] * pooled + own["shift"]
    if step.post != NONE:
        y = y + _scaled(own, "post_scale", _read(program, maps, step.post))
    return y


def _head(program: Program, step: Head, own: StepTensors, maps: dict[int, Tensor]) -> Tensor:
    found: list[list[Tensor]] = [[] for _ in range(program.keypoints)]
    for i, (source, keypoints) in enumerate(zip(step.sources, step.keypoints, strict=True)):
        x = _operand(program, _read(program, maps, source))
        v = F.conv2d(x, own[f"weight{i}"], own[f"bias{i}"]).unflatten(1, (-1, step.depth))
        squared = v.square().sum(2)
        scores = v.squeeze(2) if step.depth == 1 else squared / (1 + squared)
        for keypoint, score in zip(keypoints, scores.unbind(1), strict=True):
            found[keypoint].append(score)
    return torch.stack([sum(terms[1:], terms[0]) for terms in found], dim=1)


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
