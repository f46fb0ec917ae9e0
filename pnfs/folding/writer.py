"""Writes a program of `folded_network`: buffers, steps and weights."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from pnfs.kernels.folded_network import pack
from pnfs.kernels.folded_program import (
    LANES,
    LINEAR,
    NONE,
    Buffer,
    Conv,
    Load,
    Program,
    Step,
)


@dataclass(frozen=True)
class Feature:
    """A map that is `matrix`·buffer + `bias`, computed only where a reader wants it so."""

    buffer: int
    matrix: Tensor | None = None  # None: the buffer itself
    bias: Tensor | None = None

    def then(self, kernel: Tensor) -> Tensor:
        """A convolution (O, I) or (O, I, 3, 3) of the feature as one of the buffer."""
        if self.matrix is None:
            return kernel
        return torch.einsum("oi...,ij->oj...", kernel, self.matrix)


class Writer:
    """Collects buffers, steps and weights.

    Args:
        bfloat16: products in bfloat16, see `Program`.
    """

    def __init__(self, bfloat16: bool = False) -> None:
        self.bfloat16 = bfloat16
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

    def matrix(self, matrix: Tensor) -> int:
        """Offset of a matrix (O, I), packed for products."""
        return self.store(pack(matrix, self.bfloat16))

    def scalar(self, value: float) -> int:
        if value not in self.scalars:
            self.scalars[value] = self.store(torch.tensor([value], dtype=torch.float64))
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
            options["expand"] = self.matrix(expand[0])
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
            weight=self.matrix(matrix),
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
        terms: dict[str, Any] = {"up": up}
        for name, term in (("pre", pre), ("post", post)):
            if term is not None:
                terms |= {name: term[0], f"{name}_scale": self.scalar(term[1])}
        self.steps.append(replace(step, **terms))

    def pad(self, buffer: int, pixels: int) -> None:
        parent = self.buffers[buffer].parent
        root = buffer if parent == NONE else parent
        have = self.buffers[root]
        self.buffers[root] = replace(have, pad=max(have.pad, pixels))

    def materialise(self, feature: Feature, act: int = LINEAR) -> int:
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
        program = Program(
            tuple(self.inputs), keypoints, tuple(self.buffers), tuple(self.steps), self.bfloat16
        )
        return program.text()


def biased(kernel: Tensor, bias: Tensor, feature: Feature) -> Tensor:
    """The bias of a convolution that is composed with the feature's, (O), or (4, O) as `Conv` takes
    it where padding lies on the feature and not on its buffer."""
    if feature.bias is None:
        return bias
    if kernel.dim() == 2:
        return bias + kernel @ feature.bias
    share = torch.einsum("oikl,i->okl", kernel, feature.bias)
    terms = [share, share[:, :, 1:], share[:, 1:], share[:, 1:, 1:]]
    return torch.stack([bias + term.sum((1, 2)) for term in terms])
