"""Images by address, for requests that name a URL; off unless the operator allows it.

Every hop, the first and those that it is redirected to, goes the same way: its host must be on the list where there is one, its
name is resolved here and once, every address that it has must be public or of a network that the operator named, and the connection
goes to an address that was checked, whatever the name means by then.
"""

import asyncio
import socket
import ssl
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address

import httpx2

from app.errors import InputError, InvalidValueError, TooLargeError

Network = IPv4Network | IPv6Network
Resolve = Callable[[str, int], Awaitable[Sequence[str]]]
Hold = Callable[[int], None]

REDIRECTS = frozenset((301, 302, 303, 307, 308))
MOST_CHARACTERS = 8192  # of a URL
GLOBAL_UNICAST = IPv6Network("2000::/3")
NAT64 = IPv6Network("64:ff9b::/96")
PLATFORM = (IPv4Network("168.63.129.16"), IPv4Network("192.0.0.0/24"))  # of Azure and Oracle: not private by all tables, nor public
HEADERS = {"Accept": "image/*", "Accept-Encoding": "identity"}  # compressed, an image would have two sizes

_names = ThreadPoolExecutor(8, thread_name_prefix="resolve")  # names that nobody answers for block these, not what else waits


async def resolve(host: str, port: int) -> Sequence[str]:
    """Every address of `host`, as the system knows it.

    Raises:
        OSError: it has none.
    """
    found = await asyncio.get_running_loop().run_in_executor(
        _names, lambda: socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    )
    return [str(info[4][0]) for info in found]


@cache
def usual_authorities() -> ssl.SSLContext:
    """Trusts whom browsers trust. Made once: it takes longer than many an image."""
    return httpx2.create_ssl_context(trust_env=False)


@dataclass(frozen=True)
class FetchPolicy:
    """What may be fetched. `hosts` are the only ones, where there are any; `networks` may be asked although they are not public.

    `timeout` is in seconds, from the first name to the last byte.
    """

    allowed: bool = False
    hosts: tuple[str, ...] = ()
    timeout: float = 10.0
    max_bytes: int = 32 * 1024 * 1024
    networks: tuple[Network, ...] = ()
    redirects: int = 3
    resolve: Resolve = resolve
    authorities: Callable[[], ssl.SSLContext] = usual_authorities


async def fetch(url: str, policy: FetchPolicy, hold: Hold = lambda count: None) -> bytes | InputError:
    """The bytes behind `url`, or the error that takes the image's place. `hold` hears of every chunk before it is kept.

    No error repeats the address or what was found there: it may be signed, and is none of the client's business.
    """
    if not policy.allowed:
        return _refusal("This server does not fetch URLs; send the image itself, or set VITRINE_ALLOW_URLS.")
    try:
        async with asyncio.timeout(policy.timeout):
            return await _follow(url, policy, hold)
    except InputError as error:
        return error
    except TimeoutError:
        return _refusal(f"The URL did not answer within {policy.timeout:g} s.")
    except (httpx2.HTTPError, httpx2.InvalidURL, OSError, UnicodeError, ValueError):
        return _refusal("The URL cannot be fetched.")


async def _follow(text: str, policy: FetchPolicy, hold: Hold) -> bytes:
    if len(text) > MOST_CHARACTERS:
        raise _refusal("The URL is too long.")
    url = httpx2.URL(text)
    for _ in range(policy.redirects + 1):
        found = await _ask(url, policy, hold)
        if isinstance(found, bytes):
            return found
        if url.scheme == "https" and found.scheme == "http":
            raise _refusal("The URL leads from https to http.")
        url = found
    raise _refusal(f"The URL is redirected more than {policy.redirects} times.")


async def _ask(url: httpx2.URL, policy: FetchPolicy, hold: Hold) -> bytes | httpx2.URL:
    """What one hop gives: the bytes, or where it says that they are. Its connection and its cookies end with it."""
    if url.scheme not in ("http", "https") or not url.host or url.userinfo:
        raise _refusal("Only plain http and https URLs are fetched.")
    name = url.raw_host.decode("ascii")
    if policy.hosts and name.lower() not in {host.lower() for host in policy.hosts}:
        raise _refusal(f"This server fetches only from {', '.join(policy.hosts)}.")
    addresses = await policy.resolve(name, url.port or (443 if url.scheme == "https" else 80))
    if not addresses or not all(may_ask(address, policy.networks) for address in addresses):
        raise _refusal("The URL leads to an address that is not public.")
    pinned = url.copy_with(host=addresses[0])
    headers = {"Host": url.netloc.decode("ascii"), "Connection": "close", **HEADERS}
    tls = await asyncio.to_thread(policy.authorities)
    async with (
        httpx2.AsyncClient(verify=tls, trust_env=False, timeout=policy.timeout) as client,
        client.stream("GET", pinned, headers=headers, extensions={"sni_hostname": name}) as response,
    ):
        if response.status_code in REDIRECTS:
            return url.join(response.headers.get("location", ""))
        if response.status_code != 200:
            raise _refusal(f"The URL answered {response.status_code}.")
        if response.headers.get("content-encoding", "identity") != "identity":
            raise _refusal("The URL gives a compressed body.")
        return await _read(response, policy.max_bytes, hold)


async def _read(response: httpx2.Response, limit: int, hold: Hold) -> bytes:
    body = bytearray()
    async for chunk in response.aiter_raw():
        if len(body) + len(chunk) > limit:
            raise TooLargeError(f"The URL gives more than {limit} bytes.", field="image.url")
        hold(len(chunk))
        body += chunk
    return bytes(body)


def may_ask(address: str, networks: Sequence[Network] = ()) -> bool:
    """Whether `address` is public, or lies in one of `networks`; of one that stands for another, whether the other is.

    Raises:
        ValueError: it is no address.
    """
    parsed = ip_address(address)
    meant = embedded(parsed) if isinstance(parsed, IPv6Address) else parsed
    if any(meant.version == network.version and meant in network for network in networks):
        return True
    if isinstance(meant, IPv6Address) and (meant not in GLOBAL_UNICAST or meant.scope_id):
        return False
    return meant.is_global and not meant.is_multicast and not any(meant in network for network in PLATFORM)


def embedded(address: IPv6Address) -> IPv4Address | IPv6Address:
    """The address of version 4 that one of version 6 reaches, where it does: mapped, through NAT64, 6to4 or Teredo; or itself."""
    if address.ipv4_mapped is not None:
        return address.ipv4_mapped
    if address in NAT64:
        return IPv4Address(int(address) & 0xFFFFFFFF)
    if address.teredo is not None:
        return address.teredo[1]
    return address.sixtofour or address


def _refusal(detail: str) -> InvalidValueError:
    return InvalidValueError(detail, field="image.url")
