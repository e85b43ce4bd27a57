"""POST a signed notice to a webhook: only to addresses that were checked, without redirects, in a bounded time.

The name of the host is resolved once; every address of it must be allowed, and the connection goes to one of these very
addresses. So a name that leads elsewhere a moment later leads nowhere.
"""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from functools import cache, partial
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address
from typing import NamedTuple
from urllib.parse import urlsplit

from standardwebhooks import Webhook

from worker.errors import BadInput

# The head of an answer; its body is not read.
_MOST_HEADER_BYTES = 16_384
# A receiver that has answered and does not end its TLS is left after this: else its connections pile up.
_GOODBYE_SECONDS = 1
_NAT64 = IPv6Network("64:ff9b::/96")
# All of IPv6 that is public is in here. Site-local addresses are not, which Python calls global.
_PUBLIC_V6 = IPv6Network("2000::/3")
# Also special: protocol assignments, the former 6to4 relays, documentation.
_SPECIAL = (IPv4Network("192.0.0.0/24"), IPv4Network("192.88.99.0/24"), IPv6Network("3fff::/20"))
# A resolver that hangs keeps its thread. It has one of these, so that neither others nor the end of a job wait for it.
_RESOLVERS = ThreadPoolExecutor(128, "resolver")
MAX_URL = 2_048


class Refused(Exception):
    """The notice was not delivered; the message says why, without a secret."""


class Target(NamedTuple):
    """A webhook's URL in parts."""

    is_tls: bool
    host: str
    port: int
    path: str


def target_of(url: str, *, allows_private: bool) -> Target:
    """Return the parts of a URL. Raises BadInput that names the field and what is allowed."""
    if not isinstance(url, str) or len(url) > MAX_URL or not url.isascii() or not url.isprintable() or " " in url:
        raise BadInput(f"url: must be at most {MAX_URL} printable ASCII characters without a space")
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        raise BadInput("url: must be a URL https://host/path with a number as port") from None
    if parts.scheme not in ("https", "http") or not parts.hostname:
        raise BadInput(f"url: must be a URL https://host/path (got the scheme {parts.scheme[:16]!r})")
    if parts.username is not None or parts.password is not None or parts.fragment:
        raise BadInput("url: must have neither a user, a password nor a fragment")
    if parts.scheme == "http" and not (allows_private and _is_loopback(parts.hostname)):
        raise BadInput(
            "url: must be https; http only to a loopback address, with METERFALL_WEBHOOK_PRIVATE_ADDRESSES=true"
        )
    is_tls = parts.scheme == "https"
    path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    target = Target(is_tls, parts.hostname, port or (443 if is_tls else 80), path)
    address = _address(target.host)  # a name is resolved when it is used
    if address is not None and not is_allowed(address, allows_private=allows_private):
        raise BadInput(f"url: {address} is private; METERFALL_WEBHOOK_PRIVATE_ADDRESSES=true allows it")
    return target


def _address(host: str) -> IPv4Address | IPv6Address | None:
    try:
        return ip_address(host.partition("%")[0])
    except ValueError:
        return None


def _is_loopback(host: str) -> bool:
    address = _address(host)
    return host == "localhost" if address is None else address.is_loopback


def is_allowed(address: IPv4Address | IPv6Address, *, allows_private: bool) -> bool:
    """True for an address of the public Internet, also as an IPv6 address that leads to an IPv4 one."""
    if allows_private:
        return not (address.is_multicast or address.is_unspecified)
    inner: list[IPv4Address | None] = []
    if isinstance(address, IPv6Address):
        inner = [address.ipv4_mapped, address.sixtofour, *(address.teredo or ())]
        if address in _NAT64:
            inner.append(IPv4Address(int(address) & 0xFFFFFFFF))
    found = [address, *(each for each in inner if each is not None)]
    if isinstance(address, IPv6Address) and address.ipv4_mapped is not None:
        found = [address.ipv4_mapped]
    return all(_is_public(each) for each in found)


