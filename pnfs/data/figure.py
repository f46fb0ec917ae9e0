"""An articulated, drawn person: sampled pose and looks, painted limb by limb from back to front.

People face the viewer, so their left is the image's right. Left limbs wear light bands and a light
shoe, right limbs are plain and darker: sides differ by looks, not only by place. Lengths are in
units of the standing height.
"""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np

from pnfs.data.brush import Brush, Color, shade
from pnfs.skeleton import COCO

_INDEX = {name: index for index, name in enumerate(COCO.keypoints)}

# Part codes in the label image: 8 · person + part.
TORSO, HEAD, LEFT_ARM, RIGHT_ARM, LEFT_LEG, RIGHT_LEG = range(1, 7)
CODES_PER_PERSON = 8
# Parts on which a keypoint is seen; under any other paint it is hidden (v = 1).
_CARRIERS: tuple[tuple[int, ...], ...] = (
    *(((HEAD,),) * 5),
    (TORSO, LEFT_ARM),
    (TORSO, RIGHT_ARM),
    *(((LEFT_ARM,), (RIGHT_ARM,)) * 2),
    (TORSO, LEFT_LEG),
    (TORSO, RIGHT_LEG),
    *(((LEFT_LEG,), (RIGHT_LEG,)) * 2),
)

_SHOULDER, _HIP, _TORSO, _HEAD = 0.118, 0.078, 0.285, 0.108
_UPPER_ARM, _FOREARM, _THIGH, _SHIN = 0.165, 0.15, 0.215, 0.21
_SKINS: tuple[Color, ...] = (
    (180, 205, 240), (150, 185, 230), (120, 160, 210), (90, 125, 180), (60, 90, 140), (45, 65, 105),
)  # fmt: skip
_HAIRS: tuple[Color, ...] = (
    (25, 25, 30), (30, 45, 75), (45, 75, 120), (70, 140, 190), (120, 190, 225), (40, 50, 150),
    (190, 190, 195),
)  # fmt: skip


@dataclass(frozen=True, eq=False)
class Figure:
    """Pose and looks of one person, in height units with the pelvis at the origin, y down."""

    joints: np.ndarray  # (17, 2), COCO order
    up: np.ndarray  # (2,) of the head
    head: np.ndarray  # (2,) centre of the head
    hands: np.ndarray  # (2, 2) left, right
    feet: np.ndarray  # (2, 2) left, right
    arms_behind: tuple[bool, bool]
    right_leg_first: bool
    long_hair: bool
    girth: float
    skin: Color
    hair: Color
    shirt: Color
    trousers: Color
    band: Color

    def extent(self) -> tuple[np.ndarray, np.ndarray]:
        """Low and high corners (2,) of everything that is painted, roughly."""
        around = self.head + _HEAD * np.array([[-1.2, -1.2], [1.2, 1.2]])
        points = np.concatenate([self.joints, self.hands, self.feet, around])
        return points.min(0) - 0.04, points.max(0) + 0.04


