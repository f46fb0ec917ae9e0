"""A PoseNet in evaluation mode, folded: the same scores from one native call.

All that is linear is multiplied out in float64 before the first image: batch normalisation, α and β
into the weights (|O|·softmax(α) ≥ 0 passes through a ReLU), the cells' output convolutions and the
pyramid's 1×1 reductions into the convolutions that read them, where that lowers the work. 1×1
convolutions stand before the upsampling, with which they commute. Cells and operations that no
output depends on, or whose weight is exactly zero, are left out.

Shapes: matrices (O, I); 3×3 kernels (O, I, 3, 3); depthwise taps (C, 3, 3).
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from pnfs.architecture import mixing_weights
from pnfs.backbones.fabric import FabricBackbone
from pnfs.backbones.mobilenet_v2 import TAPS, InvertedResidual, MobileNetV2
from pnfs.errors import PnfsError
from pnfs.fabric import Cell, Fabric, MixedEdge, ScaleTransform
from pnfs.kernels import folded_network, native
from pnfs.kernels.folded_network import (
    LANES,
    LINEAR,
    NONE,
    OP,
    RELU,
    RELU6,
    Buffer,
    Conv,
    Head,
    Load,
    Pool,
    Program,
    Step,
    pack,
)
from pnfs.model import PoseNet
from pnfs.operations import BN_EPS, PartBatchNorm2d, PartConv2d, Separable
from pnfs.operations import Pool as PoolBranch
from pnfs.topology import CellRow


class FoldedPoseNet(nn.Module):
    """What `fold` returns: images (N, 3, H, W) → scores (N, K, H/4, W/4), for evaluation alone.

    Attributes:
        config: that of the folded model.
        backbone: modules that run before the program, or None where the program has all of it.
        weights: all weights, in the program's order.
        program: see `pnfs.kernels.folded_network`.
    """

    weights: Tensor

    def __init__(self, model: PoseNet) -> None:
        super().__init__()
        self.config = model.config
        writer = _Writer()
        with torch.no_grad():
            self.backbone = None if _is_foldable(model) else _fused(model.backbone)
            _write_network(writer, model)
        self.program = writer.program(model.config.skeleton_table.num_keypoints)
        dtype = next(model.parameters()).dtype
        device = next(model.parameters()).device
        self.register_buffer("weights", writer.weights().to(device, dtype))

    def forward(self, images: Tensor) -> Tensor:
        """As `PoseNet.forward`, for images of the weights' dtype.

        Raises:
            PnfsError: a size that is no multiple of 32, or another dtype.
        """
        maps = [images] if self.backbone is None else list(self.backbone(images))
        return folded_network(maps, self.weights, self.program)


def fold(model: nn.Module) -> FoldedPoseNet:
    """The evaluation mode of `model`, as it is now, in one native call.

    The result shares no memory with `model`, whose later changes it does not see.

    Args:
        model: a PoseNet, from `build_model` or `load_model`.

    Raises:
        PnfsError: not a PoseNet.
    """
    if not isinstance(model, PoseNet):
        raise PnfsError(f"fold: takes a PoseNet, not {type(model).__name__}")
    return FoldedPoseNet(model).eval()


def for_evaluation(model: nn.Module, device: torch.device, precision: str) -> nn.Module:
    """`model` folded where that is faster: a PoseNet in float32 on a CPU that has the kernel."""
    folds = (
        isinstance(model, PoseNet)
        and device.type == "cpu"
        and precision == "fp32"
        and all(p.dtype == torch.float32 and p.device == device for p in model.parameters())
        and OP.choose([torch.empty(0)] * 2) == "cpp"
    )
    return fold(model) if folds else model


@dataclass(frozen=True)
class _Feature:
    """A map that is `matrix`·buffer + `bias`, computed only where a reader wants it so."""

    buffer: int
    matrix: Tensor | None = None  # None: the buffer itself
    bias: Tensor | None = None

    def then(self, kernel: Tensor) -> Tensor:
        """A convolution (O, I) or (O, I, 3, 3) of the feature as one of the buffer."""
        if self.matrix is None:
            return kernel
        return torch.einsum("oi...,ij->oj...", kernel, self.matrix)


class _Writer:
    """Collects buffers, steps and weights."""

    def __init__(self) -> None:
        self.inputs: list[int] = []
        self.buffers: list[Buffer] = []
        self.steps: list[Step] = []
        self.chunks: list[Tensor] = []
        self.floats = 0
        self.scalars: dict[float, int] = {}

    def buffer(self, level: int, channels: int) -> int:
        self.buffers.append(Buffer(level, channels))
        return len(self.buffers) - 1

    def view(self, parent: int, offset: int, channels: int) -> int:
        level = self.buffers[parent].level
        self.buffers.append(Buffer(level, channels, parent=parent, offset=offset))
        return len(self.buffers) - 1

    def load(self, level: int, channels: int) -> int:
        out = self.buffer(level, channels)
        self.steps.append(Load(len(self.inputs), out))
        self.inputs.append(level)
        return out

    def store(self, values: Tensor) -> int:
        """Offset of `values`, padded with zeros to whole vectors."""
        offset, flat = self.floats, values.reshape(-1).double()
        padding = -len(flat) % LANES
        self.chunks.append(torch.cat([flat, flat.new_zeros(padding)]))
        self.floats += len(flat) + padding
        return offset

    def scalar(self, value: float) -> int:
        if value not in self.scalars:
            self.scalars[value] = self.store(torch.tensor([value]))
        return self.scalars[value]

    def channels(self, values: Tensor) -> Tensor:
        """(..., C) padded to whole vectors."""
        return nn.functional.pad(values, (0, -values.shape[-1] % LANES))

    def conv(
        self,
        source: int,
        out: int,
        kernel: Tensor,
        bias: Tensor | None,
        *,
        stride: int = 1,
        act: int = LINEAR,
        taps: Tensor | None = None,
        taps_bias: Tensor | None = None,
        taps_act: int = LINEAR,
        dilation: int = 1,
        expand: tuple[Tensor, Tensor, int] | None = None,
        **terms: Any,
    ) -> None:
        """`kernel` (O, I) or (O, I, 3, 3); `bias` (O) or (4, O); `terms`: see `mix`."""
        outputs, channels = kernel.shape[:2]
        k = 3 if kernel.dim() == 4 else 1
        matrix = kernel.permute(0, 2, 3, 1).reshape(outputs, -1) if k == 3 else kernel
        options: dict[str, int] = {}
        reach = 1 if k == 3 else 0
        if taps is not None:
            order = taps.permute(1, 2, 0).reshape(9, channels)
            options["taps"] = self.store(self.channels(order))
            zeros = taps.new_zeros(channels)
            options["taps_bias"] = self.store(zeros if taps_bias is None else taps_bias)
            options["taps_act"] = taps_act
            options["dilation"] = dilation
            reach = dilation
        if expand is not None:
            options["expand"] = self.store(pack(expand[0]))
            options["expand_bias"] = self.store(expand[1])
            options["expand_act"] = expand[2]
            reach = 0  # the step pads what it expands
        self.pad(source, reach)
        bias = kernel.new_zeros(outputs) if bias is None else bias
        step = Conv(
            source,
            out,
            channels,
            outputs,
            self.store(self.channels(bias)),
            weight=self.store(pack(matrix)),
            kernel=k,
            stride=stride,
            borders=bias.dim() == 2,
            act=act,
            **options,
        )
        self.add(step, **terms)

    def mix(self, out: int, *, act: int = LINEAR, bias: Tensor | None = None, **terms: Any) -> None:
        """A sum of maps without a product. Terms: `pre` and `post`, (buffer, scale) each, `up`."""
        outputs = self.buffers[out].channels
        bias = torch.zeros(outputs) if bias is None else bias
        self.add(Conv(NONE, out, 0, outputs, self.store(bias), act=act), **terms)

    def add(
        self,
        step: Conv,
        pre: tuple[int, float] | None = None,
        up: int = NONE,
        post: tuple[int, float] | None = None,
    ) -> None:
        terms: dict[str, int] = {"up": up}
        for name, term in (("pre", pre), ("post", post)):
            if term is not None:
                terms |= {name: term[0], f"{name}_scale": self.scalar(term[1])}
        self.steps.append(replace(step, **terms))

    def pad(self, buffer: int, pixels: int) -> None:
        parent = self.buffers[buffer].parent
        root = buffer if parent == NONE else parent
        have = self.buffers[root]
        self.buffers[root] = replace(have, pad=max(have.pad, pixels))

    def materialise(self, feature: _Feature, act: int = LINEAR) -> int:
        """The buffer that holds act(feature)."""
        if feature.matrix is None and act == LINEAR:
            return feature.buffer
        source = self.buffers[feature.buffer]
        if feature.matrix is None:
            out = self.buffer(source.level, source.channels)
            self.mix(out, pre=(feature.buffer, 1.0), act=act)
        else:
            out = self.buffer(source.level, len(feature.matrix))
            self.conv(feature.buffer, out, feature.matrix, feature.bias, act=act)
        return out

    def weights(self) -> Tensor:
        return torch.cat(self.chunks)

    def program(self, keypoints: int) -> str:
        return Program(
            tuple(self.inputs), keypoints, tuple(self.buffers), tuple(self.steps)
        ).text()


def _is_foldable(model: PoseNet) -> bool:
    """Whether the program can hold the backbone."""
    return isinstance(model.backbone, MobileNetV2 | FabricBackbone)


def _write_network(writer: _Writer, model: PoseNet) -> None:
    backbone = model.backbone
    if isinstance(backbone, MobileNetV2):
        pyramid = [_Feature(tap) for tap in _write_mobilenet(writer, backbone)]
    elif isinstance(backbone, FabricBackbone):
        stem = _write_stem(writer, backbone.stem)
        levels = range(len(backbone.channels))
        wanted = _live_inputs(model.fabric)
        used = [level for level in levels if level in wanted]
        features = _FabricFolder(writer, backbone.fabric, 0, [stem]).outputs(used)
        buffers = {level: writer.materialise(features[level]) for level in used}
        pyramid = [_Feature(buffers.get(level, NONE)) for level in levels]
    else:
        pyramid = [
            _Feature(writer.load(2 + level, channels))
            for level, channels in enumerate(backbone.channels)
        ]
    heads = []
    for part in range(model.fabric.parts):
        folder = _FabricFolder(writer, model.fabric, part, pyramid)
        heads.append(writer.materialise(folder.outputs([0])[0], act=RELU))
    convs = [cast(nn.Conv2d, conv) for conv in model.head.convs]
    weights = [writer.store(pack(conv.weight.detach().double().flatten(1).cpu())) for conv in convs]
    biases = [writer.store(cast(Tensor, conv.bias).detach().cpu()) for conv in convs]
    parts = tuple(tuple(keypoints) for keypoints in model.config.part_table.values())
    depth = model.head.vector_dim
    writer.steps.append(Head(depth, tuple(heads), tuple(weights), tuple(biases), parts))


def _conv_bn(conv: nn.Module, norm: nn.Module | None = None) -> tuple[Tensor, Tensor]:
    """Weight and bias, float64, of a convolution and the normalisation after it."""
    conv = cast(nn.Conv2d, conv)
    weight = conv.weight.detach().cpu().double()
    bias = weight.new_zeros(len(weight)) if conv.bias is None else conv.bias.detach().cpu().double()
    if norm is None:
        return weight, bias
    norm = cast(nn.BatchNorm2d, norm)
    mean, var, gamma, beta = (
        cast(Tensor, tensor).detach().cpu().double()
        for tensor in (norm.running_mean, norm.running_var, norm.weight, norm.bias)
    )
    scale = gamma * (var + norm.eps).rsqrt()
    return weight * scale[:, None, None, None], beta + scale * (bias - mean)


def _write_mobilenet(writer: _Writer, backbone: MobileNetV2) -> list[int]:
    """The buffers of the pyramid."""
    stem = cast(nn.Sequential, backbone.features[0])
    weight, bias = _conv_bn(stem[0], stem[1])
    level = 1
    x = writer.load(0, 3)
    out = writer.buffer(level, len(weight))
    writer.conv(x, out, weight, bias, stride=2, act=RELU6)
    x, taps = out, []
    for index, block in enumerate(backbone.features[1:], start=1):
        conv = cast(InvertedResidual, block).conv
        expand = None
        if len(conv) == 8:
            matrix, bias = _conv_bn(conv[0], conv[1])
            expand = (matrix.flatten(1), bias, RELU6)
        depthwise = cast(nn.Conv2d, conv[-5])
        kernel, kernel_bias = _conv_bn(depthwise, conv[-4])
        matrix, bias = _conv_bn(conv[-2], conv[-1])
        stride = depthwise.stride[0]
        level += stride == 2
        out = writer.buffer(level, len(matrix))
        writer.conv(
            x,
            out,
            matrix.flatten(1),
            bias,
            stride=stride,
            taps=kernel[:, 0],
            taps_bias=kernel_bias,
            taps_act=RELU6,
            expand=expand,
            post=(x, 1.0) if cast(InvertedResidual, block).residual else None,
        )
        x = out
        if index in TAPS:
            taps.append(x)
    return taps


def _write_stem(writer: _Writer, stem: nn.Sequential) -> _Feature:
    """A fabric's stem, up to its last, linear convolution."""
    x = writer.load(0, 3)
    for level, first in ((1, 0), (2, 2)):
        weight, bias = _conv_bn(stem[first], stem[first + 1])
        out = writer.buffer(level, len(weight))
        writer.conv(x, out, weight, bias, stride=2, act=LINEAR if level == 1 else RELU)
        x = out
    weight, bias = _conv_bn(stem[5])
    return _Feature(x, weight.flatten(1), bias)


