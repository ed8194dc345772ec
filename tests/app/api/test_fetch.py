"""Images by address: off by default, public addresses only, everything bounded. Real HTTP servers on the loopback."""

import asyncio
import socket
import ssl
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from ipaddress import ip_network

import pytest
import trustme

from app.api.fetch import FetchPolicy, Network, fetch, may_ask, usual_authorities
from app.errors import InputError, InvalidValueError, TooLargeError
from tests.factories import make_png

pytestmark = pytest.mark.anyio

LOOPBACK = (ip_network("127.0.0.1"), ip_network("::1"))
LOCAL = FetchPolicy(allowed=True, networks=LOOPBACK, timeout=2, max_bytes=100_000)


class Site(BaseHTTPRequestHandler):
    """`/photo` is a PNG and after it the Host that was asked for; `/to/ADDRESS` redirects there."""

    def do_GET(self) -> None:
        self.server.asked.append(self.path)  # type: ignore[attr-defined]
        if self.path == "/slow":
            time.sleep(1)
        status = 302 if self.path.startswith("/to/") else {"/gone": 404}.get(self.path, 200)
        body = b"x" * 200_000 if self.path == "/large" else make_png() + (self.headers["Host"] or "").encode()
        self.send_response(status)
        if status == 302:
            self.send_header("Location", self.path.removeprefix("/to/"))
        if self.path == "/squeezed":
            self.send_header("Content-Encoding", "gzip")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.path == "/dripping":
            for _ in range(20):
                self.wfile.write(body[:1])
                time.sleep(0.1)
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 -- the base class's name
        pass


class Server(ThreadingHTTPServer):
    """Keeps the paths that it was asked for."""

    def __init__(self, host: str) -> None:
        self.asked: list[str] = []
        super().__init__((host, 0), Site)

    def handle_error(self, *_: object) -> None:
        """A client that hangs up is meant here."""


@contextmanager
def serve(host: str = "127.0.0.1", tls: ssl.SSLContext | None = None) -> Iterator[Server]:
    with Server(host) as server:
        if tls is not None:
            server.socket = tls.wrap_socket(server.socket, server_side=True)
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with serve() as server:
        yield server


@pytest.fixture
def site(server: Server) -> str:
    server.asked.clear()
    return f"http://localhost:{server.server_port}"


class Names:
    """A resolver with answers of its own; `answers` are given one after the other, the last again and again."""

    def __init__(self, *answers: Sequence[str]) -> None:
        self.answers = answers
        self.asked: list[str] = []

    async def __call__(self, host: str, port: int) -> Sequence[str]:
        self.asked.append(host)
        return self.answers[min(len(self.asked), len(self.answers)) - 1]


async def refused(url: str, policy: FetchPolicy = LOCAL) -> str:
    refusal = await fetch(url, policy)
    assert isinstance(refusal, InvalidValueError)
    assert refusal.field == "image.url"
    return refusal.detail


async def test_off_unless_allowed(site: str) -> None:
    assert "VITRINE_ALLOW_URLS" in await refused(f"{site}/photo", replace(LOCAL, allowed=False))


async def test_a_host_is_fetched_under_its_own_name(site: str) -> None:
    assert await fetch(f"{site}/photo", LOCAL) == make_png() + site.removeprefix("http://").encode()


@pytest.mark.parametrize(
    "url",
    [
        "http://127.0.0.1:1/",
        "http://localhost:1/",
        "http://[::1]:1/",
        "http://10.0.0.1/",
        "http://169.254.169.254/latest/meta-data/",
        "http://0.0.0.0:1/",
        "http://[::ffff:127.0.0.1]:1/",
        "http://2130706433/",
        "http://0x7f.1/",
        "http://[fe80::1]/",
    ],
)
async def test_addresses_that_are_not_public_are_refused(url: str) -> None:
    assert "not public" in await refused(url, FetchPolicy(allowed=True, timeout=2))


