"""How the queries of a detector that chooses its places are compared, where places look alike."""

from dataclasses import replace

import numpy as np
import pytest
from numpy.typing import NDArray

from export.row_agreement import TOLERANCES, Told, at_same_places, compare_queries

TOLERANCE = TOLERANCES["fp32"]
STARTS = np.array([[4, 2, 7], [0, 1, 5]])


def tell(starts: NDArray[np.int64]) -> Told:
    """Queries that say where they start, of 8 places."""
    proposals = np.zeros((len(starts), 8), np.float32)
    np.put_along_axis(proposals, starts, np.array([[3.0, 2.0, 1.0]], np.float32), 1)
    boxes = np.repeat(starts[..., None], 4, 2) / np.float32(8)
    return Told(starts[..., None] / np.float32(10), boxes, None, proposals)


def failed(served: Told, reference: Told) -> set[str]:
    return {check.name for check in compare_queries("engine", served, reference, TOLERANCE) if not check.passed}


def test_of_equal_places_the_first_is_chosen_first() -> None:
    told = replace(tell(STARTS), proposals=np.array([[1, 2, 2, 1, 1, 2, 0, 0]] * 2, np.float32))
    assert told.starts is not None
    assert told.starts.tolist() == [[1, 2, 5]] * 2


def test_another_order_of_the_same_places_is_the_same() -> None:
    one, other = at_same_places(tell(STARTS), tell(STARTS[:, [1, 0, 2]]))
    assert np.array_equal(one.boxes, other.boxes)
    assert np.allclose(one.scores[..., 0], np.array([[2, 4, 7], [0, 1, 5]]) / 10)


def test_an_image_with_other_places_is_left_out() -> None:
    one, other = at_same_places(tell(STARTS), tell(np.array([[4, 2, 7], [0, 1, 6]])))
    assert len(one.boxes) == len(other.boxes) == 1
    assert np.array_equal(one.boxes, other.boxes)


def test_without_proposals_nothing_changes() -> None:
    one, other = replace(tell(STARTS), proposals=None), replace(tell(STARTS[:, ::-1]), proposals=None)
    assert at_same_places(one, other) == (one, other)


@pytest.mark.parametrize(("change", "name"), [(0.01, "proposals"), (4.0, "starts in common")])
def test_other_proposals_fail_though_queries_are_the_same(change: float, name: str) -> None:
    other = tell(STARTS)
    assert other.proposals is not None
    other.proposals[0, 7] += change
    other.proposals[0, 3] += change
    assert failed(other, tell(STARTS)) >= {f"engine: {name}"}
    assert "engine: query boxes" not in failed(other, tell(STARTS))


def test_what_is_the_same_passes() -> None:
    assert failed(tell(STARTS), tell(STARTS)) == set()
