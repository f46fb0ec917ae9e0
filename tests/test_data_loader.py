"""Batches: right pixels and joints, reproducible, resumable, sharded, not upset by broken files."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from pnfs.config import Config, SyntheticConfig, parse_config
from pnfs.data import Batch, PeopleDataset, load_people, make_loader
from pnfs.data.batch import collate
from pnfs.data.images import read_image
from pnfs.data.samples import touched_region
from pnfs.data.transforms import MEAN, STD, crop_matrix, invert_affine
from pnfs.errors import PnfsError
from pnfs.skeleton import COCO

SIZE = (128, 96)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("people")


@pytest.fixture(scope="module")
def people(root: Path) -> PeopleDataset:
    return load_people(config(root).data, COCO, "train")


@pytest.fixture
def breakable(people: PeopleDataset, tmp_path: Path):
    """Makes copies of the dataset in which some images are damaged."""

    def damage(indices) -> PeopleDataset:
        bad = tmp_path / "bad.jpg"
        bad.write_bytes(b"\xff\xd8\xff\xe0 cut off")
        changed = [
            replace(p, image_path=bad) if i in indices else p for i, p in enumerate(people.people)
        ]
        return replace(people, people=tuple(changed))

    return damage


def config(root: Path | str = "unused", workers: int = 0, batch: int = 4, **data) -> Config:
    synthetic = SyntheticConfig(train_images=12, val_images=2).model_dump()
    tree = {
        "model": {"input_size": list(SIZE)},
        "data": {"root": str(root), "workers": workers, "synthetic": synthetic, **data},
        "train": {"batch_size": batch},
        "eval": {"batch_size": batch, "profile": data.get("profile", "standard")},
    }
    return parse_config(tree)


def same(first: Batch, second: Batch) -> bool:
    return all(
        torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
        for a, b in ((getattr(first, f.name), getattr(second, f.name)) for f in fields(Batch))
    )


def warped(people: PeopleDataset, batch: Batch, row: int) -> np.ndarray:
    """What one sample's input should show, straight from the whole image: float (H, W, 3) BGR."""
    image = read_image(people.people[int(batch.indices[row])].image_path, apply_exif=False)
    matrix = batch.to_image[row].numpy()
    flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
    return cv2.warpAffine(image.astype(np.float32), matrix, SIZE[::-1], flags=flags)


def test_inputs_show_the_person_and_joints_lie_on_it(people: PeopleDataset):
    seen_flips = set()
    for batch in make_loader(people, config(), train=True):
        images = batch.images(size=SIZE)
        assert images.shape == (4, 3, *SIZE) and images.dtype == torch.float32
        assert images.is_contiguous(memory_format=torch.channels_last)
        levels = (images.permute(0, 2, 3, 1).numpy() * STD + MEAN)[..., ::-1] * 255
        for row in range(len(batch)):
            # cv2 rounds positions to 1/32 pixel, so edges differ by some grey levels.
            difference = np.abs(levels[row] - warped(people, batch, row))
            assert difference.mean() < 1.0 and np.percentile(difference, 99) < 12
            person = people.people[int(batch.indices[row])]
            flip = bool(batch.flips[row])
            seen_flips.add(flip)
            keypoints = person.keypoints[list(COCO.flip_permutation)] if flip else person.keypoints
            back = batch.to_image[row].numpy() @ np.c_[batch.joints[row].numpy(), np.ones(17)].T
            counted = batch.weights[row].numpy() > 0
            np.testing.assert_allclose(back.T[counted], keypoints[counted, :2], atol=1e-3)
            assert (keypoints[counted, 2] > 0).all()
            assert (batch.joints[row][~torch.from_numpy(counted)] == 0).all()
    assert seen_flips == {True, False}


def test_dtypes_and_shapes_are_those_of_the_contract(people: PeopleDataset):
    batch = next(iter(make_loader(people, config(), train=True)))
    dtypes = {
        f.name: getattr(batch, f.name).dtype
        for f in fields(Batch)
        if f.name not in ("skipped", "problems", "notices")
    }
    assert dtypes == {
        "pixels": torch.uint8, "offsets": torch.int64, "sizes": torch.int32,
        "matrices": torch.float32, "flips": torch.bool, "joints": torch.float32,
        "weights": torch.float32,
        "to_image": torch.float64, "indices": torch.int64,
    }  # fmt: skip
    assert batch.offsets[0] == 0 and batch.pixels.numel() == (batch.sizes.prod(1) * 3).sum()
    assert batch.offsets[1:].tolist() == (batch.sizes.prod(1) * 3).cumsum(0)[:-1].tolist()
    assert same(batch, batch.to("cpu")) and batch.skipped == 0 and len(batch) == 4


def test_evaluation_neither_augments_nor_mirrors(people: PeopleDataset):
    loader = make_loader(people, config(batch=7), train=False)
    first, second = list(loader), list(loader)
    assert all(same(a, b) for a, b in zip(first, second, strict=True))
    assert torch.cat([b.indices for b in first]).tolist() == list(range(len(people)))
    assert not any(b.flips.any() for b in first)