@pytest.mark.parametrize(
    ("address", "public"),
    [
        ("8.8.8.8", True),
        ("2606:4700::1111", True),
        ("::ffff:8.8.8.8", True),
        ("64:ff9b::808:808", True),
        ("2002:808:808::1", True),
        ("127.255.255.254", False),
        ("10.255.0.1", False),
        ("172.16.0.1", False),
        ("192.168.1.1", False),
        ("100.100.100.200", False),
        ("169.254.169.254", False),
        ("168.63.129.16", False),
        ("192.0.0.192", False),
        ("198.18.0.1", False),
        ("203.0.113.9", False),
        ("224.0.0.1", False),
        ("255.255.255.255", False),
        ("0.0.0.0", False),
        ("::", False),
        ("::1", False),
        ("::7f00:1", False),
        ("::ffff:10.0.0.1", False),
        ("64:ff9b::a9fe:a9fe", False),
        ("64:ff9b:1::1", False),
        ("2002:7f00:1::1", False),
        ("2001:0:4136:e378:8000:63bf:f5ff:fffe", False),
        ("fd00:ec2::254", False),
        ("fe80::1", False),
        ("fe80::1%1", False),
        ("2606:4700::1111%1", False),
        ("fec0::1", False),
        ("ff02::1", False),
        ("2001:db8::1", False),
    ],
)
async def test_what_is_public(address: str, public: bool) -> None:
    assert may_ask(address) == public


@pytest.mark.parametrize(
    ("address", "network", "allowed"),
    [
        ("10.1.2.3", "10.1.0.0/16", True),
        ("10.2.2.3", "10.1.0.0/16", False),
        ("::ffff:10.1.2.3", "10.1.0.0/16", True),
        ("fd00::1", "fd00::/8", True),
        ("fd00::1", "10.1.0.0/16", False),
        ("168.63.129.16", "168.63.129.16", True),
    ],
)
async def test_networks_that_the_operator_named(address: str, network: str, allowed: bool) -> None:
    assert may_ask(address, [ip_network(network)]) == allowed


async def test_the_list_of_hosts_opens_no_private_address(site: str) -> None:
    policy = FetchPolicy(allowed=True, hosts=("localhost",), timeout=2)
    assert "not public" in await refused(f"{site}/photo", policy)


async def test_hosts_off_the_list_are_refused(site: str) -> None:
    policy = replace(LOCAL, hosts=("images.example",))
    assert "images.example" in await refused(f"{site}/photo", policy)
    assert isinstance(await fetch(f"{site}/photo", replace(LOCAL, hosts=("LocalHost",))), bytes)


@pytest.mark.parametrize(
    "url",
    [
        *("file:///etc/passwd", "http://", "http://user:word@localhost/", "gopher://localhost/", "http://[::1", "http://a:99999/"),
        *("http://good.example\\@localhost/", "//localhost/photo", "http://localhost/" + "x" * 9000, "http://a b/", "http://\x00/"),
        *("http://" + "a" * 300 + ".example/", "http://xn--/", "http://localhost:-1/", "http://0177.0.0.1/"),
    ],
)
async def test_other_urls_are_refused(url: str) -> None:
    assert isinstance(await fetch(url, LOCAL), InputError)


async def test_a_name_is_resolved_once_and_the_connection_goes_where_it_was_checked(site: str, server: Server) -> None:
    """A name that is public when it is checked, and something else a moment later."""
    with serve("127.0.0.2") as inside:
        names = Names(["127.0.0.1"], ["127.0.0.2"])
        content = await fetch(f"http://rebinding.example:{server.server_port}/photo", replace(LOCAL, resolve=names))
        assert content == make_png() + f"rebinding.example:{server.server_port}".encode()
        assert names.asked == ["rebinding.example"]
        assert (server.asked, inside.asked) == (["/photo"], [])
        again = await refused(f"http://rebinding.example:{inside.server_port}/photo", replace(LOCAL, resolve=names))
        assert "not public" in again
        assert inside.asked == []


@pytest.mark.parametrize("addresses", [["127.0.0.1", "10.0.0.1"], ["169.254.169.254", "127.0.0.1"], []])
async def test_every_address_of_a_name_is_checked(site: str, server: Server, addresses: Sequence[str]) -> None:
    policy = replace(LOCAL, resolve=Names(addresses))
    assert "not public" in await refused(f"http://several.example:{server.server_port}/photo", policy)
    assert server.asked == []


@pytest.mark.parametrize("place", ["/photo", "../photo", "/photo?x#y", "{site}/photo", "//{host}/photo"])
async def test_redirects_are_followed(site: str, place: str) -> None:
    content = await fetch(f"{site}/to/{place.format(site=site, host=site.removeprefix('http://'))}", LOCAL)
    assert isinstance(content, bytes)


