"""Poses drawn on photographs: colours of parts, opacity, odd input, contact sheets."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
from pictures import has_colour, one_line

from pnfs.errors import PnfsError
from pnfs.plotting import draw_poses, part_legend, tile
from pnfs.plotting.body import body_points
from pnfs.plotting.style import PART_COLOURS, rgb
from pnfs.skeleton import COCO, MPII, SKELETONS


def standing_pose(confidence: float = 1.0, **changes: object) -> SimpleNamespace:
    """A person 160 pixels high in a 200 × 200 image."""
    points = np.array(body_points(COCO)) * 160 + [100, 20]
    pose = {
        "xy": points.astype(np.float32),
        "confidence": np.full(17, confidence, np.float32),
        "score": 0.9,
        "box": np.array([50.0, 15, 150, 185]),
    }
    return SimpleNamespace(**{**pose, **changes})


def grey(height: int = 200, width: int = 200) -> np.ndarray:
    return np.full((height, width, 3), 128, np.uint8)


@pytest.mark.parametrize("parts", [1, 3, 5, 8])
def test_limbs_take_the_colour_of_their_part(parts: int) -> None:
    image = grey()
    table = COCO.part_table[parts]
    drawn = draw_poses(image, [standing_pose()], COCO, table)
    assert drawn.shape == image.shape and drawn.dtype == np.uint8
    assert (image == 128).all(), "the input is left as it was"
    for name, colour in zip(table, PART_COLOURS, strict=False):
        assert has_colour(drawn, colour, at_least=5), name
    for unused in PART_COLOURS[len(table) :]:
        assert not has_colour(drawn, unused, at_least=1)


def test_limb_between_two_parts_is_half_and_half() -> None:
    table = {"left": (5,), "rest": tuple(k for k in range(17) if k != 5)}
    pose = standing_pose()
    drawn = draw_poses(grey(), [pose], COCO, table)
    shoulder, elbow = pose.xy[5], pose.xy[7]
    for share, colour in ((0.35, PART_COLOURS[0]), (0.65, PART_COLOURS[1])):
        x, y = np.round(shoulder + share * (elbow - shoulder)).astype(int)
        assert tuple(drawn[y, x, ::-1]) == rgb(colour)


def test_confidence_is_opacity_and_low_ones_are_left_out() -> None:
    def change(confidence: float) -> float:
        pose = standing_pose(confidence, box=None)
        drawn = draw_poses(grey(), [pose], COCO, COCO.part_table[3], min_confidence=0.2)
        return float(np.abs(drawn.astype(int) - 128).sum())

    assert change(0.1) == 0 < change(0.3) < change(0.6) < change(1.0)


def test_line_width_follows_the_box() -> None:
    def touched(box: list[float]) -> int:
        pose = standing_pose(box=np.array(box))
        image = draw_poses(grey(), [pose], COCO, COCO.part_table[1])
        return int(sum(has for has in (image[..., ::-1] == rgb(PART_COLOURS[0])).all(-1).ravel()))

    assert touched([0, 0, 600, 600]) > 1.5 * touched([50, 15, 150, 185])


@pytest.mark.parametrize(
    "changes",
    [
        {"xy": np.full((17, 2), np.nan, np.float32)},
        {"xy": np.full((17, 2), 1e9, np.float32)},
        {"xy": np.full((17, 2), -50.0, np.float32), "box": np.array([-90.0, -90, -10, -10])},
        {"box": np.array([np.nan] * 4)},
        {"box": np.array([-1e12, -1e12, 1e12, 1e12])},
        {"box": np.array([50.0, 50, 50, 50])},
        {"box": None, "score": None},
    ],
)
def test_odd_poses_are_drawn_as_far_as_they_can_be(changes: dict[str, object]) -> None:
    drawn = draw_poses(grey(), [standing_pose(**changes)], COCO, COCO.part_table[3])
    assert drawn.shape == (200, 200, 3)


def test_no_pose_changes_nothing_and_scale_enlarges() -> None:
    assert np.array_equal(draw_poses(grey(), [], COCO, COCO.part_table[3]), grey())
    drawn = draw_poses(grey(), [standing_pose()], COCO, COCO.part_table[3], scale=3)
    assert drawn.shape == (600, 600, 3)
    x, y = np.round((standing_pose().xy[9] + 0.5) * 3 - 0.5).astype(int)
    assert tuple(drawn[y, x, ::-1]) == rgb(PART_COLOURS[1]), "the wrist is where it was, times 3"


@pytest.mark.parametrize(
    "image",
    [np.zeros((8, 8), np.uint8), np.zeros((8, 8, 3), np.float32), np.zeros((0, 8, 3), np.uint8)],
)
def test_images_that_cannot_be_drawn_on_give_one_line(image: np.ndarray) -> None:
    with pytest.raises(PnfsError, match=r"need uint8 \(height, width, 3\)") as caught:
        draw_poses(image, [], COCO, COCO.part_table[3])
    assert one_line(str(caught.value))


def test_pose_of_another_skeleton_gives_one_line() -> None:
    with pytest.raises(PnfsError, match=r"skeleton 'mpii'.*\(16, 2\)"):
        draw_poses(grey(), [standing_pose()], MPII, MPII.part_table[3])


def test_contact_sheet_places_every_image() -> None:
    colours = [(0, 0, 255), (0, 255, 0), (255, 0, 0)]
    images = [np.full((20, 30, 3), colour, np.uint8) for colour in colours]
    sheet = tile(images, 2, gap=4)
    assert sheet.shape == (2 * 24 + 4, 2 * 34 + 4, 3)
    for (y, x), colour in zip(((14, 19), (14, 53), (38, 19)), colours, strict=True):
        assert tuple(sheet[y, x]) == colour
    assert tuple(sheet[38, 53]) == (255, 255, 255)
    big = np.zeros((400, 100, 3), np.uint8)
    assert tile([big], 5, cell=(100, 100), captions=["one"]).shape == (100 + 22 + 16, 116, 3)


@pytest.mark.parametrize(
    ("count", "columns", "captions"), [(0, 2, None), (1, 0, None), (2, 2, ["a"])]
)
def test_bad_contact_sheets_give_one_line(
    count: int, columns: int, captions: list[str] | None
) -> None:
    with pytest.raises(PnfsError, match="contact sheet"):
        tile([grey(8, 8)] * count, columns, captions=captions)


def test_legend_wraps_and_shows_every_part() -> None:
    wide, narrow = part_legend(COCO.part_table[8], 1200), part_legend(COCO.part_table[8], 200)
    assert wide.shape[1] == 1200 and narrow.shape[0] > 3 * wide.shape[0] / 2
    for colour in PART_COLOURS:
        assert has_colour(wide, colour) and has_colour(narrow, colour)


@pytest.mark.parametrize("skeleton", SKELETONS.values(), ids=SKELETONS)
def test_figure_has_a_place_for_every_keypoint(skeleton) -> None:
    points = np.array(body_points(skeleton))
    assert points.shape == (skeleton.num_keypoints, 2)
    assert len({tuple(point) for point in points}) == len(points)
    mirrored = points[list(skeleton.flip_permutation)] * [-1, 1]
    assert np.array_equal(mirrored, points)
