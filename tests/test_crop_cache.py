"""The cache of decoded people, and JPEGs decoded at a fraction of their size."""

from __future__ import annotations

import multiprocessing
import os
import re
from dataclasses import fields, replace
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pnfs.config import AugmentConfig, Config, SyntheticConfig, parse_config
from pnfs.data import Batch, PeopleDataset, load_people, make_loader
from pnfs.data import samples as samples_module
from pnfs.data.cropcache import CropCache
from pnfs.data.images import ImageFile, read_image
from pnfs.data.samples import SampleMaker, touched_region
from pnfs.data.training import TrainingData
from pnfs.data.transforms import (
    crop_limits,
    crop_matrix,
    invert_affine,
    reduced_affine,
    sample_augmentation,
)
from pnfs.errors import PnfsError
from pnfs.skeleton import COCO

SIZE = (64, 64)
HALF_BODY = {"half_body_probability": 0.5, "half_body_min_keypoints": 4}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("people")


@pytest.fixture(scope="module")
def people(root: Path) -> PeopleDataset:
    return load_people(config(root).data, COCO, "train")


def config(root: Path | str = "unused", size: tuple[int, int] = SIZE, **data) -> Config:
    """Large people: their crops have some two image pixels for each pixel of the input."""
    drawn = SyntheticConfig(train_images=8, val_images=1, image_size=(400, 500)).model_dump()
    return parse_config({
        "model": {"input_size": list(size)},
        "data": {"root": str(root), "workers": 0, "synthetic": drawn, **data},
        "train": {"batch_size": 4},
    })  # fmt: skip


def same(first: Batch, second: Batch) -> bool:
    """Equal but for what the user is told."""
    names = [f.name for f in fields(Batch) if f.name != "notices"]
    pairs = ((getattr(first, name), getattr(second, name)) for name in names)
    return all(torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b for a, b in pairs)


def entries(folder: Path) -> list[Path]:
    return sorted(folder.glob("??/*.crop"))


