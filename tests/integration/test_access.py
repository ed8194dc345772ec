"""Keys, TLS and secrets of a gateway as people start it: a process of its own, or several."""

import base64
import os
import signal
import ssl
import subprocess
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2
import pytest
import trustme

from app.client import Client, ClientError
from app.keys import PREFIX, make_key
from tests.app.api.test_fetch import serve as serve_site
from tests.app.test_telemetry import Receiver, receiver
from tests.factories import make_png
from tests.gateway import VITRINE, environment, free_port, gateway
from tests.repository import make_repository

__all__ = ["receiver"]

WAIT = 30


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    return make_repository(tmp_path / "repository")


def until(condition: Callable[[], Any]) -> None:
    end = time.monotonic() + WAIT
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


@contextmanager
def serving(repository: Path, *arguments: str, **settings: object) -> Iterator["subprocess.Popen[str]"]:
    """`vitrine serve` that has said that it is ready; its log is `serve.log` beside the repository."""
    variables = environment(repository=repository, default_classify="colours", **settings)
    with (repository.parent / "serve.log").open("w") as log:
        process = subprocess.Popen(
            [VITRINE, "serve", *arguments], env=variables, cwd=repository.parent, stdout=subprocess.PIPE, stderr=log, text=True
        )
    try:
        assert process.stdout is not None
        assert "answers on" in process.stdout.readline()
        yield process
    finally:
        process.terminate()
        process.communicate(timeout=WAIT)


def test_every_worker_knows_the_keys_of_the_file_as_it_is_now(repository: Path) -> None:
    file, port = repository.parent / "keys", free_port()
    (first, known), (second, successor), (scraper, monitor) = make_key("photos"), make_key("photos"), make_key("scrape", "monitor")
    file.write_text(f"{known}\n")

    def statuses(key: str) -> set[int]:
        """Of enough connections that every worker has had one."""
        return {httpx2.get(f"http://127.0.0.1:{port}/v1/models", headers={"X-API-Key": key}).status_code for _ in range(16)}

    with serving(repository, "--workers", "2", port=port, api_keys=monitor, api_keys_file=file) as process:
        assert process.stdout is not None
        assert 'curl -H "Authorization: Bearer $VITRINE_API_KEY" --data-binary' in process.stdout.readline()
        assert (statuses(first), statuses(second)) == ({200}, {401})
        file.write_text(f"{known}\n{successor}\n")
        until(lambda: statuses(second) == {200})
        assert statuses(first) == {200}
        file.write_text(f"{successor}\n")
        until(lambda: statuses(first) == {401})
        text = httpx2.get(f"http://127.0.0.1:{port}/metrics", headers={"Authorization": f"Bearer {scraper}"}).text
        counted = dict(line.rsplit(" ", 1) for line in text.splitlines() if line.startswith("vitrine_key_requests_total"))
        assert float(counted['vitrine_key_requests_total{code="200",key="photos"}']) >= 16 * 3
        assert float(counted['vitrine_key_requests_total{code="401",key=""}']) >= 16
    log = (repository.parent / "serve.log").read_text()
    assert not any(key in log for key in (first, second, scraper))


def test_the_command_line_sends_the_key_of_its_environment(repository: Path) -> None:
    made = subprocess.run([VITRINE, "key", "photos"], capture_output=True, text=True, check=True)
    key, line = made.stdout.splitlines()
    assert key.startswith(PREFIX)
    photo = repository.parent / "photo.png"
    photo.write_bytes(make_png())
    with gateway(repository, default_classify="colours", api_keys=line) as url:
        for variables, code in (({}, 1), ({"api_key": key}, 0)):
            command = [VITRINE, "classify", photo, "--url", url]
            ran = subprocess.run(command, env=environment(**variables), capture_output=True, text=True, check=False)
            assert ran.returncode == code, ran
            assert key not in ran.stdout + ran.stderr
        refused = subprocess.run([VITRINE, "models", "--url", url], env=environment(), capture_output=True, text=True, check=False)
        assert (refused.returncode, "API key" in refused.stderr) == (1, True)
        with Client(url, api_key=key) as client:
            assert [model.id for model in client.models()] == ["colours"]
        with Client(url) as client, pytest.raises(ClientError, match="wants an API key") as caught:
            client.models()
        assert (caught.value.status, caught.value.code) == (401, "unauthenticated")
        local = [VITRINE, "models", "--local", "--repository", repository, "--json"]
        alone = subprocess.run(local, env=environment(api_keys=line), capture_output=True, text=True, check=False)
        assert alone.returncode == 0, "a gateway for one command asks for no key"