def _fused(backbone: nn.Module) -> nn.Module:
    """A copy with batch normalisations multiplied into the convolutions before them."""
    fused = copy.deepcopy(backbone).eval()
    for parameter in fused.parameters():
        parameter.requires_grad_(False)
    for module in [*fused.modules()]:
        previous: tuple[str, nn.Module] | None = None
        for name, child in [*module.named_children()]:
            if isinstance(child, nn.BatchNorm2d) and previous is not None:
                conv = previous[1]
                if isinstance(conv, nn.Conv2d) and conv.out_channels == child.num_features:
                    setattr(module, previous[0], fuse_conv_bn_eval(conv, child))
                    setattr(module, name, nn.Identity())
            previous = (name, child)
    return fused.to(memory_format=torch.channels_last)


def _live_inputs(fabric: Fabric) -> set[int]:
    """Levels of the pyramid that the level-0 output of some part depends on."""
    first = fabric.topology.input_layer
    return {
        level
        for part in range(fabric.parts)
        for layer, level in _Betas(fabric, part).live([0])
        if layer == first
    }


class _Betas:
    """The mixing weights of one part's cells, scaled as the profile says, and what is alive."""

    def __init__(self, fabric: Fabric, part: int) -> None:
        self.topology = fabric.topology
        scale = 3.0 if fabric.profile == "posenfs" else 1.0
        self.rows = scale * mixing_weights(fabric.beta[part].detach().cpu().double())

    def of(self, row: CellRow) -> list[float]:
        return cast(list[float], self.rows[row.beta_row].tolist())

    def live(self, levels: Sequence[int]) -> set[tuple[int, int]]:
        """(layer, level) of the cells and inputs that these outputs depend on, with them."""
        last = self.topology.last_layer
        alive = {(last, level) for level in levels}
        for row in reversed(self.topology.cells):
            if (row.layer, row.level) in alive:
                beta = self.of(row)
                alive |= {source.source for source in row.inputs if beta[source.slot] != 0}
        return alive


