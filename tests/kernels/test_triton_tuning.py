"""The choice among a Triton kernel's configurations: when one is measured, kept, and shared."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from numerics import error_of, value_and_gradients
from torch import Tensor

from pnfs import kernels
from pnfs.kernels import use_backend

pytest.importorskip("triton", reason="triton is not installed")

from pnfs.kernels.triton import aot, tuning
from pnfs.kernels.triton.tuning import Config, Tunable, Tuner

TRITON = [
    pytest.param("triton", "cpu"),
    pytest.param("triton", "cuda", marks=pytest.mark.gpu),
]
CONFIGS = (Config(4), Config(8), Config(8, 2.0))
LIKE = torch.empty(0)


def kernel(name: str = "some_kernel", source: str = "0" * 64) -> Any:
    return SimpleNamespace(fn=SimpleNamespace(__name__=name), cache_key=source)


def tunable(*candidates: Config, name: str = "some_kernel", source: str = "0" * 64) -> Tunable:
    return Tunable(kernel(name, source), *(candidates or CONFIGS))


class Times:
    """A timer by which configurations take so many milliseconds, the first one first."""

    def __init__(self, *milliseconds: float) -> None:
        self.milliseconds, self.calls = milliseconds, 0

    def __call__(self, run: Callable[[], Any]) -> float:
        run()
        self.calls += 1
        return self.milliseconds[(self.calls - 1) % len(self.milliseconds)]


def tuner(path: Path | None = None, *times: float, **options: Any) -> Tuner:
    options = {"device": lambda like: "a GPU 9.0", "timer": Times(*(times or (3, 2, 1))), **options}
    return Tuner(path, **options)


def launched(kernel: Tunable, batch: int = 24, *exact: Any, like: Tensor = LIKE) -> Config:
    return kernel.launch(lambda config: config, like, batch, *exact)


def test_outside_the_default_runs_and_nothing_is_measured() -> None:
    kernel = tunable()
    assert launched(kernel) == CONFIGS[0]
    with tuning.tuned(tuner()) as inside:
        assert launched(kernel) == CONFIGS[2]
    assert launched(kernel) == CONFIGS[0] and inside.measured == 1


def test_the_fastest_is_measured_once_per_type_device_and_size() -> None:
    kernel, used = tunable(), tuner()
    with tuning.tuned(used):
        for _ in range(2):
            assert launched(kernel, 24, 64, 48) == CONFIGS[2]
        assert used.measured == 1
        launched(kernel, 24, 64, 47)
        launched(kernel, 24, 64, 48, like=torch.empty(0, dtype=torch.bfloat16))
        launched(kernel, 24, 64, 48, like=torch.empty(0, device="meta"))
        launched(tunable(name="other_kernel"), 24, 64, 48)
    assert used.measured == 4  # two devices of one name share a choice
    (first, *_) = used.choices
    assert first == "some_kernel | a GPU 9.0 | float32 | 64 48 | batch 32"
    assert used.choices[first]["us"] == [3000.0, 2000.0, 1000.0]


def test_batches_up_to_a_power_of_two_share_a_choice() -> None:
    assert [tuning.bucket(n) for n in (0, 1, 2, 3, 17, 24, 32, 33, 128)] == [
        1, 1, 2, 4, 32, 32, 32, 64, 128,
    ]  # fmt: skip
    kernel, used = tunable(), tuner()
    with tuning.tuned(used):
        for batch in (24, 17, 32):
            launched(kernel, batch, 64)
        assert used.measured == 1
        launched(kernel, 128, 64)
    assert used.measured == 2


def test_noise_decides_nothing_and_what_cannot_run_is_out() -> None:
    with tuning.tuned(tuner(None, 1.0, 0.99, 0.98)):
        assert launched(tunable()) == CONFIGS[0]
    with tuning.tuned(tuner(None, float("inf"), 2.0, 3.0)):
        assert launched(tunable()) == CONFIGS[1]
    with tuning.tuned(tuner(None, 1.0, float("inf"), 0.5)) as used:
        assert launched(tunable()) == CONFIGS[2]
    (entry,) = used.choices.values()
    assert entry["us"] == [1000.0, None, 500.0]


@pytest.mark.parametrize(("arch", "measured"), [(80, False), (90, True), (100, False)])
def test_configurations_are_others_where_they_were_not_measured(
    arch: int, measured: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    from triton.runtime.driver import driver

    monkeypatch.setattr(driver, "_active", aot._Gpu(arch))
    others = (Config(2), Config(16))
    some = Tunable(kernel(), *CONFIGS, elsewhere=others)
    here = CONFIGS if measured else others
    assert some.launch(lambda config: config, LIKE, 24) == here[0]
    with tuning.candidate(1):
        assert some.launch(lambda config: config, LIKE, 24) == here[1]
    with tuning.tuned(tuner(None, 3, 2)):
        assert some.launch(lambda config: config, LIKE, 24) == here[1]


def test_where_nothing_can_be_measured_the_default_runs_until_it_can() -> None:
    """As while a graph is recorded. A choice that is there already is taken there too."""
    able = True
    used = tuner(device=lambda like: "a GPU 9.0" if able else None)
    with tuning.tuned(used):
        launched(tunable(), 24, 1)
        able = False
        assert launched(tunable(), 24, 1) == CONFIGS[2]
        assert launched(tunable(), 24, 2) == CONFIGS[0]
        able = True
        assert launched(tunable(), 24, 2) == CONFIGS[2]


def test_no_device_is_named_on_cpus_in_graphs_in_tracing_and_in_the_interpreter(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    on_gpu: Any = SimpleNamespace(device=torch.device("cuda:0"))
    assert tuning.device_name(LIKE) is None
    assert tuning.device_name(on_gpu) == "NVIDIA H100 9.0"
    with mock.patch.object(torch.cuda, "is_current_stream_capturing", lambda: True):
        assert tuning.device_name(on_gpu) is None
    with mock.patch.object(torch.compiler, "is_compiling", lambda: True):
        assert tuning.device_name(on_gpu) is None
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert tuning.device_name(on_gpu) is None


def test_what_the_gpu_cannot_run_takes_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    from triton.runtime.errors import TritonError

    bench = mock.Mock(side_effect=[TritonError, torch.OutOfMemoryError, KeyError])
    monkeypatch.setattr("triton.testing.do_bench", bench)
    for _ in range(2):
        assert tuning.milliseconds(lambda: None) == float("inf")
    with pytest.raises(KeyError):
        tuning.milliseconds(lambda: None)


def test_measuring_ends_with_its_time(caplog: pytest.LogCaptureFixture) -> None:
    used = tuner(budget=1e-9)
    with tuning.tuned(used):
        assert launched(tunable(), 24, 1) == CONFIGS[2]
        assert launched(tunable(), 24, 2) == launched(tunable(), 24, 3) == CONFIGS[0]
    assert used.measured == 1 and len(used.choices) == 3
    assert [record.getMessage() for record in caplog.records] == [
        "measuring kernels has taken its time; the rest run with their defaults"
    ]


def test_choices_are_kept_in_the_file(tmp_path: Path) -> None:
    path = tmp_path / "made" / "kernels.json"
    with tuning.tuned(tuner(path)):
        launched(tunable(), 24, 64)
    with tuning.tuned(tuner(path, 1, 2, 3)) as later:
        assert launched(tunable(), 17, 64) == CONFIGS[2]
    assert later.measured == 0 and later.choices == json.loads(path.read_text())["choices"]
    assert {entry.name for entry in path.parent.iterdir()} == {"kernels.json", "kernels.lock"}
    assert tuning.summary(path) == f"1 choices in {path}"


@pytest.mark.parametrize(
    "changed", [tunable(source="1" * 64), tunable(*CONFIGS[:2])], ids=["source", "candidates"]
)
def test_a_changed_kernel_is_measured_again(tmp_path: Path, changed: Tunable) -> None:
    path = tmp_path / "kernels.json"
    with tuning.tuned(tuner(path)):
        launched(tunable())
    with tuning.tuned(tuner(path, 2, 1)) as later:
        assert launched(changed) == CONFIGS[1]
    assert later.measured == 1
    assert len(json.loads(path.read_text())["choices"]) == 1  # the older one has gone


@pytest.mark.parametrize(
    "content", ["{", "[]", '{"format": 0, "choices": {}}', '{"format": 1, "choices": 3}', "\udcff"]
)
def test_a_damaged_file_is_said_once_and_replaced(
    tmp_path: Path, content: str, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "kernels.json"
    path.write_text(content, encoding="utf-8", errors="surrogateescape")
    with tuning.tuned(tuner(path)):
        assert launched(tunable(), 24, 1) == launched(tunable(), 24, 2) == CONFIGS[2]
    (record,) = caplog.records
    assert f"{path}: not read" in record.getMessage()
    assert len(json.loads(path.read_text())["choices"]) == 2


@pytest.mark.parametrize("entry", [None, 3, {}, {"version": "x"}, {"version": 0, "config": "ab"}])
def test_a_damaged_entry_is_measured_again(tmp_path: Path, entry: Any) -> None:
    path = tmp_path / "kernels.json"
    with tuning.tuned(tuner(path)) as used:
        launched(tunable())
    (key,) = used.choices
    path.write_text(json.dumps({"format": 1, "choices": {key: entry}}))
    with tuning.tuned(tuner(path, 1, 2, 3)):
        assert launched(tunable()) == CONFIGS[0]
    assert json.loads(path.read_text())["choices"][key]["config"] == [4, 1.0]


def test_a_file_that_cannot_be_written_is_said_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("in the way")
    path = tmp_path / "file" / "kernels.json"
    with caplog.at_level(logging.WARNING), tuning.tuned(tuner(path)) as used:
        assert launched(tunable(), 24, 1) == launched(tunable(), 24, 2) == CONFIGS[2]
    assert len(used.choices) == 2
    (record,) = [r for r in caplog.records if "this process alone" in r.getMessage()]
    assert str(path) in record.getMessage()


def test_of_two_that_measure_the_first_one_decides(tmp_path: Path) -> None:
    """So the ranks of a run agree, and a later run does what this one did."""
    path = tmp_path / "kernels.json"
    first, second = tuner(path, 3, 2, 1), tuner(path, 3, 1, 2)
    for one in (first, second):
        one.restore({})  # both have read the empty file
    with tuning.tuned(first):
        assert launched(tunable()) == CONFIGS[2]
    with tuning.tuned(second):
        assert launched(tunable()) == CONFIGS[2]
    assert second.measured == 1 and second.choices == first.choices


def test_processes_that_write_at_once_lose_nothing(tmp_path: Path) -> None:
    path = tmp_path / "kernels.json"
    code = f"""