@pytest.mark.parametrize("workers", [1, 2])
def test_tls(repository: Path, workers: int) -> None:
    authority, port = trustme.CA(), free_port()
    issued = authority.issue_cert("127.0.0.1")
    certificate, key = repository.parent / "cert.pem", repository.parent / "key.pem"
    for number, pem in enumerate(issued.cert_chain_pems):
        pem.write_to_path(certificate, append=number > 0)
    issued.private_key_pem.write_to_path(key)
    trusted = ssl.create_default_context(cadata=authority.cert_pem.bytes().decode())
    url = f"https://127.0.0.1:{port}"
    with serving(repository, "--workers", str(workers), port=port, tls_certfile=certificate, tls_keyfile=key) as process:
        assert httpx2.post(f"{url}/v1/classify", content=make_png(), verify=trusted).status_code == 200
        assert process.stdout is not None
        assert f"{url}/v1/classify" in process.stdout.readline()
        with pytest.raises(httpx2.ConnectError, match="verify"):
            httpx2.get(f"{url}/livez")
        with pytest.raises(httpx2.TransportError):
            httpx2.get(f"http://127.0.0.1:{port}/livez")


def test_a_certificate_that_cannot_be_used_ends_the_start(repository: Path) -> None:
    certificate = repository.parent / "cert.pem"
    certificate.write_text("no certificate")
    command = [VITRINE, "serve", "--repository", repository]
    ran = subprocess.run(command, env=environment(tls_certfile=certificate), capture_output=True, text=True, check=False)
    assert ran.returncode == 2
    assert ran.stderr.startswith("vitrine: Settings that cannot be used: tls_keyfile: ")


def test_what_is_pasted_into_a_setting_is_not_repeated(repository: Path) -> None:
    key, _ = make_key("pasted")
    (repository.parent / "keys").write_text(f"pasted {key}")
    for variables in ({"api_keys": key}, {"api_keys": f"pasted {key}"}, {"api_keys_file": repository.parent / "keys"}):
        ran = subprocess.run([VITRINE, "serve"], env=environment(**variables), capture_output=True, text=True, check=False)
        assert (ran.returncode, ran.stdout) == (2, "")
        assert "entry 1 is not" in ran.stderr
        assert key not in ran.stderr


