"""Skeletons agree with Table I, with COCO and with the published part lists."""

from __future__ import annotations

import json

import pytest

from pnfs.compat import PUBLISHED_PARTS
from pnfs.errors import PnfsError
from pnfs.skeleton import SKELETONS, get_skeleton


@pytest.mark.parametrize("name", SKELETONS)
def test_a_skeleton_is_consistent(name):
    skeleton = get_skeleton(name)
    count = skeleton.num_keypoints
    assert len(skeleton.oks_sigmas) == count == len(set(skeleton.keypoints))
    assert sorted(skeleton.file_order) == list(range(count))
    flip = skeleton.flip_permutation
    assert all(flip[flip[k]] == k for k in range(count))
    for left, right in skeleton.flip_pairs:
        assert skeleton.keypoints[left].removeprefix("left") == skeleton.keypoints[
            right
        ].removeprefix("right")
    for parts in skeleton.part_table.values():
        assert set().union(*parts.values()) == set(range(count))
    for a, b in skeleton.limbs:
        assert 0 <= a < count and 0 <= b < count and a != b


def test_oks_sigmas_are_those_of_pycocotools():
    params = pytest.importorskip("pycocotools.cocoeval").Params(iouType="keypoints")
    assert get_skeleton("coco").oks_sigmas == pytest.approx(params.kpt_oks_sigmas.tolist())


def test_parts_are_given_by_number_or_by_mapping():
    coco = get_skeleton("coco")
    assert list(coco.resolve_parts(3)) == ["head", "upper_limb", "lower_limb"]
    own = {"front": tuple(range(9)), "back": tuple(range(8, 17))}
    assert coco.resolve_parts(own) == own


@pytest.mark.parametrize(
    ("parts", "words"),
    [
        (4, "Table I"),
        ({"a": [0, 0]}, "distinct"),
        ({"a": [17]}, "0..16"),
        ({"a": [0]}, "no part predicts"),
    ],
)
def test_bad_parts_are_refused_in_one_line(parts, words):
    with pytest.raises(PnfsError, match=words):
        get_skeleton("coco").resolve_parts(parts)


def test_published_parts_are_the_reference_lists_and_the_sets_of_table_i(shared_dir):
    reference = json.loads((shared_dir / "reference" / "parts.json").read_text())
    for (dataset, count), parts in PUBLISHED_PARTS.items():
        assert list(reference[f"{dataset} P={count}"].items()) == [
            (n, list(k)) for n, k in parts.items()
        ]
        table = get_skeleton(dataset).resolve_parts(count)
        assert {frozenset(k) for k in parts.values()} == {frozenset(k) for k in table.values()}
