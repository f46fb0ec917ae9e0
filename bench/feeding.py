"""Training steps that are fed from JPEG files, with and without the side stream.

    python bench/feeding.py --out row.jsonl [--dry-run]

One row: a step with its loader, where the next batch is copied and normalised beside the step. Ways
beside it: "without side stream", the same on the stream of the step; "step alone", of one batch
that stays on the device; "loader alone", the workers' batches, which nobody uses. A CPU has no side
stream: in a dry run the first two are one. `bench/gpu.py` runs this.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import timing
import torch

import pnfs
from pnfs.data import Batch, load_people, make_loader
from pnfs.data.loader import Loader
from pnfs.data.prefetch import side_for
from pnfs.search import build_strategy
from pnfs.steps import Stepper

ROUNDS = 5
PEOPLE = 20_000  # of an epoch: its end, where the workers start anew, comes seldom


class Feeding:
    """Preset ours-1 and drawn people on disk."""

    def __init__(self, device: torch.device, dry: bool, folder: Path) -> None:
        size, self.batch = ((64, 64), 2) if dry else ((256, 192), 128)
        drawn = {"train_images": 4, "val_images": 1, "image_size": [96, 96]}
        if not dry:
            drawn |= {"train_images": 100, "image_size": [480, 640]}
        workers = 1 if dry else max(1, min(14, (os.cpu_count() or 1) - 2))
        self.device, self.steps = device, 2 if dry else 20
        settings = [
            f"model.input_size={list(size)}", f"train.batch_size={self.batch}",
            f"train.precision={'fp32' if dry else 'bf16'}", f"data.workers={workers}",
            f"data.root={folder}", f"data.synthetic={json.dumps(drawn)}",
        ]  # fmt: skip
        self.config = pnfs.load_config("ours-1", ["data.dataset=synthetic", *settings])
        people = load_people(self.config.data, self.config.model.skeleton_table, "train")
        again = 1 if dry else -(-PEOPLE // len(people.people))
        self.people = replace(people, people=people.people * again)
        torch.manual_seed(0)
        self.model = pnfs.build_model(self.config.model).to(device).train()
        self.stepper = Stepper(self.config, self.model, build_strategy(self.config), device)
        self.case = (
            f"ours-1 {size[0]}x{size[1]} batch {self.batch} {self.config.train.precision}, "
            f"{workers} workers, {drawn['image_size'][1]}x{drawn['image_size'][0]} JPEGs"
        )

    def loader(self, *, beside: bool) -> Loader:
        loader = make_loader(self.people, self.config, train=True)
        prepare = partial(Batch.prepared, device=self.device, **self.stepper.image_settings)
        loader.prefetch(prepare, side_for(self.device) if beside else None)
        return loader

    def check(self) -> None:
        """Batches made ahead are the others, bit for bit.

        Raises:
            AssertionError: one is not.
        """
        loaders = self.loader(beside=True), self.loader(beside=False)
        for ahead, plain in itertools.islice(zip(*loaders, strict=True), 4):
            loaders[0].ahead()
            pairs = zip(self.stepper.inputs(ahead), self.on_device(plain), strict=True)
            assert all(torch.equal(a, b) for a, b in pairs), "a batch made ahead is another one"

    def on_device(self, batch: Batch) -> Any:
        return self.stepper.inputs(batch.to(self.device))

    def step_of(self, batches: Iterator[Batch], ahead: Callable[[], None]) -> Callable[[], Any]:
        return lambda: self.stepper.step(
            batches, 1, index=0, total=1, learning_rate=1e-5, ahead=ahead
        )

    def ways(self) -> Iterator[tuple[str, Callable[[], Any]]]:
        """All train the same model on; what it has learnt by then takes no time."""
        for name, beside in (("ours", True), ("without side stream", False)):
            loader = self.loader(beside=beside)
            yield name, self.step_of(endless(loader), loader.ahead)
        host = next(iter(self.loader(beside=False)))
        yield "step alone", self.step_of(itertools.repeat(host.to(self.device)), lambda: None)
        yield "loader alone", partial(next, endless(self.loader(beside=False)))

    def measure(self) -> dict[str, Any]:
        """The row, but for its rates."""
        self.check()
        times = {name: self.times(call) for name, call in self.ways()}
        own = times.pop("ours")
        median = statistics.median(own)
        size = self.config.model.input_size
        costs = pnfs.count_costs(self.model, size, self.batch, "train", device=self.device.type)
        return {
            "op": "training from files",
            "case": self.case,
            "backend": "auto",
            "device": self.device.type,
            "time": asdict(timing.spread(own)),
            "images": self.batch,
            "bytes": costs.bytes,
            "flops": 6 * costs.conv_macs * self.batch,
            "launches": costs.launches,
            "peaks": {},
            "against": {name: asdict(timing.spread(seconds)) for name, seconds in times.items()},
            "ratio": {name: statistics.median(s) / median for name, s in times.items()},
            "skipped": {},
        }

    def times(self, call: Callable[[], Any]) -> list[float]:
        """Seconds of a call, in rounds so long that the batches that workers had ready before the
        first do not matter."""

        def round_() -> float:
            start = time.perf_counter()
            for _ in range(self.steps):
                call()
            if self.device.type == "cuda":
                torch.cuda.synchronize()
            return (time.perf_counter() - start) / self.steps

        round_()
        round_()
        return [round_() for _ in range(ROUNDS)]


def endless(loader: Loader) -> Iterator[Batch]:
    while True:
        yield from loader


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--dry-run", action="store_true", help="on the CPU, with small shapes")
    options = parser.parse_args()
    device = torch.device("cpu" if options.dry_run else "cuda")
    with tempfile.TemporaryDirectory() as folder:
        row = Feeding(device, options.dry_run, Path(folder)).measure()
    seconds = row["time"]["median_us"] / 1e6
    row |= timing.rates(row["bytes"], row["flops"], seconds, timing.measure_roofs(device.type))
    rates = {"ours": row["time"], **row["against"]}
    for name, spread in rates.items():
        print(f"{name}: {row['images'] * 1e6 / spread['median_us']:.0f} images/s")
    options.out.write_text(json.dumps(row) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
