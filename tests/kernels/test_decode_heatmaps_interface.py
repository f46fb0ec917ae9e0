"""What callers and torch rely on in decode_heatmaps: what is refused and by which words, opcheck,
torch.compile, every value written and the same in every run."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from decode_heatmaps_cases import DTYPES, check, lay_out, needs_cpp, random_case, run
from torch import Tensor

from pnfs.errors import PnfsError
from pnfs.kernels import decode_heatmaps, use_backend


@needs_cpp
def test_every_value_is_written_and_equal_in_every_run(monkeypatch: pytest.MonkeyPatch) -> None:
    real = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *a, **k: real(*a, **k).fill_(math.nan))
    case = random_case((5, 17, 40, 30), shift=True)
    channels_last = case.map(lambda t: lay_out(t, "channels-last"))
    threads = torch.get_num_threads()
    outputs = []
    try:
        for count in (1, 2, 3, 1):
            torch.set_num_threads(count)
            with use_backend("cpp"):
                outputs += [run(case), run(channels_last)]
    finally:
        torch.set_num_threads(threads)
    assert not outputs[0][0].isnan().any()
    for xy, score in outputs:
        assert torch.equal(xy, outputs[0][0]) and torch.equal(score, outputs[0][1])


@needs_cpp
def test_addresses_beyond_two_to_the_31() -> None:
    try:  # pages that nobody touches cost no memory
        storage = torch.empty(2**31 + 4096, dtype=torch.bfloat16)
    except RuntimeError:
        pytest.skip("no 4 GiB of address space")
    small = random_case((2, 16, 12, 16), dtype=torch.bfloat16, flip=False)
    for strides in [(2**31, 192, 16, 1), (2**31, 1, 256, 16)]:
        far = storage.as_strided((2, 16, 12, 16), strides)
        far.copy_(small.heatmaps)
        check(replace(small, heatmaps=far), "cpp", "cpu")


@needs_cpp
def test_opcheck() -> None:
    for dtype in DTYPES:
        case = random_case((2, 3, 6, 18), dtype=dtype)
        args = (case.heatmaps, case.matrices, case.flipped, torch.tensor(case.permutation), True)
        torch.library.opcheck(torch.ops.pnfs.decode_heatmaps_cpp.default, args)
    args = (case.heatmaps, case.matrices, None, None, False)
    torch.library.opcheck(torch.ops.pnfs.decode_heatmaps_cpp.default, args)


@needs_cpp
def test_torch_compile_sees_one_op() -> None:
    case = random_case((2, 17, 8, 18))
    compiled = torch.compile(run, backend="aot_eager", fullgraph=False)
    for got, want in zip(compiled(case), run(case), strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("backend", ["torch", "auto"])
def test_nothing_is_differentiated(backend: str) -> None:
    case = random_case((1, 2, 5, 5)).map(Tensor.requires_grad_)
    with use_backend(backend):
        assert not any(result.requires_grad for result in run(case))


MAPS = torch.zeros(2, 3, 4, 5)
MATRICES = torch.zeros(2, 2, 3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"heatmaps": MAPS[0]}, r"heatmaps must have shape \(any, any, any, any\)"),
        ({"heatmaps": MAPS.int()}, "heatmaps must be float32 or bfloat16 or float16 or float64"),
        ({"heatmaps": MAPS[..., :0]}, r"heatmaps must have cells, not shape \(2, 3, 4, 0\)"),
        ({"matrices": MATRICES[:1]}, r"matrices must have shape \(2, 2, 3\), not \(1, 2, 3\)"),
        ({"matrices": MATRICES.half()}, "matrices must be float32 or float64, not float16"),
        ({"flipped": MAPS[:, :2]}, r"flipped must have shape \(2, 3, 4, 5\)"),
        ({"flipped": MAPS.half()}, "flipped must be float32, not float16"),
        ({"flipped": MAPS, "permutation": (0, 1)}, "permutation must have 3 indices"),
        ({"flipped": MAPS, "permutation": (0, 1, 3)}, r"has index 3; indices must be 0\.\.2"),
        ({"flipped": MAPS, "permutation": torch.tensor([0, -1, 1])}, "has index -1"),
        ({"flipped": MAPS, "permutation": torch.zeros(3)}, "permutation must be int64"),
        ({"flipped": MAPS.to("meta")}, "flipped is on meta but heatmaps is on cpu"),
    ],
)
def test_wrong_arguments_are_named(change: dict[str, Any], message: str) -> None:
    arguments = {"heatmaps": MAPS, "matrices": MATRICES, **change}
    with pytest.raises(PnfsError, match=message):
        decode_heatmaps(arguments.pop("heatmaps"), arguments.pop("matrices"), **arguments)


@pytest.mark.gpu
def test_on_a_gpu_a_wrong_permutation_reads_nothing() -> None:
    case = replace(random_case((1, 2, 5, 5)), permutation=torch.tensor([2**40, 1]))
    with use_backend("triton"):
        xy, score = run(case, "cuda")
    assert score[0, 0] == -math.inf and xy[0, 0].isfinite().all()