def test_the_mirrored_input_is_the_input_mirrored(people: PeopleDataset):
    batch = next(iter(make_loader(people, config(), train=True)))
    plain, mirrored = (batch.images(size=SIZE, mirrored=m) for m in (False, True))
    torch.testing.assert_close(mirrored, plain.flip(3))


def test_the_posenfs_profile_is_blue_first_with_red_first_constants(people: PeopleDataset):
    batch = next(iter(make_loader(people, config(profile="posenfs"), train=False)))
    rgb, bgr = (batch.images(size=SIZE, profile=p) for p in ("standard", "posenfs"))
    std, mean = torch.tensor(STD).view(3, 1, 1), torch.tensor(MEAN).view(3, 1, 1)
    torch.testing.assert_close(bgr * std + mean, (rgb * std + mean).flip(1))
    grown = batch.to_image[:, 0, 0]
    standard = next(iter(make_loader(people, config(), train=False))).to_image[:, 0, 0]
    assert (grown > standard).all()


def test_the_same_batches_for_any_number_of_workers_and_any_epoch_again(people: PeopleDataset):
    alone, helped = (make_loader(people, config(workers=n), train=True) for n in (0, 2))
    for _ in range(2):
        pairs = list(zip(alone, helped, strict=True))
        assert len(pairs) == len(alone) == len(helped) and all(same(a, b) for a, b in pairs)
    helped.seek(1)
    assert all(same(a, b[1]) for a, b in zip(helped, pairs, strict=True))


def test_epochs_and_seeds_differ(people: PeopleDataset):
    loader = make_loader(people, config(), train=True)
    first, second = (torch.cat([b.to_image for b in loader]) for _ in range(2))
    assert loader.epoch == 2 and not torch.equal(first, second)
    other = torch.cat([b.to_image for b in make_loader(people, config(), train=True, seed=9)])
    assert not torch.equal(first, other)


@pytest.mark.parametrize("workers", [0, 1])
def test_resuming_anywhere_gives_the_batches_that_were_left(people: PeopleDataset, workers: int):
    whole = make_loader(people, config(), train=True)
    expected = [*whole, *whole]
    for done in (1, len(whole) - 1, len(whole)):
        first = make_loader(people, config(workers=workers), train=True)
        rest = make_loader(people, config(), train=True)
        for _, _ in zip(range(done), first, strict=False):
            pass
        rest.load_state(first.state())
        found = [*rest, *rest]
        assert len(found) == len(expected) - done
        assert all(same(a, b) for a, b in zip(found, expected[done:], strict=True))


def test_leaving_an_epoch_early_goes_on_where_it_stopped(people: PeopleDataset):
    expected = list(make_loader(people, config(), train=True))
    loader = make_loader(people, config(workers=2), train=True)
    found = [batch for _, batch in zip(range(2), loader, strict=False)]
    found += list(loader)
    assert loader.epoch == 1 and all(same(a, b) for a, b in zip(found, expected, strict=True))


def test_iterating_leaves_torchs_random_stream_alone(people: PeopleDataset):
    before = torch.get_rng_state()
    list(make_loader(people, config(), train=True))
    assert torch.equal(before, torch.get_rng_state())


def test_two_processes_share_the_batches_of_one(people: PeopleDataset):
    one = [b.indices.tolist() for b in make_loader(people, config(batch=4), train=True)]
    two = [
        [
            b.indices.tolist()
            for b in make_loader(people, config(batch=2), train=True, rank=r, world=2)
        ]
        for r in (0, 1)
    ]
    assert [a + b for a, b in zip(*two, strict=True)] == one


def test_a_state_serves_another_number_of_processes(people: PeopleDataset):
    first = make_loader(people, config(batch=2), train=True, rank=1, world=2)
    next(iter(first))
    second = make_loader(people, config(batch=4), train=True)
    second.load_state(first.state())
    expected = [b.indices.tolist() for b in make_loader(people, config(batch=4), train=True)][1:]
    assert [b.indices.tolist() for b in second] == expected


def test_evaluation_shards_count_everybody_once(people: PeopleDataset):
    for world in (1, 2, 3):
        parts = [
            make_loader(people, config(batch=3), train=False, rank=r, world=world)
            for r in range(world)
        ]
        found = [int(i) for part in parts for batch in part for i in batch.indices]
        assert sorted(found) == list(range(len(people)))
        assert sum(len(part) for part in parts) >= len(people) / 3


def test_fewer_people_than_a_batch_make_a_smaller_one(people: PeopleDataset):
    few = replace(people, people=people.people[:3])
    assert [len(b) for b in make_loader(few, config(batch=24), train=True)] == [3]
    assert [len(b) for b in make_loader(few, config(batch=24), train=True, rank=1, world=2)] == [1]
    with pytest.raises(PnfsError, match="3 people for 4 processes"):
        make_loader(few, config(), train=True, rank=0, world=4)


def test_an_empty_dataset_is_an_error(people: PeopleDataset):
    with pytest.raises(PnfsError, match="no usable person"):
        replace(people, people=())