class _FabricFolder:
    """Writes one part of a fabric."""

    def __init__(
        self, writer: _Writer, fabric: Fabric, part: int, inputs: Sequence[_Feature]
    ) -> None:
        self.writer, self.fabric, self.part = writer, fabric, part
        self.posenfs = fabric.profile == "posenfs"
        self.alpha = mixing_weights(fabric.alpha[part].detach().cpu().double())
        self.betas = _Betas(fabric, part)
        layer = fabric.topology.input_layer
        self.features: dict[tuple[int, int], _Feature] = {}
        for level, x in enumerate(inputs):
            if fabric.reduce:
                weight, bias = self.weights(cast(PartConv2d, fabric.reduce[level]))
                x = _Feature(x.buffer, weight, bias)
            self.features[(layer, level)] = x

    def weights(self, conv: PartConv2d) -> tuple[Tensor, Tensor]:
        """Weight (1×1: as a matrix) and bias of this part, float64."""
        weight = conv.weight[self.part].detach().cpu().double()
        if weight.shape[-1] == 1:
            weight = weight[..., 0, 0]
        if conv.bias is None:
            return weight, weight.new_zeros(len(weight))
        return weight, conv.bias[self.part].detach().cpu().double()

    def affine(self, norm: PartBatchNorm2d) -> tuple[Tensor, Tensor]:
        """Scale and shift of this part's normalisation, float64."""
        mean, var = (
            x[self.part].detach().cpu().double() for x in (norm.running_mean, norm.running_var)
        )
        scale = (var + BN_EPS).rsqrt()
        if norm.weight is None or norm.bias is None:
            return scale, -mean * scale
        scale = norm.weight[self.part].detach().cpu().double() * scale
        return scale, norm.bias[self.part].detach().cpu().double() - mean * scale

    def outputs(self, levels: Sequence[int]) -> dict[int, _Feature]:
        """Writes what the last layer's outputs at `levels` need; the outputs by level."""
        topology = self.fabric.topology
        alive = self.betas.live(levels)
        rows = [row for row in topology.cells if (row.layer, row.level) in alive]
        for place in [place for place in self.features if place in alive]:
            self.features[place] = self.settle(place, rows)
        for row in rows:
            place = (row.layer, row.level)
            self.features[place] = self.cell(row)
            if row.layer != topology.last_layer:
                self.features[place] = self.settle(place, rows)
        return {level: self.features[(topology.last_layer, level)] for level in levels}

    def settle(self, place: tuple[int, int], rows: Sequence[CellRow]) -> _Feature:
        """The feature, computed into a buffer where that takes fewer multiply-adds than to compose
        its convolution with those that read it."""
        feature = self.features[place]
        if feature.matrix is None:
            return feature
        outputs, inputs = feature.matrix.shape
        composed = stored = 0.0
        for row in rows:
            beta = self.betas.of(row)
            kinds = {s.transform for s in row.inputs if s.source == place and beta[s.slot] != 0}
            for kind in kinds:
                # per pixel of the feature, of a convolution that reads `width` channels
                factor = {"same": outputs, "down": 9 * 2 * outputs / 4, "up": outputs / 2}[kind]
                composed += factor * inputs
                stored += 0 if kind == "same" else factor * min(outputs, inputs)
        if stored + outputs * inputs < composed:
            return _Feature(self.writer.materialise(feature))
        return feature

    def transform(
        self, row: CellRow, slot: int, weight: float
    ) -> tuple[_Feature, Tensor, Tensor]:
        """weight·BN(conv(feature)): the feature, the kernel that reads it (not composed), bias."""
        conv, norm = cast(ScaleTransform, self._cell(row).inputs[slot])
        kernel, bias = self.weights(cast(PartConv2d, conv))
        scale, shift = self.affine(cast(PartBatchNorm2d, norm))
        scale, shift = weight * scale, weight * shift
        shape = (-1, *(1,) * (kernel.dim() - 1))
        feature = self.features[row.inputs[slot].source]
        return feature, kernel * scale.view(shape), bias * scale + shift

    def _cell(self, row: CellRow) -> Cell:
        return cast(Cell, self.fabric.cells[row.name])

    def input_node(self, row: CellRow) -> int:
        """Writes h₀ = Σ softmax(β)·T(O) (Eq. 2); its buffer."""
        writer, level = self.writer, row.level + 2
        beta = self.betas.of(row)
        h0 = writer.buffer(level, row.channels)
        act = RELU if self.posenfs else LINEAR
        up, downs, same, weight = NONE, [], None, 0.0
        for source in row.inputs:
            slot = source.slot
            if beta[slot] == 0:
                continue
            if source.transform == "same":
                same, weight = self.features[source.source], weight + beta[slot]
            elif source.transform == "up":
                feature, kernel, bias = self.transform(row, slot, beta[slot])
                up = writer.buffer(level + 1, row.channels)
                writer.conv(feature.buffer, up, feature.then(kernel), _biased(kernel, bias, feature))
            else:
                feature, kernel, bias = self.transform(row, slot, beta[slot])
                downs.append((feature, kernel, bias))
        if self.posenfs and len(downs) > 1:  # border copies: one source, no ReLU between them
            kernel = sum((k for _, k, _ in downs[1:]), downs[0][1])
            bias = sum((b for _, _, b in downs[1:]), downs[0][2])
            downs = [(downs[0][0], kernel, bias)]
        linear = [
            (feature.buffer, feature.then(kernel), _biased(kernel, bias, feature), 2)
            for feature, kernel, bias in (downs if self.posenfs else [])
        ]
        pre: tuple[int, float] | None = None
        if same is not None and same.matrix is not None:
            bias = weight * cast(Tensor, same.bias)
            linear.append((same.buffer, weight * same.matrix, bias, 1))
        elif same is not None:
            pre = (same.buffer, weight)
        for number, (buffer, kernel, bias, stride) in enumerate(linear):
            last = number == len(linear) - 1
            terms = {"pre": pre, "up": up if last else NONE}
            writer.conv(
                buffer, h0, kernel, bias, stride=stride, act=act if last else LINEAR, **terms
            )
            pre = (h0, 1.0)
        rectified = [] if self.posenfs else downs
        if not linear and (pre is not None or up != NONE or not rectified):
            writer.mix(h0, pre=pre, up=up, act=act)
            pre = (h0, 1.0)
        for feature, kernel, bias in rectified:
            composed = _biased(kernel, bias, feature)
            writer.conv(
                feature.buffer, h0, feature.then(kernel), composed, stride=2, act=RELU, post=pre
            )
            pre = (h0, 1.0)
        return h0

    def cell(self, row: CellRow) -> _Feature:
        """Writes a cell up to its output convolution (Eq. 3)."""
        writer, module = self.writer, self._cell(row)
        nodes = [self.input_node(row)]
        padded = -(-row.channels // LANES) * LANES
        hidden = module.hidden
        whole = writer.buffer(row.level + 2, hidden * padded if hidden > 1 else row.channels)
        for target in range(1, hidden + 1):
            node = whole
            if hidden > 1:
                node = writer.view(whole, (target - 1) * padded, row.channels)
            self.hidden_node(module, target, nodes, node)
            nodes.append(node)
        matrix, bias = self.weights(module.output)
        if hidden > 1:
            matrix = writer.channels(matrix.unflatten(1, (hidden, row.channels))).flatten(1)
        return _Feature(whole, matrix, bias)

    def hidden_node(self, module: Cell, target: int, nodes: list[int], out: int) -> None:
        """Writes the sum of the mixed edges that lead to one node (Eq. 1)."""
        skips: list[tuple[int, float]] = []
        branches: list[tuple[int, nn.Module, float]] = []
        for edge, mixed in zip(module.edge_rows, module.edges, strict=True):
            mixed = cast(MixedEdge, mixed)
            if edge.target != target:
                continue
            weights = mixed.scale * self.alpha[edge.alpha_row]
            terms = dict(zip(mixed.columns, weights[mixed.columns].tolist(), strict=True))
            columns = iter(mixed.columns)
            source = nodes[edge.source]
            if mixed.has_skip:
                skips.append((source, terms[next(columns)]))
            for branch, column in zip(mixed.operations.values(), columns, strict=True):
                branches.append((source, branch, terms[column]))
        skips = [skip for skip in skips if skip[1] != 0]
        branches = [branch for branch in branches if branch[2] != 0]
        post = skips.pop(0) if skips else None
        if not branches:
            self.writer.mix(out, pre=post)
            post = (out, 1.0)
        for source, branch, weight in branches:
            self.branch(source, branch, weight, out, post)
            post = (out, 1.0)
        for skip in skips:
            self.writer.mix(out, pre=skip, post=(out, 1.0))

    def branch(
        self, source: int, branch: nn.Module, weight: float, out: int, post: Any
    ) -> None:
        """Writes out = weight·branch(source) + post."""
        writer = self.writer
        if isinstance(branch, PoolBranch):
            scale, shift = self.affine(cast(PartBatchNorm2d, branch[1]))
            largest = isinstance(branch[0], nn.MaxPool2d)
            offsets = writer.store(weight * scale), writer.store(weight * shift)
            terms = {} if post is None else {"post": post[0], "post_scale": writer.scalar(post[1])}
            writer.steps.append(Pool(source, out, largest, *offsets, **terms))
            return
        layers = list(cast(Separable, branch))
        stages = [*zip(layers[::4], layers[1::4], layers[2::4], strict=True)]
        for number, (depthwise, pointwise, norm) in enumerate(stages):
            last = number == len(stages) - 1
            scale, shift = self.affine(norm)
            if last:
                scale, shift = weight * scale, weight * shift
            target = out if last else writer.buffer(
                writer.buffers[source].level, writer.buffers[source].channels
            )
            writer.conv(
                source,
                target,
                self.weights(pointwise)[0] * scale[:, None],
                shift,
                act=RELU,
                taps=self.weights(depthwise)[0][:, 0],
                dilation=depthwise.dilation,
                post=post if last else None,
            )
            source = target


def _biased(kernel: Tensor, bias: Tensor, feature: _Feature) -> Tensor:
    """The bias of a convolution that is composed with the feature's, (O), or (4, O) as `Conv` takes
    it where padding lies on the feature and not on its buffer."""
    if feature.bias is None:
        return bias
    if kernel.dim() == 2:
        return bias + kernel @ feature.bias
    share = torch.einsum("oikl,i->okl", kernel, feature.bias)
    terms = [share, share[:, :, 1:], share[:, 1:], share[:, 1:, 1:]]
    return torch.stack([bias + term.sum((1, 2)) for term in terms])