def sample_figure(generator: np.random.Generator) -> Figure:
    """Draw a pose from joint angles and foreshortening, and clothes, skin and hair."""
    joints = np.zeros((17, 2))

    def put(name: str, point: np.ndarray) -> np.ndarray:
        joints[_INDEX[name]] = point
        return point

    tilt = np.deg2rad(np.clip(generator.normal(0, 9), -25, 25))
    up, across = np.array([np.sin(tilt), -np.cos(tilt)]), np.array([np.cos(tilt), np.sin(tilt)])
    girth = generator.uniform(1.0, 1.35)
    chest = up * _TORSO * generator.uniform(0.88, 1.0)
    hands, feet = np.zeros((2, 2)), np.zeros((2, 2))
    sitting = generator.random() < 0.12
    for side, sign in enumerate((1.0, -1.0)):  # left is the image's right
        name = ("left", "right")[side]
        shoulder = put(f"{name}_shoulder", chest + sign * across * _SHOULDER * girth)
        hip = put(f"{name}_hip", sign * across * _HIP * girth)
        raise_, bend = _arm_angles(generator)
        elbow = put(f"{name}_elbow", shoulder + _limb(generator, raise_, sign, _UPPER_ARM, tilt))
        forearm = _limb(generator, raise_ + bend, sign, _FOREARM, tilt)
        wrist = put(f"{name}_wrist", elbow + forearm)
        hands[side] = wrist + 0.035 * forearm / np.linalg.norm(forearm)
        spread, fold = _leg_angles(generator, sitting)
        shorten = generator.uniform(0.5, 0.65) if sitting else 1.0
        knee = put(f"{name}_knee", hip + shorten * _limb(generator, spread, sign, _THIGH, 0.0))
        ankle = put(f"{name}_ankle", knee + _limb(generator, spread + fold, sign, _SHIN, 0.0))
        feet[side] = ankle + np.array([sign * 0.022, 0.032])

    lean = tilt + np.deg2rad(np.clip(generator.normal(0, 9), -22, 22))
    head_up = np.array([np.sin(lean), -np.cos(lean)])
    head_across = np.array([np.cos(lean), np.sin(lean)])
    head = chest + up * 0.045 + head_up * _HEAD
    turn = generator.uniform(-0.28, 0.28)
    face = {
        "nose": (1.25 * turn, -0.15),
        "left_eye": (0.4 + turn, 0.15), "right_eye": (-0.4 + turn, 0.15),
        "left_ear": (1.0 - 0.1 * abs(turn), 0.02), "right_ear": (-1.0 + 0.1 * abs(turn), 0.02),
    }  # fmt: skip
    for name, (x, y) in face.items():
        put(name, head + _HEAD * (x * head_across + y * head_up))
    return Figure(
        joints=joints,
        up=head_up,
        head=head,
        hands=hands,
        feet=feet,
        arms_behind=(bool(generator.random() < 0.12), bool(generator.random() < 0.12)),
        right_leg_first=bool(generator.random() < 0.5),
        long_hair=bool(generator.random() < 0.4),
        girth=girth,
        skin=_jitter(generator, _SKINS[generator.integers(len(_SKINS))]),
        hair=_jitter(generator, _HAIRS[generator.integers(len(_HAIRS))]),
        shirt=_vivid(generator),
        trousers=_vivid(generator),
        band=(235, 240, 245) if generator.random() < 0.5 else (90, 235, 245),
    )


def draw_figure(
    image: np.ndarray,
    labels: np.ndarray,
    figure: Figure,
    height: float,
    origin: np.ndarray,
    person: int,
) -> np.ndarray:
    """Paint a figure over an image and its codes over the label image; both change in place.

    Args:
        image: uint8 (H, W, 3), blue-green-red; labels: uint8 (H, W).
        height: of the standing person, in pixels; origin: (2,) pixel of the pelvis.
        person: number from 0; its codes are `CODES_PER_PERSON · person + part`.

    Returns:
        float64 (17, 2): the joints in image pixels.
    """
    brush = Brush(image, labels, height, np.asarray(origin, np.float64), person * CODES_PER_PERSON)
    joints = figure.joints
    if figure.long_hair:
        brush.ellipse(
            HEAD,
            figure.head - 0.35 * _HEAD * figure.up,
            1.12 * _HEAD,
            1.5 * _HEAD,
            figure.up,
            figure.hair,
        )
    legs = [(LEFT_LEG, "left", 0), (RIGHT_LEG, "right", 1)]
    for part, name, side in legs[::-1] if figure.right_leg_first else legs:
        _draw_leg(brush, figure, part, name, side)
    for side in (0, 1):
        if figure.arms_behind[side]:
            _draw_arm(brush, figure, side)
    _draw_torso(brush, figure)
    _draw_head(brush, figure)
    for side in (0, 1):
        if not figure.arms_behind[side]:
            _draw_arm(brush, figure, side)
    return joints * height + brush.origin


def visibility(labels: np.ndarray, joints: np.ndarray, person: int) -> np.ndarray:
    """COCO flags (17,) of drawn joints: 0 outside the image, 1 painted over, 2 seen."""
    flags = np.zeros(len(joints), np.int64)
    for index, (x, y) in enumerate(np.rint(joints).astype(int).tolist()):
        if 0 <= x < labels.shape[1] and 0 <= y < labels.shape[0]:
            codes = [person * CODES_PER_PERSON + part for part in _CARRIERS[index]]
            flags[index] = 2 if labels[y, x] in codes else 1
    return flags


