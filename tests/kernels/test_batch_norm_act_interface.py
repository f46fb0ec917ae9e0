"""What callers and torch rely on in batch_norm_act: what is refused and by which words, opcheck,
torch.compile, costs, every value written and the same in every run."""

from __future__ import annotations

import pytest
import torch
from batch_norm_act_cases import needs_cpp, of_every_kind, on_triton, random_case
from numerics import (
    check_every_value_is_written_and_equal_in_every_run,
    opcheck,
    value_and_gradients,
)
from torch import Tensor

from pnfs.errors import PnfsError
from pnfs.kernels import batch_norm_act, use_backend
from pnfs.kernels.checks import ACTIVATIONS, STORAGE_CPU, Activation
from pnfs.kernels.registry import OpCost, op_costs


@needs_cpp
@pytest.mark.parametrize("given_stats", [False, True])
@pytest.mark.parametrize("residual", [False, True])
def test_every_value_is_written_and_equal_in_every_run(given_stats: bool, residual: bool) -> None:
    case = random_case((3, 24, 117, 119), residual=residual, given_stats=given_stats)
    check_every_value_is_written_and_equal_in_every_run(case.results)


@needs_cpp
def test_the_residual_shares_its_gradient_where_nothing_masks_it() -> None:
    case = random_case((2, 16, 3, 4), "none", residual=True)
    x, weight, bias, residual = (t.requires_grad_() for t in case.tensors.values())
    with use_backend("cpp"):
        y = batch_norm_act(x, weight, bias, residual=residual)[0]
    gy = torch.randn_like(y)
    _, given = torch.autograd.grad(y, (x, residual), gy)
    assert given.data_ptr() == gy.data_ptr()


@needs_cpp
@pytest.mark.parametrize("dtype", STORAGE_CPU)
@of_every_kind
def test_opcheck(
    dtype: torch.dtype, activation: Activation, residual: bool, given_stats: bool
) -> None:
    kind = {"residual": residual, "given_stats": given_stats, "dtype": dtype}
    for shape in ((2, 5, 3, 4), (1, 16, 1, 1)):
        case = random_case(shape, activation, **kind)
        code = ACTIVATIONS.index(activation)
        args = (case.x, case.weight, case.bias, case.mean, case.var, case.residual, code, 1e-5)
        opcheck("batch_norm_act_cpp", *args)


@on_triton
@pytest.mark.parametrize("given_stats", [False, True])
def test_opcheck_of_triton(backend: str, device: str, given_stats: bool) -> None:
    case = random_case((2, 5, 3, 4), residual=True, given_stats=given_stats)
    case = case.map(lambda tensor: tensor.to(device).requires_grad_())
    code = ACTIVATIONS.index(case.activation)
    args = (case.x, case.weight, case.bias, case.mean, case.var, case.residual, code, 1e-5)
    torch.library.opcheck(torch.ops.pnfs.batch_norm_act_triton.default, args)


@pytest.mark.parametrize("given_stats", [False, True])
@pytest.mark.parametrize("residual", [False, True])
def test_costs_of_the_gpu(given_stats: bool, residual: bool) -> None:
    """Two sums per channel of 12 blocks of 128 pixels, backward 24 of 64, written by the first
    launch, and read by each of 24 programs per channel of the second; with given statistics by the
    last program of the only one."""
    pytest.importorskip("triton", reason="triton is not installed")
    case = random_case((2, 32, 32, 24), residual=residual, given_stats=given_stats)
    case = case.map(lambda tensor: tensor.to("meta"))
    args = (case.x, case.weight, case.bias, case.mean, case.var, case.residual, 2, 1e-5)
    maps = case.x.nbytes
    forward = op_costs["pnfs::batch_norm_act_triton"](args, None)
    stats = (case.bias, case.bias)
    args = (case.x, case.x, case.weight, case.bias, *stats, case.residual, 2, not given_stats, 1e-5)
    backward = op_costs["pnfs::batch_norm_act_triton_backward"](args, None)
    sums = 4 * 2 * 32 * (1 + 24)
    if given_stats:
        assert forward == OpCost(1, (2 + residual) * maps)
        assert backward == OpCost(1, (3 + 2 * residual) * maps, scratch=24 * 4 * 2 * 32 * 2)
    else:
        assert forward == OpCost(2, (3 + residual) * maps, scratch=12 * sums)
        assert backward == OpCost(2, (5 + 2 * residual) * maps, scratch=24 * sums)


@pytest.mark.parametrize("residual", [False, True])
def test_costs_of_maps_of_many_channels_on_a_gpu(residual: bool) -> None:
    """One launch each way, and nothing passes between programs."""
    pytest.importorskip("triton", reason="triton is not installed")
    for channels, launches in ((376, 2), (377, 1)):
        x = torch.empty(2, channels, 16, 12, device="meta")
        small = torch.empty(channels, device="meta")
        added = x if residual else None
        args = (x, small, small, None, None, added, 2, 1e-5)
        forward = op_costs["pnfs::batch_norm_act_triton"](args, None)
        args = (x, x, small, small, small, small, added, 2, True, 1e-5)
        backward = op_costs["pnfs::batch_norm_act_triton_backward"](args, None)
        assert forward.launches == backward.launches == launches
        if launches == 1:
            assert forward == OpCost(1, (3 + residual) * x.nbytes)
            assert backward == OpCost(1, (5 + 2 * residual) * x.nbytes)


@needs_cpp
def test_torch_compile_keeps_the_op_and_its_gradient() -> None:
    case = random_case((2, 16, 4, 4), "relu6", residual=True)

    def call(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor) -> Tensor:
        return 2 * batch_norm_act(x, weight, bias, residual=residual, activation="relu6")[0]

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    tensors = list(case.tensors.values())
    have, want = value_and_gradients(compiled, tensors), value_and_gradients(call, tensors)
    assert all(torch.equal(a, b) for a, b in zip(have, want, strict=True))


def test_wrong_arguments_are_named() -> None:
    x, one = torch.zeros(1, 2, 1, 1), torch.ones(2)
    with pytest.raises(PnfsError, match="x must have shape"):
        batch_norm_act(x[0], one, one)
    with pytest.raises(PnfsError, match=r"weight must have shape \(2\)"):
        batch_norm_act(x, one[:1], one)
    with pytest.raises(PnfsError, match="bias must be float32"):
        batch_norm_act(x, one, one.double())
    with pytest.raises(PnfsError, match="mean and var must be given both or neither"):
        batch_norm_act(x, one, one, mean=one)
    with pytest.raises(PnfsError, match="residual must have shape"):
        batch_norm_act(x, one, one, residual=x[:, :1])
    with pytest.raises(PnfsError, match="did you mean 'relu'"):
        batch_norm_act(x, one, one, activation="relu7")  # type: ignore[arg-type]
