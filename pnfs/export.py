"""Models as files that other runtimes read: ONNX, and torch.export's programs.

What is written is the evaluation mode in plain operators: normalisations, α and β are multiplied
into convolutions (see `pnfs.folding`), what no score depends on is left out, and the file needs
nothing of this package. It is compared with the model, run, before it gets its name.

Images (N, 3, H, W), N free, H and W those of the configuration → scores (N, K, H/4, W/4).
"""

from __future__ import annotations

import copy
import io
import json
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

import pnfs
from pnfs.config import EvalProfile, ModelConfig
from pnfs.data.transforms import MEAN, STD
from pnfs.errors import PnfsError
from pnfs.folding import fold
from pnfs.folding.backbones import fused_backbone
from pnfs.kernels import use_backend
from pnfs.kernels.folded_network import run_program, step_tensors
from pnfs.kernels.folded_program import parse
from pnfs.model import PoseNet
from pnfs.statefile import check_file, write_atomically

OPSET = 17
ERROR_LIMIT = 1e-4  # of scores, relative to the largest where that is over 1
INPUT, OUTPUT = "images", "scores"


@dataclass(frozen=True)
class ExportReport:
    """What was written and how near it is to the model.

    Attributes:
        path: the file.
        bytes: its size.
        error: largest |score - the float64 model's|, divided by the largest score where that is
            over 1; at most 1e-4.
        batches: batch sizes that it was run with.
    """

    path: Path
    bytes: int
    error: float
    batches: tuple[int, ...]

    def text(self) -> str:
        counts = " and ".join(map(str, self.batches))
        return (
            f"{self.path}: {self.bytes / 1e6:.1f} MB, checked in batches of {counts}: scores "
            f"differ from the model's by up to {self.error:.2g}"
        )


class _PlainProgram(nn.Module):
    """A folded model's program in plain torch functions, its tensors as buffers."""

    def __init__(self, model: PoseNet, size: tuple[int, int]) -> None:
        super().__init__()
        folded = fold(model)
        self.backbone = folded.backbone
        self.program = parse(folded.program)
        shift = self.program.inputs[0]
        first = size[0] >> shift, size[1] >> shift
        self.names: list[dict[str, str]] = []
        for i, step in enumerate(self.program.steps):
            names = {}
            for name, tensor in step_tensors(self.program, step, folded.weights, first).items():
                if name in ("pre_scale", "post_scale") and tensor == 1:
                    continue
                names[name] = f"step{i}_{name}"
                self.register_buffer(names[name], tensor.detach().clone().contiguous())
            self.names.append(names)

    def forward(self, images: Tensor) -> Tensor:
        maps = [images] if self.backbone is None else list(self.backbone(images))
        own = [{name: getattr(self, key) for name, key in n.items()} for n in self.names]
        return run_program(self.program, maps, own)


def plain_module(model: nn.Module) -> nn.Module:
    """The evaluation mode of `model` for its configured input size, ready to be traced under
    `use_backend("torch")`. It shares no memory with `model`, which stays as it is.

    Raises:
        PnfsError: not a model of this package.
    """
    config = getattr(model, "config", None)
    if not isinstance(config, ModelConfig):
        raise PnfsError(
            f"export: {type(model).__name__} has no `config`; build it with pnfs.build_model or "
            "load it with pnfs.load_model"
        )
    if isinstance(model, PoseNet):
        plain: nn.Module = _PlainProgram(copy.deepcopy(model).cpu().float(), config.input_size)
    else:
        plain = fused_backbone(copy.deepcopy(model).cpu().float())
    return plain.eval().requires_grad_(False)


def export_onnx(
    model: nn.Module,
    path: str | Path,
    images: Tensor | None = None,
    *,
    profile: EvalProfile = "standard",
    source: str | None = None,
) -> ExportReport:
    """Write `model` as ONNX (opset 17) and check it with ONNX Runtime.

    The file's metadata say how images are prepared (order of colours, mean, deviation), the names
    of the keypoints, the parts, the configuration of the model and where it comes from.

    Args:
        model: from `build_model` or `load_model`; it is not changed.
        path: the file.
        images: (N, 3, H, W) normalised network input to check with; random by default, real ones
            tell more.
        profile: of the colours that the model was trained with.
        source: the run.

    Raises:
        PnfsError: onnx or onnxruntime is missing, the file cannot be written (seen before the
            work), or its scores differ from the model's (nothing is written then).
    """
    onnx = _package("onnx", "--onnx")
    runtime = _package("onnxruntime", "--onnx")
    check_file(Path(path))
    plain, images = plain_module(model), _inputs(model, images)
    buffer = io.BytesIO()
    with warnings.catch_warnings(), use_backend("torch"):
        # The exporter through TorchScript is deprecated; the other one needs packages of its own.
        warnings.simplefilter("ignore")
        torch.onnx.export(
            plain,
            (images[:1],),
            cast(Any, buffer),
            dynamo=False,
            opset_version=OPSET,
            input_names=[INPUT],
            output_names=[OUTPUT],
            dynamic_axes={INPUT: {0: "batch"}, OUTPUT: {0: "batch"}},
        )
    proto = onnx.load_model_from_string(buffer.getvalue())
    onnx.helper.set_model_props(proto, _metadata(model, profile, source))
    onnx.checker.check_model(proto)
    content = proto.SerializeToString()

    options = runtime.SessionOptions()
    options.log_severity_level = 3
    session = runtime.InferenceSession(content, options, providers=["CPUExecutionProvider"])

    def run(batch: Tensor) -> Tensor:
        feed = {INPUT: np.ascontiguousarray(batch.numpy())}
        return torch.from_numpy(session.run([OUTPUT], feed)[0])

    return _check_and_write(model, run, images, Path(path), content)


