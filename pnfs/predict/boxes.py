"""Files that say where the people are: COCO detections, COCO annotations, or boxes by file name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pnfs.data.coco import PERSON_CATEGORY
from pnfs.data.records import read_json
from pnfs.errors import PnfsError

Rows = list[list[float]]  # x0, y0, x1, y1 and a score, in pixels


@dataclass(frozen=True)
class BoxTable:
    """Boxes of many images.

    Attributes:
        path: the file they come from.
        by_name: file name -> boxes. by_id: image id (frame number of a video) -> boxes.
        ids: file name -> image id, where the file says so.
        coco: whether it is a COCO file; its boxes refer to pixels as stored, before any turning.
    """

    path: Path
    by_name: dict[str, Rows] = field(default_factory=dict)
    by_id: dict[int, Rows] = field(default_factory=dict)
    ids: dict[str, int] = field(default_factory=dict)
    coco: bool = True

    def rows(self, name: str, image_id: int, threshold: float = 0.0) -> Rows:
        """Boxes of one image with a score of at least `threshold`; none if it is not named."""
        rows = self.by_name.get(name, self.by_id.get(image_id, []))
        # A NaN score stays, to be reported with its image.
        return [row for row in rows if not (len(row) > 4 and row[4] < threshold)]

    def check_matches(self, images: Sequence[tuple[str, int]]) -> None:
        """Raise PnfsError if boxes are given and none is for any of these (name, id)."""
        given = [*self.by_name, *map(str, self.by_id)]
        if given and not any(name in self.by_name or i in self.by_id for name, i in images):
            raise PnfsError(
                f"{self.path}: has boxes for {_some(given)} but none for "
                f"{_some(list(dict.fromkeys(name for name, _ in images)))}; name files as they are "
                "called, or use COCO image ids that the file names spell"
            )


def read_boxes(path: str | Path) -> BoxTable:
    """Read a file with boxes.

    One of these JSON forms:

    - COCO detections: `[{"image_id": 785, "bbox": [x, y, width, height], "score": 0.9}, ...]`;
      entries of other categories than 1 are left out. An image's id is the number that its file
      name spells (000000000785.jpg), a video frame's is its number from 0.
    - COCO annotations: with `images` and `annotations`; crowds are left out.
    - `{"file name": [[x0, y0, x1, y1], ...], ...}`, with an optional score as fifth number; for a
      video the frame's number instead, or the video's name for boxes of every frame.

    Raises:
        PnfsError: missing or malformed file, or an entry with a missing or wrong field.
    """
    path = Path(path)
    tree = read_json(path, "boxes file")
    if isinstance(tree, list):
        table = BoxTable(path)
        _add(table.by_id, tree, f"{path}: ")
        return table
    if not isinstance(tree, dict):
        raise PnfsError(
            f"{path}: must be a COCO file or {{file name: [[x0, y0, x1, y1], ...]}}, "
            f"not {type(tree).__name__}"
        )
    if isinstance(tree.get("images"), list) and isinstance(tree.get("annotations"), list):
        ids = {}
        for number, image in enumerate(tree["images"]):
            where = f"{path}: images[{number}]"
            ids[str(_field(image, "file_name", where))] = _image_id(image, "id", where)
        table = BoxTable(path, ids=ids)
        people = [a for a in tree["annotations"] if not (isinstance(a, dict) and a.get("iscrowd"))]
        _add(table.by_id, people, f"{path}: annotations")
        table.by_name.update({name: table.by_id.get(i, []) for name, i in ids.items()})
        return table
    table = BoxTable(path, coco=False)
    for name, rows in tree.items():
        if not isinstance(rows, list) or not all(isinstance(row, list) for row in rows):
            raise PnfsError(f"{path}: '{name}': must be a list of boxes [[x0, y0, x1, y1], ...]")
        parsed = [_numbers(row, f"{path}: '{name}'[{i}]", (4, 5)) for i, row in enumerate(rows)]
        table.by_name[name] = parsed
        if name.isdecimal():
            table.by_id[int(name)] = parsed
    return table


def _add(by_id: dict[int, Rows], entries: Sequence[Any], what: str) -> None:
    """Append COCO entries of people to their images' boxes."""
    for number, entry in enumerate(entries):
        where = f"{what}[{number}]"
        image_id = _image_id(entry, "image_id", where)
        x, y, width, height = _numbers(_field(entry, "bbox", where), f"{where}: bbox", (4,))
        (score,) = _numbers([entry.get("score", 1.0)], f"{where}: score", (1,))
        if entry.get("category_id", PERSON_CATEGORY) == PERSON_CATEGORY:
            by_id.setdefault(image_id, []).append([x, y, x + width, y + height, score])


def _field(entry: Any, name: str, where: str) -> Any:
    if not isinstance(entry, Mapping) or name not in entry:
        raise PnfsError(f"{where}: field '{name}' is missing; add it or remove the entry")
    return entry[name]


def _image_id(entry: Any, name: str, where: str) -> int:
    value = _field(entry, name, where)
    if isinstance(value, bool) or not isinstance(value, int):
        raise PnfsError(f"{where}: {name} {value!r:.60} is not an integer; correct it")
    return value


def _numbers(values: Any, where: str, lengths: tuple[int, ...]) -> list[float]:
    """Plain numbers; NaN passes here and is reported with the image that it belongs to."""
    good = isinstance(values, list) and len(values) in lengths
    if not good or any(isinstance(v, bool) or not isinstance(v, int | float) for v in values):
        counts = " or ".join(map(str, lengths))
        raise PnfsError(f"{where}: {values!r:.60} must be {counts} numbers; correct it")
    return [float(value) for value in values]


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(names[:3])
    return f"{shown} and {len(names) - 3} more" if len(names) > 3 else shown
