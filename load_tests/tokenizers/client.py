"""A closed loop for answers that take long: a rate from a window in the middle of the load.

wrk counts what is answered between its first request and its end, and so misses the work in progress at the end: with eight clients
and answers that come eight at a time once in some seconds, that is much. Here the clients go on before and after the window.
"""

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from http.client import HTTPConnection, HTTPException
from urllib.parse import urlsplit

import numpy as np

from load_tests.wrk import Body, Load

TIMEOUT = 300.0  # seconds for one answer


class ClientError(Exception):
    """An answer was none, or not 200."""


@dataclass
class _Answers:
    """What the clients have seen so far, and whether they go on."""

    ended: list[tuple[float, float]] = field(default_factory=list)  # when, and after how many seconds
    failure: str = ""
    stop: bool = False


def load(url: str, sent: Body, clients: int, seconds: float, least: int) -> tuple[Load, int]:
    """Keep `clients` requests in flight; what is answered in a window of `seconds`, and of `least` answers at least.

    The window begins once there are two answers for each client. With it comes the number of all answers, before and after it too.

    Raises:
        ClientError: a request failed.
    """
    answers = _Answers()
    threads = [threading.Thread(target=_client, args=(url, sent, answers)) for _ in range(clients)]
    for thread in threads:
        thread.start()
    try:
        _wait(answers, lambda: len(answers.ended) >= 2 * clients)
        began, first = time.perf_counter(), len(answers.ended)
        _wait(answers, lambda: time.perf_counter() - began >= seconds and len(answers.ended) - first >= least)
        ended = time.perf_counter()
    finally:
        answers.stop = True
        for thread in threads:
            thread.join()
    if answers.failure:
        raise ClientError(answers.failure)
    latencies = [1000 * latency for when, latency in answers.ended if began < when <= ended]
    p50, p90, p99 = (float(value) for value in np.percentile(latencies, (50, 90, 99)))
    return Load(len(latencies), ended - began, 0, p50, p90, p99), len(answers.ended)


def _wait(answers: _Answers, done: Callable[[], bool]) -> None:
    while not done() and not answers.failure:
        time.sleep(0.01)


def _client(url: str, sent: Body, answers: _Answers) -> None:
    parts = urlsplit(url)
    connection = HTTPConnection(parts.netloc, timeout=TIMEOUT)
    headers = {"Content-Type": sent.content_type, "Accept": sent.accept}
    try:
        while not answers.stop and not answers.failure:
            started = time.perf_counter()
            connection.request("POST", f"{parts.path}?{parts.query}", sent.data, headers)
            response = connection.getresponse()
            content = response.read()
            if response.status != 200:
                answers.failure = f"{response.status} {content[:500]!r}"
                return
            now = time.perf_counter()
            answers.ended.append((now, now - started))
    except (OSError, HTTPException) as error:
        answers.failure = f"{type(error).__name__}: {error}"
    finally:
        connection.close()