async def test_redirects_are_limited(site: str, server: Server) -> None:
    chain = "/to/" * 3 + "/photo"
    assert isinstance(await fetch(site + chain, LOCAL), bytes)
    assert "more than 2 times" in await refused(site + chain, replace(LOCAL, redirects=2))
    assert "more than 0 times" in await refused(f"{site}/to//photo", replace(LOCAL, redirects=0))
    assert server.asked == [chain, chain[4:], chain[8:], "/photo", chain, chain[4:], chain[8:], "/to//photo"]


@pytest.mark.parametrize(
    ("place", "reason"),
    [
        ("http://169.254.169.254/latest/meta-data/", "not public"),
        ("http://127.0.0.2:1/", "not public"),
        ("http://user:word@localhost/", "plain http"),
        ("file:///etc/passwd", "plain http"),
        ("ftp://localhost/", "plain http"),
        ("http://[::1", "cannot be fetched"),
    ],
)
async def test_every_redirect_is_checked(site: str, place: str, reason: str) -> None:
    assert reason in await refused(f"{site}/to/{place}")


async def test_a_redirect_is_resolved_anew_and_must_be_on_the_list(site: str, server: Server) -> None:
    names = Names(["127.0.0.1"], ["127.0.0.2"])
    start = f"http://one.example:{server.server_port}/to/http://two.example:{server.server_port}/photo"
    assert "not public" in await refused(start, replace(LOCAL, resolve=names))
    assert names.asked == ["one.example", "two.example"]
    policy = replace(LOCAL, resolve=Names(["127.0.0.1"]), hosts=("one.example",))
    assert "only from one.example" in await refused(start, policy)
    assert server.asked == [start.partition(str(server.server_port))[2]] * 2


async def test_https_is_checked_against_the_name(site: str) -> None:
    authority = trustme.CA()
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("images.example").configure_cert(tls)
    policy = replace(LOCAL, resolve=Names(["127.0.0.1"]))
    with serve(tls=tls) as server:
        address = f"https://images.example:{server.server_port}"
        assert "cannot be fetched" in await refused(f"{address}/photo", policy), "an authority that nobody trusts"
        trusted = ssl.create_default_context(cadata=authority.cert_pem.bytes().decode())
        policy = replace(policy, authorities=lambda: trusted)
        assert isinstance(await fetch(f"{address}/photo", policy), bytes)
        assert "cannot be fetched" in await refused(f"{address.replace('images', 'other')}/photo", policy)
        assert "from https to http" in await refused(f"{address}/to/{site}/photo", policy)
        unknown = replace(policy, authorities=usual_authorities)
        assert "cannot be fetched" in await refused(f"{site}/to/{address}/photo", unknown), "also after a redirect from http"


async def test_what_is_no_image_by_its_answer(site: str) -> None:
    assert "404" in await refused(f"{site}/gone")
    assert "compressed" in await refused(f"{site}/squeezed")


@pytest.mark.parametrize("path", ["/slow", "/dripping"])
async def test_time_is_bounded(site: str, path: str) -> None:
    started = time.monotonic()
    assert "0.2 s" in await refused(site + path, replace(LOCAL, timeout=0.2))
    assert time.monotonic() - started < 0.9


async def test_a_name_that_nobody_answers_for_is_bounded(site: str) -> None:
    async def hang(host: str, port: int) -> Sequence[str]:
        await asyncio.sleep(60)
        return []

    assert "0.1 s" in await refused(f"{site}/photo", replace(LOCAL, resolve=hang, timeout=0.1))


async def test_size_is_bounded_and_heard_of(site: str) -> None:
    held: list[int] = []
    assert isinstance(await fetch(f"{site}/large", LOCAL, held.append), TooLargeError)
    assert 0 < sum(held) <= LOCAL.max_bytes


async def test_a_port_where_nobody_listens() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    assert "cannot be fetched" in await refused(f"http://localhost:{port}/")


def test_networks_are_of_both_versions() -> None:
    networks: tuple[Network, ...] = LOOPBACK
    assert may_ask("127.0.0.1", networks)
    assert may_ask("::1", networks)
    assert not may_ask("127.0.0.2", networks)
