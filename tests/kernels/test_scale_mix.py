"""scale_mix: every backend against the float64 reference, and that against plain layers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numerics import (
    ISAS,
    check_every_value_is_written_and_equal_in_every_run,
    check_value_and_gradients,
    error_of,
    examples,
    memory_filled_with_nan,
    opcheck,
    value_and_gradients,
)
from torch import Tensor, nn
from torch.nn import functional as F

from pnfs.errors import PnfsError
from pnfs.kernels import batch_stats, native, scale_mix, use_backend
from pnfs.kernels.checks import STORAGE_CPU
from pnfs.kernels.registry import op_costs
from pnfs.kernels.scale_mix import OP, TRANSFORMS

DTYPES = {torch.float32: 2e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}
if native.triton_interpreted():  # which cuts bfloat16 off
    DTYPES[torch.bfloat16] = 2**-7

needs_cpp = pytest.mark.skipif(
    not native.has_function("_cpu", "scale_mix")[0],
    reason=native.has_function("_cpu", "scale_mix")[1] or "-",
)
BACKENDS = [
    pytest.param("torch", "cpu"),
    pytest.param("cpp", "cpu", marks=needs_cpp),
    pytest.param("triton", "cpu"),
    pytest.param("triton", "cuda", marks=pytest.mark.gpu),
]
TRITON = BACKENDS[2:]
on_every_backend = pytest.mark.parametrize(("backend", "device"), BACKENDS)
on_triton = pytest.mark.parametrize(("backend", "device"), TRITON)
# Of random shapes; Triton's interpreter takes milliseconds per program.
EXAMPLES = 3 if native.triton_interpreted() else 30


@dataclass(frozen=True)
class Case:
    """The arguments of one call; `norms` are means, variances, gammas, betas."""

    sources: list[Tensor]
    transforms: list[str]
    norms: list[list[Tensor]]
    weights: Tensor
    relu: bool = True
    down_relu: bool = False

    @property
    def tensors(self) -> list[Tensor]:
        return [*self.sources, *(s for items in self.norms for s in items), self.weights]

    @property
    def arguments(self) -> tuple[Any, ...]:
        """As the registered ops take them."""
        codes = [TRANSFORMS.index(name) for name in self.transforms]
        return self.sources, codes, *self.norms, self.weights, self.relu, self.down_relu, 1e-5

    def with_tensors(self, tensors: tuple[Tensor, ...]) -> Case:
        count, per_norm = len(self.sources), len(self.norms[0])
        rest = tensors[count:-1]
        norms = [list(rest[i * per_norm : (i + 1) * per_norm]) for i in range(4)]
        return replace(self, sources=list(tensors[:count]), norms=norms, weights=tensors[-1])

    def map(self, change: Callable[[Tensor], Tensor]) -> Case:
        """The same with all sources changed."""
        return replace(self, sources=[change(x) for x in self.sources])

    def double(self) -> Case:
        return self.with_tensors(tuple(tensor.double() for tensor in self.tensors))

    def call(self, *tensors: Tensor) -> Tensor:
        c = self.with_tensors(tensors)
        switches = {"relu": c.relu, "down_relu": c.down_relu}
        return scale_mix(c.sources, c.transforms, *c.norms, c.weights, **switches)


def random_case(
    shape: tuple[int, int, int, int, int],
    transforms: str = "same down up",
    *,
    relu: bool = True,
    down_relu: bool = False,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> Case:
    """`shape` is (P, N, C, H, W) of the output."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator)

    p, n, c, h, w = shape
    names = transforms.split()
    sources = []
    for name in names:
        size = (h // 2, w // 2) if name == "up" else (h, w)
        sources.append(normal(p, n, *size, c).permute(0, 1, 4, 2, 3).to(dtype))
    per_norm = len(names) - names.count("same")
    norms = [[normal(p, c) for _ in range(per_norm)] for _ in range(4)]
    norms[1] = [s.square() + 0.1 for s in norms[1]]
    return Case(sources, names, norms, normal(p, len(names)), relu, down_relu)


def run(case: Case, device: str = "cpu") -> list[Tensor]:
    """The output and the gradients of all tensors."""
    return value_and_gradients(case.call, [tensor.to(device) for tensor in case.tensors])


def check(case: Case, backend: str, device: str) -> list[Tensor]:
    with use_backend(backend):
        have = run(case, device)
    out, dtype = have[0], case.sources[0].dtype
    assert out.dtype == dtype
    assert out.permute(0, 1, 3, 4, 2).is_contiguous()
    assert [result.dtype for result in have[1:]] == [tensor.dtype for tensor in case.tensors]
    with use_backend("torch"):
        check_value_and_gradients(case.call, have, case.double().tensors, DTYPES[dtype])
    return have


@pytest.mark.parametrize(("relu", "down_relu"), [(True, False), (False, True)])
def test_the_reference_equals_plain_layers(relu: bool, down_relu: bool) -> None:
    """With batch statistics, output and gradients are those of torch's layers, per part."""
    shape = (3, 4, 5, 6, 8)
    case = random_case(shape, relu=relu, down_relu=down_relu).double()
    up = nn.Upsample(scale_factor=2, mode="bilinear", align_corners=True)

    def layers(same: Tensor, down: Tensor, above: Tensor, *rest: Tensor) -> Tensor:
        *affine, weights = rest
        parts = []
        for p in range(3):
            gamma, gamma_up, beta, beta_up = (s[p] for s in affine)
            t_down = F.batch_norm(down[p], None, None, gamma, beta, training=True)
            t_down = F.relu(t_down) if down_relu else t_down
            t_up = up(F.batch_norm(above[p], None, None, gamma_up, beta_up, training=True))
            terms = zip(weights[p], (same[p], t_down, t_up), strict=True)
            total = sum(weight * term for weight, term in terms)
            parts.append(F.relu(total) if relu else total)
        return torch.stack(parts)

    def op(*tensors: Tensor) -> Tensor:
        sources, affine, weights = tensors[:3], tensors[3:-1], tensors[-1]
        statistics = [batch_stats(x) for x in sources[1:]]
        means, variances = zip(*statistics, strict=True)
        switches = {"relu": relu, "down_relu": down_relu}
        return scale_mix(
            sources, TRANSFORMS, means, variances, affine[:2], affine[2:], weights, **switches
        )

    inputs = [*case.sources, *case.norms[2], *case.norms[3], case.weights]
    for have, want in zip(
        value_and_gradients(op, inputs), value_and_gradients(layers, inputs), strict=True
    ):
        assert error_of(have, want) < 1e-12


@pytest.mark.parametrize(("relu", "down_relu"), [(True, False), (False, True)])
def test_gradcheck_of_the_reference(relu: bool, down_relu: bool) -> None:
    case = random_case((2, 1, 2, 2, 4), relu=relu, down_relu=down_relu).double()
    leaves = tuple(tensor.requires_grad_() for tensor in case.tensors)
    assert torch.autograd.gradcheck(case.call, leaves)


@on_every_backend
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("transforms", ["same down up", "down down down", "up same same", "same"])
def test_equals_the_float64_reference(
    backend: str, device: str, dtype: torch.dtype, transforms: str
) -> None:
    if backend == "cpp" and dtype not in STORAGE_CPU:
        pytest.skip("not a type of the CPU kernels")
    interpreted = (backend, device) == ("triton", "cpu")
    if interpreted and transforms != "same down up" and dtype != torch.float32:
        pytest.skip("Triton's interpreter: all transforms run the same lines")
    shape = (2, 2, 40, 4, 6) if interpreted else (3, 2, 64, 8, 6)
    if interpreted and dtype != torch.float32:  # which changes loads and stores alone
        shape = (1, 2, 16, 4, 6)
    for relu in (True, False):
        case = random_case(shape, transforms, relu=relu, down_relu=not relu, dtype=dtype)
        check(case, backend, device)


@on_every_backend
def test_any_shape(backend: str, device: str) -> None:
    @examples(EXAMPLES, device)
    @given(data=st.data())
    def any_case(data: st.DataObject) -> None:
        transforms = data.draw(st.lists(st.sampled_from(TRANSFORMS), min_size=1, max_size=4))
        factor = 2 if "up" in transforms else 1
        interpreted = (backend, device) == ("triton", "cpu")  # a program at a time, in Python
        side = st.integers(1, 3 if interpreted else 9)
        wide = [32] if interpreted else [32, 48, 64, 80, 130]
        shape = (
            data.draw(st.integers(1, 2 if interpreted else 8)),
            data.draw(st.integers(0, 2 if interpreted else 3)),
            data.draw(st.one_of(st.integers(1, 20), st.sampled_from(wide))),
            data.draw(side) * factor,
            data.draw(side) * factor,
        )
        case = random_case(
            shape,
            " ".join(transforms),
            relu=data.draw(st.booleans()),
            down_relu=data.draw(st.booleans()),
            seed=data.draw(st.integers(0, 99)),
        )
        check(case, backend, device)

    any_case()


@on_every_backend
@pytest.mark.parametrize(("parts", "images"), [(1, 1), (2, 3), (3, 8)])
def test_bands_of_images_meet_without_a_seam(
    backend: str, device: str, parts: int, images: int
) -> None:
    """Few images are cut into bands of rows that several threads take."""
    if (backend, device) == ("triton", "cpu"):
        pytest.skip("Triton's interpreter: it knows no bands")
    check(random_case((parts, images, 20, 50, 6)), backend, device)


@on_every_backend
def test_upsampling_meets_both_ends_and_keeps_planes(backend: str, device: str) -> None:
    """Bilinear upsampling with aligned corners reproduces a plane, and its corners exactly."""
    y, x = torch.meshgrid(torch.arange(5.0), torch.arange(7.0), indexing="ij")
    plane = (2 * y - 3 * x + 1).expand(1, 1, 3, 5, 7)
    rows, columns = torch.linspace(0, 4, 10), torch.linspace(0, 6, 14)
    zeros, ones = torch.zeros(1, 3, device=device), torch.ones(1, 3, device=device)
    with use_backend(backend):
        out = scale_mix(
            [plane.to(device)], ["up"], [zeros], [ones], [ones], [zeros], ones[:, :1],
            relu=False, eps=0.0,
        )  # fmt: skip
    want = 2 * rows[:, None] - 3 * columns + 1
    torch.testing.assert_close(out.cpu(), want.expand_as(out), rtol=0, atol=3e-6)
    corners = (..., slice(None, None, 9), slice(None, None, 13))
    assert torch.equal(out.cpu()[corners], plane[..., ::4, ::6])


@on_every_backend
def test_a_mean_far_above_the_deviation(backend: str, device: str) -> None:
    case = random_case((2, 3, 20, 6, 4))
    means, variances = case.norms[:2]
    offsets = [1e3 * var.sqrt() for var in variances]
    sources = [case.sources[0]]
    for x, offset in zip(case.sources[1:], offsets, strict=True):
        sources.append(x + offset[:, None, :, None, None])
    norms = [[m + o for m, o in zip(means, offsets, strict=True)], *case.norms[1:]]
    check(replace(case, sources=sources, norms=norms), backend, device)


@on_every_backend
def test_any_layout(backend: str, device: str) -> None:
    case = random_case((3, 2, 16, 6, 4))
    contiguous = check(case.map(lambda x: x.contiguous()), backend, device)
    strided = check(case.map(lambda x: torch.stack((x, x), dim=-1)[..., 0]), backend, device)
    check(case.map(lambda x: x[:1].expand_as(x)), backend, device)
    assert torch.equal(contiguous[0], strided[0])


@needs_cpp
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", STORAGE_CPU)
def test_every_instruction_set(
    isa: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PNFS_ISA", isa)
    for channels in (3, 22, 64):
        check(random_case((2, 2, channels, 6, 8), dtype=dtype), "cpp", "cpu")


@needs_cpp
@pytest.mark.parametrize("images", [1, 9])
def test_every_value_is_written_and_equal_in_every_run(images: int) -> None:
    case = random_case((2, images, 80, 38, 18))
    check_every_value_is_written_and_equal_in_every_run(lambda: run(case))


@needs_cpp
@pytest.mark.parametrize("dtype", STORAGE_CPU)
def test_opcheck(dtype: torch.dtype) -> None:
    for case in (
        random_case((2, 2, 5, 4, 2), dtype=dtype),
        random_case((1, 1, 16, 1, 1), "same", dtype=dtype),
        random_case((1, 1, 3, 2, 2), "up", dtype=dtype, relu=False),
    ):
        opcheck("scale_mix_cpp", *case.arguments)


@on_triton
@pytest.mark.parametrize("transforms", ["same down up", "up", "same down"])
def test_programs_that_take_several_steps(
    backend: str, device: str, transforms: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every value is written, and the same ones in every run."""
    monkeypatch.setattr("pnfs.kernels.triton.maps.PROGRAMS", 3)
    case = random_case((2, 2, 20, 10, 8), transforms)
    with memory_filled_with_nan():
        first, second = (check(case, backend, device) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@on_triton
def test_opcheck_of_triton(backend: str, device: str) -> None:
    case = random_case((2, 1, 5, 4, 2))
    case = case.with_tensors(tuple(tensor.to(device) for tensor in case.tensors))
    opcheck("scale_mix_triton", *case.arguments)


def test_what_a_gpu_kernel_does_not_take(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "backend_available", lambda *_: (True, ""))
    monkeypatch.setattr(native, "backend_fits", lambda *_: (True, ""))
    huge = random_case((1, 1, 1, 1, 1), "same")
    huge = huge.map(lambda x: x.expand(1, 1, 1, 2**15, 2**15))
    for case, message in [
        (random_case((1, 1, 2, 1, 1), " ".join(["same"] * 9)), "9 sources, takes up to 8"),
        (random_case((1, 1, 2, 1, 1), "same").double(), "float64, takes float32, bfloat16, fl"),
    ]:
        with use_backend("triton"), pytest.raises(PnfsError, match=message):
            run(case)
    ok, reason = OP.verdict("triton", (huge.sources, [0], [], [], [], [], huge.weights))
    assert not ok
    assert "1073741824 pixels per part, takes fewer than 2^30" in reason


def test_costs_of_the_gpu_count_the_sums_between_its_two_kernels() -> None:
    pytest.importorskip("triton", reason="triton is not installed")
    case = random_case((3, 2, 40, 32, 24))
    case = case.with_tensors(tuple(t.to("meta") for t in case.tensors))
    h = torch.empty(3, 2, 40, 32, 24, device="meta")
    args = (h, h, case.sources, [0, 1, 2], *case.norms, case.weights, True, False, 1e-5)
    outputs = torch.ops.pnfs.scale_mix_triton_backward.default(*args)
    cost = op_costs["pnfs::scale_mix_triton_backward"](args, outputs)
    # Two sums per term, part and channel of 24 blocks of 16 pixels of half resolution.
    assert (cost.launches, cost.scratch) == (2, 2 * 4 * 3 * 3 * 2 * 24 * 40)


@needs_cpp
def test_torch_compile_keeps_the_op_and_its_gradient() -> None:
    case = random_case((2, 2, 16, 4, 4))
    compiled = torch.compile(
        lambda *tensors: 2 * case.call(*tensors), fullgraph=True, backend="aot_eager"
    )
    for have, want in zip(value_and_gradients(compiled, case.tensors), run(case), strict=True):
        assert torch.equal(have, 2 * want)


SMALL = random_case((2, 1, 4, 4, 6))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sources": []}, "needs a source"),
        ({"transforms": ["same"]}, "transforms must have one entry per source, 3, not 1"),
        ({"transforms": ["same", "dwon", "up"]}, "'dwon' is unknown; use same, down, up.*'down'"),
        ({"transforms": ["same"] * 3}, r"sources\[2\] must have shape \(2, 1, 4, 4, 6\)"),
        (
            {"transforms": ["down", "down", "up"]},
            "means must have one entry per source that is not",
        ),
        ({"sources": [torch.zeros(2, 1, 4, 5, 6), *SMALL.sources[1:]]}, r"sources\[1\] must have"),
        ({"weights": torch.zeros(2, 2)}, r"weights must have shape \(2, 3\), not \(2, 2\)"),
        ({"norms": [*SMALL.norms[:3], [torch.zeros(4)] * 2]}, r"betas\[0\] must have shape"),
        ({"weights": torch.zeros(2, 3, device="meta")}, r"weights is on meta but sources\[0\] is"),
    ],
)
def test_wrong_arguments_are_named(change: dict[str, Any], message: str) -> None:
    case = replace(SMALL, **change)
    with pytest.raises(PnfsError, match=message):
        scale_mix(case.sources, case.transforms, *case.norms, case.weights, relu=True)


def test_an_odd_size_cannot_be_reached_by_upsampling() -> None:
    sources = [torch.zeros(1, 1, 2, 5, 4), torch.zeros(1, 1, 2, 2, 2)]
    norms = [[torch.ones(1, 2)]] * 4
    with pytest.raises(PnfsError, match=r"sources\[1\] cannot be scaled by 2 to .* odd size 5×4"):
        scale_mix(sources, ["same", "up"], *norms, torch.ones(1, 2), relu=True)
