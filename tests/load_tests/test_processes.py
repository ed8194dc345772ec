"""Every process of a server is counted and ended, those too that have left its tree."""

import os
import sys
import time
from pathlib import Path

import psutil
import pytest

from load_tests.processes import Server, ServerError
from load_tests.servers import free_port
from load_tests.wrk import Body

SERVE = """
import http.server, os, subprocess, sys, time
if len(sys.argv) > 2:
    left = subprocess.Popen([sys.executable, "-c", "import time\\nwhile time.process_time() < 0.5: pass\\ntime.sleep(60)"],
                            start_new_session=True)
    open(sys.argv[2], "w").write(str(left.pid))

class Handler(http.server.BaseHTTPRequestHandler):
    def do_POST(self):
        self.send_response(200); self.end_headers(); self.wfile.write(os.environ.get("VITRINE_THREADS", "unset").encode())
    def log_message(self, *_): pass

http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""


def server(tmp_path: Path, *arguments: str) -> Server:
    return Server([sys.executable, "-c", SERVE, *arguments], {}, tmp_path, tmp_path / "log")


def test_what_left_the_tree_is_counted_and_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VITRINE_THREADS", "7")
    port = free_port()
    with server(tmp_path, str(port), str(tmp_path / "pid")) as running:
        assert running.wait(f"http://127.0.0.1:{port}/", Body("image/jpeg", b"x")) == b"unset"
        until = time.monotonic() + 20
        while running.usage().cpu < 0.5 and time.monotonic() < until:
            time.sleep(0.05)
        running.settle()
        assert running.usage().cpu >= 0.5
        assert running.usage().memory > 2 * 2**20
        left = psutil.Process(int((tmp_path / "pid").read_text()))
        assert left.is_running()
    assert not left.is_running() or left.status() == psutil.STATUS_ZOMBIE
    assert psutil.Process(os.getpid()).is_running()


def test_one_that_ends_says_why(tmp_path: Path) -> None:
    with (
        Server([sys.executable, "-c", "raise SystemExit('no such model')"], {}, tmp_path, tmp_path / "log") as running,
        pytest.raises(ServerError, match="no such model"),
    ):
        running.wait("http://127.0.0.1:9/", Body("image/jpeg", b"x"))
