"""Work that is recorded and replayed; recordings are played by the CPU where there is no GPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from played import Player
from runs import rows_of, small_config, state_of
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import pnfs
from pnfs import capture
from pnfs.capture import WARM_UP, Captured
from pnfs.folding import for_evaluation
from pnfs.head import pose_loss
from pnfs.steps import Stepper
from pnfs.train import train


def triple(x: Tensor) -> tuple[Tensor]:
    return (x[:3].double() * 3,)


def test_calls_are_recorded_after_a_warm_up_and_replayed() -> None:
    player = Player()
    call = Captured(triple, player)
    for index in range(WARM_UP + 4):
        x = torch.arange(4.0) + index
        assert torch.equal(call(x)[0], x[:3].double() * 3)
        assert player.replays == max(0, index + 1 - WARM_UP)
    assert len(call.recordings) == 1 and call.refused is None


def test_a_third_signature_stays_an_ordinary_call() -> None:
    player = Player()
    call = Captured(triple, player)
    for size in (4, 5, 6):
        for _ in range(WARM_UP + 2):
            call(torch.ones(size))
    assert len(call.recordings) == capture.MAX_GRAPHS
    assert player.replays == 2 * capture.MAX_GRAPHS


def test_strides_and_dtypes_are_part_of_a_signature() -> None:
    call = Captured(triple, Player())
    for x in (torch.ones(8), torch.ones(16)[::2], torch.ones(8, dtype=torch.bfloat16)):
        for _ in range(WARM_UP):
            call(x)
    assert not call.recordings


def test_a_recording_that_fails_is_given_up_with_its_reason() -> None:
    mended: list[bool] = []
    call = Captured(triple, Player(broken=True), after_failure=lambda: mended.append(True))
    for _ in range(WARM_UP + 3):
        assert torch.equal(call(torch.ones(4))[0], torch.full((3,), 3.0, dtype=torch.float64))
    assert mended == [True]
    assert call.refused is not None and call.refused.endswith("when stream is capturing")


@pytest.fixture(scope="module")
def people(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("people")


RUNS: dict[str, tuple[str, ...]] = {
    "sync": ("search.strategy=sync",),
    "first-order": ("search.strategy=first-order",),
    "accumulated": ("train.accumulate=3", "train.grad_clip=0.01"),
    "bf16": ("train.precision=bf16",),
    "checkpointed": ("model.fabric.checkpoint=true",),
}


@pytest.mark.parametrize("settings", RUNS.values(), ids=RUNS)
def test_a_replayed_run_equals_an_ordinary_one_bit_for_bit(
    settings: tuple[str, ...], people: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = small_config(people, "train.epochs=5", "train.eval_every=3", *settings)
    train(config, tmp_path / "plain", device="cpu", quiet=True)
    player = Player()
    monkeypatch.setattr("pnfs.steps.recorder_for", lambda device: player)
    train(config, tmp_path / "replayed", device="cpu", quiet=True)
    assert player.replays > 3
    tensors, tree = state_of(tmp_path / "plain")
    replayed, replayed_tree = state_of(tmp_path / "replayed")
    assert tree == replayed_tree and tensors.keys() == replayed.keys()
    assert not [key for key in tensors if not torch.equal(tensors[key], replayed[key])]
    assert rows_of(tmp_path / "plain") == rows_of(tmp_path / "replayed")


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        (("train.cuda_graph=false",), "train.cuda_graph is off"),
        (("search.strategy=gumbel",), "strategy gumbel acts between"),
        (("search.strategy=sync", "search.macs_penalty=1.0"), "strategy sync acts between"),
    ],
)
def test_why_steps_are_not_recorded_is_said_once(
    settings: tuple[str, ...],
    reason: str,
    people: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    player = Player()
    monkeypatch.setattr("pnfs.steps.recorder_for", lambda device: player)
    train(small_config(people, *settings), tmp_path / "run", device="cpu")
    said = capsys.readouterr().out
    assert said.count("steps are launched kernel by kernel: ") == 1 and reason in said
    assert not player.replays


def test_a_nonfinite_batch_among_replays_leaves_no_mark(
    people: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = small_config(people, "train.epochs=3", "train.eval_every=0")
    player = Player()
    monkeypatch.setattr("pnfs.steps.recorder_for", lambda device: player)
    inputs = Stepper.inputs
    states: list[Any] = []

    def spoiled(self: Stepper, batch: Any) -> tuple[Tensor, Tensor, Tensor]:
        images, joints, weights = inputs(self, batch)
        states.append([tensor.clone() for tensor in self.model.state_dict().values()])
        return (images * torch.nan if len(states) == 8 else images), joints, weights

    monkeypatch.setattr(Stepper, "inputs", spoiled)
    train(config, tmp_path / "run", device="cpu", quiet=True)
    before, after, later = states[7], states[8], states[9]
    assert player.replays
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(after, later, strict=True))
    assert rows_of(tmp_path / "run", "train")[-1]["skipped_steps"] == 1


def test_evaluation_is_replayed_and_its_scores_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    config = pnfs.load_config("tiny").model
    model = pnfs.build_model(config).eval()
    images = [torch.randn(2, 3, *config.input_size) for _ in range(WARM_UP + 3)]
    with torch.inference_mode():
        want = [model(x) for x in images]
        player = Player(want[0])
        monkeypatch.setattr("pnfs.folding.recorder_for", lambda device: player)
        network = for_evaluation(model, torch.device("cpu"), "fp32")
        scores = [network(x) for x in images]
    assert player.replays == 3
    assert all(torch.equal(a, b) for a, b in zip(scores, want, strict=True))


class _FromTheHost(TorchDispatchMode):
    """Notes operations that touch the CPU."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        leaves = tree_leaves((args, kwargs, result))
        if any(isinstance(leaf, Tensor) and leaf.device.type == "cpu" for leaf in leaves):
            self.seen.add(str(func))
        return result


@pytest.mark.parametrize("preset", ["tiny", "ours-1", "ours-c", "branchnet-1", "hrnet-w32-vec8"])
def test_a_step_neither_asks_the_device_nor_copies_to_it(
    preset: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = pnfs.load_config(preset, ["model.input_size=[64, 64]"]).model
    with torch.device("meta"):  # stands for a GPU: reading a value from it fails
        model = pnfs.build_model(config)
        keypoints = config.skeleton_table.num_keypoints
        images, joints = torch.empty(2, 3, 64, 64), torch.empty(2, keypoints, 2)
        weights = torch.empty(2, keypoints)

    def made_on_the_host(*args: Any, **kwargs: Any) -> Tensor:
        raise AssertionError("torch.tensor copies from the host")

    monkeypatch.setattr(torch, "tensor", made_on_the_host)
    with _FromTheHost() as mode:
        pose_loss(model, images, joints, weights, sigma=2.0).backward()
        torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
    assert not mode.seen


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_losses_with_and_without_cuda_graphs_are_equal(
    precision: str, people: Path, tmp_path: Path
) -> None:
    settings = [f"train.precision={precision}", "train.epochs=50", "train.eval_every=25"]
    losses = []
    for graph in ("true", "false"):
        config = small_config(people, *settings, f"train.cuda_graph={graph}")
        train(config, tmp_path / graph, device="cuda", quiet=True)
        losses.append([row["loss"] for row in rows_of(tmp_path / graph, "train")])
    torch.testing.assert_close(*losses)
