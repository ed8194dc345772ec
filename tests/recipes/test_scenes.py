"""Scenes are what they say: boxes fit, phrases refer to one shape, and the same number is the same picture everywhere."""

import contextlib
import hashlib
import io
import itertools
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scenes
from PIL import Image, ImageDraw
from pycocotools.coco import COCO
from scenes import SPLITS, Picture

from export.evaluate.coco import read_coco
from export.evaluate.detection import average_precision
from export.evaluate.grounding import read_phrases
from export.evaluate.measuring import find_images

ROOT = Path(__file__).parents[2]
COUNT = 60


@pytest.fixture(scope="module")
def pictures() -> list[Picture]:
    return [scenes.draw(number) for number in SPLITS["held-out"][:COUNT]]


def tight(mask: np.ndarray) -> tuple[int, int, int, int]:
    rows, columns = np.where(mask)
    return int(columns.min()), int(rows.min()), int(columns.max()) + 1, int(rows.max()) + 1


def test_a_box_is_tight_around_the_pixels_of_its_shape(pictures: list[Picture]) -> None:
    for picture in pictures:
        for index, shape in enumerate(picture.scene.shapes):
            mine = picture.owners == index + 1
            assert shape.box == tight(mine)
            assert shape.area == np.count_nonzero(mine)


def test_a_box_is_where_the_picture_shows_the_colour_of_its_shape(pictures: list[Picture]) -> None:
    """From the pixels alone: within a margin of 4 around the box, the colour is found in the box and reaches its sides."""
    seen = 0
    for picture in pictures:
        rectangles = [shape.box for shape in picture.scene.shapes]
        for shape in picture.scene.shapes:
            x0, y0, x1, y1 = (edge + margin for edge, margin in zip(shape.box, (-4, -4, 4, 4), strict=True))
            crowd = [b for b in rectangles if b is not shape.box and b[0] < x1 and x0 < b[2] and b[1] < y1 and y0 < b[3]]
            if crowd or min(x0, y0) < 0 or max(x1, y1) > picture.scene.size:
                continue
            part = picture.pixels[y0:y1, x0:x1].astype(int)
            found = tight(np.abs(part - shape.rgb).max(-1) <= 32)
            wanted = (4, 4, x1 - x0 - 4, y1 - y0 - 4)
            blended = 1 if shape.kind in ("circle", "ring") else 2  # pixels at an edge, and at a tip
            assert np.abs(np.subtract(found, wanted)).max() <= blended, (picture.scene.number, shape)
            seen += 1
    assert seen > COUNT


def test_every_shape_is_in_the_frame_stands_out_and_is_mostly_seen(pictures: list[Picture]) -> None:
    for picture in pictures:
        for index, shape in enumerate(picture.scene.shapes):
            assert min(shape.box[:2]) >= 1
            assert max(shape.box[2:]) <= picture.scene.size - 1
            whole = alone(picture, index)
            assert shape.area >= 0.57 * np.count_nonzero(whole)  # the outline below is drawn without supersampling


def alone(picture: Picture, index: int) -> np.ndarray:
    """The mask of one shape as if no other hid it."""
    shape, size = picture.scene.shapes[index], picture.scene.size
    turn = np.radians(shape.rotation)
    rotate = np.array([[np.cos(turn), np.sin(turn)], [-np.sin(turn), np.cos(turn)]])
    image = Image.new("1", (size, size))
    for outline, filled in scenes.KINDS[shape.kind]:
        points = np.array(outline) @ rotate * shape.diameter / 2 + shape.centre - 0.5
        ImageDraw.Draw(image).polygon([tuple(point) for point in points.tolist()], fill=filled)
    return np.asarray(image)


def test_a_shape_hides_those_below_it_that_it_overlaps(pictures: list[Picture]) -> None:
    hidden = 0
    for picture in pictures:
        masks = [alone(picture, index) for index in range(len(picture.scene.shapes))]
        for index, shape in enumerate(picture.scene.shapes):
            for other in range(len(masks)):
                common = np.count_nonzero(masks[index] & masks[other])
                if other >= index or common == 0:
                    assert other not in shape.hides or common > 0 or touches(masks[index], masks[other])
                elif common > 12:
                    assert other in shape.hides
                    hidden += 1
    assert hidden > COUNT / 4


