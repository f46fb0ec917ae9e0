"""The command line: one call per command, one line per error, fast help."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from runs import SETTINGS, assert_same_run, rows_of, small_config

from pnfs.checkpoint import load_model, save_weights
from pnfs.cli import main
from pnfs.commands import data_overrides
from pnfs.config import load_config
from pnfs.errors import PnfsError
from pnfs.runlog import run_config
from pnfs.train import train

COMMANDS = ("demo", "train", "eval", "predict", "plot", "prune", "export", "architecture", "info")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained run; the people lie beside it."""
    folder = tmp_path_factory.mktemp("cli")
    train(small_config(folder / "people", "train.epochs=1"), folder / "run", quiet=True)
    return folder / "run"


def call(*arguments: str) -> int:
    with pytest.raises(SystemExit) as end:
        main(arguments)
    code = end.value.code
    return code if isinstance(code, int) else 0


def options(settings: Sequence[str]) -> list[str]:
    return [word for setting in settings for word in ("--set", setting)]


def one_line_error(capsys: pytest.CaptureFixture[str]) -> str:
    captured = capsys.readouterr().err
    assert captured.startswith("error: ") and captured.count("\n") == 1
    assert "Traceback" not in captured
    return captured


def test_help_is_fast_and_lists_the_commands() -> None:
    command = [sys.executable, "-c", "import sys; from pnfs.cli import main; main(['--help'])"]
    seconds = []
    for _ in range(3):
        started = time.perf_counter()
        shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        seconds.append(time.perf_counter() - started)
    assert all(f"  {name} " in shown for name in COMMANDS)
    check = "import sys, pnfs.cli; print(sorted({'torch', 'cv2', 'numpy'} & set(sys.modules)))"
    loaded = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True)
    assert loaded.stdout.strip() == "[]"
    if os.getloadavg()[0] < (os.cpu_count() or 1):  # else the time is the neighbours'
        assert min(seconds) < 1.0