def export_program(
    model: nn.Module, path: str | Path, images: Tensor | None = None
) -> ExportReport:
    """Write `model` as a program of torch.export, which `torch.export.load` reads without pnfs.

    Arguments and errors are those of `export_onnx`.
    """
    check_file(Path(path))
    plain, images = plain_module(model), _inputs(model, images)
    batch = torch.export.Dim("batch")
    example = images if len(images) > 1 else images.repeat(2, 1, 1, 1)  # 1 would be fixed
    buffer = io.BytesIO()
    with warnings.catch_warnings(), use_backend("torch"), torch.no_grad():
        warnings.simplefilter("ignore")  # of torch about itself
        program = torch.export.export(plain, (example,), dynamic_shapes=({0: batch},))
        torch.export.save(program, buffer)
        loaded = torch.export.load(io.BytesIO(buffer.getvalue())).module()

    def run(batch: Tensor) -> Tensor:
        with torch.no_grad():
            return cast(Tensor, loaded(batch))

    return _check_and_write(model, run, images, Path(path), buffer.getvalue())


def _package(name: str, option: str) -> Any:
    try:
        return import_module(name)
    except ImportError:
        raise PnfsError(
            f"{option}: the package {name} is not installed; pip install 'pnfs[export]'"
        ) from None


def _inputs(model: nn.Module, images: Tensor | None) -> Tensor:
    """`images` on the CPU, or random ones; of the model's size."""
    height, width = cast(ModelConfig, model.config).input_size
    if images is None:
        images = torch.randn(2, 3, height, width, generator=torch.Generator().manual_seed(0))
    if images.dim() != 4 or tuple(images.shape[1:]) != (3, height, width) or not len(images):
        raise PnfsError(
            f"export: images are {tuple(images.shape)}; give (N, 3, {height}, {width}), N >= 1"
        )
    return images.detach().float().cpu().contiguous()


def _check_and_write(
    model: nn.Module,
    run: Callable[[Tensor], Tensor],
    images: Tensor,
    path: Path,
    content: bytes,
) -> ExportReport:
    """Compare with the model in float64, in one batch and in a batch of one, then write."""
    exact = copy.deepcopy(model).cpu().double().eval()
    with torch.no_grad(), use_backend("torch"):
        want = exact(images.double())
    size = max(1.0, float(want.abs().max()))
    batches = dict.fromkeys((len(images), 1))
    errors = [float((run(images[:count]) - want[:count]).abs().max()) / size for count in batches]
    error = max(errors)
    if not error <= ERROR_LIMIT:  # NaN too
        raise PnfsError(
            f"{path}: the exported model's scores differ by {error:.3g} from the model's, more "
            f"than {ERROR_LIMIT:g}; nothing was written, please report this"
        )

    def write(temporary: Path) -> None:
        temporary.write_bytes(content)

    write_atomically(path, write)
    return ExportReport(path, len(content), error, tuple(batches))


def _metadata(model: nn.Module, profile: EvalProfile, source: str | None) -> Mapping[str, str]:
    config = cast(ModelConfig, model.config)
    tree: dict[str, Any] = {
        "producer": f"pnfs {pnfs.__version__}",
        "source": source or "",
        "input": "pixels of a person's crop: (value / 255 - mean) / std",
        "colors": "red, green, blue" if profile == "standard" else "blue, green, red",
        "mean": list(MEAN),
        "std": list(STD),
        "output": "scores of the keypoints at 1/4 of the input's size",
        "keypoints": list(config.skeleton_table.keypoints),
        "parts": {name: list(keypoints) for name, keypoints in config.part_table.items()},
        "config": config.model_dump(mode="json"),
    }
    return {k: v if isinstance(v, str) else json.dumps(v) for k, v in tree.items()}
