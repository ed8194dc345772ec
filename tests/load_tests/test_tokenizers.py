"""The benchmark of tokenizers: what it computes, and a whole short run on a tokenizer that has no torch network."""

import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import count
from pathlib import Path

import pytest

from app.manifest import ManifestError
from app.token_format import unpack
from load_tests import images
from load_tests.tokenizers import __main__ as command
from load_tests.tokenizers.__main__ import Setting, best, in_turn, main, shapes
from load_tests.tokenizers.client import ClientError, load
from load_tests.tokenizers.floor import Floor
from load_tests.tokenizers.inside import Point
from load_tests.tokenizers.records import Record, verdicts
from load_tests.tokenizers.ways import PHOTO, WAYS, batch, check, find, request
from load_tests.wrk import Body
from tests.tokenizer_repository import NAME, add_tokenizer


def test_targets_are_judged_by_the_median_of_paired_rounds() -> None:
    rates = {"http": (9.0, 18.0, 1.0), "floor": (10.0, 20.0, 10.0), "torch": (10.0, 20.0, 0.5)}
    records = [
        Record("m", way, engine, number, rate=rate)
        for way in WAYS
        for engine, of_engine in rates.items()
        for number, rate in enumerate(of_engine)
    ]
    found = {(each.work, each.goal): each for each in verdicts(records)}
    assert len(found) == 5
    floor = found["m, tokenize", "at least 0.9 of the floor"]
    assert floor.estimate is not None
    assert (floor.estimate.value, floor.met) == (0.9, True)
    torch = found["m, detokenize to JPEG", "at least 1 x the best torch setting"]
    assert torch.estimate is not None
    assert (torch.estimate.value, torch.met) == (0.9, False)


def test_a_row_without_figures_is_neither_met_nor_missed() -> None:
    records = [Record("m", "tokenize", "http", 1, rate=5.0), Record("m", "tokenize", "torch", 1, failure="no network")]
    assert {each.met for each in verdicts(records)} == {None}


def test_the_fastest_setting_of_each_way_is_taken() -> None:
    slow, fast = Setting(2, 1, Point("tokenize", 1), 5.0), Setting(1, 2, Point("tokenize", 8, "channels_last"), 7.0)
    assert best(iter((slow, fast))) == best(iter((fast, slow))) == {"tokenize": fast}
    assert str(fast) == "1 process, 2 threads, batch 8, channels_last"


def test_all_cores_are_used() -> None:
    assert shapes("floor", 4) == [(4, 1), (1, 4)]
    assert shapes("torch", 4) == [(1, 4)]
    assert shapes("floor", 1) == [(1, 1)]


def test_requests_and_answers_fit(tmp_path: Path) -> None:
    images.make_all()
    add_tokenizer(tmp_path)
    add_tokenizer(tmp_path, version=10)
    model = find(tmp_path, NAME)
    assert model.tokenize.version == model.detokenize.version == 10
    floor = Floor(model, WAYS, 1, b"")
    floor.tokens = container = floor.container()
    check(model, "tokenize", container, container)
    assert floor.step(Point("tokenize", 3)) == floor.step(Point("detokenize to PNG", 3)) == 3
    with pytest.raises(ValueError, match="JPEG of 500 x 334"):
        check(model, "detokenize to JPEG", container, PHOTO.path.read_bytes())
    assert request("detokenize to JPEG", container) == Body("application/vnd.vitrine.tokens", container, "image/jpeg")
    assert unpack(batch("detokenize to JPEG", container, 8).data).tokens.shape == (8, 1, 4, 4)
    assert batch("tokenize", container, 8).data.count(PHOTO.path.read_bytes()) == 8
    with pytest.raises(ManifestError, match=r"no nothing\.tokenize"):
        find(tmp_path, "nothing")


@pytest.fixture
def server() -> Iterator[tuple[str, list[int]]]:
    """An address, and the statuses that it answers with in turn; the last one for ever."""
    statuses, turn = [200], count()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            self.send_response(statuses[min(next(turn), len(statuses) - 1)])
            self.send_header("Content-Length", "2")
            self.end_headers()
            self.wfile.write(self.headers["Accept"][:2].encode())

        def log_message(self, *arguments: object) -> None:
            """Nothing is printed."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        running.daemon_threads = True
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{running.server_port}/x?model=m", statuses
        running.shutdown()


def test_a_window_has_enough_answers(server: tuple[str, list[int]]) -> None:
    found, answers = load(server[0], Body("image/jpeg", b"x"), clients=3, seconds=0.2, least=20)
    assert found.requests >= 20
    assert answers >= found.requests + 6  # what came before the window
    assert found.seconds >= 0.2
    assert 0 < found.p50 <= found.p99


def test_a_wrong_answer_ends_the_load(server: tuple[str, list[int]]) -> None:
    server[1].extend([200] * 10 + [503])
    with pytest.raises(ClientError, match="503"):
        load(server[0], Body("image/jpeg", b"x"), clients=2, seconds=5, least=20)


def test_only_the_processes_that_need_torch_have_it() -> None:
    """The others' memory is told, and each would wait for it."""
    code = "import sys, load_tests.tokenizers.__main__, load_tests.tokenizers.floor; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_rounds_begin_at_another_engine() -> None:
    turns = [("m", "http"), ("m", "floor"), ("m", "torch")]
    assert [in_turn(turns, number)[0] for number in (1, 2, 3)] == turns
    assert sorted(in_turn(turns, 2)) == sorted(turns)


def test_a_whole_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VITRINE_BENCH_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(command, "available_cpus", lambda: 1)  # a process less for each measurement
    repository = tmp_path / "repository"
    add_tokenizer(repository)
    main(names=[NAME], repository=repository, rounds=1, seconds=0.1, workers=1, output=tmp_path / "results")
    table, figures, picture = (next((tmp_path / "results").glob(f"*{suffix}")) for suffix in (".md", ".json", ".png"))
    found = json.loads(figures.read_text())
    assert str(tmp_path) not in figures.read_text()
    cells = {(cell["way"], cell["engine"]): cell for cell in found["cells"]}
    assert {key for key, cell in cells.items() if cell["rate"] > 0} == {
        (way, engine) for way in WAYS for engine in ("http", "floor")
    }
    assert all(cells[way, "torch"]["failure"] for way in WAYS[:2])
    assert {(peak["role"], peak["engine"]) for peak in found["memory"] if peak["loaded"] > 10_000_000} == {
        (role, engine) for role in ("tokenize", "detokenize") for engine in ("http", "floor")
    }
    assert {each["met"] is None for each in found["targets"] if "torch" in each["goal"]} == {True}
    assert "## Without a figure" in table.read_text()
    assert picture.read_bytes().startswith(b"\x89PNG")
