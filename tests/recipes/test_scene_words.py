"""Every question has the answer that a scene gives to it, found anew by reading the question."""

import re
from collections import Counter

import numpy as np
import pytest
import scenes
from scene_words import (
    QUESTION_KINDS,
    Question,
    QuestionKind,
    choose_question,
    describe,
    held_out_questions,
    plural,
    questions,
    simple_phrases,
    summarise,
)
from scenes import COLOURS, KINDS, Scene, Shape

COUNT = 60
SINGULAR = {plural(kind): kind for kind in (*KINDS, "shape")}


@pytest.fixture(scope="module")
def drawn() -> list[Scene]:
    return [scenes.draw(number, size=128).scene for number in range(COUNT)]


def fitting(scene: Scene, words: str) -> list[Shape]:
    """The shapes that a noun such as "red circle", "star" or "blue one" fits."""
    *colour, kind = words.split()
    return [s for s in scene.shapes if colour in ([], [s.colour]) and kind in ("shape", "one", s.kind)]


def meant(scene: Scene, phrase: str) -> Shape:
    """Who alone a phrase fits, of those with superlatives by plain comparison; the grammar's own test reads the phrases in full."""
    match = re.fullmatch(r"the (?:(\w+est|leftmost|rightmost|topmost|lowest) )?(.+?)( (?:on|at|in) the .+)?", phrase)
    assert match, phrase
    word, noun, where = match.groups()
    found = fitting(scene, noun)
    order = {
        "largest": lambda s: -s.extent,
        "biggest": lambda s: -s.extent,
        "smallest": lambda s: s.extent,
        "leftmost": lambda s: s.middle[0],
        "rightmost": lambda s: -s.middle[0],
        "topmost": lambda s: s.middle[1],
        "lowest": lambda s: -s.middle[1],
    }
    far = {
        " on the far left": "leftmost",
        " on the far right": "rightmost",
        " at the very top": "topmost",
        " at the very bottom": "lowest",
    }
    if where is not None and where not in far:
        down, across = re.fullmatch(r" in the (top|bottom) (left|right) quarter", where).groups()  # type: ignore[union-attr]
        half = scene.size / 2
        (one,) = (s for s in found if (s.middle[0] < half) == (across == "left") and (s.middle[1] < half) == (down == "top"))
        return one
    if word is None and where is None:
        (one,) = found
        return one
    return min(found, key=order[word or far[where]])


