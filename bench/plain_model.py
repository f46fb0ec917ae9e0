"""PoseNet on MobileNetV2 as plain PyTorch modules: what the whole-model benchmarks compare with.

One module per layer, per cell and per part, in the published code's order; no kernel of ours. It is
lean where that costs no meaning: `zero` is not computed, scores are joined by one `cat`, the loss
is one expression. Weights come from our model, so that both give the same scores.
"""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.fusion import fuse_conv_bn_eval

from pnfs.backbones.mobilenet_v2 import SETTINGS, STEM_CHANNELS, TAPS
from pnfs.model import PoseNet
from pnfs.topology import CellRow, Topology


def conv_bn_relu6(inputs: int, outputs: int, kernel: int, stride: int, groups: int) -> list[Any]:
    conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
    return [conv, nn.BatchNorm2d(outputs), nn.ReLU6(inplace=True)]


class PlainBlock(nn.Module):
    """An inverted residual of MobileNetV2."""

    def __init__(self, inputs: int, outputs: int, stride: int, expansion: int) -> None:
        super().__init__()
        self.residual = stride == 1 and inputs == outputs
        hidden = inputs * expansion
        expand = conv_bn_relu6(inputs, hidden, 1, 1, 1) if expansion != 1 else []
        self.conv = nn.Sequential(
            *expand,
            *conv_bn_relu6(hidden, hidden, 3, stride, hidden),
            nn.Conv2d(hidden, outputs, 1, bias=False),
            nn.BatchNorm2d(outputs),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x) if self.residual else self.conv(x)


class PlainMobileNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        blocks: list[nn.Module] = [nn.Sequential(*conv_bn_relu6(3, STEM_CHANNELS, 3, 2, 1))]
        inputs = STEM_CHANNELS
        for expansion, outputs, repeats, stride in SETTINGS:
            for repeat in range(repeats):
                blocks.append(PlainBlock(inputs, outputs, 1 if repeat else stride, expansion))
                inputs = outputs
        self.features = nn.Sequential(*blocks)

    def forward(self, x: Tensor) -> list[Tensor]:
        pyramid = []
        for index, block in enumerate(self.features):
            x = block(x)
            if index in TAPS:
                pyramid.append(x)
        return pyramid


