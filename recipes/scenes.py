"""Draw scenes of coloured shapes over procedural textures, with exact boxes, masks and phrases: data for the bundled models.

    python recipes/scenes.py --split held-out --count 500 --out scenes
    python recipes/scenes.py --split held-out --count 500 --out scenes --phrases 2

writes `scenes/images/*.png`, `scenes/annotations.json` (COCO's format, one category per kind of shape) and, with `--phrases`,
`scenes/phrases.jsonl`: one JSON object per line with `image`, `phrase`, `form` and `box` (x0, y0, x1, y1 in pixels). Both are what
`python -m export eval` takes.

A scene is known by its number and a seed: the same pair gives the same scene, and each split is a range of numbers, so that no
scene is in two splits. Only arithmetic that IEEE 754 defines exactly and Pillow's integer drawing decide on pixels.

Boxes and masks are those of what can be **seen**: a pixel belongs to the topmost shape that covers at least half of it, and a box
is the tightest around the pixels of its shape. Every shape lies wholly inside the frame, shows at least 60 % of itself, and
overlaps none of its own colour. Textures are muted, shapes are not, so that every shape stands out.

A phrase refers to exactly one shape of its scene, and by a margin: who is called leftmost is so by 5 % of the frame.
"""

import argparse
import dataclasses
import itertools
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from rich.progress import track

Split = Literal["train", "validation", "held-out"]
Form = Literal["colour", "shape", "attributes", "size", "position", "relation", "order"]
Box = tuple[int, int, int, int]
Pixels = NDArray[np.uint8]
Field = NDArray[np.float32]
Outline = tuple[tuple[float, float], ...]

FORMS: tuple[Form, ...] = get_args(Form)
SPLITS: dict[Split, range] = {
    "held-out": range(1_000_000),
    "validation": range(1_000_000, 2_000_000),
    "train": range(2_000_000, 2**31),
}
COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (214, 30, 36),
    "orange": (245, 135, 18),
    "yellow": (245, 222, 30),
    "green": (28, 158, 52),
    "blue": (28, 74, 222),
    "purple": (136, 34, 180),
    "white": (242, 242, 242),
    "black": (18, 18, 18),
}
SUPERSAMPLING = 4
LEAST_SEEN = 0.6
CLEAR_DISTANCE = 0.05
"""By how much of the frame's side one centre must be further left (right, up, down) than another to be called so."""
CLEAR_RATIO = 1.35
"""How many times the area of one box must be that of another for its shape to be called larger."""


def _circle(radius: float, x: float = 0.0, y: float = 0.0, corners: int = 64) -> Outline:
    turn = 2 * math.pi / corners
    return tuple((x + radius * math.cos(i * turn), y + radius * math.sin(i * turn)) for i in range(corners))


def _star(points: int, inner: float) -> Outline:
    turn = math.pi / points
    radii = itertools.cycle((1.0, inner))
    return tuple((r * math.sin(i * turn), -r * math.cos(i * turn)) for i, r in zip(range(2 * points), radii, strict=False))


def _heart(corners: int = 64) -> Outline:
    turn = 2 * math.pi / corners
    x = [16 * math.sin(i * turn) ** 3 for i in range(corners)]
    y = [sum(c * math.cos(k * i * turn) for k, c in ((1, -13), (2, 5), (3, 2), (4, 1))) - 2.5 for i in range(corners)]
    return tuple((a / 17, b / 17) for a, b in zip(x, y, strict=True))


def _cross(arm: float) -> Outline:
    tip = math.sqrt(1 - arm * arm)
    quarter = ((arm, -tip), (arm, -arm), (tip, -arm))
    quarters = [quarter]
    for _ in range(3):
        quarters.append(tuple((-y, x) for x, y in quarters[-1]))  # type: ignore[arg-type]
    return tuple(itertools.chain.from_iterable(quarters))