def _is_public(address: IPv4Address | IPv6Address) -> bool:
    if isinstance(address, IPv6Address) and address not in _PUBLIC_V6:
        return False
    if any(address in network for network in _SPECIAL if network.version == address.version):
        return False
    return address.is_global and not address.is_multicast and not address.is_reserved


def signed(secrets: list[str], notice_id: str, at: datetime, body: str) -> dict[str, str]:
    """Return the headers of Standard Webhooks, with a signature of each secret: so one may replace another."""
    return {
        "webhook-id": notice_id,
        "webhook-timestamp": str(int(at.timestamp())),
        "webhook-signature": " ".join(Webhook(secret).sign(notice_id, at, body) for secret in secrets),
    }


async def post(
    target: Target, headers: Mapping[str, str], body: bytes, timeout_seconds: float, *, allows_private: bool
) -> None:
    """Deliver a body; return after an answer 2xx. All of it takes no longer than `timeout_seconds`.

    Raises Refused for any other answer, a redirect among them, for an address that is not allowed, and for a server
    that does not answer in time.
    """
    try:
        async with asyncio.timeout(timeout_seconds):
            status = await _status(target, headers, body, allows_private=allows_private)
    except TimeoutError:
        raise Refused(f"no answer within {timeout_seconds:g} s") from None
    except (OSError, asyncio.IncompleteReadError, asyncio.LimitOverrunError, ssl.SSLError) as error:
        raise Refused(f"{type(error).__name__}: {error}"[:200]) from None
    if 300 <= status < 400:
        raise Refused(f"answered {status}: redirects are not followed")
    if not 200 <= status < 300:
        raise Refused(f"answered {status}")


async def _status(target: Target, headers: Mapping[str, str], body: bytes, *, allows_private: bool) -> int:
    reader, writer = await _connect(target, allows_private=allows_private)
    try:
        host = f"[{target.host}]" if ":" in target.host else target.host
        port = "" if target.port == (443 if target.is_tls else 80) else f":{target.port}"
        lines = [
            f"POST {target.path} HTTP/1.1", f"host: {host}{port}", "content-type: application/json",
            f"content-length: {len(body)}", "user-agent: meterfall", "connection: close",
            *(f"{name}: {value}" for name, value in headers.items()),
        ]  # fmt: skip
        writer.write("\r\n".join(lines).encode("ascii") + b"\r\n\r\n" + body)
        await writer.drain()
        while True:
            head = await reader.readuntil(b"\r\n\r\n")
            version, _, rest = head.partition(b" ")
            if not version.startswith(b"HTTP/1.") or not rest[:3].isdigit():
                raise Refused("the answer is no HTTP/1.1")
            status = int(rest[:3])
            if status >= 200:  # one below comes before the answer
                return status
    finally:
        writer.close()


@cache
def _context() -> ssl.SSLContext:
    """Return the one context of the process: to read the certificates takes longer than a delivery."""
    return ssl.create_default_context()


async def _connect(target: Target, *, allows_private: bool) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """Connect to the first address that answers, of a host whose addresses are all allowed."""
    resolve = partial(socket.getaddrinfo, target.host, target.port, type=socket.SOCK_STREAM)
    found = await asyncio.get_running_loop().run_in_executor(_RESOLVERS, resolve)
    addresses = list(dict.fromkeys(info[4][0] for info in found))
    parsed = [ip_address(str(address).partition("%")[0]) for address in addresses]
    for each in parsed:
        if not is_allowed(each, allows_private=allows_private):
            raise Refused(f"{target.host} leads to {each}, which is private")
    if not target.is_tls and not all(each.is_loopback for each in parsed):
        raise Refused(f"{target.host} leads elsewhere: http only to a loopback address")
    context = _context() if target.is_tls else None
    last: OSError | None = None
    for address in addresses:
        try:
            return await asyncio.open_connection(
                str(address), target.port, limit=_MOST_HEADER_BYTES, ssl=context,
                server_hostname=target.host if context else None,
                ssl_shutdown_timeout=_GOODBYE_SECONDS if context else None,
            )  # fmt: skip
        except OSError as error:
            last = error
    raise last or OSError("no address")
