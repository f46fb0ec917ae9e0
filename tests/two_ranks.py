"""Run by torchrun: gradients and running statistics of two ranks against one with all the data.

Float64, so that only the mathematics counts: in float32 the deep chain of batch normalisations
magnifies rounding to 1e-3 in gradients that nearly cancel.
"""

from __future__ import annotations

import copy
import sys
from pathlib import Path

import torch
from runs import small_config

from pnfs import distributed
from pnfs.model import build_model
from pnfs.search import build_strategy
from pnfs.steps import PoseLoss, Stepper


def main() -> None:
    device = distributed.join(torch.device("cpu"))
    config = small_config(Path("unused"), f"search.strategy={sys.argv[1]}")
    torch.manual_seed(0)
    model = build_model(config.model).double()
    alone = copy.deepcopy(model)
    images = torch.randn(8, 3, *config.model.input_size, dtype=torch.float64)
    joints = torch.rand(8, 17, 2, dtype=torch.float64) * 64
    weights = (torch.rand(8, 17, dtype=torch.float64) > 0.3).double()

    torch.set_default_dtype(torch.float64)
    stepper = Stepper(config, model, build_strategy(config), device)
    stepper.connect()
    own = slice(4 * distributed.rank(), 4 * distributed.rank() + 4)
    stepper.loss_module(images[own], joints[own], weights[own]).backward()

    build_strategy(config).prepare(alone)
    PoseLoss(alone, config.data.sigma)(images, joints, weights).backward()
    for (name, ours), theirs in zip(model.named_parameters(), alone.parameters(), strict=True):
        assert (ours.grad is None) == (theirs.grad is None), name
        if ours.grad is not None and theirs.grad is not None:
            assert torch.allclose(ours.grad, theirs.grad, rtol=1e-8, atol=1e-14), name
    for (name, ours), theirs in zip(model.named_buffers(), alone.buffers(), strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-10, atol=1e-12), name
    distributed.leave()


if __name__ == "__main__":
    main()