# Each kind as polygons in the unit circle, drawn one over another: filled (1) or cut out (0).
KINDS: dict[str, tuple[tuple[Outline, int], ...]] = {
    "circle": ((_circle(1.0), 1),),
    "square": ((_circle(1.0, corners=4), 1),),
    "triangle": ((_circle(1.0, corners=3), 1),),
    "star": ((_star(5, 0.42), 1),),
    "ring": ((_circle(1.0), 1), (_circle(0.55), 0)),
    "cross": ((_cross(0.28), 1),),
    "heart": ((_heart(), 1),),
    "crescent": ((_circle(1.0), 1), (_circle(0.82, x=0.5), 0)),
}


@dataclass(frozen=True)
class Shape:
    """One shape of a scene; lengths in pixels, x to the right and y down."""

    kind: str
    colour: str
    rgb: tuple[int, int, int]
    centre: tuple[float, float]
    """Of the circle that circumscribes the whole shape, hidden parts too."""
    diameter: float
    rotation: int
    """Degrees, clockwise."""
    box: Box
    """The tightest around what can be seen, as (x0, y0, x1, y1); x1 and y1 are exclusive."""
    area: int
    """Pixels that can be seen."""
    hides: tuple[int, ...] = ()
    """Indices of the shapes of the scene that this one covers a part of."""

    @property
    def middle(self) -> tuple[float, float]:
        """Of the box: the point by which phrases compare places."""
        return (self.box[0] + self.box[2]) / 2, (self.box[1] + self.box[3]) / 2

    @property
    def extent(self) -> int:
        """Area of the box: the measure by which phrases compare sizes."""
        return (self.box[2] - self.box[0]) * (self.box[3] - self.box[1])


@dataclass(frozen=True)
class Scene:
    """What a picture shows: a texture and, from back to front, the shapes."""

    number: int
    seed: int
    size: int
    texture: str
    shapes: tuple[Shape, ...]

    @classmethod
    def from_json(cls, line: str) -> "Scene":
        """The inverse of `to_json`."""
        values = json.loads(line)
        shapes = tuple(Shape(**{k: tuple(v) if isinstance(v, list) else v for k, v in s.items()}) for s in values.pop("shapes"))
        return cls(shapes=shapes, **values)

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self))


@dataclass(frozen=True)
class Picture:
    """A scene with its pixels, uint8 [size,size,3], and who owns each: uint8 [size,size], 0 for the texture, i + 1 for shape i."""

    scene: Scene
    pixels: Pixels
    owners: Pixels


@dataclass(frozen=True)
class Phrase:
    """Words that refer to one shape of a scene; shapes are known by their indices."""

    text: str
    form: Form
    target: int
    among: tuple[int, ...]
    """The shapes that the noun fits and the phrase chooses from."""
    anchor: int | None = None
    """The shape that a relation is to."""


# Textures: fields of numbers 0..1 that blend two muted colours.


def _clouds(rng: np.random.Generator, size: int, cells: int = 0, octaves: int = 3) -> Field:
    cells = cells or int(rng.integers(2, 7))
    field = np.zeros((size, size), np.float32)
    for octave in range(octaves):
        grid = rng.random((cells << octave, cells << octave), np.float32) - np.float32(0.5)
        field += np.asarray(Image.fromarray(grid).resize((size, size), Image.Resampling.BICUBIC)) * np.float32(0.5**octave)
    return np.clip(field + np.float32(0.5), 0, 1)


def _waves(rng: np.random.Generator, size: int) -> Field:
    """A ramp in a random direction, bent by clouds, that rises by 1 from one wave to the next."""
    angle = 2 * math.pi * rng.random()
    period = size * (0.05 + 0.2 * rng.random())
    along = np.arange(size, dtype=np.float32)
    ramp = along[None, :] * np.float32(math.cos(angle) / period) + along[:, None] * np.float32(math.sin(angle) / period)
    return ramp + _clouds(rng, size, 3, 1) * np.float32(2 * rng.random())


def _there_and_back(ramp: Field) -> Field:
    """A ramp as a triangular wave 0..1."""
    return np.abs((ramp - np.floor(ramp)) * np.float32(2) - np.float32(1))


def _stripes(rng: np.random.Generator, size: int) -> Field:
    return np.clip(_there_and_back(_waves(rng, size)) * np.float32(3) - np.float32(1), 0, 1)


def _ripples(rng: np.random.Generator, size: int) -> Field:
    return _there_and_back(_waves(rng, size))


