"""The sweep's best cell is what a bench run takes."""

from dataclasses import asdict
from typing import Any

from load_tests.servers import CONTENDERS, Tuning, predictions
from load_tests.sweep import best


def cell(goal: str, tuning: Tuning, **figures: Any) -> dict[str, Any]:
    return {"server": "litserve", "goal": goal, "tuning": asdict(tuning), **figures}


SLOW, FAST, BROKEN = Tuning(1), Tuning(2, 8, 0.002), Tuning(2, 16, 0.01)
CELLS = [
    cell("throughput", SLOW, rate=90.0, p50=300.0),
    cell("throughput", FAST, rate=120.0, p50=250.0),
    cell("throughput", BROKEN, failure="500"),
    cell("latency", SLOW, rate=50.0, p50=20.0),
    cell("latency", Tuning(2), rate=60.0, p50=25.0),
]


def test_most_images_or_the_lowest_latency() -> None:
    assert best(CELLS, CONTENDERS["litserve"], "throughput") == FAST
    assert best(CELLS, CONTENDERS["litserve"], "latency") == SLOW


def test_a_second_row_has_the_settings_of_the_first() -> None:
    assert best(CELLS, CONTENDERS["litserve, vitrine's decoding"], "throughput") == FAST


def test_without_a_sweep_the_first_setting_is_taken() -> None:
    assert best([], CONTENDERS["mlserver"], "throughput") == CONTENDERS["mlserver"].tunings[0]


def test_vitrine_is_swept_as_the_others_and_has_a_row_of_its_defaults() -> None:
    mine = [{**each, "server": "vitrine"} for each in CELLS]
    assert best(mine, CONTENDERS["vitrine"], "throughput") == best(mine, CONTENDERS["vitrine, base64"], "throughput") == FAST
    assert best(mine, CONTENDERS["vitrine, one process"], "throughput") == Tuning()


def test_every_kind_of_answer_is_read() -> None:
    row = b'{"predictions": [{"class_id": 7}, {"class_id": 3}]}'
    assert predictions("fastapi_plain", row) == predictions("bentoml", b"[" + row + b"]") == [7, 3]
    assert predictions("vitrine", b'{"results": [' + row + b"]}") == [7, 3]
    assert predictions("mlserver", b'{"outputs": [{"data": ["{\\"predictions\\": [{\\"class_id\\": 7}]}"]}]}') == [7]