@pytest.mark.parametrize("name", COMMANDS)
def test_each_command_explains_itself(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(name, "--help") == 0
    shown = capsys.readouterr().out
    assert "Usage: pnfs " + name in shown
    assert name in ("info", "architecture") or "Example" in shown


def test_training_from_the_command_line(run: Path, tmp_path: Path) -> None:
    people = run.parent / "people"
    arguments = ["--preset", "tiny", "--data", f"synthetic={people}", "--strategy", "random"]
    settings = [s for s in SETTINGS if not s.startswith("train.epochs")] + ["train.epochs=1"]
    code = call("train", *arguments, "--out", str(tmp_path / "r"), *options(settings))
    assert code == 0
    config = run_config(tmp_path / "r")
    assert config.search.strategy == "random" and config.preset == "tiny"
    assert config.data.root == str(people.resolve())
    resumed = ("--resume", "--out", str(tmp_path / "r"), "--set", "train.epochs=2")
    assert call("train", *resumed) == 0
    assert [row["epoch"] for row in rows_of(tmp_path / "r", "eval")] == [1, 2]
    assert run_config(tmp_path / "r").train.epochs == 2


def test_without_arguments_the_demo_preset_and_data_are_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pnfs import commands

    calls = []

    class Done:
        stopped_by = None

    monkeypatch.setattr(commands, "train", lambda *a, **k: calls.append((a, k)) or Done())
    call("train")
    (config, out), keywords = calls[0]
    assert config == load_config("tiny") and config.data.dataset == "synthetic"
    assert out == Path("runs/tiny") and not keywords["resume"] and not keywords["overwrite"]


def test_python_dash_m_train_is_the_train_command() -> None:
    command = [sys.executable, "-m", "pnfs.train", "--help"]
    shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "Usage: pnfs train" in shown


def test_evaluation_says_what_it_measured(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call("eval", str(run), "--no-flip", "--profile", "posenfs", "--out", str(tmp_path)) == 0
    shown = capsys.readouterr().out
    for words in ("AP50", "profile: posenfs", "flip test: off", "ground-truth boxes"):
        assert words in shown
    assert "AP" in json.loads((tmp_path / "metrics.json").read_text())["metrics"]
    weights = run / "model.safetensors"
    assert call("eval", str(weights), "--data", f"synthetic={run.parent / 'people'}") == 0
    assert "profile: standard" in capsys.readouterr().out


def test_prediction_draws_and_writes(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    image = next((run.parent / "people" / "images" / "val").glob("*.jpg"))
    assert call("predict", str(run), str(image), "--out", str(tmp_path / "out")) == 0
    assert "1 pose in 1 image" in capsys.readouterr().out
    results = json.loads((tmp_path / "out" / "predictions.json").read_text())
    assert len(results[0]["keypoints"]) == 51
    assert list((tmp_path / "out").glob("*_poses.*"))


def test_a_run_is_pruned_and_the_result_predicts_scores_trains_on_and_resumes(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small = tmp_path / "small"
    assert call("prune", str(run), "--out", str(small), "--threshold", "0.3") == 0
    shown = capsys.readouterr().out
    assert "removal error" in shown and f"run folder: {small}" in shown
    report = json.loads((small / "pruning.json").read_text())
    assert report["removal_error"] <= 1e-6 and report["source"] == str(run)
    assert report["after"]["params"] <= report["before"]["params"]
    assert {"bytes", "launches", "conv_macs"} <= set(report["after"]) and report[
        "seconds_after"
    ] > 0
    assert call("architecture", "show", str(small)) == 0
    assert str(run) not in capsys.readouterr().out.splitlines()[0]
    assert call("eval", str(small)) == 0
    image = next((run.parent / "people" / "images" / "val").glob("*.jpg"))
    assert call("predict", str(small), str(image), "--out", str(tmp_path / "poses")) == 0
    assert len(json.loads((tmp_path / "poses" / "predictions.json").read_text())) == 1
    longer = ["--config", str(small / "config.yaml"), "--set", f"train.weights={small}"]
    assert call("train", *longer, "--out", str(tmp_path / "longer"), "--set", "train.epochs=1") == 0
    assert load_model(tmp_path / "longer").config.pruning == load_model(small).config.pruning
    config = load_config(small / "config.yaml", [f"train.weights={small}", "train.epochs=1"])
    train(config, tmp_path / "stopped", quiet=True, stop_at=2)
    assert call("train", "--resume", "--out", str(tmp_path / "stopped")) == 0
    assert_same_run(tmp_path / "longer", tmp_path / "stopped")
    assert call("prune", str(run), "--out", str(small)) == 2  # the folder is taken
    assert "not empty" in capsys.readouterr().err


def test_a_run_and_its_pruned_form_are_exported(
    run: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("onnx")
    runtime = pytest.importorskip("onnxruntime")
    small, file, program = tmp_path / "small", tmp_path / "new" / "a.onnx", tmp_path / "a.pt2"
    assert call("prune", str(run), "--out", str(small), "--threshold", "0.3") == 0
    assert call("export", str(run), "--onnx", str(file)) == 0
    shown = capsys.readouterr().out
    assert f"{file}: " in shown and "checked in batches of 4 and 1" in shown
    both = ("--onnx", str(tmp_path / "small.onnx"), "--program", str(program))
    assert call("export", str(small), *both) == 0
    assert (tmp_path / "small.onnx").is_file() and program.is_file()
    session = runtime.InferenceSession(str(file))
    assert session.get_modelmeta().custom_metadata_map["source"] == str(run)

    def no_data(config: object) -> None:
        raise PnfsError("no such folder")

    monkeypatch.setattr("pnfs.commands._some_images", no_data)
    assert call("export", str(run), "--onnx", str(file)) == 0
    assert "random images, not on the run's (no such folder)" in capsys.readouterr().out


def test_export_knows_every_file_that_cannot_be_written_before_it_writes_one(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    files = ("--onnx", str(tmp_path / "a.onnx"), "--program", str(folder))
    assert call("export", str(run), *files) == 2
    error = one_line_error(capsys)
    assert re.search(r"folder: cannot be written \(Is a directory\); name another file", error)
    assert list(tmp_path.iterdir()) == [folder] and not list(folder.iterdir())


def test_training_starts_from_an_architecture_file_and_keeps_it(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = load_model(run)
    with torch.no_grad():
        for parameter in found.architecture_parameters():
            parameter.normal_()
    config = run_config(run)
    save_weights(tmp_path / "found.safetensors", found, config, {"step": 7})
    file = tmp_path / "new" / "found.json"
    assert (
        call("architecture", "export", str(tmp_path / "found.safetensors"), "--out", str(file)) == 0
    )
    assert capsys.readouterr().out == f"{file}\n"
    assert call("architecture", "show", str(file)) == 0
    shown = capsys.readouterr().out
    assert "found.safetensors" in shown.splitlines()[0]
    assert "entropy of α" in shown and "h0→h1" in shown and "cell_5_0" in shown

    again = ["--config", str(run / "config.yaml"), "--architecture", str(file)]
    assert call("train", *again, "--out", str(tmp_path / "b")) == 0
    trained = load_model(tmp_path / "b")
    pairs = zip(trained.architecture_parameters(), found.architecture_parameters(), strict=True)
    assert all(torch.equal(mine, theirs) for mine, theirs in pairs)
    assert run_config(tmp_path / "b").search.strategy == "none"
    weights, old = trained.state_dict(), found.state_dict()
    assert any(not torch.equal(weights[key], old[key]) for key in weights)
    assert call("plot", str(file), "--out", str(tmp_path / "pictures")) == 0
    assert (tmp_path / "pictures" / "found.svg").is_file()
    capsys.readouterr()

    # a run stands for its file; with a strategy the search goes on from there
    further = ["--config", str(run / "config.yaml"), "--architecture", str(tmp_path / "b")]
    assert call("train", *further, "--strategy", "sync", "--out", str(tmp_path / "c")) == 0
    pairs = zip(
        load_model(tmp_path / "c").architecture_parameters(),
        found.architecture_parameters(),
        strict=True,
    )
    assert not all(torch.equal(mine, theirs) for mine, theirs in pairs)
    capsys.readouterr()

    other = [*further, "--set", "model.fabric.operations=[zero, skip, separable, atrous]"]
    assert call("train", *other, "--out", str(tmp_path / "d")) == 2
    assert "of another topology: fabrics.parts.topology.operations is" in one_line_error(capsys)
    assert call("train", *further, "--strategy", "random", "--out", str(tmp_path / "d")) == 2
    assert "exclude each other" in one_line_error(capsys)
    assert call("train", "--resume", "--out", str(tmp_path / "b"), "--architecture", str(file)) == 2
    assert "drop --architecture" in one_line_error(capsys)


def test_several_runs_are_compared(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "other"
    shutil.copytree(run, other)
    assert call("plot", str(run), str(other), "--out", str(tmp_path / "plots")) == 0
    names = [Path(line).name for line in capsys.readouterr().out.splitlines()]
    assert names == ["curves.png", "tradeoff.png"]


def test_plot_names_the_pictures(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call("plot", str(run), "--out", str(tmp_path / "pictures")) == 0
    for line in capsys.readouterr().out.splitlines():
        assert Path(line).stat().st_size > 1000


def test_info_shows_backends(capsys: pytest.CaptureFixture[str]) -> None:
    assert call("info") == 0
    assert "crop_normalize" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["train", "--preset", "our-1"], "preset 'our-1' is unknown.*did you mean 'ours-1'"),
        (["train", "--config", "no.yaml"], "no.yaml: cannot be read"),
        (["train", "--preset", "tiny", "--config", "x.yaml"], "exclude each other"),
        (["train", "--resume", "--overwrite"], "exclude each other"),
        (["train", "--set", "train.lrr=1"], "unknown key 'train.lrr'.*did you mean 'lr'"),
        (["train", "--set", "nonsense"], "write section.key=value"),
        (["train", "--data", "cocoa=x"], "write coco=DIR.*did you mean 'coco'"),
        (["train", "--data", "coco"], "give the dataset's folder"),
        (["train", "--data", "coco=missing", "--out", "o"], "no such folder"),
        (["train", "--strategy", "syncc"], "search.strategy.*syncc"),
        (["train", "--device", "tpu"], "device 'tpu'"),
        (["train", "--resume", "--out", "missing"], "not a run folder"),
        (["eval", "missing"], "no such run folder or file"),
        (["eval", "."], "not a run with a model"),
        (["predict", "missing", "a.jpg"], "no such run folder or file"),
        (["plot", "missing"], "no such run folder or file"),
        (["plot", "missing", "gone"], "no such run folder or file"),
        (["architecture", "export", "missing", "--out", "a.json"], "no such run folder or file"),
        (["architecture", "show", "missing.json"], "missing.json: cannot be read"),
        (["architecture", "show", "file"], "file: not JSON"),
        (["train", "--architecture", "missing.json", "--out", "o"], "missing.json: cannot be read"),
        (["export", "missing", "--onnx", "a.onnx"], "no such run folder or file"),
        (["export", "missing"], "nothing to export; give --onnx FILE"),
        (["demo", "--out", "file/demo"], "cannot be written"),
    ],
)
def test_an_error_is_one_line_and_status_two(
    arguments: list[str],
    words: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    assert call(*arguments) == 2
    assert re.search(words, one_line_error(capsys))


def test_a_model_and_a_dataset_that_do_not_fit_are_one_line(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call("eval", str(run), "--data", f"mpii={tmp_path}") == 2
    assert "keypoints" in one_line_error(capsys)


def test_data_options() -> None:
    assert data_overrides("synthetic") == ["data.dataset=synthetic"]
    dataset, root = data_overrides("mpii=some/folder")
    assert dataset == "data.dataset=mpii"
    assert root == f'data.root="{Path("some/folder").resolve()}"'
    with pytest.raises(PnfsError, match="write coco=DIR"):
        data_overrides("imagenet=x")


def test_interrupting_a_run_exits_130_and_leaves_a_checkpoint(run: Path, tmp_path: Path) -> None:
    people = run.parent / "people"
    settings = [*SETTINGS, f"data.root={people}", "train.epochs=5000", "data.workers=2"]
    command = [sys.executable, "-m", "pnfs.train", "--out", str(tmp_path / "r")]
    settings += ["train.eval_every=0"]
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [*command, *options(settings)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        start_new_session=True,
    )
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("step "):
            break
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: the workers get it too
    out, errors = process.communicate(timeout=120)
    assert process.returncode == 130, errors
    assert "stopped by SIGINT" in out and "--resume" in out
    assert "Traceback" not in errors
    assert list((tmp_path / "r" / "checkpoints").glob("step-*/state.json"))
