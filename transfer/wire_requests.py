"""Requests for pages and the replies to them, once a connection's handshake is done (`wire.py` has the picture)."""

from __future__ import annotations

import hmac
import struct
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from transfer.spans import Runs
from transfer.wire import MAGIC, VERSION, Status, WireError, check_version, status_of

_REQUEST = struct.Struct(">4sHQQIIQ16s")
_REPLY = struct.Struct(">4sHBQQIQ16s")
_REQUEST_TAG_BYTES = 16
_RUN_BYTES = 8

REQUEST_BYTES = _REQUEST.size
REPLY_BYTES = _REPLY.size


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
    check_version(magic, version)
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
    check_version(magic, version)
    if not hmac.compare_digest(tag, _request_tag(key, data[:-_REQUEST_TAG_BYTES], b"reply")):
        raise WireError("the reply's tag is wrong")
    return Reply(status=status_of(status), boot=boot, job=job, num_pages=num_pages, byte_length=byte_length)


def _request_tag(key: bytes, head: bytes, body: bytes) -> bytes:
    return hmac.digest(key, head + body, "sha256")[:_REQUEST_TAG_BYTES]