def _checks(rng: np.random.Generator, size: int) -> Field:
    across, down = (np.floor(_waves(rng, size)) for _ in range(2))
    return (across + down) % np.float32(2)


def _gradient(rng: np.random.Generator, size: int) -> Field:
    ramp = _waves(rng, size)
    low, high = ramp.min(), ramp.max()
    return (ramp - low) / (high - low)


def _dots(rng: np.random.Generator, size: int) -> Field:
    across, down = (_there_and_back(_waves(rng, size)) for _ in range(2))
    return np.clip((across * across + down * down) * np.float32(2) - np.float32(1), 0, 1)


TEXTURES: dict[str, Callable[[np.random.Generator, int], Field]] = {
    "clouds": _clouds,
    "stripes": _stripes,
    "ripples": _ripples,
    "checks": _checks,
    "gradient": _gradient,
    "dots": _dots,
}


def _texture(name: str, rng: np.random.Generator, size: int) -> Field:
    """Float32 [3,size,size] in 0..255, between dark and light grey with a little colour."""
    first, second = ((rng.integers(75, 186) + rng.integers(-22, 23, 3)).astype(np.float32) for _ in range(2))
    field = TEXTURES[name](rng, size)
    grain = (np.frombuffer(rng.bytes(size * size), np.int8).reshape(size, size) >> int(rng.integers(3, 6))).astype(np.float32)
    planes = np.empty((3, size, size), np.float32)
    for channel in range(3):
        np.multiply(field, second[channel] - first[channel], out=planes[channel])
        planes[channel] += first[channel]
        planes[channel] += grain
    return planes


# Shapes.


@dataclass(frozen=True)
class _Placed:
    """A shape before it is known what will be seen of it."""

    kind: str
    colour: str
    rgb: tuple[int, int, int]
    centre: tuple[float, float]
    diameter: float
    rotation: int
    left: int
    top: int
    alpha: Pixels
    """[side,side]: how much of each pixel it covers, 0..255, from `left`, `top` on."""

    @property
    def window(self) -> tuple[slice, slice]:
        return slice(self.top, self.top + len(self.alpha)), slice(self.left, self.left + len(self.alpha))

    @property
    def mask(self) -> NDArray[np.bool_]:
        return self.alpha >= 128


def _propose(rng: np.random.Generator, size: int, kinds: Sequence[str], colours: Sequence[str]) -> _Placed:
    kind, colour = kinds[rng.integers(len(kinds))], colours[rng.integers(len(colours))]
    rgb = tuple(int(v) for v in np.clip(COLOURS[colour] + rng.integers(-12, 13, 3), 0, 255))
    diameter = size * (0.11 + 0.33 * rng.random() ** 1.5)
    margin = diameter / 2 + 2
    centre = tuple(margin + (size - 2 * margin) * rng.random() for _ in range(2))
    rotation = int(rng.integers(360))
    left, top = (math.floor(v - margin) + 1 for v in centre)
    side = math.ceil(diameter) + 3
    cos, sin = math.cos(math.radians(rotation)), math.sin(math.radians(rotation))
    image = Image.new("L", (side * SUPERSAMPLING, side * SUPERSAMPLING))
    draw = ImageDraw.Draw(image)
    for outline, filled in KINDS[kind]:
        points = [
            (
                round((centre[0] - left + (x * cos - y * sin) * diameter / 2) * SUPERSAMPLING),
                round((centre[1] - top + (x * sin + y * cos) * diameter / 2) * SUPERSAMPLING),
            )
            for x, y in outline
        ]
        draw.polygon(points, fill=255 * filled)
    alpha = np.asarray(image.reduce(SUPERSAMPLING))
    return _Placed(kind, colour, rgb, centre, diameter, rotation, left, top, alpha)  # type: ignore[arg-type]


def _fits(new: _Placed, placed: Sequence[_Placed], owners: Pixels) -> bool:
    """Whether all shapes stay visible enough, and those of one colour apart, if `new` is put on top."""
    for index, other in enumerate(placed):
        if other.colour == new.colour:
            if math.dist(other.centre, new.centre) < (other.diameter + new.diameter) / 2 + 3:
                return False
            continue
        seen = np.count_nonzero(owners[other.window] == index + 1)
        lost = np.count_nonzero(new.mask & (owners[new.window] == index + 1))
        if seen - lost < LEAST_SEEN * np.count_nonzero(other.mask):
            return False
    return True