def answer(scene: Scene, text: str) -> str:
    """What a scene says to a question."""
    if match := re.fullmatch(r"How many (?:(\w+) )?(\w+) are there\?", text):
        return str(len(fitting(scene, " ".join(filter(None, (match[1], SINGULAR[match[2]]))))))
    if match := re.fullmatch(r"What colour is (.+)\?", text):
        return meant(scene, match[1]).colour
    if match := re.fullmatch(r"What shape is (.+)\?", text):
        return meant(scene, match[1]).kind
    if match := re.fullmatch(r"Is there an? (.+)\?", text):
        return "yes" if fitting(scene, match[1]) else "no"
    if match := re.fullmatch(r"Where is (.+)\?", text):
        x, y = (int(3 * middle // scene.size) for middle in meant(scene, match[1]).middle)
        side = " ".join(filter(None, (("top", "", "bottom")[y], ("left", "", "right")[x])))
        return "in the middle" if not side else f"on the {side}" if y == 1 else f"at the {side}"
    match = re.fullmatch(r"Is the (\w+ \w+) (to the left of|to the right of|above|below) the (\w+ \w+)\?", text)
    assert match, text
    (one,), (other,) = fitting(scene, match[1]), fitting(scene, match[3])
    axis = 0 if "the" in match[2] else 1
    before = match[2] in ("to the left of", "above")
    return "yes" if (one.middle[axis] < other.middle[axis]) == before else "no"


@pytest.mark.parametrize("kind", QUESTION_KINDS)
def test_every_question_has_the_answer_that_is_told(kind: QuestionKind, drawn: list[Scene]) -> None:
    heard: Counter[str] = Counter()
    for scene in drawn:
        asked = questions(scene, kind)
        assert len({question.text for question in asked}) == len(asked), "one answer to a question"
        for question in asked:
            assert question.answer == answer(scene, question.text), (scene.number, question)
            heard[question.answer] += 1
    least = {"count": 7, "colour": len(COLOURS), "shape": len(KINDS), "where": 9, "yes or no": 2}
    assert len(heard) >= least[kind]


def test_a_question_is_about_the_shapes_that_its_words_mean(drawn: list[Scene]) -> None:
    for scene in drawn:
        for kind in QUESTION_KINDS:
            for question in questions(scene, kind):
                about = [scene.shapes[index] for index in question.about]
                if kind == "count":
                    assert str(len(about)) == question.answer
                    noun = question.text.removeprefix("How many ").removesuffix(" are there?").split()
                    assert about == fitting(scene, " ".join([*noun[:-1], SINGULAR[noun[-1]]]))
                elif match := re.fullmatch(r"Is the (\w+ \w+) .+ the (\w+ \w+)\?", question.text):
                    assert about == [*fitting(scene, match[1]), *fitting(scene, match[2])]
                elif kind == "yes or no":
                    assert bool(about) == (question.answer == "yes")
                else:
                    phrase = re.sub("^(Where|What (colour|shape)) is ", "", question.text).removesuffix("?")
                    assert about == [meant(scene, phrase)]


def test_a_place_that_is_hard_to_tell_is_not_asked_for(drawn: list[Scene]) -> None:
    for scene in drawn:
        for question in questions(scene, "where"):
            shape = meant(scene, question.text.removeprefix("Where is ").removesuffix("?"))
            assert all(abs(middle - line * 128 / 3) >= 3 for middle in shape.middle for line in (1, 2))


def test_answers_are_alike_often(drawn: list[Scene]) -> None:
    rng = np.random.default_rng(0)
    chosen = [choose_question(scene, "yes or no", rng) for scene in drawn for _ in range(5)]
    yes = sum(question.answer == "yes" for question in chosen if question is not None)
    assert 0.4 < yes / (5 * COUNT) < 0.6


def test_held_out_questions_are_of_all_kinds_and_always_the_same(drawn: list[Scene]) -> None:
    found = held_out_questions(drawn, 50)
    assert found == held_out_questions(drawn, 50)
    kinds = Counter(question.kind for _, question in found)
    assert set(kinds) == set(QUESTION_KINDS)
    assert max(kinds.values()) - min(kinds.values()) <= 1
    for index, question in found:
        assert question in questions(drawn[index], question.kind)
    assert len({index for index, _ in found}) == len(found)


def test_a_kind_that_cannot_be_asked_has_no_question() -> None:
    empty = Scene(0, 0, 128, "clouds", ())
    assert questions(empty, "where") == []
    assert choose_question(empty, "where", np.random.default_rng(0)) is None
    assert questions(empty, "count") == [
        Question("count", text, "0", ()) for text in dict.fromkeys(question.text for question in questions(empty, "count"))
    ]


def test_a_description_names_every_shape_from_left_to_right(drawn: list[Scene]) -> None:
    for scene in drawn:
        parts = re.split(", | and ", describe(scene))
        ordered = sorted(scene.shapes, key=lambda shape: shape.middle)
        assert [part.split()[1:] for part in parts] == [[shape.colour, shape.kind] for shape in ordered]
        assert all(part.split()[0] == ("an" if part.split()[1] == "orange" else "a") for part in parts)


def test_a_description_with_places_says_where_each_is(drawn: list[Scene]) -> None:
    for scene in drawn:
        parts = re.split(", | and ", describe(scene, places=True))
        for part, shape in zip(parts, sorted(scene.shapes, key=lambda shape: shape.middle), strict=True):
            *_, where = re.fullmatch(r"an? (\w+) (\w+) (.+)", part).groups()  # type: ignore[union-attr]
            alone = Scene(0, 0, scene.size, "clouds", (shape,))
            assert where == answer(alone, f"Where is the {shape.kind}?")


def test_a_summary_counts(drawn: list[Scene]) -> None:
    numbers = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight")
    for scene in drawn:
        counted: Counter[tuple[str, str]] = Counter()
        for part in re.split(", | and ", summarise(scene)):
            number, colour, kind = part.split()
            counted[colour, SINGULAR.get(kind, kind)] = numbers.index(number)
        assert counted == Counter((shape.colour, shape.kind) for shape in scene.shapes)


def test_simple_phrases_speak_of_one_shape_alone(drawn: list[Scene]) -> None:
    for scene in drawn:
        for phrase in simple_phrases(scene):
            assert phrase.anchor is None
            assert meant(scene, phrase.text) == scene.shapes[phrase.target]
