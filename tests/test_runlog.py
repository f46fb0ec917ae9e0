"""The run folder's own files: what a full disk or a kill in the middle leaves of them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from runs import small_config

from pnfs.errors import PnfsError
from pnfs.runlog import Metrics, discard_run, open_run, run_config, write_record


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_metrics_on_a_full_disk_are_one_line(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    metrics = Metrics(tmp_path)
    with pytest.raises(PnfsError, match=r"metrics\.jsonl: cannot be written \(No space left"):
        metrics.write("train", {"step": 1, "epoch": 0, "loss": 1.0})
    metrics.close()  # without a second complaint


def test_rows_after_the_checkpoint_are_cut(tmp_path: Path) -> None:
    metrics = Metrics(tmp_path)
    metrics.write("train", {"step": 1, "epoch": 0})
    position = metrics.position()
    metrics.write("train", {"step": 2, "epoch": 0, "loss": float("nan")})
    metrics.close()
    assert (tmp_path / "metrics.jsonl").read_text().count("null") == 1
    Metrics(tmp_path, position=position).close()
    assert (tmp_path / "metrics.jsonl").read_text() == '{"event": "train", "step": 1, "epoch": 0}\n'


def test_discarding_that_is_interrupted_can_be_repeated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wherever it stops, the folder is empty or still known as a run's."""
    run, config, real = tmp_path / "run", small_config(tmp_path), Path.unlink
    for survivors in range(6):
        with open_run(run, resume=False, overwrite=True):
            discard_run(run)
            write_record(run, config, device="cpu", world=1, step=0)
            (run / "metrics.jsonl").write_text("")
            left = survivors

            def unlink(path: Path, missing_ok: bool = False) -> None:
                nonlocal left
                left -= 1
                if left < 0:
                    raise KeyboardInterrupt
                real(path, missing_ok=missing_ok)

            with monkeypatch.context() as patch:
                patch.setattr(Path, "unlink", unlink)
                try:
                    discard_run(run)
                except KeyboardInterrupt:
                    assert run_config(run) == config
    open_run(run, resume=False, overwrite=False).close()
    assert os.listdir(run) == [".lock"]


def test_a_run_without_its_configuration_file_has_it_from_its_last_start(tmp_path: Path) -> None:
    write_record(tmp_path, small_config(tmp_path), device="cpu", world=1, step=0)
    longer = small_config(tmp_path, "train.epochs=7")
    write_record(tmp_path, longer, device="cpu", world=1, step=3)
    (tmp_path / "config.yaml").unlink()
    assert run_config(tmp_path) == longer
    assert run_config(tmp_path, ["train.epochs=9"]).train.epochs == 9
    (tmp_path / "run.json").write_text("{}")
    with pytest.raises(PnfsError, match="not a run folder"):
        run_config(tmp_path)