def _paint(canvas: Field, shape: _Placed, rng: np.random.Generator) -> None:
    """Blend a shape into float32 [3,size,size], a little lighter on one side than on the other."""
    slope = np.arange(len(shape.alpha), dtype=np.float32) * np.float32(2 / len(shape.alpha)) - np.float32(1)
    down, across = (np.float32(24 * rng.random() - 12) for _ in range(2))
    shade = slope[:, None] * down + slope[None, :] * across
    alpha = shape.alpha * np.float32(1 / 255)
    for plane, value in zip(canvas, shape.rgb, strict=True):
        part = plane[shape.window]
        part += (shade + np.float32(value) - part) * alpha


def _seen(index: int, shape: _Placed, placed: Sequence[_Placed], owners: Pixels) -> Shape:
    """The description of a shape once all are placed."""
    mine = owners[shape.window] == index + 1
    rows, columns = np.flatnonzero(mine.any(1)), np.flatnonzero(mine.any(0))
    box = (shape.left + int(columns[0]), shape.top + int(rows[0]), shape.left + int(columns[-1]) + 1, shape.top + int(rows[-1]) + 1)
    hides = tuple(i for i, other in enumerate(placed[:index]) if _overlap(shape, other))
    return Shape(
        shape.kind, shape.colour, shape.rgb, shape.centre, shape.diameter, shape.rotation, box, int(np.count_nonzero(mine)), hides
    )


def _overlap(one: _Placed, other: _Placed) -> bool:
    left, top = max(one.left, other.left), max(one.top, other.top)
    right = min(one.left + len(one.alpha), other.left + len(other.alpha))
    bottom = min(one.top + len(one.alpha), other.top + len(other.alpha))
    if left >= right or top >= bottom:
        return False
    first, second = (s.mask[top - s.top : bottom - s.top, left - s.left : right - s.left] for s in (one, other))
    return bool((first & second).any())


def draw(number: int, *, seed: int = 0, size: int = 256) -> Picture:
    """The scene of one number: up to eight shapes of a few kinds and colours over a texture.

    Args:
        number: which scene; see `SPLITS`.
        seed: another seed gives another world of scenes.
        size: width and height in pixels; everything scales with it.
    """
    rng = np.random.default_rng((seed, number))
    name = tuple(TEXTURES)[rng.integers(len(TEXTURES))]
    canvas = _texture(name, rng, size)
    kinds = [tuple(KINDS)[i] for i in rng.permutation(len(KINDS))[: rng.integers(2, 6)]]
    colours = [tuple(COLOURS)[i] for i in rng.permutation(len(COLOURS))[: rng.integers(2, 6)]]
    owners = np.zeros((size, size), np.uint8)
    placed: list[_Placed] = []
    for _ in range(int(rng.integers(1, 9))):
        new = next((n for n in (_propose(rng, size, kinds, colours) for _ in range(10)) if _fits(n, placed, owners)), None)
        if new is None:
            continue
        placed.append(new)
        owners[new.window][new.mask] = len(placed)
        _paint(canvas, new, rng)
    shapes = tuple(_seen(i, shape, placed, owners) for i, shape in enumerate(placed))
    canvas += np.float32(0.5)
    pixels = np.ascontiguousarray(np.clip(canvas, 0, 255, out=canvas).astype(np.uint8).transpose(1, 2, 0))
    return Picture(Scene(number, seed, size, name, shapes), pixels, owners)


# Phrases.


@dataclass(frozen=True, order=True)
class _Group:
    """The shapes of a scene that one noun fits: "red circle", "circle", "red shape" or, all of them, "shape"."""

    colour: str
    kind: str

    def __str__(self) -> str:
        return f"{self.colour} {self.kind or 'shape'}".lstrip()

    def members(self, scene: Scene) -> list[int]:
        return [i for i, s in enumerate(scene.shapes) if self.colour in ("", s.colour) and self.kind in ("", s.kind)]