def touches(one: np.ndarray, other: np.ndarray) -> bool:
    grown = np.pad(one, 1)
    return any(bool((np.roll(grown, (dy, dx), (0, 1))[1:-1, 1:-1] & other).any()) for dy in (-1, 0, 1) for dx in (-1, 0, 1))


def test_the_same_number_gives_the_same_bytes_in_another_process(pictures: list[Picture]) -> None:
    code = (
        "import hashlib; import scenes; p = scenes.draw(7)\n"
        "print(hashlib.sha256(p.pixels.tobytes() + p.owners.tobytes() + p.scene.to_json().encode()).hexdigest())"
    )
    other = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT / "recipes", capture_output=True, text=True, check=True
    ).stdout.strip()
    mine = pictures[7]
    assert other == hashlib.sha256(mine.pixels.tobytes() + mine.owners.tobytes() + mine.scene.to_json().encode()).hexdigest()


def test_numbers_and_seeds_give_different_pictures(pictures: list[Picture]) -> None:
    assert len({picture.pixels.tobytes() for picture in pictures}) == COUNT
    assert scenes.draw(7, seed=1).scene.shapes != pictures[7].scene.shapes


def test_no_scene_is_in_two_splits() -> None:
    ranges = sorted(SPLITS.values(), key=lambda numbers: numbers.start)
    assert all(before.stop <= after.start for before, after in itertools.pairwise(ranges))


def test_a_scene_survives_json(pictures: list[Picture]) -> None:
    for picture in pictures:
        assert scenes.Scene.from_json(picture.scene.to_json()) == picture.scene


def test_a_larger_frame_shows_larger_shapes() -> None:
    small, large = (scenes.draw(3, size=size) for size in (128, 256))
    assert small.pixels.shape == (128, 128, 3)
    assert all(shape.diameter <= 0.44 * 128 for shape in small.scene.shapes)
    assert max(shape.diameter for shape in large.scene.shapes) > 0.11 * 256


# What a phrase means, told anew: plain comparisons of boxes, without margins and without the grammar of the generator.

NOUN = r"(?:(red|orange|yellow|green|blue|purple|white|black) ?)?(circle|square|triangle|star|ring|cross|heart|crescent|shape|one)"
SIDES = {"left": (0, 1), "right": (0, -1), "top": (1, 1), "bottom": (1, -1)}
WORDS = {
    "leftmost": "left",
    "on the far left": "left",
    "rightmost": "right",
    "on the far right": "right",
    "topmost": "top",
    "at the very top": "top",
    "lowest": "bottom",
    "at the very bottom": "bottom",
    "left of": "left",
    "to the left of": "left",
    "right of": "right",
    "to the right of": "right",
    "above": "top",
    "below": "bottom",
    "under": "bottom",
}
ORDINAL = {"second": 1, "third": 2, "fourth": 3}
Item = dict[str, Any]


def fits(item: Item, colour: str | None, kind: str) -> bool:
    return colour in (None, item["colour"]) and kind in ("shape", "one", item["kind"])


def middle(item: Item) -> tuple[float, float]:
    x, y, width, height = item["bbox"]
    return x + width / 2, y + height / 2


def place(item: Item, side: str) -> float:
    axis, sign = SIDES[side]
    return sign * middle(item)[axis]


def box_area(item: Item) -> float:
    return float(item["bbox"][2] * item["bbox"][3])