def _arm_angles(generator: np.random.Generator) -> tuple[float, float]:
    """Degrees from hanging, outward, and the further bend at the elbow."""
    kind = generator.choice(5, p=[0.4, 0.2, 0.15, 0.15, 0.1])
    low, high, bend_low, bend_high = (
        (5, 40, -35, 45),  # hanging
        (55, 115, -60, 70),  # to the side
        (125, 165, -20, 45),  # up
        (35, 60, -110, -75),  # hand on hip
        (-20, 0, -60, -20),  # across the belly
    )[kind]
    return generator.uniform(low, high), generator.uniform(bend_low, bend_high)


def _leg_angles(generator: np.random.Generator, sitting: bool) -> tuple[float, float]:
    """Degrees from hanging, outward, and the further bend at the knee."""
    if sitting:
        return generator.uniform(10, 45), generator.uniform(-45, -10)
    if generator.random() < 0.15:  # a raised knee
        return generator.uniform(40, 75), generator.uniform(-85, -35)
    return generator.uniform(0, 28), generator.uniform(-25, 15)


def _limb(
    generator: np.random.Generator, degrees: float, sign: float, length: float, tilt: float
) -> np.ndarray:
    """A bone as a vector; foreshortened as if it pointed a little towards the viewer."""
    angle = np.deg2rad(degrees) * sign - tilt
    return length * generator.uniform(0.82, 1.0) * np.array([np.sin(angle), np.cos(angle)])


def _jitter(generator: np.random.Generator, color: Color) -> Color:
    blue, green, red = np.clip(np.array(color) + generator.integers(-12, 13, 3), 0, 255).tolist()
    return blue, green, red


def _vivid(generator: np.random.Generator) -> Color:
    hsv = np.array(
        [[[generator.integers(180), generator.integers(40, 230), generator.integers(70, 235)]]],
        np.uint8,
    )
    blue, green, red = cv2.cvtColor(hsv, cv2.COLOR_HSV2BGR)[0, 0].tolist()
    return blue, green, red


def _draw_leg(brush: Brush, figure: Figure, part: int, name: str, side: int) -> None:
    hip, knee, ankle = (
        figure.joints[_INDEX[f"{name}_{joint}"]] for joint in ("hip", "knee", "ankle")
    )
    left, wide = side == 0, figure.girth
    color = shade(figure.trousers, 1.2 if left else 0.75)
    sole = (230, 230, 235) if left else (45, 40, 40)
    brush.ellipse(part, figure.feet[side], 0.05, 0.028, np.array([0.0, -1.0]), sole)
    brush.capsule(part, knee, ankle, (0.043 * wide, 0.031 * wide), color)
    brush.capsule(part, hip, knee, (0.062 * wide, 0.046 * wide), color)
    if left:
        brush.bands(part, hip, knee, 0.05 * wide, figure.band, (0.55,))
        brush.bands(part, knee, ankle, 0.033 * wide, figure.band, (0.5,))
    brush.disc(part, knee, 0.025, shade(color, 0.55))
    brush.disc(part, ankle, 0.017, shade(color, 0.45))


def _draw_arm(brush: Brush, figure: Figure, side: int) -> None:
    part, name = ((LEFT_ARM, "left"), (RIGHT_ARM, "right"))[side]
    shoulder, elbow, wrist = (
        figure.joints[_INDEX[f"{name}_{joint}"]] for joint in ("shoulder", "elbow", "wrist")
    )
    left, wide = side == 0, figure.girth
    color = shade(figure.shirt, 1.2 if left else 0.75)
    brush.disc(part, figure.hands[side], 0.034, figure.skin, outline=True)
    brush.capsule(part, elbow, wrist, (0.035 * wide, 0.028 * wide), color)
    brush.capsule(part, shoulder, elbow, (0.046 * wide, 0.037 * wide), color)
    if left:
        brush.bands(part, shoulder, elbow, 0.038 * wide, figure.band, (0.55,))
        brush.bands(part, elbow, wrist, 0.029 * wide, figure.band, (0.5,))
    brush.disc(part, shoulder, 0.018, shade(color, 0.7))
    brush.disc(part, elbow, 0.019, shade(color, 0.55))
    brush.disc(part, wrist, 0.018, shade(figure.skin, 0.7))