import sys; sys.path[:] = {sys.path!r}
from pathlib import Path
from test_triton_tuning import launched, tunable, tuner, tuning
with tuning.tuned(tuner(Path({str(path)!r}))):
    for size in range(20):
        launched(tunable(name="kernel_" + sys.argv[1]), 24, size)
"""
    started = [subprocess.Popen([sys.executable, "-c", code, name]) for name in "ab"]
    assert [process.wait(120) for process in started] == [0, 0]
    assert len(json.loads(path.read_text())["choices"]) == 40


def test_a_resumed_run_takes_the_choices_of_its_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "kernels.json"
    with tuning.tuned(tuner(None, 3, 1, 2)):
        launched(tunable())
        saved = tuning.choices()
    with tuning.tuned(tuner(path, 3, 2, 1)):
        launched(tunable())
    with tuning.tuned(tuner(path)):
        assert launched(tunable()) == CONFIGS[2]
        tuning.restore(saved)
        assert launched(tunable()) == CONFIGS[1]
        assert tuning.choices() == saved
    assert tuning.choices() == {} and tuning.news() is None


def test_news_comes_when_measuring_is_over(tmp_path: Path) -> None:
    path = tmp_path / "kernels.json"
    with tuning.tuned(tuner(path)):
        assert tuning.news() is None
        launched(tunable(), 24, 1)
        assert tuning.news() is None
        launched(tunable(), 24, 2)
        assert tuning.news() is None
        said = tuning.news()
        assert said == f"Triton kernels: measured 2 cases, the choices are kept in {path}"
        assert tuning.news() is None


def test_the_folder_is_the_users(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("PNFS_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", "/home/someone")
    assert tuning.cache_file() == Path("/home/someone/.cache/pnfs/kernels.json")
    monkeypatch.setenv("XDG_CACHE_HOME", "/caches")
    assert tuning.cache_file() == Path("/caches/pnfs/kernels.json")
    monkeypatch.setenv("PNFS_CACHE", "/own")
    assert tuning.cache_file() == Path("/own/kernels.json")


def test_tuning_compiles_each_configuration_once_whatever_the_batch() -> None:
    """Batches of one choice, and of others: those are measured again, and nothing is compiled."""

    def compiled(*batches: int) -> dict[str, set[str]]:
        def call() -> None:
            for batch in batches:
                aot.training_step(aot.PRESET, batch, torch.float32)

        return aot.specialisations(call)

    default = compiled(24)
    with tuning.tuned(tuner(timer=Times(1))) as used:
        first, measured = compiled(24), used.measured
        assert compiled(24, 17) == default and used.measured == measured
        assert compiled(128) == first and used.measured == 2 * measured
    assert all(default[name] <= keys for name, keys in first.items())
    counts = {name: (len(default[name]), len(keys)) for name, keys in first.items()}
    assert all(few <= many <= 4 * few for few, many in counts.values()), counts
    assert sum(many for _, many in counts.values()) > 2 * sum(few for few, _ in counts.values())


def maps(*shape: int) -> Tensor:
    p, n, c, h, w = shape
    return torch.randn(p, n, h, w, c).permute(0, 1, 4, 2, 3)


def mixed_sum(x: Tensor, y: Tensor, mean: Tensor, var: Tensor, weights: Tensor) -> Tensor:
    return kernels.mixed_sum(x, [y], [mean], [var], weights, relu=[True])


def scale_mix(up: Tensor, same: Tensor, norms: Tensor, weights: Tensor) -> Tensor:
    each = [[item] for item in norms]
    return kernels.scale_mix([up, same], ["up", "same"], *each, weights, relu=True)


def separable_conv(x: Tensor, weights: Tensor, depthwise: Tensor) -> tuple[Tensor, ...]:
    return kernels.separable_conv(x, weights, depthwise=depthwise)


def strided_conv(x: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
    return kernels.strided_conv(x, weight, stats=True)


def heatmap(*vectors: Tensor) -> Tensor:
    return kernels.vector_heatmap(vectors, [[0, 1], [1, 2]], 3)


def loss(*vectors: Tensor) -> Tensor:
    joints = torch.linspace(0, 40, 12, device=vectors[0].device).view(2, 3, 2)
    weights = torch.ones(2, 3, device=vectors[0].device)
    return kernels.vector_heatmap_loss(vectors, [[0, 1], [1, 2]], joints, weights, sigma=2.0)


def batch_norm_act(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return kernels.batch_norm_act(x, weight, bias, activation="relu6")[0]


def calls_of_ops() -> dict[str, tuple[Callable[..., Any], list[Tensor]]]:
    """Every kernel that has configurations, on maps of a few tiles and a rest."""
    torch.manual_seed(0)
    wide = 2, 2, 20, 9, 8
    positive = torch.rand(2, 20) + 0.5
    vectors = [torch.randn(2, 2, 8, 13, 21) for _ in range(2)]
    return {
        "batch_norm_act": (batch_norm_act, [maps(*wide)[0], *torch.randn(2, 20)]),
        "batch_stats": (kernels.batch_stats, [maps(*wide)]),
        "mixed_sum": (
            mixed_sum,
            [maps(*wide), maps(*wide), torch.randn(2, 20), positive, torch.randn(2, 2)],
        ),
        "scale_mix": (
            scale_mix,
            [
                maps(1, 2, 20, 3, 3),
                maps(1, 2, 20, 6, 6),
                torch.rand(4, 1, 20) + 0.5,
                torch.randn(1, 2),
            ],
        ),
        "separable_conv": (
            separable_conv,
            [maps(2, 2, 20, 5, 7), torch.randn(2, 18, 20), torch.randn(2, 20, 3, 3)],
        ),
        "strided_conv": (strided_conv, [maps(2, 2, 20, 5, 7), torch.randn(2, 18, 20, 3, 3)]),
        "vector_heatmap": (heatmap, vectors),
        "vector_heatmap_loss": (loss, vectors),
    }


def results(op: str, device: str, index: int) -> list[Tensor]:
    with use_backend("triton"), tuning.candidate(index):
        if op == "decode_heatmaps":
            scores = torch.linspace(-9, 9, 2 * 3 * 80 * 33, device=device).sin()
            scores = scores.view(2, 3, 80, 33)
            return list(kernels.decode_heatmaps(scores, torch.ones(2, 2, 3, device=device)))
        call, inputs = calls_of_ops()[op]
        return value_and_gradients(call, [x.to(device) for x in inputs])


@pytest.mark.parametrize(("backend", "device"), TRITON)
@pytest.mark.parametrize("op", [n for n, op in kernels.ops().items() if "triton" in op.backends])
def test_every_configuration_gives_the_result(op: str, backend: str, device: str) -> None:
    """To rounding: the order of sums differs. The interpreter knows no warps."""
    want = results(op, device, 0)
    for index in (2, 3) if device == "cpu" else (1, 2, 3):
        for have, right in zip(results(op, device, index), want, strict=True):
            assert error_of(have, right) < 2e-5