def meant(text: str, items: list[Item]) -> list[Item]:
    """Every item of one image that a phrase can be said of."""
    if match := re.fullmatch(rf"the {NOUN}", text):
        return [item for item in items if fits(item, *match.groups())]
    if match := re.fullmatch(rf"the (?:(second|third|fourth) )?(largest|biggest|smallest) {NOUN}", text):
        rank = ORDINAL.get(match[1], 0)
        chosen = sorted((i for i in items if fits(i, match[3], match[4])), key=box_area, reverse=match[2] != "smallest")
        return [item for item in chosen if box_area(item) == box_area(chosen[rank])]
    if match := re.fullmatch(rf"the (second|third|fourth) {NOUN} from the (left|right|top|bottom)", text):
        chosen = sorted((i for i in items if fits(i, match[2], match[3])), key=lambda item: place(item, match[4]))
        return [item for item in chosen if place(item, match[4]) == place(chosen[ORDINAL[match[1]]], match[4])]
    if match := re.fullmatch(rf"the {NOUN} in the (top|bottom) (left|right) quarter", text):
        chosen = [item for item in items if fits(item, match[1], match[2])]
        return [i for i in chosen if all(place(i, side) < SIDES[side][1] * 128 for side in (match[3], match[4]))]
    if (match := re.fullmatch(rf"the (leftmost|rightmost|topmost|lowest) {NOUN}", text)) or (
        match := re.fullmatch(rf"the {NOUN} (on the far left|on the far right|at the very top|at the very bottom)", text)
    ):
        word = next(group for group in match.groups() if group in WORDS)
        colour, kind = (match[2], match[3]) if match[1] == word else (match[1], match[2])
        chosen = [item for item in items if fits(item, colour, kind)]
        return [i for i in chosen if place(i, WORDS[word]) == min(place(c, WORDS[word]) for c in chosen)]
    match = re.fullmatch(rf"the {NOUN} (.+) the {NOUN}", text)
    assert match, text
    (anchor,) = (item for item in items if fits(item, match[4], match[5]))
    chosen = [item for item in items if item is not anchor and fits(item, match[1], match[2])]
    assert len(chosen) >= 2, "a relation chooses among several"
    if match[3] == "closest to":
        distances = [float(np.hypot(*np.subtract(middle(item), middle(anchor)))) for item in chosen]
        return [item for item, distance in zip(chosen, distances, strict=True) if distance == min(distances)]
    if match[3] in ("behind", "in front of"):
        pairs = [(i, anchor) if match[3] == "behind" else (anchor, i) for i in chosen]
        return [i for i, (below, above) in zip(chosen, pairs, strict=True) if below["index"] in above["hides"]]
    side = WORDS[match[3]]
    return [item for item in chosen if place(item, side) < place(anchor, side)]


def described(picture: Picture) -> list[Item]:
    items = [
        {"kind": s.kind, "colour": s.colour, "bbox": (s.box[0], s.box[1], s.box[2] - s.box[0], s.box[3] - s.box[1])}
        for s in picture.scene.shapes
    ]
    return [{**item, "index": i, "hides": picture.scene.shapes[i].hides} for i, item in enumerate(items)]


def test_every_phrase_refers_to_its_shape_and_to_no_other(pictures: list[Picture]) -> None:
    heard: dict[str, int] = {}
    for picture in pictures:
        items = described(picture)
        for phrase in scenes.phrases(picture.scene):
            assert meant(phrase.text, items) == [items[phrase.target]], (picture.scene.number, phrase)
            assert phrase.target in phrase.among
            assert (phrase.anchor is not None) == (phrase.form == "relation")
            heard[phrase.form] = heard.get(phrase.form, 0) + 1
    assert set(heard) == set(scenes.FORMS)
    assert min(heard.values()) > COUNT


@pytest.mark.parametrize(("say", "axis"), [(scenes.mirrored, 0), (scenes.upside_down, 1)])
def test_a_phrase_can_be_said_of_the_mirror_image(say: Callable[[str], str], axis: int, pictures: list[Picture]) -> None:
    changed = 0
    for picture in pictures[:20]:
        items = described(picture)
        for item in items:
            box = list(item["bbox"])
            box[axis] = picture.scene.size - box[axis] - box[axis + 2]
            item["bbox"] = tuple(box)
        for phrase in scenes.phrases(picture.scene):
            assert meant(say(phrase.text), items) == [items[phrase.target]], (picture.scene.number, phrase)
            changed += say(phrase.text) != phrase.text
    assert changed > 100