def separable(channels: int, count: int, dilation: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for _ in range(count):
        layers += [
            nn.Conv2d(channels, channels, 3, 1, dilation, dilation, groups=channels, bias=False),
            nn.Conv2d(channels, channels, 1, bias=False),
            nn.BatchNorm2d(channels, affine=False),
            nn.ReLU(),
        ]
    return nn.Sequential(*layers)


OPERATIONS: dict[str, Callable[[int], nn.Module]] = {
    "skip": lambda channels: nn.Identity(),
    "separable": lambda channels: separable(channels, count=2, dilation=1),
    "atrous": lambda channels: separable(channels, count=1, dilation=2),
}


class PlainEdge(nn.Module):
    """A mixed operation (Eq. 1), scaled by the number of operations."""

    def __init__(self, names: tuple[str, ...], channels: int) -> None:
        super().__init__()
        self.names = names
        self.operations = nn.ModuleDict(
            {name: OPERATIONS[name](channels) for name in names if name != "zero"}
        )

    def forward(self, x: Tensor, alpha_O: Tensor) -> Tensor:
        terms = [
            alpha_O[self.names.index(name)] * operation(x)
            for name, operation in self.operations.items()
        ]
        return len(self.names) * cast(Tensor, sum(terms))


class PlainInput(nn.Sequential):
    """How one neighbour's output reaches a cell (Eq. 2)."""

    def __init__(self, transform: str, channels: int) -> None:
        conv = {
            "same": lambda: [],
            "down": lambda: [nn.Conv2d(channels // 2, channels, 3, 2, 1)],
            "up": lambda: [nn.Conv2d(channels * 2, channels, 1)],
        }[transform]()
        super().__init__(*conv, *(nn.BatchNorm2d(channels) for _ in conv))
        self.up = transform == "up"

    def forward(self, x: Tensor) -> Tensor:
        x = super().forward(x)
        if not self.up:
            return x
        return F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=True)


class PlainCell(nn.Module):
    """A cell (Eq. 3)."""

    def __init__(self, row: CellRow, topology: Topology) -> None:
        super().__init__()
        self.sources = [source.source for source in row.inputs]
        self.edge_rows = topology.edges
        self.inputs = nn.ModuleList(
            PlainInput(source.transform, row.channels) for source in row.inputs
        )
        self.edges = nn.ModuleList(
            PlainEdge(topology.operations, row.channels) for _ in topology.edges
        )
        self.output = nn.Conv2d(row.channels * topology.hidden, row.channels, 1)
        self.hidden = topology.hidden

    def forward(
        self, maps: Mapping[tuple[int, int], Tensor], alpha_EO: Tensor, beta_3: Tensor
    ) -> Tensor:
        inputs = [
            beta_3[slot] * transform(maps[source])
            for slot, (transform, source) in enumerate(zip(self.inputs, self.sources, strict=True))
        ]
        nodes = [F.relu(3 * cast(Tensor, sum(inputs)))]
        for target in range(1, self.hidden + 1):
            terms = [
                edge(nodes[row.source], alpha_EO[row.alpha_row])
                for row, edge in zip(self.edge_rows, self.edges, strict=True)
                if row.target == target
            ]
            nodes.append(cast(Tensor, sum(terms)))
        return self.output(torch.cat(nodes[1:], dim=1))


class PlainFabric(nn.Module):
    """The fabric of one part."""

    def __init__(self, topology: Topology, in_channels: tuple[int, ...]) -> None:
        super().__init__()
        self.topology = topology
        self.alpha = nn.Parameter(torch.zeros(len(topology.edges), len(topology.operations)))
        self.beta = nn.Parameter(torch.zeros(len(topology.cells), 3))
        self.reduce = nn.ModuleList(
            nn.Conv2d(channels, topology.channels_at(level), 1)
            for level, channels in enumerate(in_channels)
        )
        self.cells = nn.ModuleDict({row.name: PlainCell(row, topology) for row in topology.cells})

    def forward(self, pyramid: list[Tensor]) -> Tensor:
        table = self.topology
        maps = {
            (table.input_layer, level): reduce(x)
            for level, (reduce, x) in enumerate(zip(self.reduce, pyramid, strict=True))
        }
        alpha, beta = self.alpha.softmax(-1), self.beta.softmax(-1)
        for row in table.cells:
            maps[row.layer, row.level] = self.cells[row.name](maps, alpha, beta[row.beta_row])
        last = table.output_cells[0]
        return maps[last.layer, last.level]


class PlainPoseNet(nn.Module):
    """Images (N, 3, H, W) → scores (N, K, H/4, W/4)."""

    order: Tensor

    def __init__(self, model: PoseNet) -> None:
        """With the weights of `model`: MobileNetV2, profile posenfs, disjoint parts."""
        super().__init__()
        config, fabric = model.config, model.fabric
        assert config.backbone == "mobilenet_v2" and config.fabric.profile == "posenfs"
        parts = list(config.part_table.values())
        keypoints = [k for part in parts for k in part]
        assert sorted(keypoints) == list(range(config.skeleton_table.num_keypoints))
        self.vector_dim = config.vector_dim
        self.backbone = PlainMobileNet()
        self.fabrics = nn.ModuleList(
            PlainFabric(fabric.topology, model.backbone.channels) for _ in parts
        )
        self.head = nn.ModuleList(
            nn.Conv2d(fabric.topology.channels_at(0), len(part) * self.vector_dim, 1)
            for part in parts
        )
        self.register_buffer("order", torch.tensor(keypoints).argsort())
        self.load_state_dict(self._weights_of(model))

    def _weights_of(self, model: PoseNet) -> dict[str, Tensor]:
        theirs, state = model.state_dict(), self.state_dict()
        for key in state:
            if key.startswith("fabrics."):
                _, part, rest = key.split(".", 2)
                # a statistic that the model need not keep
                if not key.endswith("num_batches_tracked"):
                    state[key] = theirs[f"fabric.{rest}"][int(part)]
            elif key.startswith("head."):
                state[key] = theirs[key.replace("head.", "head.convs.")]
            elif key != "order":
                state[key] = theirs[key]
        return state

    def forward(self, images: Tensor) -> Tensor:
        pyramid = self.backbone(images)
        scores = []
        for fabric, conv in zip(self.fabrics, self.head, strict=True):
            vectors = conv(F.relu(fabric(pyramid))).unflatten(1, (-1, self.vector_dim))
            squared = vectors.square().sum(2)
            scores.append(squared / (1 + squared))
        return torch.cat(scores, dim=1)[:, self.order]


def heatmap_mse(scores: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
    """The training loss from target maps, as a data loader brings them (N, K, h, w)."""
    return 0.5 * (weights[:, :, None, None] * (scores - targets).square()).mean()


def folded(model: nn.Module) -> nn.Module:
    """A copy in evaluation mode with every batch normalisation folded into its convolution."""
    model = copy.deepcopy(model).eval()
    for module in model.modules():
        if not isinstance(module, nn.Sequential):
            continue
        for i in range(len(module) - 1):
            conv, norm = module[i], module[i + 1]
            if isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
                if norm.weight is None:
                    norm.weight = nn.Parameter(torch.ones_like(norm.running_mean))
                    norm.bias = nn.Parameter(torch.zeros_like(norm.running_mean))
                module[i], module[i + 1] = fuse_conv_bn_eval(conv, norm), nn.Identity()
    return model


def missing(*packages: str) -> str | None:
    """Why a runtime cannot be compared with, or None."""
    absent = [package for package in packages if importlib.util.find_spec(package) is None]
    return f"{', '.join(absent)} not installed" if absent else None


def onnx_bytes(model: nn.Module, images: Tensor) -> bytes:
    """The folded model as ONNX, for the shape of `images`."""
    import io

    buffer = io.BytesIO()
    torch.onnx.export(folded(model), (images,), buffer, dynamo=False, opset_version=17)
    return buffer.getvalue()


def in_onnxruntime(onnx: bytes, images: Tensor) -> Callable[[], Tensor]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(onnx, options, providers=["CPUExecutionProvider"])
    feed = {session.get_inputs()[0].name: images.contiguous().numpy()}
    return lambda: torch.from_numpy(session.run(None, feed)[0])


def in_openvino(onnx: bytes, images: Tensor, precision: str = "f32") -> Callable[[], Tensor]:
    import io

    import openvino

    core = openvino.Core()
    settings = {
        "INFERENCE_PRECISION_HINT": precision,
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "PERFORMANCE_HINT": "LATENCY",
    }
    compiled = core.compile_model(core.read_model(io.BytesIO(onnx)), "CPU", settings)
    request, feed = compiled.create_infer_request(), images.contiguous().numpy()
    # one copy of the scores, as the other ways return a tensor of their own
    return lambda: torch.from_numpy(request.infer([feed])[0].copy())
