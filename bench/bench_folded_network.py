"""A whole PoseNet in evaluation mode as one call: against the model, and OpenVINO in float32.

OpenVINO runs the folded network, not the model: normalisations, α and β are multiplied in for it
too, and only the code that computes the convolutions differs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import harness
import pytest
import torch
from torch import Tensor

from pnfs.config import load_config
from pnfs.costs import count_costs
from pnfs.folding import FoldedPoseNet, fold
from pnfs.kernels import use_backend
from pnfs.model import build_model

SIZE = (256, 192)


def openvino_call(folded: FoldedPoseNet, images: Tensor) -> Callable[[], Tensor]:
    """The reference of the folded network on OpenVINO, with as many threads as torch."""
    openvino = pytest.importorskip("openvino")
    with torch.no_grad(), use_backend("torch"):
        graph = openvino.convert_model(folded, example_input=images, input=list(images.shape))
    options = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": "f32",
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
    }
    request = openvino.Core().compile_model(graph, "CPU", options).create_infer_request()
    array = images.numpy()
    return lambda: torch.from_numpy(request.infer([array])[0])


@pytest.mark.parametrize("contestant", ["torch", "openvino"])
@pytest.mark.parametrize("batch", [1, 8])
@pytest.mark.parametrize(("backend", "device"), harness.backends("folded_network"))
def bench_folded_network(
    measure: Any, backend: str, device: str, batch: int, contestant: str
) -> None:
    torch.manual_seed(0)
    model = build_model(load_config("ours-1").model).eval()
    folded, images = fold(model), torch.randn(batch, 3, *SIZE)
    with torch.inference_mode(), use_backend("torch"):
        want = fold(model.double())(images.double())
        model.float()
    costs = count_costs(folded, SIZE, batch)
    if contestant == "openvino":
        other = openvino_call(folded, images)
    else:
        last = images.contiguous(memory_format=torch.channels_last)
        other = harness.on_backend("torch", lambda: model(last))
    with torch.inference_mode():
        measure(
            harness.Case(
                op="folded_network",
                name=f"ours-1 {batch}x3x{SIZE[0]}x{SIZE[1]} float32, {contestant}",
                backend=backend,
                device=device,
                call=harness.on_backend(backend, lambda: folded(images)),
                want=want,
                tolerance=1e-5,
                bytes=costs.bytes,
                flops=2 * batch * costs.conv_macs,
                against={contestant: other},
            )
        )