def test_chosen_phrases_differ_and_take_the_forms_in_turn(pictures: list[Picture]) -> None:
    for picture in pictures:
        there = {phrase.form for phrase in scenes.phrases(picture.scene)}
        chosen = scenes.choose(picture.scene, len(there))
        assert {phrase.form for phrase in chosen} == there
        assert chosen == scenes.choose(picture.scene, 100)[: len(there)]
        assert len({phrase.text for phrase in scenes.choose(picture.scene, 100)}) == len(scenes.choose(picture.scene, 100))


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the command line writes."""
    out = tmp_path_factory.mktemp("scenes")
    command = [sys.executable, "recipes/scenes.py", "--split", "held-out", "--count", "12", "--phrases", "3", "--out", str(out)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    return out


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # pycocotools 2.0 under NumPy 2
def test_pycocotools_reads_the_annotations(written: Path, pictures: list[Picture]) -> None:
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO(str(written / "annotations.json"))
    assert [c["name"] for c in coco.loadCats(coco.getCatIds())] == list(scenes.KINDS)
    assert len(coco.getImgIds()) == 12
    for image, picture in zip(coco.loadImgs(coco.getImgIds()), pictures, strict=False):
        assert np.array_equal(np.asarray(Image.open(written / "images" / image["file_name"])), picture.pixels)
        annotations = coco.loadAnns(coco.getAnnIds(image["id"]))
        assert len(annotations) == len(picture.scene.shapes)
        for index, annotation in enumerate(annotations):
            mask = coco.annToMask(annotation).astype(bool)
            assert np.array_equal(mask, picture.owners == index + 1)
            x0, y0, x1, y1 = tight(mask)
            assert annotation["bbox"] == [x0, y0, x1 - x0, y1 - y0]
            assert annotation["area"] == mask.sum()


def test_the_grounding_file_tells_image_phrase_form_and_box(written: Path) -> None:
    rows = [json.loads(line) for line in (written / "phrases.jsonl").read_text().splitlines()]
    annotations = json.loads((written / "annotations.json").read_text())
    names = {image["file_name"]: image["id"] for image in annotations["images"]}
    assert len(rows) > 30
    for row in rows:
        assert set(row) == {"image", "phrase", "form", "box"}
        x0, y0, x1, y1 = row["box"]
        boxes = [a["bbox"] for a in annotations["annotations"] if a["image_id"] == names[row["image"]]]
        assert [x0, y0, x1 - x0, y1 - y0] in boxes


def test_models_can_be_evaluated_on_the_files(written: Path, pictures: list[Picture]) -> None:
    """Who answers with the truth is told so."""
    data, said = read_coco(written / "annotations.json"), read_phrases(written / "phrases.jsonl")
    find_images([image.file_name for image in data.images], written / "images", written / "annotations.json")
    rows = [
        {"image_id": one.image_id, "category_id": one.category_id, "bbox": list(one.bbox), "score": 0.9} for one in data.annotations
    ]
    assert len(rows) == sum(len(picture.scene.shapes) for picture in pictures[:12])
    overall, kinds = average_precision(data, rows)
    assert overall["AP"] == pytest.approx(1)
    assert set(kinds) == set(scenes.KINDS)
    assert len(said) == sum(min(3, len(scenes.phrases(picture.scene))) for picture in pictures[:12])
    assert {one.form for one in said} == set(scenes.FORMS)


def test_drawn_scenes_are_kept(tmp_path: Path) -> None:
    first, again = (scenes.drawn(tmp_path, "validation", 5, size=64) for _ in range(2))
    wanted = [scenes.draw(number, size=64) for number in SPLITS["validation"][:5]]
    for data in (first, again):
        assert data.scenes == [picture.scene for picture in wanted]
        assert np.array_equal(data.pixels, np.stack([picture.pixels for picture in wanted]))
        assert np.array_equal(data.owners, np.stack([picture.owners for picture in wanted]))
