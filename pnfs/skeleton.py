"""COCO and MPII: keypoints, flips, limbs, OKS sigmas, PCKh groups, body parts of Table I.

Keypoint order is the paper's (footnote 3). COCO annotation files use the same order; MPII's use
another one, so `Skeleton.file_order` says where each keypoint stands in the official files.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from pnfs.errors import PnfsError, did_you_mean

Parts = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class Skeleton:
    """One dataset's body model. Indices are positions in `keypoints`.

    Attributes:
        name: `coco` or `mpii`.
        keypoints: K keypoint names, in the paper's order.
        flip_pairs: (left, right) index pairs that a mirrored image exchanges.
        limbs: index pairs that a drawing connects.
        oks_sigmas: K per-keypoint constants of OKS (COCO's published values; for MPII, which has no
            official ones, COCO's for the same joint and 0.079 or 0.026 for those COCO lacks).
        file_order: K positions of the keypoints in the dataset's official annotation files.
        pckh_groups: name -> indices that PCKh reports together; empty where PCKh is not used.
        upper_body: indices that half-body augmentation keeps together.
        part_table: P -> part name -> indices (Table I).
    """

    name: str
    keypoints: tuple[str, ...]
    flip_pairs: tuple[tuple[int, int], ...]
    limbs: tuple[tuple[int, int], ...]
    oks_sigmas: tuple[float, ...]
    file_order: tuple[int, ...]
    upper_body: tuple[int, ...]
    part_table: Mapping[int, Parts] = field(hash=False)
    pckh_groups: Mapping[str, tuple[int, ...]] = field(default_factory=dict, hash=False)

    @property
    def num_keypoints(self) -> int:
        return len(self.keypoints)

    @cached_property
    def flip_permutation(self) -> tuple[int, ...]:
        """K indices: keypoint k of a mirrored image is `flip_permutation[k]` of the original."""
        order = list(range(self.num_keypoints))
        for left, right in self.flip_pairs:
            order[left], order[right] = right, left
        return tuple(order)

    def resolve_parts(self, parts: int | Mapping[str, Sequence[int]]) -> Parts:
        """Table I's parts for P in {1, 3, 5, 8}, or a checked user-defined mapping.

        Raises:
            PnfsError: unknown P, an index outside the skeleton or twice in a part, an empty part,
                or a keypoint that no part predicts.
        """
        if isinstance(parts, int):
            if parts not in self.part_table:
                known = ", ".join(map(str, self.part_table))
                raise PnfsError(
                    f"model.parts: {parts} is not in Table I for {self.name}; use one of {known}, "
                    "or a mapping {name: [keypoint indices]}"
                )
            return dict(self.part_table[parts])
        resolved = {name: tuple(int(k) for k in indices) for name, indices in parts.items()}
        covered: set[int] = set()
        for name, indices in resolved.items():
            bad = [k for k in indices if not 0 <= k < self.num_keypoints]
            if bad or not indices or len(set(indices)) != len(indices):
                raise PnfsError(
                    f"model.parts.{name}: {list(indices)} must be distinct keypoint indices "
                    f"0..{self.num_keypoints - 1} of {self.name}, at least one"
                )
            covered.update(indices)
        missing = sorted(set(range(self.num_keypoints)) - covered)
        if missing:
            names = ", ".join(f"{k} ({self.keypoints[k]})" for k in missing)
            raise PnfsError(f"model.parts: no part predicts keypoint {names}; add it to a part")
        return resolved


def _span(first: int, last: int) -> tuple[int, ...]:
    return tuple(range(first, last + 1))


COCO = Skeleton(
    name="coco",
    keypoints=(
        "nose", "left_eye", "right_eye", "left_ear", "right_ear", "left_shoulder", "right_shoulder",
        "left_elbow", "right_elbow", "left_wrist", "right_wrist", "left_hip", "right_hip",
        "left_knee", "right_knee", "left_ankle", "right_ankle",
    ),
    flip_pairs=((1, 2), (3, 4), (5, 6), (7, 8), (9, 10), (11, 12), (13, 14), (15, 16)),
    limbs=(
        (15, 13), (13, 11), (16, 14), (14, 12), (11, 12), (5, 11), (6, 12), (5, 6), (5, 7), (7, 9),
        (6, 8), (8, 10), (0, 1), (0, 2), (1, 3), (2, 4), (3, 5), (4, 6),
    ),
    oks_sigmas=(
        0.026, 0.025, 0.025, 0.035, 0.035, 0.079, 0.079, 0.072, 0.072, 0.062, 0.062, 0.107, 0.107,
        0.087, 0.087, 0.089, 0.089,
    ),
    file_order=_span(0, 16),
    upper_body=_span(0, 10),
    part_table={
        1: {"all_keypoints": _span(0, 16)},
        3: {"head": _span(0, 4), "upper_limb": _span(5, 10), "lower_limb": _span(11, 16)},
        5: {
            "head_shoulder": _span(0, 6), "left_lower_arm": (7, 9), "right_lower_arm": (8, 10),
            "thigh": (11, 12), "lower_limb": _span(13, 16),
        },
        8: {
            "head_shoulder": _span(0, 6), "left_upper_arm": (5, 7), "left_lower_arm": (7, 9),
            "right_upper_arm": (6, 8), "right_lower_arm": (8, 10), "thigh": _span(11, 14),
            "left_lower_leg": (13, 15), "right_lower_leg": (14, 16),
        },
    },
)  # fmt: skip

MPII = Skeleton(
    name="mpii",
    keypoints=(
        "head_top", "upper_neck", "thorax", "left_shoulder", "right_shoulder", "left_elbow",
        "right_elbow", "left_wrist", "right_wrist", "left_hip", "right_hip", "left_knee",
        "right_knee", "left_ankle", "right_ankle", "pelvis",
    ),
    flip_pairs=((3, 4), (5, 6), (7, 8), (9, 10), (11, 12), (13, 14)),
    limbs=(
        (0, 1), (1, 2), (2, 3), (2, 4), (3, 5), (5, 7), (4, 6), (6, 8), (2, 15), (15, 9), (15, 10),
        (9, 11), (11, 13), (10, 12), (12, 14),
    ),
    oks_sigmas=(
        0.026, 0.079, 0.079, 0.079, 0.079, 0.072, 0.072, 0.062, 0.062, 0.107, 0.107, 0.087, 0.087,
        0.089, 0.089, 0.107,
    ),
    file_order=(9, 8, 7, 13, 12, 14, 11, 15, 10, 3, 2, 4, 1, 5, 0, 6),
    upper_body=_span(0, 8),
    part_table={
        1: {"all_keypoints": _span(0, 15)},
        3: {"head": _span(0, 2), "upper_limb": _span(3, 8), "lower_limb": _span(9, 15)},
        5: {
            "head_shoulder": _span(0, 4), "left_lower_arm": (5, 7), "right_lower_arm": (6, 8),
            "thigh": (9, 10, 15), "lower_limb": _span(11, 14),
        },
        8: {
            "head_shoulder": _span(0, 4), "left_upper_arm": (3, 5), "left_lower_arm": (5, 7),
            "right_upper_arm": (4, 6), "right_lower_arm": (6, 8), "thigh": (*_span(9, 12), 15),
            "left_lower_leg": (11, 13), "right_lower_leg": (12, 14),
        },
    },
    pckh_groups={  # "head" is the top of the head alone, as in the published tables
        "head": (0,), "shoulder": (3, 4), "elbow": (5, 6), "wrist": (7, 8), "hip": (9, 10),
        "knee": (11, 12), "ankle": (13, 14),
    },
)  # fmt: skip

SKELETONS: dict[str, Skeleton] = {skeleton.name: skeleton for skeleton in (COCO, MPII)}


def get_skeleton(name: str) -> Skeleton:
    """The skeleton called `name` (`coco` or `mpii`)."""
    try:
        return SKELETONS[name]
    except KeyError:
        raise PnfsError(
            f"skeleton '{name}' is unknown; use one of {', '.join(SKELETONS)}"
            + did_you_mean(name, SKELETONS)
        ) from None
