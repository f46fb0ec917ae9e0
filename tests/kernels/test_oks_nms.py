"""oks_nms: every backend against the published results and a plain loop over lists."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pnfs.errors import PnfsError
from pnfs.kernels import native, oks_matrix, oks_nms, use_backend
from pnfs.skeleton import COCO

needs_cpp = pytest.mark.skipif(
    not native.has_function("_cpu", "oks_nms")[0],
    reason=native.has_function("_cpu", "oks_nms")[1] or "-",
)
BACKENDS = [
    pytest.param("torch", "cpu"),
    pytest.param("cpp", "cpu", marks=needs_cpp),
    pytest.param("cuda", "cpu"),
    pytest.param("cuda", "cuda", marks=pytest.mark.gpu),
]
on_every_backend = pytest.mark.parametrize(("backend", "device"), BACKENDS)


@dataclass(frozen=True)
class Case:
    """The arguments of one call."""

    keypoints: Tensor
    scores: Tensor
    areas: Tensor
    sigmas: Tensor | Sequence[float] = COCO.oks_sigmas
    threshold: float = 0.9
    groups: Tensor | None = None
    skip: bool = False


def crowd(n: int, seed: int = 0, k: int = 17, groups: int = 0) -> Case:
    """Noisy copies of a few people, with many equal scores and a few areas of zero."""
    rng = np.random.default_rng(seed)
    people = rng.uniform(0, 300, (max(n // 4, 1), k, 3))
    keypoints = people[rng.integers(0, len(people), n)]
    keypoints = keypoints + rng.normal(0, 1, keypoints.shape) * rng.choice([0, 1, 8, 30], (n, 1, 1))
    areas = rng.uniform(1e3, 9e4, n) * (rng.random(n) > 0.1)
    return Case(
        torch.from_numpy(keypoints),
        torch.from_numpy(rng.integers(0, 5, n) / 4),
        torch.from_numpy(areas),
        sigmas=rng.uniform(0.02, 0.11, k).tolist(),
        groups=torch.from_numpy(rng.integers(-2, groups, n)) if groups else None,
    )


def run(case: Case, device: str = "cpu") -> list[int]:
    def move(value: Any) -> Any:
        return value.to(device) if isinstance(value, Tensor) and device != "cpu" else value

    keep = oks_nms(
        move(case.keypoints),
        move(case.scores),
        move(case.areas),
        move(case.sigmas),
        case.threshold,
        groups=move(case.groups),
        skip_after_removal=case.skip,
    )
    assert keep.dtype == torch.int64
    return keep.tolist()


def oks_of(case: Case, i: int, j: int) -> float:
    """OKS of two poses by its formula."""
    a, b = case.keypoints[i].double().numpy(), case.keypoints[j].double().numpy()
    area = float(case.areas[i] + case.areas[j]) / 2 + np.spacing(1)
    total = 0.0
    for k, sigma in enumerate(case.sigmas):
        squared = (a[k, 0] - b[k, 0]) ** 2 + (a[k, 1] - b[k, 1]) ** 2
        total += math.exp(-squared / (2 * float(sigma)) ** 2 / area / 2)
    return total / len(case.sigmas)


def nms_by_lists(case: Case) -> list[int]:
    """The definition with lists: with `skip`, the element after a removed one is passed over."""
    n = len(case.scores)
    groups = [0] * n if case.groups is None else case.groups.tolist()
    kept = []
    for group in sorted(set(groups)):
        left = [i for i in range(n) if groups[i] == group]
        left.sort(key=lambda i: -float(case.scores[i]))
        at = 0
        while at < len(left):
            other = at + 1
            while other < len(left):
                if oks_of(case, left[at], left[other]) > case.threshold:
                    left.pop(other)
                    other += case.skip
                else:
                    other += 1
            at += 1
        kept += left
    return kept


def check(case: Case, backend: str, device: str) -> list[int]:
    with use_backend(backend):
        kept = run(case, device)
    assert kept == nms_by_lists(case)
    return kept


@on_every_backend
def test_published_results(backend: str, device: str, shared_dir: Path) -> None:
    """pipeline.npz: six poses with areas of 200 × 200, OKS rounded to four digits."""
    data = np.load(shared_dir / "reference" / "pipeline.npz")
    case = Case(
        torch.from_numpy(data["nms_keypoints"]).reshape(6, 17, 3),
        torch.from_numpy(data["nms_scores"]),
        torch.full((6,), 200.0**2),
    )
    oks = oks_matrix(case.keypoints, case.areas, case.sigmas)
    np.testing.assert_allclose(oks, data["nms_oks"], atol=5.1e-5)
    assert check(replace(case, skip=True), backend, device) == data["nms_keep"].tolist()
    assert check(case, backend, device) == [0, 4, 5]


@on_every_backend
@settings(max_examples=80, deadline=None)
@given(data=st.data())
def test_any_crowd(backend: str, device: str, data: st.DataObject) -> None:
    case = crowd(
        data.draw(st.integers(0, 14)),
        data.draw(st.integers(0, 999)),
        data.draw(st.integers(1, 17)),
        data.draw(st.integers(0, 3)),
    )
    threshold = data.draw(st.sampled_from([0.0, 0.3, 0.5, 0.9]))
    check(replace(case, threshold=threshold, skip=data.draw(st.booleans())), backend, device)


@on_every_backend
@pytest.mark.parametrize("skip", [False, True])
def test_a_large_crowd_in_one_image_and_in_many(backend: str, device: str, skip: bool) -> None:
    for groups in (0, 1, 40):
        case = replace(crowd(130, 3, groups=groups), threshold=0.5, skip=skip)
        kept = check(case, backend, device)
        assert 0 < len(kept) < 130


@on_every_backend
def test_equal_scores_keep_the_lower_index(backend: str, device: str) -> None:
    case = crowd(4)
    pose = case.keypoints[:1].expand(4, -1, -1)
    same = replace(case, keypoints=pose, areas=torch.ones(4), scores=torch.ones(4))
    assert check(same, backend, device) == [0]
    assert check(replace(same, scores=torch.tensor([1.0, 2.0, 2.0, 1.0])), backend, device) == [1]
    groups = torch.tensor([7, -1, 7, -1])
    assert check(replace(same, groups=groups), backend, device) == [1, 0]


@on_every_backend
def test_identical_people_resemble_each_other_by_one(backend: str, device: str) -> None:
    case = crowd(3)
    pose = case.keypoints[:1].repeat(3, 1, 1)
    for areas in (torch.zeros(3), torch.ones(3)):  # also without any area
        same = replace(case, keypoints=pose, areas=areas, scores=torch.ones(3))
        assert oks_matrix(pose, areas, case.sigmas).tolist() == [[1.0] * 3] * 3
        assert check(replace(same, threshold=1.0), backend, device) == [0, 1, 2]
        below = math.nextafter(1.0, 0.0)
        assert check(replace(same, threshold=below), backend, device) == [0]
        assert check(replace(same, threshold=below, skip=True), backend, device) == [0, 2]


@on_every_backend
def test_only_more_than_the_threshold_is_removed(backend: str, device: str) -> None:
    keypoints = torch.zeros(2, 4, 2)
    keypoints[1, 2:] = 1e6  # two of four keypoints agree: OKS is exactly one half
    case = Case(keypoints, torch.tensor([1.0, 0.5]), torch.ones(2), sigmas=(0.05,) * 4)
    assert oks_matrix(keypoints, case.areas, case.sigmas)[0, 1] == 0.5
    assert check(replace(case, threshold=0.5), backend, device) == [0, 1]
    below = math.nextafter(0.5, 0.0)
    assert check(replace(case, threshold=below), backend, device) == [0]
    assert check(replace(case, threshold=-1.0), backend, device) == [0]


@on_every_backend
def test_without_an_area_any_distance_is_far(backend: str, device: str) -> None:
    keypoints = torch.zeros(2, 17, 2)
    keypoints[1] += 1e-3
    case = Case(keypoints, torch.ones(2), torch.zeros(2))
    assert check(case, backend, device) == [0, 1]
    assert check(replace(case, areas=torch.tensor([0.0, 1e4])), backend, device) == [0]


@on_every_backend
def test_nan_coordinates_remove_nobody_and_nan_scores_come_last(backend: str, device: str) -> None:
    case = replace(crowd(6), keypoints=torch.zeros(6, 17, 3), areas=torch.ones(6))
    case.keypoints[2, 0, 0] = case.keypoints[4, 16, 1] = math.nan
    scores = torch.tensor([0.1, 0.5, 0.9, math.nan, 0.7, -math.inf])
    with use_backend(backend):
        assert run(replace(case, scores=scores, threshold=0.99), device) == [2, 4, 1]
        spread = replace(case, keypoints=1e4 * torch.arange(6.0).view(6, 1, 1).expand(6, 17, 2))
        assert run(replace(spread, scores=scores), device) == [2, 4, 1, 0, 3, 5]


@on_every_backend
def test_skipping_ends_with_the_walk_of_the_pose_that_removed(backend: str, device: str) -> None:
    """0 removes 1, passes over 2, compares 3; then 2 compares all that follow, 3 too."""
    keypoints = torch.zeros(5, 17, 2)
    keypoints[3:] += 500.0
    keypoints[2] += torch.tensor([0.0, 0.1])
    case = Case(keypoints, torch.linspace(1, 0.6, 5), torch.full((5,), 1e4), skip=True)
    assert check(case, backend, device) == [0, 2, 3]


@on_every_backend
def test_every_dtype_and_layout(backend: str, device: str) -> None:
    case = crowd(12, 5, groups=2)
    want = check(case, backend, device)
    half = torch.stack((case.keypoints, case.keypoints), dim=-1)[..., 0]
    assert not half.is_contiguous()
    changed = replace(
        case,
        keypoints=half,
        scores=case.scores.half(),
        sigmas=torch.tensor(case.sigmas).double(),
        groups=torch.stack((case.groups, case.groups), dim=-1)[..., 0],  # type: ignore[arg-type]
    )
    assert check(changed, backend, device) == want
    single = replace(case, keypoints=case.keypoints.float(), areas=case.areas.float())
    check(single, backend, device)
    check(replace(case, keypoints=case.keypoints[..., :2]), backend, device)
    check(replace(case, areas=(case.areas * 10).long()), backend, device)


@on_every_backend
def test_no_poses_give_no_indices(backend: str, device: str) -> None:
    assert check(crowd(0), backend, device) == []
    assert check(crowd(0, groups=2), backend, device) == []
    assert check(crowd(1), backend, device) == [0]


@needs_cpp
def test_threads_change_nothing() -> None:
    case = replace(crowd(600, 8, groups=150), threshold=0.5)
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 3, 1):
            torch.set_num_threads(count)
            with use_backend("cpp"):
                results.append(run(case))
    finally:
        torch.set_num_threads(threads)
    assert all(result == results[0] for result in results)
    assert results[0] == nms_by_lists(case)


@needs_cpp
def test_every_index_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    real = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *a, **k: real(*a, **k).fill_(-(2**62)))
    check(crowd(40, 2, groups=3), "cpp", "cpu")


@needs_cpp
def test_opcheck() -> None:
    case = crowd(9, 1, groups=2)
    sigmas = torch.tensor(case.sigmas, dtype=torch.float64)
    for groups in (None, case.groups):
        args = (case.keypoints[..., :2].contiguous(), case.scores, case.areas, sigmas, 0.5)
        torch.library.opcheck(torch.ops.pnfs.oks_nms_cpp.default, (*args, groups, False))


def test_the_matrix_is_the_formula_in_float64() -> None:
    case = crowd(9, 4)
    for keypoints in (case.keypoints, case.keypoints.float()):
        one = replace(case, keypoints=keypoints)
        oks = oks_matrix(keypoints, case.areas, case.sigmas)
        assert oks.dtype == torch.float64
        want = [[oks_of(one, i, j) for j in range(9)] for i in range(9)]
        np.testing.assert_allclose(oks, want, rtol=1e-12, atol=1e-300)
        assert torch.equal(oks, oks.T)
    assert oks_matrix(case.keypoints[:0], case.areas[:0], case.sigmas).shape == (0, 0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"keypoints": torch.zeros(3, 34)}, r"keypoints must have shape \(any, any, any\)"),
        ({"keypoints": torch.zeros(3, 17, 1)}, r"keypoints must be \(n, K, 2 or more\)"),
        ({"keypoints": torch.zeros(3, 0, 3)}, r"keypoints must be \(n, K, 2 or more\)"),
        ({"keypoints": torch.zeros(3, 17, 3).int()}, "keypoints must be float32 or float64"),
        ({"scores": torch.zeros(2)}, r"scores must have shape \(3\), not \(2,\)"),
        ({"scores": torch.zeros(3).int()}, "scores must be floating point, not int32"),
        ({"areas": torch.zeros(3, 1)}, r"areas must have shape \(3\)"),
        ({"sigmas": (0.1,) * 16}, r"sigmas must have shape \(17\), not \(16,\)"),
        ({"groups": torch.zeros(3)}, "groups must be int64, not float32"),
        ({"groups": torch.zeros(2).long()}, r"groups must have shape \(3\)"),
        ({"areas": torch.zeros(3, device="meta")}, "areas is on meta but keypoints is on cpu"),
    ],
)
def test_wrong_arguments_are_named(change: dict[str, Any], message: str) -> None:
    case = Case(torch.zeros(3, 17, 3), torch.zeros(3), torch.ones(3))
    with pytest.raises(PnfsError, match=message):
        run(replace(case, **change))
