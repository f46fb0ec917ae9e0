"""Backbones folded: MobileNetV2 and the fabric's stem as steps, others as fused modules."""

from __future__ import annotations

import copy
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.fusion import fuse_conv_bn_eval

from pnfs.backbones.mobilenet_v2 import TAPS, InvertedResidual, MobileNetV2
from pnfs.backbones.norm import BatchNormAct2d
from pnfs.folding.writer import Feature, Writer
from pnfs.kernels.folded_program import LINEAR, RELU, RELU6


def conv_bn(conv: nn.Module, norm: nn.Module | None = None) -> tuple[Tensor, Tensor]:
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


def write_mobilenet(writer: Writer, backbone: MobileNetV2) -> list[int]:
    """The buffers of the pyramid."""
    stem = cast(nn.Sequential, backbone.features[0])
    weight, bias = conv_bn(stem[0], stem[1])
    level = 1
    x = writer.load(0, 3)
    out = writer.buffer(level, len(weight))
    writer.conv(x, out, weight, bias, stride=2, act=RELU6)
    x, taps = out, []
    for index, block in enumerate([*backbone.features][1:], start=1):
        conv = cast(InvertedResidual, block).conv
        expand = None
        if len(conv) == 8:
            matrix, bias = conv_bn(conv[0], conv[1])
            expand = (matrix.flatten(1), bias, RELU6)
        depthwise = cast(nn.Conv2d, conv[-5])
        kernel, kernel_bias = conv_bn(depthwise, conv[-4])
        matrix, bias = conv_bn(conv[-2], conv[-1])
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


def write_stem(writer: Writer, stem: nn.Sequential) -> Feature:
    """A fabric's stem, up to its last, linear convolution."""
    x = writer.load(0, 3)
    for level, first in ((1, 0), (2, 2)):
        weight, bias = conv_bn(stem[first], stem[first + 1])
        out = writer.buffer(level, len(weight))
        writer.conv(x, out, weight, bias, stride=2, act=LINEAR if level == 1 else RELU)
        x = out
    weight, bias = conv_bn(stem[5])
    return Feature(x, weight.flatten(1), bias)


class ResidualAct(nn.Module):
    """What a `BatchNormAct2d` does beside normalising: plus a residual → activation."""

    def __init__(self, activation: str) -> None:
        super().__init__()
        self.activation = activation

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """(N, C, H, W), and a residual of the same shape → the same."""
        y = x if residual is None else x + residual
        if self.activation == "relu":
            return F.relu(y)
        return F.relu6(y) if self.activation == "relu6" else y


def fused_backbone(backbone: nn.Module) -> nn.Module:
    """A copy with batch normalisations multiplied into the convolutions before them."""
    fused = copy.deepcopy(backbone).eval()
    for parameter in fused.parameters():
        parameter.requires_grad_(False)
    for module in [*fused.modules()]:
        previous: tuple[str, nn.Module] | None = None
        for name, child in [*module.named_children()]:
            if isinstance(child, BatchNormAct2d) and previous is not None:
                conv = previous[1]
                if isinstance(conv, nn.Conv2d) and conv.out_channels == child.num_features:
                    setattr(module, previous[0], fuse_conv_bn_eval(conv, child))
                    setattr(module, name, ResidualAct(child.activation))
            previous = (name, child)
    return cast(Any, fused).to(memory_format=torch.channels_last)
