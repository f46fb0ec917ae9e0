"""Checkpoints are complete, survive a kill and damage, and refuse what is not theirs."""

from __future__ import annotations

import errno
import os
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import die_at
from runs import small_config
from safetensors.torch import save_file
from torch import nn

from pnfs import checkpoint, statefile
from pnfs.checkpoint import (
    drop_checkpoints_after,
    list_checkpoints,
    load_checkpoint,
    load_model,
    load_optimizer,
    load_weights,
    random_state,
    read_metadata,
    save_checkpoint,
    save_weights,
    set_random_state,
)
from pnfs.config import Config
from pnfs.errors import PnfsError
from pnfs.model import build_model
from pnfs.statefile import pack, unpack


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Config:
    return small_config(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def model(config: Config) -> nn.Module:
    return build_model(config.model)


def save(run: Path, step: int, model: nn.Module, config: Config) -> Path:
    training = {"step": step, "tensor": torch.full((3,), float(step))}
    return save_checkpoint(run, step=step, epoch=0, model=model, training=training, config=config)


def test_pack_and_unpack_give_back_any_nested_state() -> None:
    state = {
        "numbers": [1, 2.5, float("inf"), None, True, "text"],
        "pair": (1, (2, torch.arange(3))),
        7: {"empty": torch.zeros(0, 2), "half": torch.ones(2, dtype=torch.bfloat16)},
        "array": np.array([[1, 2]], dtype=np.uint32),
        "$tensor": "a key that looks like ours",
    }
    tree, tensors = pack(state)
    back = unpack(tree, tensors)
    assert back.keys() == state.keys()
    assert back["numbers"] == state["numbers"]
    assert back["pair"][0] == 1 and isinstance(back["pair"][1], tuple)
    assert torch.equal(back["pair"][1][1], torch.arange(3))
    assert back[7]["half"].dtype is torch.bfloat16
    assert np.array_equal(back["array"], state["array"]) and back["array"].dtype == np.uint32
    assert back["$tensor"] == state["$tensor"]


def test_what_json_cannot_say_is_refused_by_name() -> None:
    with pytest.raises(TypeError, match=r"a\.b: a set"):
        pack({"a": {"b": {1, 2}}})


def test_a_checkpoint_gives_back_what_was_saved(
    tmp_path: Path, model: nn.Module, config: Config
) -> None:
    save(tmp_path, 12, model, config)
    loaded = load_checkpoint(tmp_path)
    assert loaded is not None and loaded.step == 12
    assert loaded.training["step"] == 12
    assert torch.equal(loaded.training["tensor"], torch.full((3,), 12.0))
    assert loaded.model.keys() == model.state_dict().keys()


def test_the_newest_two_checkpoints_stay(tmp_path: Path, model: nn.Module, config: Config) -> None:
    for step in (1, 2, 10):
        save(tmp_path, step, model, config)
    assert [path.name for path in list_checkpoints(tmp_path)] == [
        "step-00000002-epoch-0000",
        "step-00000010-epoch-0000",
    ]
    assert not list((tmp_path / "checkpoints").glob(".*"))


def test_no_checkpoint_is_no_error(tmp_path: Path) -> None:
    assert load_checkpoint(tmp_path) is None


@pytest.mark.parametrize("name", ["model.safetensors", "training.safetensors", "state.json"])
@pytest.mark.parametrize("damage", ["truncated", "changed", "missing"])
def test_a_damaged_checkpoint_is_passed_over_with_one_line(
    tmp_path: Path, model: nn.Module, config: Config, name: str, damage: str
) -> None:
    save(tmp_path, 1, model, config)
    newest = save(tmp_path, 2, model, config)
    file = newest / name
    content = bytearray(file.read_bytes())
    if damage == "truncated":
        file.write_bytes(content[: len(content) // 2])
    elif damage == "changed":
        content[len(content) // 2] ^= 0xFF
        file.write_bytes(content)
    else:
        file.unlink()
    lines: list[str] = []
    loaded = load_checkpoint(tmp_path, warn=lines.append)
    if loaded is None or loaded.step != 1:
        # One flipped bit in state.json's text may leave JSON that says the same.
        assert (name, damage) == ("state.json", "changed")
        return
    assert len(lines) == 1 and str(newest) in lines[0] and "\n" not in lines[0]
    drop_checkpoints_after(tmp_path, loaded.path)
    assert [path.name for path in list_checkpoints(tmp_path)] == [loaded.path.name]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
def test_a_kill_at_any_moment_of_a_save_loses_nothing(
    tmp_path: Path, model: nn.Module, config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A child process is killed at its n-th file operation, for every n until a save survives.

    One thread: a forked child has no OpenMP pool, and waits for ever at its first parallel loop.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    killed = 0
    for moment in range(1, 100):
        run = tmp_path / str(moment)
        save(run, 1, model, config)
        child = os.fork()
        if child == 0:
            die_at(moment)
            save(run, 2, model, config)
            os._exit(0)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        lines: list[str] = []
        loaded = load_checkpoint(run, warn=lines.append)
        assert loaded is not None and not lines
        assert loaded.step == loaded.training["step"]
        assert torch.equal(loaded.training["tensor"], torch.full((3,), float(loaded.step)))
        if status == 0:
            assert loaded.step == 2
            break
        killed += 1
        save(run, 3, model, config)  # and the remains are in nobody's way
        again = load_checkpoint(run)
        assert again is not None and again.step == 3
    torch.set_num_threads(threads)
    assert killed >= 10, "the hook must have killed saves at many moments"


def test_a_full_disk_is_one_line_and_the_last_checkpoint_stays(
    tmp_path: Path, model: nn.Module, config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path, 1, model, config)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(statefile, "save_file", full)
    with pytest.raises(PnfsError, match="cannot be written .No space left on device") as error:
        save(tmp_path, 2, model, config)
    assert "\n" not in str(error.value)
    monkeypatch.undo()
    loaded = load_checkpoint(tmp_path)
    assert loaded is not None and loaded.step == 1
    assert not list((tmp_path / "checkpoints").glob(".*"))


def test_an_unwritable_folder_is_one_line(tmp_path: Path, model: nn.Module, config: Config) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(PnfsError, match="cannot be written"):
        save(tmp_path / "file" / "run", 1, model, config)
    with pytest.raises(PnfsError, match="cannot be written"):
        save_weights(tmp_path / "file" / "m.safetensors", model, config, {})


def test_a_saved_model_loads_from_its_file_alone(
    tmp_path: Path, model: nn.Module, config: Config
) -> None:
    path = tmp_path / "model.safetensors"
    save_weights(path, model, config, {"step": 3})
    loaded = load_model(path)
    images = torch.randn(2, 3, *config.model.input_size)
    with torch.no_grad():
        assert torch.equal(loaded(images), model.eval()(images))
    assert not loaded.training
    assert read_metadata(path) == (config, {"step": 3})


def test_a_run_gives_its_best_model_else_its_newest(
    tmp_path: Path, model: nn.Module, config: Config
) -> None:
    save(tmp_path, 1, model, config)
    newest = save(tmp_path, 2, model, config)
    assert checkpoint.find_weights(tmp_path) == newest / "model.safetensors"
    save_weights(tmp_path / "model.safetensors", model, config, {})
    assert checkpoint.find_weights(str(tmp_path)) == tmp_path / "model.safetensors"


def test_weights_of_another_model_are_refused_by_their_first_key(
    tmp_path: Path, model: nn.Module, config: Config
) -> None:
    weights = dict(model.state_dict())
    first = next(iter(weights))
    before = weights[first].clone()
    missing = {k: torch.zeros_like(v) for k, v in weights.items() if k != first}
    with pytest.raises(PnfsError, match=f"other.*another model.*missing: {first}"):
        load_weights(model, missing, where="other")
    with pytest.raises(PnfsError, match="unexpected: something.else"):
        load_weights(model, weights | {"something.else": torch.ones(1)}, where="other")
    with pytest.raises(PnfsError, match=f"{first}.*instead of"):
        load_weights(model, weights | {first: torch.ones(1)}, where="other")
    assert torch.equal(model.state_dict()[first], before)
    # And as a file whose configuration does not fit its weights.
    other = config.model_copy(update={"model": small_config(tmp_path, "model.parts=1").model})
    save_weights(tmp_path / "m.safetensors", model, other, {})
    with pytest.raises(PnfsError, match=r"m\.safetensors: this file is of another model"):
        load_model(tmp_path / "m.safetensors")


def test_what_is_no_model_is_refused_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "runs").mkdir()
    foreign = tmp_path / "foreign.safetensors"
    save_file({"weight": torch.ones(2)}, foreign)
    truncated = tmp_path / "truncated.safetensors"
    truncated.write_bytes(foreign.read_bytes()[:20])
    cases = {
        tmp_path / "rums": "no such run folder or file.*did you mean 'runs'",
        tmp_path / "runs": "not a run with a model",
        foreign: "holds no pnfs model",
        truncated: "cannot be read as safetensors",
    }
    for path, message in cases.items():
        with pytest.raises(PnfsError, match=message) as error:
            load_model(path)
        assert "\n" not in str(error.value) and path.name in str(error.value)


def test_restored_moments_have_their_parameters_strides() -> None:
    weight = nn.Parameter(torch.randn(4, 3, 3, 3).to(memory_format=torch.channels_last))
    optimizer = torch.optim.Adam([weight])
    weight.sum().backward()
    optimizer.step()
    tree, tensors = pack(optimizer.state_dict())
    stored = unpack(tree, {k: v.contiguous() for k, v in tensors.items()})
    fresh = torch.optim.Adam([weight])
    load_optimizer(fresh, stored)
    for name in ("exp_avg", "exp_avg_sq"):
        assert fresh.state[weight][name].stride() == weight.stride()
        assert torch.equal(fresh.state[weight][name], optimizer.state[weight][name])


def test_random_states_are_restored() -> None:
    tree, tensors = pack(random_state())
    drawn = [random.random(), np.random.rand(), torch.rand(3)]
    set_random_state(unpack(tree, tensors))
    again = [random.random(), np.random.rand(), torch.rand(3)]
    assert drawn[:2] == again[:2] and torch.equal(drawn[2], again[2])
