"""Images by address, for requests that name a URL; off unless the operator allows it.

The name is resolved here, every address must be public (unless the operator listed the host), and the connection goes to
exactly the address that was checked. Redirects are not followed.
"""

import asyncio
import ipaddress
import socket
from collections.abc import Callable
from dataclasses import dataclass
from urllib.parse import urlsplit

import httpx2

from app.errors import InputError, InvalidValueError, TooLargeError


@dataclass(frozen=True)
class FetchPolicy:
    allowed: bool = False
    hosts: tuple[str, ...] = ()
    timeout: float = 10.0
    max_bytes: int = 32 * 1024 * 1024


async def fetch(url: str, policy: FetchPolicy, hold: Callable[[int], None] = lambda count: None) -> bytes | InputError:
    """The bytes behind `url`, or the error that takes the image's place. `hold` hears of every chunk before it is kept."""
    if not policy.allowed:
        return InvalidValueError(
            "This server does not fetch URLs; send the image itself, or set VITRINE_ALLOW_URLS.", field="image.url"
        )
    try:
        async with asyncio.timeout(policy.timeout):
            return await _download(url, policy, hold)
    except InputError as error:
        return error
    except TimeoutError:
        return InvalidValueError(f"The URL did not answer within {policy.timeout:g} s.", field="image.url")
    except (httpx2.HTTPError, httpx2.InvalidURL, OSError, UnicodeError, ValueError):
        return InvalidValueError("The URL cannot be fetched.", field="image.url")


async def _download(url: str, policy: FetchPolicy, hold: Callable[[int], None]) -> bytes:
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.username or parts.password:
        raise InvalidValueError("Only plain http and https URLs are fetched.", field="image.url")
    hosts = [host.lower() for host in policy.hosts]
    if hosts and parts.hostname not in hosts:
        raise InvalidValueError(f"This server fetches only from {', '.join(policy.hosts)}.", field="image.url")
    port = parts.port or (443 if parts.scheme == "https" else 80)
    address = await _resolve(parts.hostname, port, trusted=parts.hostname in hosts)
    target = httpx2.URL(url).copy_with(host=address)
    headers = {"Host": parts.netloc}
    async with (
        httpx2.AsyncClient(follow_redirects=False, trust_env=False, timeout=policy.timeout) as client,
        client.stream("GET", target, headers=headers, extensions={"sni_hostname": parts.hostname}) as response,
    ):
        if response.status_code != 200:
            raise InvalidValueError(f"The URL answered {response.status_code}; redirects are not followed.", field="image.url")
        return await _read(response, policy.max_bytes, hold)


async def _read(response: httpx2.Response, limit: int, hold: Callable[[int], None]) -> bytes:
    body = bytearray()
    async for chunk in response.aiter_raw():
        if len(body) + len(chunk) > limit:
            raise TooLargeError(f"The URL gives more than {limit} bytes.", field="image.url")
        hold(len(chunk))
        body += chunk
    return bytes(body)


async def _resolve(host: str, port: int, *, trusted: bool) -> str:
    """One address of `host`; all of them must be public unless the host is trusted."""
    found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    addresses = [str(info[4][0]) for info in found]
    if not trusted and not all(_is_public(address) for address in addresses):
        raise InvalidValueError("The URL leads to an address that is not public.", field="image.url")
    return addresses[0]


def _is_public(address: str) -> bool:
    parsed = ipaddress.ip_address(address)
    return parsed.is_global and not parsed.is_multicast
