"""Training steps and evaluation of whole networks on one device, beside what users would run.

    python bench/whole_models.py --out rows.jsonl [--compiled] [--dry-run]

A row per case is written as soon as it is measured; a case that fails is a row with its reason.
`bench/gpu.py` runs this. Ways: "reference", the network as plain PyTorch (`plain_model.py`; where
that has none, our modules on the reference ops), the same in a CUDA graph, what torch.compile makes
of it, and ours without the graph.
"""

from __future__ import annotations

import argparse
import copy
import gc
import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import harness
import timing
import torch
from plain_model import PlainPoseNet, heatmap_mse
from torch import Tensor, nn

import pnfs
from pnfs import kernels
from pnfs.capture import Captured, recorder_for
from pnfs.config import Config
from pnfs.data import Batch
from pnfs.folding import for_evaluation
from pnfs.head import pose_loss, render_targets
from pnfs.kernels.triton import tuning
from pnfs.search import build_strategy
from pnfs.steps import PRECISIONS, Stepper

TOLERANCES = {"fp32": 1e-5, "tf32": 1e-2, "bf16": 5e-2}  # of loss and scores, relative
ROUNDS = 7


@dataclass(frozen=True)
class Case:
    """One line of the table."""

    preset: str
    size: tuple[int, int]
    batch: int
    precision: str  # fp32, tf32 or bf16
    training: bool

    def __str__(self) -> str:
        height, width = self.size
        return f"{self.preset} {height}x{width} batch {self.batch} {self.precision}"


def cases(dry: bool, compiled: bool) -> Iterator[Case]:
    """In order of importance: time may end before the list does."""
    if dry:
        for precision, training in itertools.product(("fp32", "bf16"), (True, False)):
            yield Case("ours-1", (64, 64), 2, precision, training)
        return
    sizes = {"ours-1": [(256, 192), (384, 288)], "ours-3": [(384, 288)]}
    if compiled:  # minutes each
        for precision, training in itertools.product(("bf16", "fp32"), (True, False)):
            yield Case("ours-1", (256, 192), 128, precision, training)
        return
    for of_training, of_evaluation in ((24, 1), (128, 24), (512, 128)):
        for precision in ("fp32", "tf32", "bf16"):
            yield Case("ours-1", (256, 192), of_training, precision, True)
        for precision in ("fp32", "bf16"):
            yield Case("ours-1", (256, 192), of_evaluation, precision, False)
    for preset, size in (("ours-1", sizes["ours-1"][1]), ("ours-3", sizes["ours-3"][0])):
        for training, precision in itertools.product((True, False), ("fp32", "bf16")):
            yield Case(preset, size, 24 if training else 1, precision, training)


