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
can be played again. The pages' bytes themselves carry no tag: their checksums came over the authenticated link.
Numbers are big-endian. `WireError` means that the other side does not speak this protocol: close the connection.
"""

from __future__ import annotations

import enum
import hashlib
import hmac
import struct
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from transfer.spans import Runs

MAGIC = b"PDKV"
VERSION = 1

_GREETING = struct.Struct(">4sH16s")
_HELLO = struct.Struct(">4sHBQ16s32s")
_WELCOME = struct.Struct(">4sHBQQQ32s")
_REQUEST = struct.Struct(">4sHQQIIQ16s")
_REPLY = struct.Struct(">4sHBQQIQ16s")
_REQUEST_TAG_BYTES = 16
_RUN_BYTES = 8

GREETING_BYTES = _GREETING.size
HELLO_BYTES = _HELLO.size
WELCOME_BYTES = _WELCOME.size
REQUEST_BYTES = _REQUEST.size
REPLY_BYTES = _REPLY.size


class WireError(ValueError):
    """The other side does not speak this version of this protocol, or does not know the secret."""


class Want(enum.IntEnum):
    """What a connection is for."""

    MEMORY = 1
    """The file descriptor of the pool's memory."""
    PAGES = 2
    """Pages, request by request."""
    GRAINS = 4
    """Parts of pages, for a pool of another shape, request by request."""
    INT8 = 5
    """Pages or parts of them in 8 bits, request by request."""
    GROUP = 3
    """Requests, replies and the rendezvous of a process group that the pages themselves go through (dist/)."""


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


@dataclass(frozen=True, kw_only=True)
class RequestHead:
    """A request up to its runs; `tag` covers both and can be checked once the runs are there."""

    boot: int
    job: int
    num_runs: int
    num_pages: int
    byte_length: int
    tag: bytes
    raw: bytes

    @property
    def runs_bytes(self) -> int:
        return self.num_runs * _RUN_BYTES


@dataclass(frozen=True, kw_only=True)
class Reply:
    status: Status
    boot: int
    job: int
    num_pages: int
    byte_length: int


# ---- the handshake --------------------------------------------------------------------------------------------


def encode_greeting(nonce: bytes) -> bytes:
    return _GREETING.pack(MAGIC, VERSION, nonce)


def decode_greeting(data: bytes) -> bytes:
    """The listener's nonce."""
    magic, version, nonce = _GREETING.unpack(data)
    _check_version(magic, version)
    return bytes(nonce)


def encode_hello(secret: bytes, server_nonce: bytes, *, want: Want, boot: int, nonce: bytes) -> bytes:
    tag = _hello_tag(secret, server_nonce, want, boot, nonce)
    return _HELLO.pack(MAGIC, VERSION, want, boot, nonce, tag)


def decode_hello(data: bytes, secret: bytes, server_nonce: bytes) -> Hello:
    """Raises `WireError` unless the fetcher proved that it knows the secret."""
    magic, version, want, boot, nonce, tag = _HELLO.unpack(data)
    _check_version(magic, version)
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
    _check_version(magic, version)
    welcome = Welcome(status=_status(status), boot=boot, num_pages=num_pages, page_bytes=page_bytes)
    if not hmac.compare_digest(tag, _welcome_tag(secret, server_nonce, client_nonce, welcome)):
        raise WireError("the welcome's tag is wrong: another cluster secret")
    return welcome


def connection_key(secret: bytes, server_nonce: bytes, client_nonce: bytes) -> bytes:
    """The key of one connection's requests and replies."""
    return _tag(secret, b"connection", server_nonce, client_nonce)


# ---- pages ----------------------------------------------------------------------------------------------------


def encode_request(
    key: bytes, *, boot: int, job: int, runs: npt.ArrayLike, page_bytes: int, ask: bytes = b"", rest: bytes = b""
) -> bytes:
    """A request for `runs` of pages, in the order in which their bytes are wanted, between `ask` and `rest`."""
    listed = np.asarray(runs, dtype=np.int64).reshape(-1, 2)
    num_pages = int(listed[:, 1].sum())
    head = _REQUEST.pack(MAGIC, VERSION, boot, job, len(listed), num_pages, num_pages * page_bytes, b"")
    body = ask + pack_runs(listed) + rest
    untagged = head[:-_REQUEST_TAG_BYTES]
    return untagged + _request_tag(key, untagged, body) + body


