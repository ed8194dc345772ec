from dataclasses import astuple
from pathlib import Path

import numpy as np
import pytest

from export.agreement import TOLERANCES, Limits, Scores, compare, compare_pixels, distance

RANDOM = np.random.default_rng(0)
LIMITS = Limits(logits=1e-3, probabilities=1e-4, ties=2e-3)


def softmax(logits: np.ndarray) -> np.ndarray:
    exponents = np.exp(logits - logits.max(axis=1, keepdims=True))
    return (exponents / exponents.sum(axis=1, keepdims=True)).astype(np.float32)


def sigmoid(logits: np.ndarray) -> np.ndarray:
    return (1 / (1 + np.exp(-logits))).astype(np.float32)


def failed(served: Scores, reference: Scores, limits: Limits = LIMITS) -> set[str]:
    return {check.name for check in compare("it", served, reference, limits) if not check.passed}


@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
def test_probabilities_of_the_same_logits_agree(activation: str) -> None:
    logits = RANDOM.normal(0, 3, (4, 10)).astype(np.float32)
    probabilities = softmax(logits) if activation == "softmax" else sigmoid(logits)
    reference = Scores.of_logits(logits, activation)
    assert not failed(Scores.of_probabilities(probabilities, activation), reference)
    np.testing.assert_allclose(reference.probabilities, probabilities, atol=1e-6)


def test_softmax_forgets_a_constant_and_sigmoid_does_not() -> None:
    logits = RANDOM.normal(0, 3, (4, 10))
    assert not failed(Scores.of_logits(logits + 5, "softmax"), Scores.of_logits(logits, "softmax"))
    assert failed(Scores.of_logits(logits + 5, "sigmoid"), Scores.of_logits(logits, "sigmoid"))


def test_the_distance_is_relative_to_the_spread_of_the_logits() -> None:
    logits = RANDOM.normal(0, 1, (4, 10))
    for size in (1e-3, 1.0, 10.0):
        reference = Scores.of_logits(logits * size, "softmax")
        off = Scores.of_logits(logits * size * 1.01, "softmax")
        assert 0.005 < distance(off, reference, reference.scale).max() < 0.1


def test_classes_lost_in_float32_are_not_compared_but_lost_mass_is() -> None:
    logits = np.array([[0.0, -200.0, 1.0, -300.0]])
    reference = Scores.of_logits(logits, "softmax")
    assert not failed(Scores.of_probabilities(softmax(logits), "softmax"), reference)
    assert "it: logits" in failed(Scores.of_probabilities(np.array([[0.0, 0.0, 1.0, 0.0]], np.float32), "softmax"), reference)


def test_the_distance_from_a_probability_of_zero_can_be_written_down() -> None:
    certain = Scores.of_probabilities(np.array([[0.0, 1.0]], np.float32), "softmax")
    unsure = Scores.of_probabilities(np.array([[0.5, 0.5]], np.float32), "softmax")
    assert np.isfinite(distance(certain, unsure, 1.0)).all()
    assert distance(certain, unsure, 1.0).max() > 100


def test_not_a_number_never_agrees() -> None:
    reference = Scores.of_logits(RANDOM.normal(0, 3, (4, 10)), "softmax")
    served = Scores.of_probabilities(np.full((4, 10), np.nan, np.float32), "softmax")
    assert {"it: logits", "it: probabilities", "it: top-1 agreement"} <= failed(served, reference)


def test_another_order_of_the_best_classes_fails() -> None:
    logits = np.tile(np.arange(10.0), (4, 1))
    swapped = logits.copy()
    swapped[:, [8, 9]] = swapped[:, [9, 8]]
    loose = Limits(logits=10, probabilities=1, ties=0.01)
    assert failed(Scores.of_logits(swapped, "softmax"), Scores.of_logits(logits, "softmax"), loose) == {"it: top-1 agreement"}


def test_a_near_tie_may_go_either_way_but_not_in_most_images() -> None:
    logits = np.tile(np.arange(10.0), (4, 1))
    logits[:, 8] = logits[:, 9] - 1e-6
    swapped = logits.copy()
    swapped[0, [8, 9]] = swapped[0, [9, 8]]
    reference = Scores.of_logits(logits, "softmax")
    assert not failed(Scores.of_logits(swapped, "softmax"), reference)
    swapped[:3, [8, 9]] = logits[:3, [9, 8]]
    assert failed(Scores.of_logits(swapped, "softmax"), reference) == {"it: top-1 near-ties"}


def test_pixels_may_differ_by_a_level_but_not_by_a_shift() -> None:
    frames = RANDOM.integers(0, 255, (2, 32, 32, 3), dtype=np.uint8)
    assert all(check.passed for check in compare_pixels(frames + 1, frames))
    assert not any(check.passed for check in compare_pixels(np.roll(frames, 1, axis=2), frames))
    one = frames.copy()
    one[0, 0, 0, 0] ^= 0x80
    assert [check.passed for check in compare_pixels(one, frames)] == [True, False]


def test_the_document_tells_these_tolerances() -> None:
    document = (Path(__file__).parents[2] / "docs" / "export.md").read_text()
    for precision, limit in TOLERANCES.items():
        figures = (*astuple(limit.engine)[:2], *astuple(limit.path)[:2], limit.golden)
        assert f"| {precision} | {' | '.join(f'{figure:g}' for figure in figures)} |" in document


def test_sigmoid_sees_a_confident_yes_that_lost_its_confidence() -> None:
    reference = Scores.of_logits(np.array([[8.0, -8.0, 0.0]]), "sigmoid")
    doubtful = Scores.of_probabilities(sigmoid(np.array([[5.0, -8.0, 0.0]])), "sigmoid")
    surer = Scores.of_probabilities(sigmoid(np.array([[8.0, -8.0, 0.0]])), "sigmoid")
    assert distance(doubtful, reference, 1.0)[0] > 1
    assert distance(surer, reference, 1.0)[0] < 1e-3
