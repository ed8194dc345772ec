"""What is said of a scene: a description of all of it, questions of several kinds with their answers, and phrases with boxes.

Words are made of what a scene is known to show, and each question has one right answer by construction: what is counted is all
there, who is asked for is the only one or so by a margin, a place is told where the middle of a shape lies clearly in it.
"""

import itertools
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, get_args

import numpy as np
from scenes import CLEAR_DISTANCE, COLOURS, KINDS, Form, Phrase, Scene, Shape, phrases

QuestionKind = Literal["count", "colour", "shape", "where", "yes or no"]
QUESTION_KINDS: tuple[QuestionKind, ...] = get_args(QuestionKind)
DESCRIPTION_QUESTIONS = ("Describe the image.", "Describe this image.", "What is in the image?", "What do you see?")
"""To which `describe` is the answer."""
SIMPLE_FORMS: tuple[Form, ...] = ("colour", "shape", "attributes", "size", "position")
"""Of phrases that speak of one shape and not of others around it."""
PLACES = (
    ("at the top left", "at the top", "at the top right"),
    ("on the left", "in the middle", "on the right"),
    ("at the bottom left", "at the bottom", "at the bottom right"),
)
NUMBERS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight")
AMONG = 50
"""Descriptions of different scenes among which one's own is to be found."""
SIDES = (("to the left of", 0, 1), ("to the right of", 0, -1), ("above", 1, 1), ("below", 1, -1))


@dataclass(frozen=True)
class Question:
    """A question about one scene and the only right answer to it."""

    kind: QuestionKind
    text: str
    answer: str
    about: tuple[int, ...]
    """The shapes that one must look at, by their indices."""


_Asked = tuple[str, str, tuple[int, ...]]
"""Text, answer and shapes."""


# Descriptions.


def describe(scene: Scene, *, places: bool = False) -> str:
    """Every shape of a scene from left to right: "a red star, a blue ring and a green heart".

    With `places`, each with where it is: "a red star at the top left and a blue ring in the middle".
    """
    ordered = sorted(scene.shapes, key=lambda shape: shape.middle)
    return joined([named(shape) + (f" {place(shape, scene.size)}" if places else "") for shape in ordered])


def summarise(scene: Scene) -> str:
    """How many of each there are, the colours in their order: "two red stars and one blue ring"."""
    counts = Counter((shape.colour, shape.kind) for shape in scene.shapes)
    ordered = [(colour, kind) for colour, kind in itertools.product(COLOURS, KINDS) if (colour, kind) in counts]
    return joined([f"{NUMBERS[counts[each]]} {each[0]} {plural(each[1]) if counts[each] > 1 else each[1]}" for each in ordered])


DESCRIPTIONS: dict[str, Callable[[Scene], str]] = {
    "places": lambda scene: describe(scene, places=True),
    "list": describe,
    "counts": summarise,
}


def draws(texts: Sequence[str], among: int = AMONG) -> list[list[int]]:
    """Indices of texts, `among` different ones at a time and in their order; one that its draw already has is left out."""
    found: list[dict[str, int]] = [{}]
    for index, text in enumerate(texts):
        if len(found[-1]) == among:
            found.append({})
        found[-1].setdefault(text, index)
    return [list(each.values()) for each in found if len(each) == among]


def joined(parts: Sequence[str]) -> str:
    """English for a list; "nothing" for an empty one."""
    if not parts:
        return "nothing"
    return " and ".join((", ".join(parts[:-1]), parts[-1])) if len(parts) > 1 else parts[0]


def named(shape: Shape) -> str:
    return f"{article(shape.colour)} {shape.colour} {shape.kind}"


def article(word: str) -> str:
    return "an" if word[0] in "aeiou" else "a"


def plural(kind: str) -> str:
    return f"{kind}es" if kind.endswith("s") else f"{kind}s"


def place(shape: Shape, size: int) -> str:
    """Where the middle of a shape is among nine equal parts of the frame."""
    across, down = (min(int(3 * middle / size), 2) for middle in shape.middle)
    return PLACES[down][across]


def is_clear(shape: Shape, size: int) -> bool:
    """Whether the middle of a shape is clearly within its ninth of the frame."""
    return all(abs(middle - line * size / 3) >= CLEAR_DISTANCE * size / 2 for middle in shape.middle for line in (1, 2))


# Questions.


def questions(scene: Scene, kind: QuestionKind) -> list[Question]:
    """Every question of one kind that can be asked about a scene, in a fixed order; there may be none."""
    return list(dict.fromkeys(Question(kind, *asked) for asked in _ASKED[kind](scene)))


def choose_question(scene: Scene, kind: QuestionKind, rng: np.random.Generator) -> Question | None:
    """One of the questions of a kind, each answer alike often as far as there are questions for it."""
    candidates = questions(scene, kind)
    if not candidates:
        return None
    answers = sorted({question.answer for question in candidates})
    answer = answers[rng.integers(len(answers))]
    those = [question for question in candidates if question.answer == answer]
    return those[rng.integers(len(those))]