def _draw_torso(brush: Brush, figure: Figure) -> None:
    joints = figure.joints
    shoulders, hips = joints[[5, 6]], joints[[11, 12]]
    chest = shoulders.mean(0)
    up = chest / np.linalg.norm(chest)
    side = np.array([-up[1], up[0]])  # to the image's right
    # Trousers first, so that the shirt's hem lies over them.
    pelvis = np.concatenate([hips + 0.045 * side * [[1], [-1]] + 0.02 * up, hips - 0.05 * up])
    brush.polygon(TORSO, cv2.convexHull(pelvis.astype(np.float32))[:, 0], figure.trousers)
    brush.capsule(TORSO, chest, chest + 0.06 * up, (0.036, 0.034), shade(figure.skin, 0.85))
    yoke = shoulders + 0.022 * side * [[1], [-1]] + 0.012 * up
    hem = hips + 0.04 * side * [[1], [-1]] + 0.03 * up
    neck = chest + 0.03 * up + np.array([[0.05], [-0.05]]) * side
    outline = np.concatenate([yoke, neck, hem]).astype(np.float32)
    brush.polygon(TORSO, cv2.convexHull(outline)[:, 0], figure.shirt)
    collar = np.array(
        [chest + 0.03 * up + 0.04 * side, chest + 0.03 * up - 0.04 * side, chest - 0.03 * up]
    )
    brush.polygon(TORSO, collar, figure.skin, outline=False)
    brush.capsule(TORSO, hem[0], hem[1], (0.01, 0.01), shade(figure.trousers, 0.45))
    for hip in hips:
        brush.disc(TORSO, hip, 0.02, shade(figure.trousers, 0.5))


def _draw_head(brush: Brush, figure: Figure) -> None:
    up, head, radius, skin = figure.up, figure.head, _HEAD, figure.skin
    side = np.array([-up[1], up[0]])
    nose, left_eye, right_eye, left_ear, right_ear = figure.joints[:5]
    dark = shade(skin, 0.6)
    for ear in (left_ear, right_ear):
        brush.ellipse(HEAD, ear, 0.26 * radius, 0.36 * radius, up, skin)
    brush.ellipse(HEAD, head, radius, 1.1 * radius, up, skin)
    for ear in (left_ear, right_ear):
        brush.ellipse(HEAD, ear, 0.2 * radius, 0.3 * radius, up, shade(skin, 0.8), outline=False)
        brush.disc(HEAD, ear, 0.1 * radius, dark)
    angle = np.linspace(0, np.pi, 14)
    dome = (
        np.cos(angle)[:, None] * 0.9 * radius * side + np.sin(angle)[:, None] * 0.84 * radius * up
    )
    brush.polygon(HEAD, head + 0.42 * radius * up + dome, figure.hair, outline=False)
    for sign in (1, -1):  # temples
        temple = head + 0.42 * radius * up + sign * 0.82 * radius * side
        brush.ellipse(HEAD, temple, 0.14 * radius, 0.34 * radius, up, figure.hair, outline=False)
    for eye in (left_eye, right_eye):
        brush.ellipse(HEAD, eye, 0.21 * radius, 0.16 * radius, up, (245, 245, 245))
        brush.disc(HEAD, eye, 0.115 * radius, (30, 25, 20))
    tip = np.array(
        [
            nose + 0.2 * radius * up,
            nose - 0.16 * radius * (up - side),
            nose - 0.16 * radius * (up + side),
        ]
    )
    brush.polygon(HEAD, tip, dark, outline=False)
    mouth = nose - 0.4 * radius * up
    brush.ellipse(HEAD, mouth, 0.3 * radius, 0.08 * radius, up, (70, 60, 170), outline=False)