def tolerant(settings: Config, fraction: float) -> Config:
    return settings.model_copy(
        update={"train": settings.train.model_copy(update={"max_skipped_fraction": fraction})}
    )


@pytest.mark.parametrize("workers", [0, 1])
def test_training_skips_and_counts_broken_images(breakable, workers: int):
    dataset = breakable({2, 5})
    loader = make_loader(dataset, tolerant(config(workers=workers), 0.5), train=True)
    batches = [*loader, *loader]
    assert loader.skipped == sum(b.skipped for b in batches) > 0
    assert "bad.jpg" in loader.first_problem and "truncated" in loader.first_problem
    for batch in batches:
        assert len(batch) + batch.skipped == 4 and len(batch.problems) == batch.skipped
        assert not {2, 5} & set(batch.indices.tolist())
        assert len(batch.images(size=SIZE)) == len(batch)


def test_too_many_broken_images_stop_training_and_name_the_first(breakable):
    loader = make_loader(breakable(range(0, 20, 2)), config(), train=True)
    with pytest.raises(
        PnfsError, match=r"bad\.jpg: image is truncated.*max_skipped_fraction=0\.01"
    ) as error:
        list(loader)
    assert "\n" not in str(error.value)


def test_evaluation_stops_at_a_broken_image(breakable):
    with pytest.raises(PnfsError, match=r"bad\.jpg: image is truncated"):
        list(make_loader(breakable({3}), config(), train=False))


def test_a_wholly_broken_batch_gets_a_stand_in(breakable, people: PeopleDataset):
    dataset = breakable(set(range(len(people))) - {1})
    batches = list(make_loader(dataset, tolerant(config(), 1.0), train=True))
    assert len(batches) == len(people) // 4
    assert all(batch.indices.tolist() == [1] for batch in batches)


def test_nothing_but_broken_images_gives_empty_batches(breakable, people: PeopleDataset):
    dataset = breakable(set(range(len(people))))
    batch = next(iter(make_loader(dataset, tolerant(config(), 1.0), train=True)))
    assert len(batch) == 0 and batch.skipped == 4
    assert batch.images(size=SIZE).shape == (0, 3, *SIZE) and batch.joints.shape == (0, 17, 2)


def test_broken_annotations_count_as_skipped_samples(people: PeopleDataset):
    broken = replace(people, broken=("a.json: annotations[3]: bbox holds NaN",))
    with pytest.raises(PnfsError, match=r"a\.json: annotations\[3\].*1 of"):
        make_loader(broken, config(), train=True)
    assert (
        make_loader(broken, tolerant(config(), 0.2), train=True).first_problem == broken.broken[0]
    )


def test_a_box_beside_the_stored_image_is_a_broken_sample(people: PeopleDataset):
    """The annotation file states a larger image than the one on disk."""
    lost = replace(people.people[0], box=np.array([900.0, 900, 50, 80]), image_size=None)
    dataset = replace(people, people=(lost, *people.people[1:]))
    with pytest.raises(
        PnfsError, match=r"000000\.jpg: the box around .* lies outside the 320x240 image"
    ):
        list(make_loader(dataset, config(), train=False))


def test_half_body_crops_are_closer(people: PeopleDataset):
    augment = {"scale": 0, "rotation_probability": 0, "half_body_probability": 1.0}
    half, whole = (
        next(iter(make_loader(people, config(augment=a), train=True)))
        for a in (augment, {**augment, "half_body_probability": 0})
    )
    assert (half.to_image[:, 1, 1] < whole.to_image[:, 1, 1]).all()


def test_crops_hold_what_the_warp_reads_and_little_more():
    inverse = invert_affine(crop_matrix(np.array([50.0, 60]), np.array([0.2, 0.2]), 0, (20, 20)))
    assert touched_region(inverse, (20, 20), (200, 200)) == (29, 39, 71, 81)
    assert touched_region(inverse, (20, 20), (45, 60)) == (29, 39, 60, 45)
    assert touched_region(inverse, (20, 20), (30, 200)) is None


def test_collating_nothing_gives_an_empty_batch():
    batch = collate([], 17, ["a"])
    assert batch.pixels.numel() == 0 and batch.sizes.shape == (0, 2) and batch.skipped == 1


def test_the_real_image_loads(shared_dir: Path):
    tree = {"data": {"dataset": "coco", "root": str(shared_dir / "data" / "coco"), "workers": 0}}
    settings = parse_config(tree)
    dataset = load_people(settings.data, COCO, "val")
    one = replace(dataset, people=tuple(p for p in dataset.people if p.image_id == 785))
    (batch,) = make_loader(one, settings, train=False)
    assert batch.weights.sum() == 17 and batch.images(size=(256, 192)).shape == (1, 3, 256, 192)


@pytest.mark.parametrize("value", [1e308, np.inf, np.nan])
def test_a_crop_at_infinity_touches_nothing(value: float) -> None:
    inverse = np.array([[1.0, 0, value], [0, value, 0]])
    assert touched_region(inverse, (64, 48), (300, 350)) is None
