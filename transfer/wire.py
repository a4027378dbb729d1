"""Bytes between a page server and a fetcher: fixed-size headers, each checked, none trusted.

    server                                   fetcher
      |-- Greeting: a nonce ------------------->|
      |<-- Hello: what it wants, of which boot -|      tag: the fetcher knows the cluster secret
      |-- Welcome: what it gets --------------->|      tag: so does the server
      |      over a Unix socket: the memory's file descriptor comes along, and that is all
      |      over TCP, as often as wanted:
      |<-- Request: a job number, runs of pages-|      tag under a key of this connection alone; of grains the
      |                                         |      request says before the runs what they are (wire_grains.py)
      |-- Reply, then the pages' bytes -------->|      tag likewise

Tags are HMAC-SHA256. A connection's key is derived from both nonces, and job numbers must rise, so nothing recorded
can be played again. The pages' bytes themselves carry no tag: their checksums came over the authenticated link. (In 8
bits those say nothing of the bytes, so there are tags.) Numbers are big-endian. `WireError` means that the other side
does not speak this protocol: close the connection. Here is the handshake; `wire_requests.py` has the rest.
"""

from __future__ import annotations

import enum
import hashlib
import hmac
import struct
from dataclasses import dataclass

MAGIC = b"PDKV"
VERSION = 1

_GREETING = struct.Struct(">4sH16s")
_HELLO = struct.Struct(">4sHBQ16s32s")
_WELCOME = struct.Struct(">4sHBQQQ32s")

GREETING_BYTES = _GREETING.size
HELLO_BYTES = _HELLO.size
WELCOME_BYTES = _WELCOME.size


class WireError(ValueError):
    """The other side does not speak this version of this protocol, or does not know the secret."""


class Want(enum.IntEnum):
    """What a connection is for."""

    MEMORY = 1
    """The file descriptor of the pool's memory."""
    PAGES = 2
    """Pages, request by request."""
    GROUP = 3
    """Requests, replies and the rendezvous of a process group that the pages themselves go through (dist/)."""
    GRAINS = 4
    """Parts of pages, for a pool of another shape, request by request."""
    INT8 = 5
    """Pages or parts of them in 8 bits, request by request."""


class Status(enum.IntEnum):
    OK = 0
    OTHER_BOOT = 1
    """The listener is another life of the peer than the fetcher means."""
    BAD_PAGES = 2
    """The request names pages that the pool does not have, or more of them."""


@dataclass(frozen=True, kw_only=True)
class Hello:
    want: Want
    boot: int
    nonce: bytes
    tag: bytes


@dataclass(frozen=True, kw_only=True)
class Welcome:
    status: Status
    boot: int
    num_pages: int
    page_bytes: int


def encode_greeting(nonce: bytes) -> bytes:
    return _GREETING.pack(MAGIC, VERSION, nonce)


def decode_greeting(data: bytes) -> bytes:
    """The listener's nonce."""
    magic, version, nonce = _GREETING.unpack(data)
    check_version(magic, version)
    return bytes(nonce)


def encode_hello(secret: bytes, server_nonce: bytes, *, want: Want, boot: int, nonce: bytes) -> bytes:
    tag = _hello_tag(secret, server_nonce, want, boot, nonce)
    return _HELLO.pack(MAGIC, VERSION, want, boot, nonce, tag)


def decode_hello(data: bytes, secret: bytes, server_nonce: bytes) -> Hello:
    """Raises `WireError` unless the fetcher proved that it knows the secret."""
    magic, version, want, boot, nonce, tag = _HELLO.unpack(data)
    check_version(magic, version)
    try:
        hello = Hello(want=Want(want), boot=boot, nonce=nonce, tag=tag)
    except ValueError as error:
        raise WireError(str(error)) from error
    if not hmac.compare_digest(tag, _hello_tag(secret, server_nonce, hello.want, boot, nonce)):
        raise WireError("the hello's tag is wrong: another cluster secret")
    return hello


def encode_welcome(secret: bytes, server_nonce: bytes, client_nonce: bytes, welcome: Welcome) -> bytes:
    tag = _welcome_tag(secret, server_nonce, client_nonce, welcome)
    return _WELCOME.pack(MAGIC, VERSION, welcome.status, welcome.boot, welcome.num_pages, welcome.page_bytes, tag)


def decode_welcome(data: bytes, secret: bytes, server_nonce: bytes, client_nonce: bytes) -> Welcome:
    """Raises `WireError` unless the listener proved that it knows the secret."""
    magic, version, status, boot, num_pages, page_bytes, tag = _WELCOME.unpack(data)
    check_version(magic, version)
    welcome = Welcome(status=status_of(status), boot=boot, num_pages=num_pages, page_bytes=page_bytes)
    if not hmac.compare_digest(tag, _welcome_tag(secret, server_nonce, client_nonce, welcome)):
        raise WireError("the welcome's tag is wrong: another cluster secret")
    return welcome


def connection_key(secret: bytes, server_nonce: bytes, client_nonce: bytes) -> bytes:
    """The key of one connection's requests and replies."""
    return _tag(secret, b"connection", server_nonce, client_nonce)


def check_version(magic: bytes, version: int) -> None:
    """Raises `WireError` for bytes that are not of this protocol or of another version of it."""
    if magic != MAGIC:
        raise WireError(f"not a page connection: it begins with {magic!r} instead of {MAGIC!r}")
    if version != VERSION:
        raise WireError(f"the other side speaks version {version}, this one {VERSION}; run one release everywhere")


def status_of(value: int) -> Status:
    """Raises `WireError` for a number that is none."""
    try:
        return Status(value)
    except ValueError as error:
        raise WireError(str(error)) from error


def _hello_tag(secret: bytes, server_nonce: bytes, want: Want, boot: int, nonce: bytes) -> bytes:
    return _tag(secret, b"hello", server_nonce, nonce, struct.pack(">BQ", want, boot))


def _welcome_tag(secret: bytes, server_nonce: bytes, client_nonce: bytes, welcome: Welcome) -> bytes:
    fields = struct.pack(">BQQQ", welcome.status, welcome.boot, welcome.num_pages, welcome.page_bytes)
    return _tag(secret, b"welcome", server_nonce, client_nonce, fields)


def _tag(secret: bytes, label: bytes, *parts: bytes) -> bytes:
    # Every part but the label has a fixed size, so their concatenation can be read in one way only.
    return hmac.new(
        secret, b"pd-serve pages " + bytes([VERSION, len(label)]) + label + b"".join(parts), hashlib.sha256
    ).digest()