DIRECTIONS = {
    "left": ("leftmost {}", "{} on the far left"),
    "right": ("rightmost {}", "{} on the far right"),
    "top": ("topmost {}", "{} at the very top"),
    "bottom": ("lowest {}", "{} at the very bottom"),
}
RELATIONS = {
    "left": ("{} left of the {}", "{} to the left of the {}"),
    "right": ("{} right of the {}", "{} to the right of the {}"),
    "top": ("{} above the {}",),
    "bottom": ("{} below the {}", "{} under the {}"),
}
ORDINALS = ("second", "third", "fourth")


def _towards(direction: str, shape: Shape, size: int) -> float:
    """How far from its side of the frame a shape is, in units of what counts as a clear distance."""
    x, y = shape.middle
    return {"left": x, "right": size - x, "top": y, "bottom": size - y}[direction] / (CLEAR_DISTANCE * size)


def _magnitude(shape: Shape) -> float:
    """The size of a shape on a scale on which 1 is a clear difference."""
    return math.log(shape.extent) / math.log(CLEAR_RATIO)


def _ranked(members: Sequence[int], key: Callable[[int], float]) -> Iterator[tuple[int, int]]:
    """(rank, member) of the members, in rising order of key, that are at least 1 away from both neighbours."""
    order = sorted(members, key=key)
    for rank, member in enumerate(order):
        around = order[max(rank - 1, 0) : rank] + order[rank + 1 : rank + 2]
        if all(abs(key(other) - key(member)) >= 1 for other in around):
            yield rank, member


def _by_size(scene: Scene, members: Sequence[int]) -> Iterator[tuple[Form, str, int]]:
    scales = (("largest", "biggest"), -1), (("smallest",), 1)
    for words, sign in scales:
        for rank, member in _ranked(members, lambda i, sign=sign: sign * _magnitude(scene.shapes[i])):  # type: ignore[misc]
            if rank == 0:
                yield from (("size", f"{word} {{}}", member) for word in words)
            elif rank <= len(ORDINALS):
                yield "order", f"{ORDINALS[rank - 1]} {words[0]} {{}}", member


def _by_place(scene: Scene, members: Sequence[int]) -> Iterator[tuple[Form, str, int]]:
    for direction, templates in DIRECTIONS.items():
        for rank, member in _ranked(members, lambda i, d=direction: _towards(d, scene.shapes[i], scene.size)):  # type: ignore[misc]
            if rank == 0:
                yield from (("position", template, member) for template in templates)
            elif rank <= len(ORDINALS):
                yield "order", f"{ORDINALS[rank - 1]} {{}} from the {direction}", member
    half = 0.5 / CLEAR_DISTANCE
    for vertical, horizontal in itertools.product(("top", "bottom"), ("left", "right")):
        depth = {
            i: max(_towards(vertical, scene.shapes[i], scene.size), _towards(horizontal, scene.shapes[i], scene.size)) - half
            for i in members
        }
        if (found := _only(depth)) is not None:
            yield "position", f"{{}} in the {vertical} {horizontal} quarter", found


def _only(depth: dict[int, float]) -> int | None:
    """The one member whose depth is clearly below 0 where those of all others are clearly above it."""
    inside = [i for i, value in depth.items() if value < 1]
    return inside[0] if len(inside) == 1 and depth[inside[0]] <= -1 else None


def _by_relation(scene: Scene, members: Sequence[int], anchor: int) -> Iterator[tuple[str, int]]:
    """Templates of a noun and its anchor."""
    shapes, size = scene.shapes, scene.size
    for direction, templates in RELATIONS.items():
        origin = _towards(direction, shapes[anchor], size)
        found = _only({i: _towards(direction, shapes[i], size) - origin for i in members})
        if found is not None:
            yield from ((template, found) for template in templates)
    clear = CLEAR_DISTANCE * size
    near = next(_ranked(members, lambda i: math.dist(shapes[i].middle, shapes[anchor].middle) / clear), None)
    if near is not None and near[0] == 0:
        yield "{} closest to the {}", near[1]
    behind = [i for i in members if i in shapes[anchor].hides]
    before = [i for i in members if anchor in shapes[i].hides]
    yield from (("{} behind the {}", i) for i in behind if len(behind) == 1)
    yield from (("{} in front of the {}", i) for i in before if len(before) == 1)