def test_secrets_go_nowhere(repository: Path, receiver: Receiver) -> None:
    """Sent wherever a request can hold one, and looked for in all that leaves the gateway, with the log at its most talkative."""
    key, known = make_key("photos")
    scraper, monitor = make_key("scrape", "monitor")
    stranger, _ = make_key("stranger")
    file = repository.parent / "keys"
    file.write_text(str(known))
    seen: list[str] = []
    secret = "hunter2-" + stranger.removeprefix(PREFIX)
    picture = base64.b64encode(make_png()).decode()
    with serve_site() as site:
        there = f"http://localhost:{site.server_port}"
        settings = {
            "default_classify": "colours",
            "api_keys": monitor,
            "api_keys_file": file,
            "log_level": "debug",
            "otlp_endpoint": receiver.url.replace("//", f"//collector:{secret}@"),
            "allow_urls": True,
            "url_networks": "127.0.0.1,::1",
        }
        with gateway(repository, **settings) as url, httpx2.Client(base_url=url, timeout=WAIT) as client:

            def ask(path: str = "/v1/classify", key: str = key, **request: Any) -> int:
                headers = {"Authorization": f"Bearer {key}"} | request.pop("headers", {})
                answer = client.post(path, headers=headers, **request)
                seen.extend((answer.text, str(answer.headers)))
                return answer.status_code

            def ask_for(address: str) -> int:
                return ask(json={"image": {"url": address}})

            assert ask(content=make_png()) == 200
            assert ask(content=make_png(), key=secret) == 401
            assert ask(content=make_png(), headers={"Authorization": f"Basic {secret}", "X-API-Key": secret}) == 401
            assert ask(content=make_png(), headers={"Authorization": f"Bearer {secret} {secret}"}) == 401
            assert ask("/metrics") == 403
            assert ask(content=make_png(), headers={"Cookie": secret, "X-Token": secret, "Baggage": f"key={secret}"}) == 200
            for query in ("api_key", "token", "top_k"):
                assert ask(f"/v1/classify?{query}={secret}", content=make_png()) == 422
                assert ask(content=make_png(), key=secret) == 401
                assert ask(json={"image": {"base64": picture}, query: secret}) == 422
                assert ask(files={"image": make_png()}, data={query: secret}) == 422
            assert ask(f"/nowhere?api_key={secret}") == 404
            assert ask(content=f'{{"api_key": "{secret}", '.encode()) == 400
            assert ask(json={"image": {"base64": f"!{secret}"}}) == 400
            assert ask(json={"image": f"data:image/png,{secret}"}) == 400
            assert ask(content=secret.encode()) == 415
            assert ask_for(f"{there}/photo?signature={secret}") == 200
            assert ask_for(f"{there.replace('//', f'//user:{secret}@')}/photo") == 422
            assert ask_for(f"{there}/gone?signature={secret}") == 200
            assert ask_for(f"{there}/to//photo?signature={secret}") == 200
            assert ask_for(f"{there}/to/http://10.0.0.1/?signature={secret}") == 422
            assert ask_for(f"http://localhost:{free_port()}/?signature={secret}") == 422
            assert ask_for(f"http://{secret}.invalid/") == 422
            file.write_text(f"photos {secret}")
            until(lambda: "stay as they are" in (repository.parent / "gateway.log").read_text())
            figures = client.get("/metrics", headers={"X-API-Key": scraper}).text
            pages = [client.get(path).text for path in ("/status", "/docs", "/openapi.json", "/readyz")]
        log = (repository.parent / "gateway.log").read_text()
    spans = [request.SerializeToString().decode("latin-1") for request in receiver.requests]
    assert 'key="photos"' in figures
    assert "DEBUG" in log
    assert any("POST /v1/classify" in span for span in spans)
    told = {"answers": seen, "metrics": [figures], "pages": pages, "log": [log], "spans": spans}
    secrets = {"the client's key": key, "the monitor's key": scraper, "a password": secret, "its digest": known.digest.hex()}
    leaks = {
        (what, where) for where, texts in told.items() for what, word in secrets.items() if any(word in text for text in texts)
    }
    assert leaks == set()


def test_it_writes_only_where_a_read_only_container_lets_it(repository: Path) -> None:
    """The file system as it is in the container: read-only, but for /tmp and the memory that is /dev/shm."""
    guard = repository.parent / "guard"
    guard.mkdir()
    (guard / "sitecustomize.py").write_text(GUARD)
    variables = {
        "PYTHONPATH": os.pathsep.join((str(guard), *filter(None, [os.environ.get("PYTHONPATH")]))),
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    port = free_port()
    ours = (
        environment(repository=repository, default_classify="colours", port=port, workers=2) | variables | {"HOME": "/nonexistent"}
    )
    process = subprocess.Popen([VITRINE, "serve"], env=ours, cwd="/", stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        assert "answers on" in process.stdout.readline()
        with ThreadPoolExecutor(4) as pool:
            answers = list(pool.map(lambda _: httpx2.post(f"http://127.0.0.1:{port}/v1/classify", content=make_png()), range(16)))
        assert {answer.status_code for answer in answers} == {200}
        assert httpx2.get(f"http://127.0.0.1:{port}/metrics").status_code == 200
    finally:
        process.send_signal(signal.SIGTERM)
        _, log = process.communicate(timeout=WAIT)
    assert "would write" not in log


GUARD = """
import os, sys

MAY = ("/tmp/vitrine-", "/dev/shm/vitrine-", "/dev/null", "/proc/")
CHANGES = {"os.mkdir", "os.rename", "os.link", "os.symlink", "os.truncate", "os.chmod", "os.chown", "os.utime"}


def watch(event, arguments):
    if event == "open":
        path, mode, flags = arguments
        changes = bool(flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND))
    else:
        path, changes = (arguments or [None])[0], event in CHANGES
    if changes and isinstance(path, (str, bytes)) and not os.fsdecode(path).startswith(MAY):
        os.write(2, f"{event} would write {path!r}\\\\n".encode())
        raise OSError(30, "Read-only file system", path)


sys.addaudithook(watch)
"""