def held_out_questions(scenes: Sequence[Scene], count: int) -> list[tuple[int, Question]]:
    """The index of a scene and a question about it: up to `count`, the kinds in turn; the same each time."""
    found: list[tuple[int, Question]] = []
    kinds = itertools.cycle(QUESTION_KINDS)
    kind = next(kinds)
    for index, scene in enumerate(scenes):
        question = choose_question(scene, kind, np.random.default_rng((scene.seed, scene.number, 2)))
        if question is not None and len(found) < count:
            found.append((index, question))
            kind = next(kinds)
    return found


def choose_phrase(scene: Scene, rng: np.random.Generator) -> Phrase | None:
    """One of the simple phrases, their forms alike often."""
    found: dict[Form, list[Phrase]] = defaultdict(list)
    for phrase in simple_phrases(scene):
        found[phrase.form].append(phrase)
    if not found:
        return None
    those = found[sorted(found)[rng.integers(len(found))]]
    return those[rng.integers(len(those))]


def held_out_phrases(scenes: Sequence[Scene], count: int) -> list[tuple[int, Phrase]]:
    """The index of a scene and a simple phrase: up to `count`; the same each time."""
    drawn = (choose_phrase(scene, np.random.default_rng((scene.seed, scene.number, 3))) for scene in scenes)
    return [(index, phrase) for index, phrase in enumerate(drawn) if phrase is not None][:count]


@lru_cache(maxsize=64)
def simple_phrases(scene: Scene) -> tuple[Phrase, ...]:
    """Phrases that speak of one shape by what it looks like, its size or its place."""
    return tuple(phrase for phrase in phrases(scene, relations=False) if phrase.form in SIMPLE_FORMS)


def _counts(scene: Scene) -> Iterator[_Asked]:
    yield "How many shapes are there?", str(len(scene.shapes)), tuple(range(len(scene.shapes)))
    for colour, kind in itertools.product(("", *COLOURS), ("", *KINDS)):
        if colour or kind:
            words = " ".join(word for word in (colour, plural(kind or "shape")) if word)
            fitting = _fitting(scene, colour, kind)
            yield f"How many {words} are there?", str(len(fitting)), fitting


def _colours(scene: Scene) -> Iterator[_Asked]:
    for phrase in simple_phrases(scene):
        if not COLOURS.keys() & set(phrase.text.split()):
            yield f"What colour is {phrase.text}?", scene.shapes[phrase.target].colour, (phrase.target,)


def _shapes(scene: Scene) -> Iterator[_Asked]:
    for phrase in simple_phrases(scene):
        words = phrase.text.split()
        if not KINDS.keys() & set(words):
            text = " ".join("one" if word == "shape" else word for word in words)
            yield f"What shape is {text}?", scene.shapes[phrase.target].kind, (phrase.target,)


def _places(scene: Scene) -> Iterator[_Asked]:
    for phrase in simple_phrases(scene):
        shape = scene.shapes[phrase.target]
        if phrase.form != "position" and is_clear(shape, scene.size):
            yield f"Where is {phrase.text}?", place(shape, scene.size), (phrase.target,)


def _yes_or_no(scene: Scene) -> Iterator[_Asked]:
    """What there is, and what there is not though its colour or its kind is: else looking for one would do. And on which side of
    another a shape is, where it is so by a margin."""
    colours, kinds = ({getattr(shape, name) for shape in scene.shapes} for name in ("colour", "kind"))
    for colour, kind in itertools.product(COLOURS, KINDS):
        if colour in colours or kind in kinds:
            fitting = _fitting(scene, colour, kind)
            yield f"Is there {article(colour)} {colour} {kind}?", "yes" if fitting else "no", fitting
    counts = Counter((shape.colour, shape.kind) for shape in scene.shapes)
    single = [index for index, shape in enumerate(scene.shapes) if counts[shape.colour, shape.kind] == 1]
    for pair in itertools.permutations(single, 2):
        one, other = (scene.shapes[index] for index in pair)
        for words, axis, sign in SIDES:
            ahead = sign * (other.middle[axis] - one.middle[axis])
            if abs(ahead) >= CLEAR_DISTANCE * scene.size:
                text = f"Is the {one.colour} {one.kind} {words} the {other.colour} {other.kind}?"
                yield text, "yes" if ahead > 0 else "no", pair


def _fitting(scene: Scene, colour: str, kind: str) -> tuple[int, ...]:
    fits = (colour in ("", shape.colour) and kind in ("", shape.kind) for shape in scene.shapes)
    return tuple(index for index, fitting in enumerate(fits) if fitting)


_ASKED: dict[QuestionKind, Callable[[Scene], Iterator[_Asked]]] = {
    "count": _counts,
    "colour": _colours,
    "shape": _shapes,
    "where": _places,
    "yes or no": _yes_or_no,
}