def phrases(scene: Scene, *, relations: bool = True) -> list[Phrase]:
    """Every phrase of the grammar that refers to exactly one shape of the scene, in a fixed order; without `relations`, sooner.

    Superlatives, orders and relations choose among two shapes or more.
    """
    nouns = sorted({_Group(c, k) for s in scene.shapes for c in ("", s.colour) for k in ("", s.kind)})
    groups = {noun: noun.members(scene) for noun in nouns}
    found: list[Phrase] = []
    for noun, members in groups.items():
        if len(members) == 1 and (noun.colour or noun.kind):
            form: Form = "attributes" if noun.colour and noun.kind else "colour" if noun.colour else "shape"
            found.append(Phrase(f"the {noun}", form, members[0], tuple(members)))
            if not noun.kind:
                found.append(Phrase(f"the {noun.colour} one", form, members[0], tuple(members)))
        if len(members) >= 2:
            clauses = itertools.chain(_by_size(scene, members), _by_place(scene, members))
            found += [Phrase("the " + t.format(noun), form, target, tuple(members)) for form, t, target in clauses]
    anchors = {noun: members[0] for noun, members in groups.items() if len(members) == 1 and noun.kind and relations}
    for (noun, members), (other, anchor) in itertools.product(groups.items(), anchors.items()):
        candidates = [i for i in members if i != anchor]
        if len(candidates) >= 2:
            for template, target in _by_relation(scene, candidates, anchor):
                found.append(Phrase("the " + template.format(noun, other), "relation", target, tuple(candidates), anchor))
    return found


ACROSS = {"left": "right", "right": "left", "leftmost": "rightmost", "rightmost": "leftmost"}
DOWN = {
    "top": "bottom",
    "bottom": "top",
    "topmost": "lowest",
    "lowest": "topmost",
    "above": "below",
    "below": "above",
    "under": "above",
}


def mirrored(text: str) -> str:
    """What is said of a scene, said of its mirror image."""
    return " ".join(ACROSS.get(word, word) for word in text.split())


def upside_down(text: str) -> str:
    """What is said of a scene, said of it upside down."""
    return " ".join(DOWN.get(word, word) for word in text.split())


def choose(scene: Scene, count: int) -> list[Phrase]:
    """Up to `count` different phrases of a scene, the forms in turn as far as the scene has them; the same each time."""
    rng = np.random.default_rng((scene.seed, scene.number, 1))
    all_phrases = phrases(scene)
    order = [all_phrases[i] for i in rng.permutation(len(all_phrases))]
    turn = {form: int(rank) for form, rank in zip(FORMS, rng.permutation(len(FORMS)), strict=True)}
    met = dict.fromkeys(FORMS, 0)
    keyed: list[tuple[int, int, Phrase]] = []
    for phrase in order:
        keyed.append((met[phrase.form], turn[phrase.form], phrase))
        met[phrase.form] += 1
    return [phrase for _, _, phrase in sorted(keyed, key=lambda item: item[:2])[:count]]


# Files.


def run_lengths(mask: NDArray[np.bool_]) -> list[int]:
    """A mask [H,W] as COCO's uncompressed run-length encoding: column by column, the first run is of False."""
    flat = mask.ravel(order="F")
    ends = np.flatnonzero(np.diff(flat, prepend=False)).tolist()
    return [end - start for start, end in itertools.pairwise([0, *ends, flat.size])]


def coco(pictures: Iterable[tuple[str, Picture]]) -> dict[str, Any]:
    """The annotations of (file name, picture) pairs in COCO's format; the colour is an extra key of each."""
    category = {kind: index for index, kind in enumerate(KINDS, start=1)}
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for name, picture in pictures:
        size = picture.scene.size
        images.append({"id": len(images) + 1, "file_name": name, "width": size, "height": size, "scene": picture.scene.number})
        for index, shape in enumerate(picture.scene.shapes):
            x0, y0, x1, y1 = shape.box
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": len(images),
                    "category_id": category[shape.kind],
                    "bbox": [x0, y0, x1 - x0, y1 - y0],
                    "area": shape.area,
                    "iscrowd": 0,
                    "segmentation": {"size": [size, size], "counts": run_lengths(picture.owners == index + 1)},
                    "colour": shape.colour,
                }
            )
    return {
        "info": {"description": "Scenes of coloured shapes, drawn by recipes/scenes.py", "version": "1"},
        "licenses": [{"id": 1, "name": "CC0-1.0", "url": "https://creativecommons.org/publicdomain/zero/1.0/"}],
        "images": images,
        "annotations": annotations,
        "categories": [{"id": index, "name": kind, "supercategory": "shape"} for kind, index in category.items()],
    }


