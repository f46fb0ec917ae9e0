"""Everything that takes a GPU, in one command: build, check, measure; one JSON and one log.

    python bench/gpu.py              # under ten minutes, no network, on a bare machine with a GPU
    python bench/gpu.py --dry-run    # every stage on the CPU with small shapes, in minutes

Each stage is a process of its own with a limit; one that fails or hangs is recorded, and the rest
runs. The JSON is one of those that `bench/report.py` reads; a dry run's is marked and left out.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
BUDGET = 570  # seconds of all stages together
FAREWELL = 3  # seconds of a stage's limit that it has to end by itself
TAIL = 4000  # characters of a stage's output that the JSON keeps
TUNED = "tuned"  # folder of the choices that stage "tuning" leaves
CUDA_OPS = ("crop_normalize", "oks_nms", "depthwise_fanout")


@dataclass(frozen=True)
class Stage:
    """A command and how long it may take.

    missing: why it cannot run here, or None.
    """

    name: str
    command: Sequence[str]
    seconds: float
    missing: str | None = None
    environment: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Outcome:
    """What became of a stage. status: passed, failed, too long, or not run."""

    name: str
    status: str
    seconds: float
    tail: str


def run_stage(stage: Stage, limit: float, log: Any) -> Outcome:
    """Run it in a process group of its own, which is killed at the limit."""
    if stage.missing is not None:
        return Outcome(stage.name, "not run", 0.0, stage.missing)
    limit = min(limit, stage.seconds)
    if limit < 5:
        return Outcome(stage.name, "not run", 0.0, "no time was left")
    log.write(f"\n=== {stage.name}: {' '.join(map(str, stage.command))}\n")
    log.flush()
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    started, start = time.monotonic(), log.tell()
    process = subprocess.Popen(
        list(stage.command),
        cwd=ROOT,
        stdout=log,
        stderr=subprocess.STDOUT,
        start_new_session=True,
        env={**os.environ, "PYTHONPATH": path, **stage.environment},
    )
    try:
        status = "passed" if process.wait(limit - FAREWELL) == 0 else "failed"
    except subprocess.TimeoutExpired:
        status = "too long"
        with contextlib.suppress(ProcessLookupError, subprocess.TimeoutExpired):
            os.killpg(process.pid, signal.SIGINT)  # pytest then says what failed so far
            process.wait(FAREWELL)
    finally:  # a child of a stage that is over keeps the GPU busy
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    log.seek(start)
    tail = log.read()[-TAIL:]
    log.seek(0, os.SEEK_END)
    return Outcome(stage.name, status, round(time.monotonic() - started, 1), tail)


def sanitizer() -> str | None:
    """compute-sanitizer, which comes with the CUDA toolkit."""
    beside = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "bin" / "compute-sanitizer"
    return shutil.which("compute-sanitizer") or (str(beside) if beside.exists() else None)


def stages(dry: bool, folder: Path) -> list[Stage]:
    """In order of importance, after the build: what comes late may find no time left."""
    python, checker = sys.executable, sanitizer()
    pytest = [python, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    dry_flag = ["--dry-run"] if dry else []
    no_checker = "no GPU in a dry run" if dry else None if checker else "no compute-sanitizer"
    kernel_tests = ROOT / "tests" / "kernels"
    checked = [str(path) for op in CUDA_OPS for path in kernel_tests.glob(f"test_{op}*.py")]

    def sanitized(tool: str) -> Stage:
        command = [str(checker), "--tool", tool, "--error-exitcode", "9", *pytest, *checked]
        return Stage(tool, [*command, "-k", "cuda and not cuda-cpu", "-x"], 60, no_checker)

    def models(name: str, seconds: float, *options: str) -> Stage:
        command = [python, "bench/whole_models.py", "--out", str(folder / f"{name}.jsonl")]
        limit = ["--seconds", str(0.9 * seconds)]
        return Stage(name, [*command, *limit, *options, *dry_flag], seconds)

    feeding = [python, "bench/feeding.py", "--out", str(folder / "feeding.jsonl"), *dry_flag]
    build = [python, "setup.py", "-q", "build_ext", "--inplace"]
    tests = ["tests", "-m", "gpu and not slow", "--maxfail=40"]
    alone: dict[str, str] = {}
    if importlib.util.find_spec("xdist"):  # every core compiles kernels
        tests += ["-n", str(min(os.cpu_count() or 1, 12))]
        alone["OMP_NUM_THREADS"] = "1"
    if dry:
        build = [python, "-m", "pnfs.cli", "info"]
        tests = ["tests/kernels/test_batch_stats.py", "tests/test_capture.py", "-k", "not run"]
    benches = ["--results", str(folder), "--benchmark-min-rounds=3"]
    benches += ["--benchmark-disable", "-k", "mixed_sum"] if dry else ["-k", "cuda or triton"]
    tune = [python, "bench/tuning.py", "--out", str(folder / TUNED), "--seconds", "80", *dry_flag]
    tune += ["--batch", "2"] if dry else []
    profile = [python, "bench/step_profile.py", "--out", str(folder / "profile.txt"), *dry_flag]
    repeated = ["--repetitions", "3" if dry else "10000", "--results", str(folder)]
    repeated += ["-k", "mixed_sum" if dry else "cuda or triton"]
    ignored = [
        f"--ignore=bench/{name}.py" for name in ("bench_train", "bench_predict", "bench_loader")
    ]
    return [
        Stage("build", build, 150),
        Stage("kernel tests", [*pytest, *tests], 170, environment=alone),
        Stage("compilation", [*tune, "--compile-only"], 90),
        Stage("profile", profile, 60),
        models("whole models", 150),
        Stage("feeding", feeding, 90),
        Stage("ops", [*pytest, "bench/", *ignored, *benches], 110),
        Stage("tuning", tune, 140),
        Stage("repetitions", [*pytest, "bench/", *ignored, *repeated], 60),
        models("compiled models", 150, "--compiled"),
        sanitized("memcheck"),
        sanitized("racecheck"),
    ]


def run_all(todo: Sequence[Stage], budget: float, log: Any) -> list[Outcome]:
    """Every stage in turn; what is left of the budget bounds each."""
    end, outcomes = time.monotonic() + budget, []
    for stage in todo:
        outcome = run_stage(stage, end - time.monotonic(), log)
        print(f"{outcome.name}: {outcome.status}, {outcome.seconds:.0f} s", flush=True)
        outcomes.append(outcome)
    return outcomes


def gather(folder: Path, outcomes: Sequence[Outcome], dry: bool) -> dict[str, Any]:
    """One result in the form of `records.save`, with the stages and what they wrote as lines."""
    import records
    import timing

    device = "cpu" if dry else "cuda"
    content = records.describe(device, timing.measure_roofs(device))
    rows: list[dict[str, Any]] = []
    for path in sorted(folder.glob("*.json")):
        rows += json.loads(path.read_text(encoding="utf-8"))["results"]
    models = [
        json.loads(line)
        for path in sorted(folder.glob("*.jsonl"), reverse=True)  # whole before compiled
        for line in path.read_text(encoding="utf-8").splitlines()
    ]
    tuned, profile = folder / TUNED / "kernels.json", folder / "profile.txt"
    return {
        **content,
        "dry_run": dry,
        "tuned": json.loads(tuned.read_text(encoding="utf-8")) if tuned.exists() else None,
        "profile": profile.read_text(encoding="utf-8").splitlines() if profile.exists() else None,
        "stages": [asdict(outcome) for outcome in outcomes],
        "failures": [row for row in models if "failed" in row],
        "results": rows + merged([row for row in models if "failed" not in row]),
    }


def merged(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row per case: a later one adds ways (what torch.compile made of it) to the first."""
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for row in rows:
        known = found.setdefault((row["op"], row["case"]), row)
        for key in ("against", "ratio", "peaks"):
            known[key] = {**row[key], **known[key]}
    return list(found.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dry-run", action="store_true", help="on the CPU, with small shapes")
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results")
    parser.add_argument("--seconds", type=float, default=BUDGET, help="of all stages together")
    parser.add_argument("--only", nargs="+", metavar="STAGE", help="run these stages alone")
    options = parser.parse_args()
    import torch

    sys.path.insert(0, str(ROOT / "bench"))
    import records

    dry = options.dry_run
    if not dry and not torch.cuda.is_available():
        parser.error("no CUDA device is visible; --dry-run goes through the stages without one")
    options.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        todo = stages(dry, folder)
        if options.only:
            names = [stage.name for stage in todo]
            if unknown := set(options.only) - set(names):
                parser.error(f"no stage {sorted(unknown)[0]!r}; there are {', '.join(names)}")
            todo = [stage for stage in todo if stage.name in options.only]
        with open(folder / "log", "w+", encoding="utf-8", errors="replace") as log:
            outcomes = run_all(todo, options.seconds, log)
        content = gather(folder, outcomes, dry)
        path = options.out / (("dry-run-" if dry else "") + records.file_name(content))
        path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        shutil.copy(folder / "log", path.with_suffix(".log"))
    print(f"written: {path}, {path.with_suffix('.log')}")


if __name__ == "__main__":
    main()
