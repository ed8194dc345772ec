"""What a run measures: rows of cells, each a server with a model, a photo and a number of clients."""

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from load_tests.images import PHOTOS
from load_tests.models import MODELS
from load_tests.servers import CONTENDERS

FLOOR = "floor"
TRITON = "triton, ready tensor"
VITRINE_ON_TRITON = "vitrine on triton"
PEERS = ("fastapi", "litserve", "bentoml", "ray serve", "mlserver")
DECODING = ("fastapi, vitrine's decoding", "litserve, vitrine's decoding")
FORMS = ("vitrine, one process", "vitrine, multipart", "vitrine, base64")


@dataclass(frozen=True)
class Cell:
    """`model` and `photo` are keys of MODELS and PHOTOS."""

    server: str
    model: str
    photo: str
    clients: int


@dataclass(frozen=True)
class Record:
    """One finished measurement. Rate: images/s; latencies: ms; cpu: processor seconds per image; memory: bytes; `failure` says why
    there is no figure. `prepare` is what decoding and resizing take (bare Triton only), ms."""

    cell: Cell
    round: int
    seconds: float
    rate: float = 0.0
    p50: float = 0.0
    p90: float = 0.0
    p99: float = 0.0
    errors: int = 0
    cpu: float = 0.0
    memory: int = 0
    setting: str = ""
    prepare: float = 0.0
    failure: str = ""

    def as_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> "Record":
        return cls(**{**value, "cell": Cell(**value["cell"])})


def headline() -> list[Cell]:
    """The rows of the README's table and of every target that wrk measures."""
    return [
        *(Cell(name, "small", "500x334", 32) for name in (FLOOR, "vitrine", *PEERS, *DECODING, *FORMS)),
        *(
            Cell(name, "small", photo, 32)
            for photo in ("1920x1281", "12mp")
            for name in (FLOOR, "vitrine", "vitrine, one process", "litserve")
        ),
        *(Cell(name, "medium", "500x334", 32) for name in (FLOOR, "vitrine", "vitrine, one process")),
        *(Cell(name, "medium", "500x334", 1) for name in ("vitrine", *PEERS)),
        *_triton(),
    ]


def full() -> list[Cell]:
    """Every model, photo and number of clients, and the rows that only the headline has."""
    rows = [
        Cell(name, model, photo, clients)
        for model in MODELS
        for photo in PHOTOS
        for clients in (1, 8, 32)
        for name in (FLOOR, *CONTENDERS)
        if name not in FORMS and (name != FLOOR or clients == 32)
    ]
    return list(dict.fromkeys([*headline(), *rows]))


def _triton() -> Iterable[Cell]:
    return (Cell(name, "small", "500x334", 1) for name in (TRITON, VITRINE_ON_TRITON))