def decode_request_head(data: bytes) -> RequestHead:
    magic, version, boot, job, num_runs, num_pages, byte_length, tag = _REQUEST.unpack(data)
    _check_version(magic, version)
    return RequestHead(
        boot=boot,
        job=job,
        num_runs=num_runs,
        num_pages=num_pages,
        byte_length=byte_length,
        tag=tag,
        raw=data[:-_REQUEST_TAG_BYTES],
    )


def decode_runs(key: bytes, head: RequestHead, data: bytes, *, ask_bytes: int = 0) -> Runs:
    """The runs in `data`, which follows `head`; raises `WireError` when its tag does not match both."""
    if not hmac.compare_digest(head.tag, _request_tag(key, head.raw, data)):
        raise WireError("the request's tag is wrong")
    return unpack_runs(data[ask_bytes : ask_bytes + head.runs_bytes])


def pack_runs(runs: Runs) -> bytes:
    return runs.astype(">u4").tobytes()


def unpack_runs(data: bytes) -> Runs:
    return np.frombuffer(data, dtype=">u4").reshape(-1, 2).astype(np.int64)


def runs_are_inside(runs: Runs, head: RequestHead, *, num_pages: int, page_bytes: int) -> bool:
    """Whether the runs lie in a pool of `num_pages` pages and add up to what the head says."""
    inside = bool(((runs[:, 1] > 0) & (runs.sum(axis=1) <= num_pages)).all())
    total = int(runs[:, 1].sum())
    return inside and total == head.num_pages <= num_pages and total * page_bytes == head.byte_length


def encode_reply(key: bytes, reply: Reply) -> bytes:
    head = _REPLY.pack(MAGIC, VERSION, reply.status, reply.boot, reply.job, reply.num_pages, reply.byte_length, b"")
    untagged = head[:-_REQUEST_TAG_BYTES]
    return untagged + _request_tag(key, untagged, b"reply")


def decode_reply(key: bytes, data: bytes) -> Reply:
    """Raises `WireError` for a reply that the server of this connection did not make."""
    magic, version, status, boot, job, num_pages, byte_length, tag = _REPLY.unpack(data)
    _check_version(magic, version)
    if not hmac.compare_digest(tag, _request_tag(key, data[:-_REQUEST_TAG_BYTES], b"reply")):
        raise WireError("the reply's tag is wrong")
    return Reply(status=_status(status), boot=boot, job=job, num_pages=num_pages, byte_length=byte_length)


def _check_version(magic: bytes, version: int) -> None:
    if magic != MAGIC:
        raise WireError(f"not a page connection: it begins with {magic!r} instead of {MAGIC!r}")
    if version != VERSION:
        raise WireError(f"the other side speaks version {version}, this one {VERSION}; run one release everywhere")


def _status(value: int) -> Status:
    try:
        return Status(value)
    except ValueError as error:
        raise WireError(str(error)) from error


def _hello_tag(secret: bytes, server_nonce: bytes, want: Want, boot: int, nonce: bytes) -> bytes:
    return _tag(secret, b"hello", server_nonce, nonce, struct.pack(">BQ", want, boot))


def _welcome_tag(secret: bytes, server_nonce: bytes, client_nonce: bytes, welcome: Welcome) -> bytes:
    fields = struct.pack(">BQQQ", welcome.status, welcome.boot, welcome.num_pages, welcome.page_bytes)
    return _tag(secret, b"welcome", server_nonce, client_nonce, fields)


def _request_tag(key: bytes, head: bytes, body: bytes) -> bytes:
    return hmac.digest(key, head + body, "sha256")[:_REQUEST_TAG_BYTES]


def _tag(secret: bytes, label: bytes, *parts: bytes) -> bytes:
    # Every part but the label has a fixed size, so their concatenation can be read in one way only.
    return hmac.new(
        secret, b"pd-serve pages " + bytes([VERSION, len(label)]) + label + b"".join(parts), hashlib.sha256
    ).digest()
