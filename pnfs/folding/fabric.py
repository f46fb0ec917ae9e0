"""A part fabric folded (Eq. 1-3): its cells as steps, α, β and normalisations multiplied in."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

from torch import Tensor, nn

from pnfs.fabric import Cell, Fabric, MixedEdge, ScaleTransform
from pnfs.folding.writer import Feature, Writer, biased
from pnfs.kernels.folded_program import LINEAR, NONE, RELU, Pool, round_up
from pnfs.operations import BN_EPS, PartBatchNorm2d, PartConv2d, Separable
from pnfs.operations import Pool as PoolBranch
from pnfs.topology import CellRow


def live_inputs(fabric: Fabric) -> set[int]:
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
        beta = fabric.mixing_weights()[1][part].detach().cpu().double()
        self.rows = fabric.of_inputs.factor * beta
        self.readers = {cell.row.name: cell.inputs for cell in fabric.plan.cells}
        self.part = part

    def of(self, row: CellRow) -> list[float]:
        readers = self.readers.get(row.name, ((), (), ()))
        weights = self.rows[row.beta_row].tolist()
        return [w if self.part in parts else 0.0 for w, parts in zip(weights, readers, strict=True)]

    def live(self, levels: Sequence[int]) -> set[tuple[int, int]]:
        """(layer, level) of the cells and inputs that these outputs depend on, with them."""
        last = self.topology.last_layer
        alive = {(last, level) for level in levels}
        for row in reversed(self.topology.cells):
            if (row.layer, row.level) in alive:
                beta = self.of(row)
                alive |= {source.source for source in row.inputs if beta[source.slot] != 0}
        return alive


class FabricFolder:
    """Writes one part of a fabric."""

    def __init__(
        self, writer: Writer, fabric: Fabric, part: int, inputs: Sequence[Feature]
    ) -> None:
        self.writer, self.fabric, self.part = writer, fabric, part
        self.posenfs = fabric.profile == "posenfs"
        self.alpha = fabric.mixing_weights()[0][part].detach().cpu().double()
        self.betas = _Betas(fabric, part)
        layer = fabric.topology.input_layer
        self.features: dict[tuple[int, int], Feature] = {}
        reads = fabric.plan.reads  # of a short fabric no cell reads the coarsest levels
        for level, x in enumerate(inputs[: len(reads)]):
            readers = reads[level] if fabric.plan.pruned else range(fabric.parts)
            if part not in readers:
                continue
            if fabric.reduce:
                reduce = cast(PartConv2d, fabric.reduce[level])
                weight, bias = self.weights(reduce, readers.index(part))
                x = Feature(x.buffer, weight, bias)
            self.features[(layer, level)] = x

    def weights(self, conv: PartConv2d, index: int) -> tuple[Tensor, Tensor]:
        """Weight (1×1: as a matrix) and bias, float64, of the part that has this index there."""
        weight = conv.weight[index].detach().cpu().double()
        if weight.shape[-1] == 1:
            weight = weight[..., 0, 0]
        if conv.bias is None:
            return weight, weight.new_zeros(len(weight))
        return weight, conv.bias[index].detach().cpu().double()

    def affine(self, norm: PartBatchNorm2d, index: int) -> tuple[Tensor, Tensor]:
        """Scale and shift of a normalisation, float64, of the part that has this index there."""
        mean, var = (
            x[index].detach().cpu().double() for x in (norm.running_mean, norm.running_var)
        )
        scale = (var + BN_EPS).rsqrt()
        if norm.weight is None or norm.bias is None:
            return scale, -mean * scale
        scale = norm.weight[index].detach().cpu().double() * scale
        return scale, norm.bias[index].detach().cpu().double() - mean * scale

    def outputs(self, levels: Sequence[int]) -> dict[int, Feature]:
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

    def settle(self, place: tuple[int, int], rows: Sequence[CellRow]) -> Feature:
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
            return Feature(self.writer.materialise(feature))
        return feature

    def transform(self, row: CellRow, slot: int, weight: float) -> tuple[Feature, Tensor, Tensor]:
        """weight·BN(conv(feature)): the feature, the kernel that reads it (not composed), bias."""
        conv, norm = cast(ScaleTransform, self._cell(row).inputs[slot])
        index = self._cell(row).plan.inputs[slot].index(self.part)
        kernel, bias = self.weights(cast(PartConv2d, conv), index)
        scale, shift = self.affine(cast(PartBatchNorm2d, norm), index)
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
                writer.conv(feature.buffer, up, feature.then(kernel), biased(kernel, bias, feature))
            else:
                feature, kernel, bias = self.transform(row, slot, beta[slot])
                downs.append((feature, kernel, bias))
        if self.posenfs and len(downs) > 1:  # border copies: one source, no ReLU between them
            kernel = sum((k for _, k, _ in downs[1:]), downs[0][1])
            bias = sum((b for _, _, b in downs[1:]), downs[0][2])
            downs = [(downs[0][0], kernel, bias)]
        linear = [
            (feature.buffer, feature.then(kernel), biased(kernel, bias, feature), 2)
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
            writer.conv(
                buffer,
                h0,
                kernel,
                bias,
                stride=stride,
                act=act if last else LINEAR,
                pre=pre,
                up=up if last else NONE,
            )
            pre = (h0, 1.0)
        rectified = [] if self.posenfs else downs
        if not linear and (pre is not None or up != NONE or not rectified):
            writer.mix(h0, pre=pre, up=up, act=act)
            pre = (h0, 1.0)
        for feature, kernel, bias in rectified:
            composed = biased(kernel, bias, feature)
            writer.conv(
                feature.buffer, h0, feature.then(kernel), composed, stride=2, act=RELU, post=pre
            )
            pre = (h0, 1.0)
        return h0

    def cell(self, row: CellRow) -> Feature:
        """Writes a cell up to its output convolution (Eq. 3)."""
        writer, module = self.writer, self._cell(row)
        nodes = [self.input_node(row)]
        padded = round_up(row.channels)
        hidden = module.hidden
        whole = writer.buffer(row.level + 2, hidden * padded if hidden > 1 else row.channels)
        for target in range(1, hidden + 1):
            node = whole
            if hidden > 1:
                node = writer.view(whole, (target - 1) * padded, row.channels)
            self.hidden_node(module, target, nodes, node)
            nodes.append(node)
        matrix, bias = self.weights(module.output, module.plan.parts.index(self.part))
        if hidden > 1:
            matrix = writer.channels(matrix.unflatten(1, (hidden, row.channels))).flatten(1)
        return Feature(whole, matrix, bias)

    def hidden_node(self, module: Cell, target: int, nodes: list[int], out: int) -> None:
        """Writes the sum of the mixed edges that lead to one node (Eq. 1)."""
        skips: list[tuple[int, float]] = []
        branches: list[tuple[int, nn.Module, float, int]] = []
        for edge, mixed in zip(module.edge_rows, module.edges, strict=True):
            mixed = cast(MixedEdge, mixed)
            if edge.target != target:
                continue
            weights = self.fabric.of_edges.factor * self.alpha[edge.alpha_row]
            terms = dict(zip(mixed.columns, weights[mixed.columns].tolist(), strict=True))
            columns = iter(mixed.columns)
            source = nodes[edge.source]
            if mixed.has_skip:
                skips.append((source, terms[next(columns)]))
            for (name, branch), column in zip(mixed.operations.items(), columns, strict=True):
                if self.part in mixed.users[name]:
                    index = mixed.users[name].index(self.part)
                    branches.append((source, branch, terms[column], index))
        skips = [skip for skip in skips if skip[1] != 0]
        branches = [branch for branch in branches if branch[2] != 0]
        post = skips.pop(0) if skips else None
        if not branches:
            self.writer.mix(out, pre=post)
            post = (out, 1.0)
        for source, branch, weight, index in branches:
            self.branch(source, branch, weight, index, out, post)
            post = (out, 1.0)
        for skip in skips:
            self.writer.mix(out, pre=skip, post=(out, 1.0))

    def branch(
        self, source: int, branch: nn.Module, weight: float, index: int, out: int, post: Any
    ) -> None:
        """Writes out = weight·branch(source) + post; `index`: this part's in the branch."""
        writer = self.writer
        if isinstance(branch, PoolBranch):
            scale, shift = self.affine(cast(PartBatchNorm2d, branch[1]), index)
            largest = isinstance(branch[0], nn.MaxPool2d)
            offsets = writer.store(weight * scale), writer.store(weight * shift)
            terms = {} if post is None else {"post": post[0], "post_scale": writer.scalar(post[1])}
            writer.steps.append(Pool(source, out, largest, *offsets, **terms))
            return
        layers: list[Any] = list(cast(Separable, branch))
        stages = [*zip(layers[::4], layers[1::4], layers[2::4], strict=True)]
        for number, (depthwise, pointwise, norm) in enumerate(stages):
            last = number == len(stages) - 1
            scale, shift = self.affine(norm, index)
            if last:
                scale, shift = weight * scale, weight * shift
            target = (
                out
                if last
                else writer.buffer(writer.buffers[source].level, writer.buffers[source].channels)
            )
            writer.conv(
                source,
                target,
                self.weights(pointwise, index)[0] * scale[:, None],
                shift,
                act=RELU,
                taps=self.weights(depthwise, index)[0][:, 0],
                dilation=depthwise.dilation,
                post=post if last else None,
            )
            source = target