def write(numbers: Sequence[int], out: Path, *, seed: int, size: int, suffix: str, phrases_per_scene: int) -> None:
    """Write the scenes of these numbers as a data set, as the module says."""
    (out / "images").mkdir(parents=True, exist_ok=True)
    spoken: list[str] = []

    def pictures() -> Iterator[tuple[str, Picture]]:
        for number in track(numbers, description="Drawing scenes"):
            picture, name = draw(number, seed=seed, size=size), f"{number:08}.{suffix}"
            Image.fromarray(picture.pixels).save(out / "images" / name, **({"quality": 92} if suffix == "jpg" else {}))
            for phrase in choose(picture.scene, phrases_per_scene):
                box = picture.scene.shapes[phrase.target].box
                spoken.append(json.dumps({"image": name, "phrase": phrase.text, "form": phrase.form, "box": box}))
            yield name, picture

    (out / "annotations.json").write_text(json.dumps(coco(pictures())))
    if phrases_per_scene:
        (out / "phrases.jsonl").write_text("".join(f"{line}\n" for line in spoken))


@dataclass(frozen=True)
class Drawn:
    """Scenes that are drawn, kept on disk: pixels uint8 [N,size,size,3] and owners uint8 [N,size,size] as memory maps."""

    scenes: list[Scene]
    pixels: Pixels
    owners: Pixels


def _row(job: tuple[int, int, int]) -> tuple[Pixels, Pixels, str]:
    number, seed, size = job
    picture = draw(number, seed=seed, size=size)
    return picture.pixels, picture.owners, picture.scene.to_json()


def drawn(folder: Path, split: Split, count: int, *, seed: int = 0, size: int = 256) -> Drawn:
    """The first scenes of a split for training, drawn once on all cores and then read from `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    stem = f"{split}-{count}-{size}-{seed}"
    described, pixels, owners = (folder / f"{stem}{end}" for end in (".jsonl", ".npy", "-owners.npy"))
    if not described.exists():
        pixels_out = np.lib.format.open_memmap(pixels, "w+", np.uint8, (count, size, size, 3))
        owners_out = np.lib.format.open_memmap(owners, "w+", np.uint8, (count, size, size))
        jobs = ((number, seed, size) for number in SPLITS[split][:count])
        part = described.with_suffix(".part")
        with ProcessPoolExecutor(os.cpu_count()) as pool, part.open("w") as lines:
            rows = pool.map(_row, jobs, chunksize=64)
            for index, row in enumerate(track(rows, description=f"Drawing {split} scenes", total=count)):
                pixels_out[index], owners_out[index], line = row
                lines.write(f"{line}\n")
        pixels_out.flush()
        owners_out.flush()
        part.replace(described)
    scenes = [Scene.from_json(line) for line in described.read_text().splitlines()]
    return Drawn(scenes, np.load(pixels, mmap_mode="r"), np.load(owners, mmap_mode="r"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--split", choices=tuple(SPLITS), default="held-out")
    parser.add_argument("--count", type=int, default=500, help="number of scenes")
    parser.add_argument("--first", type=int, default=0, help="where in the split to begin")
    parser.add_argument("--phrases", type=int, default=0, metavar="N", help="phrases per scene, at most")
    parser.add_argument("--size", type=int, default=256, help="width and height in pixels")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--format", choices=("png", "jpg"), default="png")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    numbers = SPLITS[options.split][options.first : options.first + options.count]
    write(
        numbers,
        options.out,
        seed=options.seed,
        size=options.size,
        suffix=options.format,
        phrases_per_scene=options.phrases,
    )


if __name__ == "__main__":
    main()
