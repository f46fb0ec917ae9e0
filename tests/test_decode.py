"""Keypoints in image pixels: both profiles against independent and published computations."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from pnfs.decode import _constant, cell_to_image, decode
from pnfs.errors import PnfsError
from pnfs.kernels import use_backend
from pnfs.skeleton import COCO, MPII


def hrnet_transform(
    center: np.ndarray, scale: np.ndarray, rotation: float, size: tuple[int, int], *, inverse: bool
) -> np.ndarray:
    """HRNet's crop transform from three point pairs: the centre, a point half the person's width
    above it, and a third at a right angle. `size` is the grid's (width, height), `scale` is in
    200 px."""
    angle = np.deg2rad(rotation)
    width = scale[0] * 200.0

    def corners(origin: np.ndarray, up: np.ndarray) -> np.ndarray:
        side = np.array([-up[1], up[0]])
        return np.stack([origin, origin + up, origin + up + side])

    up_image = width * -0.5 * np.array([-np.sin(angle), np.cos(angle)])
    source = corners(center, up_image)
    target = corners(np.array(size) * 0.5, np.array([0.0, size[0] * -0.5]))
    if inverse:
        source, target = target, source
    return np.linalg.solve(np.column_stack([source, np.ones(3)]), target).T


def hrnet_decode(heatmaps: np.ndarray) -> np.ndarray:
    """Peak cell plus a quarter of a cell towards the larger neighbour, (N, K, 2)."""
    n, k, h, w = heatmaps.shape
    cells = np.zeros((n, k, 2))
    for i in range(n):
        for j in range(k):
            m = heatmaps[i, j]
            y, x = np.unravel_index(m.argmax(), m.shape)
            if m[y, x] <= 0:
                continue
            cells[i, j] = x, y
            if 1 < x < w - 1 and 1 < y < h - 1:
                cells[i, j, 0] += 0.25 * np.sign(m[y, x + 1] - m[y, x - 1])
                cells[i, j, 1] += 0.25 * np.sign(m[y + 1, x] - m[y - 1, x])
    return cells


def blobs(generator: np.random.Generator, n: int, k: int, h: int, w: int) -> np.ndarray:
    """Gaussian maps with peaks anywhere, borders included, and a little noise."""
    x = generator.uniform(0, w - 1, (n, k, 1, 1))
    y = generator.uniform(0, h - 1, (n, k, 1, 1))
    rows, columns = np.arange(h)[:, None], np.arange(w)[None]
    maps = np.exp(-((columns - x) ** 2 + (rows - y) ** 2) / 8)
    return (maps + 0.01 * generator.random((n, k, h, w))).astype(np.float32)


@pytest.mark.parametrize("flip", [False, True])
def test_standard_profile_is_hrnets_inverse_on_the_heatmap_grid(flip: bool) -> None:
    generator = np.random.default_rng(3)
    n, h, w = 5, 32, 24
    centers = generator.uniform(50, 400, (n, 2))
    widths = generator.uniform(0.4, 3, n)
    scales = np.stack([widths, widths * h / w], axis=1)
    rotations = generator.uniform(-80, 80, n)
    to_image, on_heatmap = (
        np.stack(
            [
                hrnet_transform(c, s, r, size, inverse=True)
                for c, s, r in zip(centers, scales, rotations, strict=True)
            ]
        )
        for size in ((4 * w, 4 * h), (w, h))
    )
    maps, mirrored = blobs(generator, n, 17, h, w), blobs(generator, n, 17, h, w)
    merged = maps
    if flip:
        back = mirrored[..., ::-1][:, COCO.flip_permutation].copy()
        back[..., 1:] = back[..., :-1].copy()
        merged = (maps + back) * np.float32(0.5)
    cells = hrnet_decode(merged)
    expected = np.einsum("nij,nkj->nki", on_heatmap, np.dstack([cells, np.ones((n, 17))]))
    xy, score = decode(
        torch.from_numpy(maps),
        torch.from_numpy(to_image),
        flipped=torch.from_numpy(mirrored) if flip else None,
        skeleton=COCO,
    )
    np.testing.assert_allclose(xy.numpy(), expected, atol=2e-4)
    np.testing.assert_allclose(score.numpy(), merged.max((2, 3)), atol=1e-7)


def test_posenfs_profile_reproduces_the_published_pipeline(shared_dir: Path) -> None:
    with np.load(shared_dir / "reference" / "pipeline.npz") as file:
        fixture = dict(file)
    to_image = torch.from_numpy(np.linalg.inv(fixture["post_affine"])[:, :2])
    heatmaps = torch.from_numpy(fixture["post_heatmap"])
    xy, score = decode(heatmaps, to_image, skeleton=COCO, profile="posenfs")
    np.testing.assert_allclose(xy.numpy(), fixture["post_image_xy"][..., :2], atol=2e-4)
    np.testing.assert_array_equal(score.numpy(), fixture["post_max"])
    # With the identity in place of the crop, the cells themselves come out.
    cell = torch.tensor([[0.25, 0, -0.125], [0, 0.25, -0.125]], dtype=torch.float64)
    cells, _ = decode(heatmaps, cell.expand(4, 2, 3), skeleton=COCO, profile="posenfs")
    np.testing.assert_allclose(cells.numpy(), fixture["post_coords"], atol=1e-6)


def test_posenfs_flip_average_reproduces_the_published_exchange(shared_dir: Path) -> None:
    """`flip_back_coco` is the mirrored batch turned back; the flip test averages with it."""
    with np.load(shared_dir / "reference" / "pipeline.npz") as file:
        heatmaps, back = file["post_heatmap"], file["flip_back_coco"]
    to_image = torch.eye(2, 3, dtype=torch.float64).expand(len(heatmaps), 2, 3)
    merged = (heatmaps + back) * np.float32(0.5)
    expected = 4 * hrnet_decode(merged) + 0.5
    xy, score = decode(
        torch.from_numpy(heatmaps),
        to_image,
        flipped=torch.from_numpy(heatmaps),
        skeleton=COCO,
        profile="posenfs",
    )
    np.testing.assert_allclose(xy.numpy(), expected, atol=1e-5)
    np.testing.assert_allclose(score.numpy(), merged.max((2, 3)), atol=1e-7)


def test_cell_matrices_differ_by_half_an_input_pixel_between_the_profiles() -> None:
    to_image = torch.tensor([[[0.5, 0.1, 3.0], [-0.1, 0.5, 7.0]]], dtype=torch.float64)
    shift = cell_to_image(to_image, "posenfs") - cell_to_image(to_image, "standard")
    expected = to_image[:, :, :2].sum(-1) / 2
    torch.testing.assert_close(shift[:, :, 2], expected)
    assert shift[:, :, :2].abs().max() == 0


def test_a_perfect_flip_of_a_symmetric_person_changes_nothing_in_posenfs() -> None:
    generator = np.random.default_rng(0)
    maps = torch.from_numpy(blobs(generator, 2, 16, 16, 16))
    mirrored = maps.flip(3)[:, list(MPII.flip_permutation)]
    to_image = torch.eye(2, 3, dtype=torch.float64).expand(2, 2, 3)
    plain = decode(maps, to_image, skeleton=MPII, profile="posenfs")
    averaged = decode(maps, to_image, flipped=mirrored, skeleton=MPII, profile="posenfs")
    for one, other in zip(plain, averaged, strict=True):
        torch.testing.assert_close(one, other)


def test_no_people_decode_to_nothing() -> None:
    xy, score = decode(torch.zeros(0, 17, 8, 6), torch.zeros(0, 2, 3).double(), skeleton=COCO)
    assert xy.shape == (0, 17, 2) and score.shape == (0, 17)


def test_maps_of_another_skeleton_are_refused_in_one_line() -> None:
    with pytest.raises(PnfsError, match=r"\(2, 16, 8, 6\).*'coco'.*\(N, 17, h, w\)"):
        decode(torch.zeros(2, 16, 8, 6), torch.zeros(2, 2, 3), skeleton=COCO)


def test_fake_tensors_leave_nothing_behind() -> None:
    """What a mode made must not be met again outside of it, nor the other way round."""
    maps, to_image = torch.rand(2, 17, 8, 6), torch.eye(2, 3).double().expand(2, 2, 3)
    _constant.cache_clear()

    def shapes_under_a_mode() -> list[torch.Size]:
        with FakeTensorMode() as mode:
            fake = mode.from_tensor(maps)
            results = decode(fake, mode.from_tensor(to_image), flipped=fake, skeleton=COCO)
        assert all(isinstance(x, FakeTensor) for x in results)
        return [x.shape for x in results]

    shapes = shapes_under_a_mode()
    first = decode(maps, to_image, flipped=maps, skeleton=COCO)
    assert [x.shape for x in first] == shapes == shapes_under_a_mode()
    with use_backend("torch"):
        want = decode(maps, to_image, flipped=maps, skeleton=COCO)
    for have, expected in zip(first, want, strict=True):
        assert type(have) is torch.Tensor
        torch.testing.assert_close(have, expected)