def taken(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("??/*"))


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The images that were opened."""
    found: list[str] = []

    def opened(path: str, reduction: int = 1) -> ImageFile:
        found.append(path)
        return ImageFile(path, reduction)

    monkeypatch.setattr(samples_module, "ImageFile", opened)
    return found


@pytest.mark.parametrize("reduced", [False, True])
@pytest.mark.parametrize("profile", ["standard", "posenfs"])
def test_batches_are_the_same_bits_and_later_epochs_decode_nothing(
    people: PeopleDataset, tmp_path: Path, decoded: list[str], profile: str, reduced: bool
) -> None:
    chosen = {"profile": profile, "reduced_decode": reduced, "augment": HALF_BODY}
    plain = make_loader(people, config(**chosen), train=True)
    expected = [batch for _ in range(3) for batch in plain]
    decoded.clear()
    cached = make_loader(people, config(**chosen, cache=str(tmp_path / "c")), train=True)
    found = list(cached)
    used = {i for batch in found for i in batch.indices.tolist()}
    assert len(decoded) == len(used) == len(entries(tmp_path / "c"))
    found += [*cached, *cached]
    assert all(same(a, b) for a, b in zip(found, expected, strict=True))
    assert len(decoded) == len({i for batch in found for i in batch.indices.tolist()})
    assert int((tmp_path / "c" / "used").read_text()) == taken(tmp_path / "c")
    assert not list((tmp_path / "c").glob("??/*.part"))


@settings(max_examples=60, deadline=None)
@given(
    center=st.tuples(st.floats(-50, 400), st.floats(-50, 400)),
    scale=st.floats(0.05, 3),
    augment=st.builds(
        AugmentConfig,
        scale=st.floats(0, 0.9),
        rotation=st.floats(0, 180),
        rotation_probability=st.sampled_from([0.0, 1.0]),
    ),
    profile=st.sampled_from(["standard", "posenfs"]),
    reduction=st.sampled_from([1, 2, 4, 8]),
    seed=st.integers(0, 1000),
)
def test_no_augmentation_reads_beyond_what_is_stored(
    center, scale, augment, profile, reduction, seed
) -> None:
    size, image = (64, 48), (300, 350)
    middle, extent = np.array(center), np.array([scale, scale * 4 / 3])
    region, step = crop_limits(middle, extent, size, augment, profile)
    small = tuple(-(-side // reduction) for side in image)
    stored = (
        max(region[0] // reduction - 2, 0),
        max(region[1] // reduction - 2, 0),
        min(region[2] // reduction + 4, small[1]),
        min(region[3] // reduction + 4, small[0]),
    )
    generator = np.random.default_rng(seed)
    for _ in range(20):
        drawn = sample_augmentation(generator, augment, profile)
        matrix = crop_matrix(middle, extent * drawn.factor, drawn.rotation, size)
        assert 1 / np.hypot(matrix[0, 0], matrix[0, 1]) >= step * (1 - 1e-9)
        read = touched_region(reduced_affine(invert_affine(matrix), reduction), size, small)
        if read is not None:
            assert stored[0] <= read[0] and stored[1] <= read[1]
            assert read[2] <= stored[2] and read[3] <= stored[3]


@pytest.mark.parametrize("damage", ["cut", "tail", "foreign", "empty", "other"])
def test_a_damaged_or_foreign_file_is_replaced(
    people: PeopleDataset, tmp_path: Path, damage: str
) -> None:
    settings = config(cache=str(tmp_path))
    expected = list(make_loader(people, settings, train=True))
    good = [path.read_bytes() for path in entries(tmp_path)]
    for path, content in zip(entries(tmp_path), good, strict=True):
        path.write_bytes({
            "cut": content[:-1000],
            "tail": content[:-500] + bytes(500),
            "foreign": b"something else " * 100,
            "empty": b"",
            "other": good[0] if content != good[0] else good[1],
        }[damage])  # fmt: skip
    assert all(
        same(a, b) for a, b in zip(make_loader(people, settings, train=True), expected, strict=True)
    )
    assert [path.read_bytes() for path in entries(tmp_path)] == good


def test_a_changed_image_is_decoded_again(people: PeopleDataset, tmp_path: Path) -> None:
    copy = tmp_path / "a.jpg"
    copy.write_bytes(people.people[0].image_path.read_bytes())
    one = replace(people, people=(replace(people.people[0], image_path=copy),))
    settings = config(cache=str(tmp_path / "c"))
    (first,) = make_loader(one, settings, train=True)
    cv2.imwrite(str(copy), 255 - read_image(copy, apply_exif=False))
    (second,) = make_loader(one, settings, train=True)
    (plain,) = make_loader(one, config(), train=True)
    assert same(second, plain) and not same(first, second)
    copy.unlink()
    with pytest.raises(PnfsError, match=r"a\.jpg: image is missing"):
        list(make_loader(one, settings, train=True))


def test_other_augmentation_limits_are_other_entries(people: PeopleDataset, tmp_path: Path) -> None:
    for scale in (0.1, 0.4):
        chosen = {"augment": {"scale": scale}}
        cached = make_loader(people, config(**chosen, cache=str(tmp_path)), train=True)
        plain = make_loader(people, config(**chosen), train=True)
        assert all(same(a, b) for a, b in zip(cached, plain, strict=True))


def test_the_cache_keeps_its_bound_and_the_rest_is_decoded(
    people: PeopleDataset, tmp_path: Path, decoded: list[str]
) -> None:
    whole = config(cache=str(tmp_path / "whole"))
    expected = list(make_loader(people, whole, train=True))
    bound = taken(tmp_path / "whole") // 2
    settings = config(cache=str(tmp_path / "half"), cache_gb=bound / 1e9)
    loader = make_loader(people, settings, train=True)
    assert all(same(a, b) for a, b in zip(loader, expected, strict=True))
    assert 0 < taken(tmp_path / "half") <= bound
    # Deleted entries make room again, although the count in the folder does not know.
    count = len(entries(tmp_path / "half"))
    for path in entries(tmp_path / "half"):
        path.unlink()
    list(make_loader(people, settings, train=True))
    assert len(entries(tmp_path / "half")) == count


def test_an_unwritable_folder_is_one_line(people: PeopleDataset, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    settings = config(cache=str(tmp_path / "file" / "c"))
    with pytest.raises(PnfsError, match=r"data\.cache: .*file/c cannot be written \(") as error:
        make_loader(people, settings, train=True)
    assert "\n" not in str(error.value)
    make_loader(people, settings, train=False)  # evaluation does not use it


def test_a_full_disk_stops_the_cache_and_not_the_training(
    people: PeopleDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pnfs.data.cropcache.os.replace", full)
    cached = make_loader(people, config(cache=str(tmp_path)), train=True)
    plain = make_loader(people, config(), train=True)
    assert all(same(a, b) for a, b in zip(cached, plain, strict=True))
    assert not list(tmp_path.glob("??/*"))


def _fill(folder: str, key: bytes, count: int) -> None:
    image = np.full((200, 300, 3), 7, np.uint8)
    cache = CropCache(folder, 1.0)
    for number in range(count):
        cache.store(key[:-1] + bytes([number]), image, (0, 0, 300, 200), 1)


def test_two_processes_fill_one_cache(tmp_path: Path) -> None:
    key = bytes(16)
    context = multiprocessing.get_context("spawn")
    helpers = [context.Process(target=_fill, args=(str(tmp_path), key, 60)) for _ in range(2)]
    for helper in helpers:
        helper.start()
    for helper in helpers:
        helper.join()
    assert [helper.exitcode for helper in helpers] == [0, 0]
    assert len(entries(tmp_path)) == 60 and len(list(tmp_path.glob("??/*"))) == 60
    assert int((tmp_path / "used").read_text()) == taken(tmp_path)
    cache = CropCache(tmp_path, 1.0)
    for number in range(60):
        entry = cache.find(key[:-1] + bytes([number]))
        assert entry is not None
        with entry:
            pixels = entry.read((10, 20, 290, 190))
        assert pixels is not None and pixels.shape == (170, 280, 3) and (pixels == 7).all()


def test_workers_share_the_cache(people: PeopleDataset, tmp_path: Path) -> None:
    settings = config(cache=str(tmp_path), workers=2)
    loader = make_loader(people, settings, train=True)
    plain = make_loader(people, config(), train=True)
    assert all(same(a, b) for _ in range(2) for a, b in zip(loader, plain, strict=True))
    assert int((tmp_path / "used").read_text()) == taken(tmp_path) > 0


def test_leftovers_of_killed_processes_go(tmp_path: Path) -> None:
    _fill(str(tmp_path), bytes(16), 2)
    old, young = (entries(tmp_path)[0].with_name(f"{name}.part") for name in ("old", "young"))
    for part in (old, young):
        part.write_bytes(b"x")
    os.utime(old, (1, 1))
    (tmp_path / "used").write_text("torn")
    cache = CropCache(tmp_path, 1.0)
    cache.store(b"k" * 16, np.zeros((9, 9, 3), np.uint8), (0, 0, 9, 9), 1)
    assert not old.exists() and young.exists() and len(entries(tmp_path)) == 3
    young.unlink()
    assert int((tmp_path / "used").read_text()) == taken(tmp_path)


def makers(people: PeopleDataset, augment: AugmentConfig) -> tuple[SampleMaker, SampleMaker]:
    whole, reduced = (
        SampleMaker.of(people, SIZE, "standard", augment, 0, reduced=reduced)
        for reduced in (False, True)
    )
    return whole, reduced


def test_reduced_decoding_shows_the_same_input(
    people: PeopleDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against whole decoding and the mean of each r × r pixels, in grey levels of the input."""
    flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
    whole, reduced = makers(people, AugmentConfig(scale=0.1))
    differences, shifted = [], []
    for index in range(len(people)):
        _, reduction = reduced._limits(index)
        if reduction == 1:
            continue
        a, b = whole.make(index, 0), reduced.make(index, 0)
        assert np.array_equal(a.joints, b.joints) and np.array_equal(a.weights, b.weights)
        assert np.array_equal(a.to_image, b.to_image) and a.flip == b.flip
        assert b.crop.nbytes < 0.5 * a.crop.nbytes
        image = read_image(people.people[index].image_path, apply_exif=False).astype(np.float32)
        height, width = (side // reduction for side in image.shape[:2])
        area = image[: height * reduction, : width * reduction]
        area = area.reshape(height, reduction, width, reduction, 3).mean((1, 3))
        inverse = invert_affine(whole._crop(index, 0)[0])
        want = cv2.warpAffine(area, reduced_affine(inverse, reduction), SIZE[::-1], flags=flags)
        have = cv2.warpAffine(b.crop.astype(np.float32), b.matrix, SIZE[::-1], flags=flags)
        differences.append(np.abs(have - want).mean())
        moved = b.matrix + np.array([[0, 0, 0.5]] * 2)
        off = cv2.warpAffine(b.crop.astype(np.float32), moved, SIZE[::-1], flags=flags)
        shifted.append(np.abs(off - want).mean())
    assert len(differences) >= 3
    assert max(differences) < 1.5, differences
    assert np.mean(differences) < 0.5 * np.mean(shifted), (differences, shifted)


def test_reductions_leave_a_pixel_for_each_of_the_input(people: PeopleDataset) -> None:
    augment = AugmentConfig(scale=0.3)
    _, reduced = makers(people, augment)
    found = [reduced._limits(index)[1] for index in range(len(people))]
    steps = reduced.scales[:, 0] * 200 * (1 - augment.scale) / SIZE[1]
    assert all(
        r == max(s for s in (1, 2, 4, 8) if s <= max(step, 1))
        for r, step in zip(found, steps, strict=True)
    )


def test_only_jpegs_are_reduced_and_evaluation_never(people: PeopleDataset, tmp_path: Path) -> None:
    image = read_image(people.people[0].image_path, apply_exif=False)[:333, :451]
    for suffix, reduction in ((".png", 1), (".jpg", 4)):
        cv2.imwrite(str(tmp_path / f"a{suffix}"), image)
        file = ImageFile(tmp_path / f"a{suffix}", 4)
        assert file.reduction == reduction
        assert file.size == file.whole().shape[:2] == (-(-333 // reduction), -(-451 // reduction))
    plain, reduced = (
        make_loader(people, config(reduced_decode=flag), train=False) for flag in (False, True)
    )
    assert all(same(a, b) for a, b in zip(plain, reduced, strict=True))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_full_cache_says_so_once_with_its_size_and_what_to_do(
    people: PeopleDataset, root: Path, tmp_path: Path, workers: int
) -> None:
    folder = tmp_path / "cache"
    data = TrainingData(config(root, cache=str(folder), cache_gb=0.0015, workers=workers))
    said = []
    for _ in range(2):
        for _ in data.loader:
            said.append(data.new_notice())
    used = int((folder / "used").read_text())
    assert 0 < used <= 1_500_000
    (line,) = filter(None, said)
    # The first worker without room says what was used then; another may still add a smaller entry.
    told = re.search(r"is full \(([0-9.]+) of", line)
    assert told and 0 < float(told[1]) <= float(f"{used / 1e9:.3g}")
    assert workers > 1 or told[1] == f"{used / 1e9:.3g}"
    assert line == (
        f"data.cache: {folder} is full ({told[1]} of 0.0015 GB); people who are not in it "
        "are decoded in each epoch; raise data.cache_gb to keep them too"
    )
