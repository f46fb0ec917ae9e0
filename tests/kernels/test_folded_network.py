"""folded_network: programs of every kind of step, C++ against the float64 reference."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numerics import BF16_ISAS, ISAS, error_of, memory_filled_with_nan, results_by_threads
from torch import Tensor
from torch.nn import functional as F

from pnfs.errors import PnfsError
from pnfs.folding.writer import Writer
from pnfs.kernels import folded_network, native, use_backend
from pnfs.kernels.folded_network import OP, pack, panel_widths, unpack
from pnfs.kernels.folded_program import LINEAR, RELU, RELU6, Head, Pool, parse

needs_cpp = pytest.mark.skipif(
    not native.has_function("_cpu", "folded_network")[0],
    reason=native.has_function("_cpu", "folded_network")[1] or "-",
)
COLUMNS = st.integers(1, 150)


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def finish(
    writer: Writer, buffer: int, depth: int = 2, parts: tuple[tuple[int, ...], ...] = ((0, 1),)
) -> tuple[str, Tensor]:
    """Ends the program in a head that reads `buffer`; the program and its weights."""
    channels = writer.buffers[buffer].channels
    heads = [
        (writer.matrix(normal(len(p) * depth, channels) / channels**0.5),
         writer.store(normal(len(p) * depth)))
        for p in parts
    ]  # fmt: skip
    weights, biases = zip(*heads, strict=True)
    writer.steps.append(Head(depth, (buffer,) * len(parts), weights, biases, parts))
    keypoints = 1 + max(k for part in parts for k in part)
    return writer.program(keypoints), writer.weights()


def pyramid(writer: Writer, channels: tuple[int, ...]) -> list[int]:
    return [writer.load(2 + level, count) for level, count in enumerate(channels)]


def maps(
    channels: tuple[int, ...], batch: int, units: tuple[int, int], channels_last: bool = True
) -> list[Tensor]:
    found = []
    for level, count in enumerate(channels):
        x = torch.randn(batch, count, 8 * units[0] >> level, 8 * units[1] >> level)
        layout = torch.channels_last if channels_last else torch.contiguous_format
        found.append(x.contiguous(memory_format=layout))
    return found


def check(inputs: list[Tensor], program: str, weights: Tensor) -> None:
    """C++ and the reference in float32 against the reference in float64. In bfloat16 a last digit
    can round an operand up instead of down, which is 1/256 of it and rare: the test of whole
    numbers is the sharp one."""
    want = folded_network([x.double() for x in inputs], weights, program)
    for backend in ("torch", "cpp"):
        with use_backend(backend):
            have = folded_network(inputs, weights.float(), program)
        if not parse(program).bfloat16:
            assert error_of(have, want) < 1e-5, backend
        elif want.numel():
            assert (have - want).norm() < 5e-3 * want.norm(), backend


@needs_cpp
@pytest.mark.parametrize(
    ("isa", "bfloat16"),
    [*((isa, False) for isa in ISAS), *((isa, True) for isa in BF16_ISAS)],
)
@settings(max_examples=12, deadline=None)
@given(data=st.data())
def test_convolutions_equal_the_reference(isa: str, bfloat16: bool, data: st.DataObject) -> None:
    torch.manual_seed(data.draw(st.integers(0, 99)))
    inputs, outputs = data.draw(COLUMNS), data.draw(COLUMNS)
    units = data.draw(st.tuples(st.integers(1, 2), st.integers(1, 3)))
    batch = data.draw(st.integers(0, 3))
    kind = data.draw(st.sampled_from(["1x1", "3x3", "depthwise", "inverted residual", "sum"]))
    act = data.draw(st.sampled_from([LINEAR, RELU, RELU6]))
    stride = data.draw(st.integers(1, 2)) if kind not in ("1x1", "sum") else 1
    terms = {name: data.draw(st.booleans()) for name in ("pre", "up", "post")}
    writer = Writer(bfloat16)
    buffers = pyramid(writer, (inputs, inputs, outputs, outputs))
    level = stride - 1
    same = writer.buffer(2 + level, outputs)  # more maps of the output's size
    writer.conv(buffers[level], same, normal(outputs, inputs) / inputs**0.5, normal(outputs))
    half = writer.buffer(3 + level, outputs)
    source = buffers[level + 1]
    channels = writer.buffers[source].channels
    writer.conv(source, half, normal(outputs, channels) / channels**0.5, normal(outputs))
    chosen: dict[str, object] = {}
    if terms["pre"]:
        chosen["pre"] = (same, 0.7)
    if terms["up"]:
        chosen["up"] = half
    if terms["post"]:
        chosen["post"] = (same, -1.3)
    out = writer.buffer(2 + level, outputs)
    if kind == "sum":
        writer.mix(out, act=act, bias=normal(outputs), **chosen)
    elif kind in ("1x1", "3x3"):
        shape = (outputs, inputs) if kind == "1x1" else (outputs, inputs, 3, 3)
        borders = stride == 2 and data.draw(st.booleans())
        bias = normal(4, outputs) if borders else normal(outputs)
        kernel = normal(*shape) / (inputs * len(shape)) ** 0.5
        writer.conv(buffers[0], out, kernel, bias, stride=stride, act=act, **chosen)
    else:
        expands = kind == "inverted residual"
        width = data.draw(COLUMNS) if expands else inputs
        expand = (normal(width, inputs) / inputs**0.5, normal(width), RELU6) if expands else None
        writer.conv(
            buffers[0],
            out,
            normal(outputs, width) / width**0.5,
            normal(outputs),
            stride=stride,
            act=act,
            taps=normal(width, 3, 3),
            taps_bias=normal(width),
            taps_act=data.draw(st.sampled_from([LINEAR, RELU6])),
            dilation=1 if expands or stride == 2 else data.draw(st.integers(1, 2)),
            expand=expand,
            **chosen,
        )
    if level == 1:  # scores lie at 1/4
        big = writer.buffer(2, outputs)
        writer.mix(big, up=out)
        out = big
    program, weights = finish(writer, out)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PNFS_ISA", isa)
        sizes = (inputs, inputs, outputs, outputs)
        check(maps(sizes, batch, units, data.draw(st.booleans())), program, weights)


@needs_cpp
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("largest", [False, True])
def test_pools_equal_the_reference(
    isa: str, largest: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PNFS_ISA", isa)
    writer = Writer()
    (x,) = pyramid(writer, (20,))
    out = writer.buffer(2, 20)
    scale, shift = writer.store(normal(20)), writer.store(normal(20))
    writer.steps.append(Pool(x, out, largest, scale, shift, x, writer.scalar(0.3)))
    program, weights = finish(writer, out)
    check(maps((20,), 2, (1, 3)), program, weights)


@needs_cpp
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("depth", [1, 3, 8, 16])
def test_heads_add_the_parts_that_share_a_keypoint(
    isa: str, depth: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PNFS_ISA", isa)
    writer = Writer()
    (x,) = pyramid(writer, (24,))
    program, weights = finish(writer, x, depth, ((0, 2), (1,), (2, 1, 3)))
    check(maps((24,), 3, (2, 1)), program, weights)


@needs_cpp
@pytest.mark.parametrize("isa", BF16_ISAS)
@pytest.mark.parametrize("pixels", [(1, 1), (3, 2), (4, 6)])
def test_whole_numbers_in_bfloat16_are_exact(
    isa: str, pixels: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sums of whole numbers are exact, so all round the same operands: an error is a wrong term."""
    monkeypatch.setenv("PNFS_ISA", isa)
    torch.manual_seed(1)

    def few(*shape: int) -> Tensor:  # mostly zeros
        return (torch.randint(0, 6, shape) == 0).double()

    writer = Writer(bfloat16=True)
    (x,) = pyramid(writer, (21,))
    wide, narrow, out = (writer.buffer(2, count) for count in (83, 40, 20))
    writer.conv(x, wide, few(83, 21, 3, 3), few(83), act=RELU)
    writer.conv(
        wide, narrow, few(40, 99), few(40), act=RELU, taps=few(99, 3, 3), taps_bias=few(99),
        taps_act=RELU6, expand=(few(99, 83), few(99), RELU6),
    )  # fmt: skip
    writer.conv(narrow, out, few(20, 40), few(20), act=RELU6)
    program, weights = finish(writer, out)
    inputs = [few(2, 21, 8 * pixels[0], 8 * pixels[1])]
    want = folded_network(inputs, weights, program)
    have = folded_network([x.float() for x in inputs], weights.float(), program)
    assert error_of(have, want) < 1e-6