class Ways:
    """The networks and inputs of one case, and the ways to run them. All start from one state."""

    def __init__(self, case: Case, device: torch.device) -> None:
        self.case, self.device = case, device
        precision = "bf16" if case.precision == "bf16" else "fp32"
        self.dtype = PRECISIONS[precision]
        settings = [f"model.input_size={list(case.size)}", f"train.precision={precision}"]
        self.config: Config = pnfs.load_config(case.preset, settings)
        torch.manual_seed(0)
        self.model = pnfs.build_model(self.config.model).to(device).train(case.training)
        with torch.no_grad():  # scores that are not all near 0
            for conv in self.model.head.convs:
                conv.weight.mul_(5)
        count, keypoints = case.batch, self.config.model.skeleton_table.num_keypoints
        height, width = case.size
        generator = torch.Generator().manual_seed(1)
        joints = torch.rand(count, keypoints, 2, generator=generator)
        joints *= torch.tensor([width, height])
        pixels = torch.randint(0, 256, (count * height * width * 3,), generator=generator)
        self.batch = Batch(
            pixels=pixels.to(torch.uint8),
            offsets=torch.arange(count) * height * width * 3,
            sizes=torch.tensor([[height, width]] * count, dtype=torch.int32),
            matrices=torch.eye(2, 3).repeat(count, 1, 1),
            flips=torch.zeros(count, dtype=torch.bool),
            joints=joints,
            weights=torch.ones(count, keypoints),
            to_image=torch.eye(2, 3, dtype=torch.float64).repeat(count, 1, 1),
            indices=torch.arange(count),
        ).to(device)
        self.images = self.batch.images(size=case.size, dtype=torch.float32)

    def autocast(self) -> Any:
        enabled = self.dtype != torch.float32
        return torch.autocast(self.device.type, self.dtype) if enabled else nullcontext()

    # -- ours --------------------------------------------------------------------------------------

    def ours(self, graph: bool) -> Callable[[], Any]:
        model = copy.deepcopy(self.model)
        if not self.case.training:
            if not graph:
                return lambda: self._scores(model)
            network = for_evaluation(model, self.device, self.config.train.precision)
            return lambda: self._scores(network)
        train = self.config.train.model_copy(update={"cuda_graph": graph})
        config = self.config.model_copy(update={"train": train})
        stepper = Stepper(config, model, build_strategy(config), self.device)
        batches = itertools.repeat(self.batch)
        return lambda: stepper.step(batches, 1, index=0, total=1, learning_rate=1e-5)

    def _scores(self, network: Callable[[Tensor], Tensor]) -> Tensor:
        with torch.no_grad(), self.autocast():
            return network(self.images)

    # -- what users would run ----------------------------------------------------------------------

    def reference(self, *, compiled: bool = False, graph: bool = False) -> Callable[[], Any]:
        model = copy.deepcopy(self.model)
        plain = self.config.model.backbone == "mobilenet_v2"
        network: nn.Module = PlainPoseNet(model).to(self.device) if plain else model
        network = network.train(self.case.training).to(memory_format=torch.channels_last)
        run = torch.compile(network, dynamic=False) if compiled else network

        def scores(images: Tensor) -> tuple[Tensor]:
            with torch.no_grad(), self.autocast():
                return (run(images),)

        work = self._step(network, run) if self.case.training else scores
        if graph:
            work = Captured(work, recorder_for(self.device))

        def call() -> Any:
            with nullcontext() if plain else kernels.use_backend("torch"):
                return work(self.images)[0]

        return call

    def _step(self, network: nn.Module, run: Any) -> Callable[[Tensor], tuple[Tensor]]:
        height, width = self.case.size
        targets = render_targets(self.batch.joints, (height // 4, width // 4), sigma=2.0)
        on_gpu = self.device.type == "cuda"
        adam = torch.optim.Adam(network.parameters(), lr=1e-5, fused=True, capturable=on_gpu)

        def step(images: Tensor) -> tuple[Tensor]:
            adam.zero_grad(set_to_none=True)
            with self.autocast():
                loss = heatmap_mse(run(images).float(), targets, self.batch.weights)
            loss.backward()
            adam.step()
            return (loss.detach(),)

        return step

    # -- is it right? ------------------------------------------------------------------------------

    def check(self) -> float:
        """Relative error of our loss, or scores, on the first two samples against float64.

        Raises:
            AssertionError: it is larger than the precision explains.
        """
        images, joints = self.images[:2], self.batch.joints[:2]
        weights = self.batch.weights[:2]

        def outcome(model: nn.Module, images: Tensor) -> Tensor:
            if not self.case.training:
                return model(images)
            return pose_loss(model, images, joints, weights, sigma=2.0)

        with torch.no_grad(), kernels.use_backend("torch"):
            want = outcome(copy.deepcopy(self.model).double(), images.double())
        with torch.no_grad(), self.autocast():
            have = outcome(copy.deepcopy(self.model), images)
        error = harness.distance_of(have, want)
        allowed = TOLERANCES[self.case.precision]
        assert error <= allowed, f"wrong by {error:.3g}, allowed is {allowed:.3g}; no speed"
        return error


@contextmanager
def products_in(precision: str) -> Iterator[None]:
    """float32 matrix products as they are, or through TF32."""
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32
    matmul.allow_tf32 = cudnn.allow_tf32 = precision == "tf32"
    try:
        yield
    finally:
        matmul.allow_tf32, cudnn.allow_tf32 = before


def measured(call: Callable[[], Any], device: torch.device) -> tuple[timing.Round, float | None]:
    """A round of `call` after its warm-up, and its peak memory in MiB on a GPU."""
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    for _ in range(5):  # a graph is recorded after three calls
        call()
    round_ = timing.repeated(call, device.type)
    return round_, torch.cuda.max_memory_allocated() / 2**20 if on_gpu else None


def measure(case: Case, device: torch.device, compiled: bool) -> dict[str, Any]:
    """A row of the results."""
    with products_in(case.precision):
        ways = Ways(case, device)
        error = ways.check()
        makers: dict[str, Callable[[], Callable[[], Any]]] = {"ours": lambda: ways.ours(True)}
        if compiled:
            makers["compile"] = lambda: ways.reference(compiled=True)
        else:
            makers["reference"] = ways.reference
            makers["ours without graph"] = lambda: ways.ours(False)
            if device.type == "cuda":
                makers["reference in a graph"] = lambda: ways.reference(graph=True)
        times: dict[str, list[float]] = {}
        peaks: dict[str, float] = {}
        problems: dict[str, str] = {}
        for name, make in makers.items():  # one at a time: each has the memory to itself
            try:
                round_, peak = measured(make(), device)
                times[name] = [round_.run() for _ in range(ROUNDS)]
                if peak is not None:
                    peaks[name] = peak
            except Exception as problem:
                if name == "ours":
                    raise
                problems[name] = str(problem).splitlines()[0]
            release()
    costs = pnfs.count_costs(
        ways.model,
        case.size,
        case.batch,
        "train" if case.training else "eval",
        device=device.type,
    )
    own = statistics.median(times["ours"])
    others = {name: seconds for name, seconds in times.items() if name != "ours"}
    return {
        "op": "training step" if case.training else "evaluation",
        "case": str(case),
        "backend": "auto",
        "device": device.type,
        "time": asdict(timing.spread(times["ours"])),
        "error": error,
        "images": case.batch,
        "bytes": costs.bytes,
        "flops": (6 if case.training else 2) * costs.conv_macs * case.batch,
        "launches": costs.launches,
        "peaks": peaks,
        "against": {name: asdict(timing.spread(seconds)) for name, seconds in others.items()},
        "ratio": {name: statistics.median(seconds) / own for name, seconds in others.items()},
        "skipped": problems,
    }


def tuned_as_in(path: Path | None) -> Any:
    """A context in which Triton kernels run as a file has chosen; nothing is measured."""
    return nullcontext() if path is None else tuning.tuned(tuning.Tuner(path, budget=0))


def release() -> None:
    """Give back what a way held."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--compiled", action="store_true", help="torch.compile, minutes a case")
    parser.add_argument("--dry-run", action="store_true", help="on the CPU, with small shapes")
    parser.add_argument("--seconds", type=float, default=1e9, help="start no case after this")
    parser.add_argument("--tuned", type=Path, help="kernels.json, with the choices of kernels")
    options = parser.parse_args()
    device = torch.device("cpu" if options.dry_run else "cuda")
    end = time.monotonic() + options.seconds
    if options.dry_run and options.compiled:
        print("torch.compile takes minutes: not in a dry run")
        return
    roofs = timing.measure_roofs(device.type)
    failed = False
    with open(options.out, "w", encoding="utf-8") as file, tuned_as_in(options.tuned):
        for case in cases(options.dry_run, options.compiled):
            kind = "training step" if case.training else "evaluation"
            if time.monotonic() > end:
                row: dict[str, Any] = {"op": kind, "case": str(case), "failed": "no time was left"}
            else:
                try:
                    row = measure(case, device, options.compiled)
                    seconds = row["time"]["median_us"] / 1e6
                    row |= timing.rates(row["bytes"], row["flops"], seconds, roofs)
                except Exception as problem:
                    failed = True
                    row = {"op": kind, "case": str(case), "failed": str(problem)[:500]}
                    release()
            print(json.dumps(row), flush=True)
            file.write(json.dumps(row) + "\n")
            file.flush()
    sys.exit(failed)


if __name__ == "__main__":
    main()
