"""What the measurement of the detector and the grounding model writes down of what it has found."""

from pathlib import Path

import pytest
from measure_boxes import MARKS, Result

from export.evaluate.measuring import Measured

DOCUMENT = Path(__file__).parent.parent.parent / "docs/scenes.md"


@pytest.fixture
def found() -> Result:
    groups = {"star": {"AP": 0.9, "AP50": 1.0, "AP75": 0.95}, "ring": {"AP": 0.5, "AP50": 0.75, "AP75": 0.625}}
    whole = {"AP": 0.71236, "AP50": 0.875, "AP75": 0.7875, "AP_small": None}
    return Result("shapes@2", "detect", Measured("images", 40, whole, (), "category", groups))


def test_a_manifest_holds_the_figures_of_the_whole(found: Result) -> None:
    assert found.figures == {"images": 40, "AP": 0.7124, "AP50": 0.875, "AP75": 0.7875}


def test_a_table_has_a_row_for_each_group(found: Result) -> None:
    assert found.table().splitlines() == [
        "| category | AP | AP50 | AP75 |",
        "| --- | --: | --: | --: |",
        "| star | 0.900 | 1.000 | 0.950 |",
        "| ring | 0.500 | 0.750 | 0.625 |",
        "| **all 40 images** | 0.712 | 0.875 | 0.787 |",
    ]


def test_what_cannot_be_told_is_not_written_down() -> None:
    unknown = Measured("phrases", 3, {"accuracy": None, "mean_iou": 0.5}, ())
    with pytest.raises(AssertionError, match="accuracy"):
        _ = Result("phrases@1", "ground", unknown).figures


def test_the_document_has_a_place_for_the_tables(found: Result) -> None:
    text = DOCUMENT.read_text()
    changed = MARKS.sub(lambda _: found.table() + "\n", text)
    assert found.table() in changed
    assert changed.count("<!-- end of figures -->") == text.count("<!-- end of figures -->") == 1