@settings(max_examples=50, deadline=None)
@given(outputs=st.integers(1, 700), depth=st.integers(1, 70), bfloat16=st.booleans())
def test_packing_can_be_undone(outputs: int, depth: int, bfloat16: bool) -> None:
    matrix = torch.randn(outputs, depth)
    packed = pack(matrix, bfloat16)
    rows = -(-depth // 32) * 16 if bfloat16 else depth
    assert len(packed) == rows * sum(panel_widths(outputs))
    assert sum(panel_widths(outputs)) < outputs + 16
    want = matrix.bfloat16().float() if bfloat16 else matrix
    assert torch.equal(unpack(packed.double(), 0, outputs, depth, bfloat16).float(), want)


def network(bfloat16: bool = False) -> tuple[str, Tensor]:
    """A small network that has padded maps, views of one and terms of several scales."""
    torch.manual_seed(5)
    writer = Writer(bfloat16)
    x, y = pyramid(writer, (20, 40))
    whole = writer.buffer(2, 64)
    views = [writer.view(whole, 32 * i, 20) for i in range(2)]
    up = writer.buffer(3, 20)
    writer.conv(y, up, normal(20, 40) / 6, normal(20))
    for view, dilation in zip(views, (1, 2), strict=True):
        writer.conv(
            x, view, normal(20, 20) / 4, normal(20), act=RELU, taps=normal(20, 3, 3) / 3,
            dilation=dilation, post=(x, 0.5),
        )  # fmt: skip
    out = writer.buffer(2, 30)
    writer.conv(whole, out, normal(30, 64) / 8, normal(30))
    down = writer.buffer(3, 20)
    writer.conv(views[1], down, normal(20, 20, 3, 3) / 12, normal(4, 20), stride=2)
    last = writer.buffer(2, 20)
    writer.conv(out, last, normal(20, 30) / 5, normal(20), act=RELU, up=down)
    return finish(writer, last, 8, ((0, 1, 2), (2, 3)))


@needs_cpp
@pytest.mark.parametrize("bfloat16", [False, True])
@pytest.mark.parametrize("batch", [0, 1, 2, 3, 5])
@pytest.mark.parametrize("units", [(1, 1), (2, 3), (1, 9)])
def test_batches_and_sizes(batch: int, units: tuple[int, int], bfloat16: bool) -> None:
    program, weights = network(bfloat16)
    check(maps((20, 40), batch, units), program, weights)


@needs_cpp
@pytest.mark.parametrize("bfloat16", [False, True])
@pytest.mark.parametrize("isa", BF16_ISAS)
def test_the_bits_do_not_depend_on_threads_or_batch(
    isa: str, bfloat16: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PNFS_ISA", isa)
    program, weights = network(bfloat16)
    inputs = maps((20, 40), 5, (2, 3))

    def call() -> list[Tensor]:
        return [folded_network(inputs, weights.float(), program)]

    first, *others = results_by_threads(call)
    assert all(torch.equal(first[0], other[0]) for other in others)
    for i in range(5):
        alone = folded_network([x[i : i + 1] for x in inputs], weights.float(), program)
        assert torch.equal(alone[0], first[0][i])


@needs_cpp
@pytest.mark.parametrize("bfloat16", [False, True])
def test_memory_of_earlier_calls_does_not_show(bfloat16: bool) -> None:
    program, weights = network(bfloat16)
    inputs = maps((20, 40), 3, (1, 3))
    with memory_filled_with_nan():
        want = folded_network(inputs, weights.float(), program)
        poisoned = [torch.full_like(x, float("nan")) for x in maps((20, 40), 3, (2, 3))]
        assert folded_network(poisoned, weights.float(), program).isnan().all()
        assert torch.equal(folded_network(inputs, weights.float(), program), want)


def test_text_and_program_are_the_same() -> None:
    program, _ = network()
    assert parse(program).text() == program
    assert parse(replace(parse(program), keypoints=9).text()).keypoints == 9


def test_the_reference_is_what_its_docstring_says() -> None:
    torch.manual_seed(0)
    writer = Writer()
    x, y = pyramid(writer, (5, 7))
    out = writer.buffer(2, 6)
    expand, taps, kernel = normal(9, 5), normal(9, 3, 3), normal(6, 9)
    biases = [normal(9), normal(9), normal(6)]
    up = writer.buffer(3, 6)
    matrix = normal(6, 7)
    writer.conv(y, up, matrix, None)
    writer.conv(
        x, out, kernel, biases[2], act=RELU, taps=taps, taps_bias=biases[1], taps_act=RELU6,
        expand=(expand, biases[0], RELU6), up=up,
    )  # fmt: skip
    program, weights = finish(writer, out, depth=1)
    inputs = [map_.double() for map_ in maps((5, 7), 2, (1, 1))]
    a = F.relu6(F.conv2d(inputs[0], expand[:, :, None, None], biases[0]))
    a = F.relu6(F.conv2d(a, taps[:, None], biases[1], padding=1, groups=9))
    b = F.conv2d(inputs[1], matrix[:, :, None, None])
    b = F.interpolate(b, scale_factor=2, mode="bilinear", align_corners=True)
    c = F.relu(F.conv2d(a, kernel[:, :, None, None], biases[2]) + b)
    head = parse(program).steps[-1]
    assert isinstance(head, Head)
    w = unpack(weights, head.weights[0], 2, 6)[:, :, None, None]
    want = F.conv2d(c, w, weights[head.biases[0] : head.biases[0] + 2])
    torch.testing.assert_close(folded_network(inputs, weights, program), want)


def test_wrong_arguments_are_named() -> None:
    program, weights = network()
    inputs = maps((20, 40), 1, (1, 1))
    with pytest.raises(PnfsError, match="multiples of 8"):
        folded_network([x[:, :, 1:] for x in inputs], weights.float(), program)
    with pytest.raises(PnfsError, match="inputs must have one entry"):
        folded_network(inputs[:1], weights.float(), program)
    with pytest.raises(PnfsError, match=r"inputs\[1\] must have shape"):
        folded_network([inputs[0], inputs[0]], weights.float(), program)
    with pytest.raises(PnfsError, match="weights must be float32"):
        folded_network(inputs, weights, program)
    ok, reason = OP.verdict("cpp", [[x.double() for x in inputs], weights, program])
    assert not ok and ("float64" in reason or "built" in reason)


@needs_cpp
def test_torch_sees_one_opaque_operator() -> None:
    program, weights = network()
    arguments = (maps((20, 40), 2, (1, 1)), weights.float(), program)
    torch.library.opcheck(torch.ops.pnfs.folded_network_cpp.default, arguments)
