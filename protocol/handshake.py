"""Who is at the other end of a link: messages of the mutual authentication, and the tags they carry.

The listener sends `Challenge`, the connector answers `Hello` with a tag over both nonces, the listener answers
`Welcome` with its own tag. Tags are HMAC-SHA256 under the cluster secret, so nobody without it can open a room,
and a recorded handshake opens nothing. Both nonces also make the keys that every later frame is tagged under
(`sealing.py`).
"""

from __future__ import annotations

import enum
import hashlib
import hmac
import secrets

import msgspec

from protocol.rooms import PROTOCOL_VERSION, Message, PeerAddress


class LinkRole(enum.Enum):
    ROUTER = "router"
    REPLICA = "replica"


class PoolShape(msgspec.Struct, frozen=True, array_like=True):
    """What the bytes of a pool mean: enough to take parts of its pages into a pool of another shape.

    With tensor parallelism each rank has a pool of its own, of `kv_heads` of the model's `total_kv_heads` heads.
    """

    model: str
    """Equal for two pools whose KV means the same, token for token."""
    dtype: str
    layers: int
    kv_heads: int
    page_size: int
    head_dim: int
    total_kv_heads: int
    tp_rank: int = 0
    tp_size: int = 1


class RegionTicket(msgspec.Struct, frozen=True, array_like=True):
    """How a peer reaches a replica's KV pool: one contiguous region of equal pages.

    A page holds every layer: `[layers, kv_heads, 2, page_size, head_dim]` of `dtype`, so one page is one span.
    """

    num_pages: int
    page_bytes: int
    layout: str
    """Fingerprint of model, dtype and page shape: equal tickets hold interchangeable pages."""
    host_id: str
    """Equal on two replicas that share a kernel, so that shared memory can be passed."""
    shm_socket: str
    """Abstract Unix socket that hands out the memory's file descriptor; empty when there is none."""
    tcp_host: str
    tcp_port: int
    """0 when the pool is not served over TCP."""
    doors: dict[str, str] = {}
    """Further ways in, by the name of their transport: what its clients need to know, in its own words."""
    shape: PoolShape | None = None
    """None when only pools of an equal `layout` can take from this one."""
    int8: bool = False
    """Whether KV is also served in 8 bits, over TCP."""


class Challenge(Message, frozen=True, tag="challenge"):
    version: int
    nonce: bytes


class Hello(Message, frozen=True, tag="hello"):
    version: int
    role: LinkRole
    peer_id: str
    boot: int
    nonce: bytes
    tag: bytes


class Welcome(Message, frozen=True, tag="welcome"):
    address: PeerAddress
    region: RegionTicket | None
    tag: bytes


class Ping(Message, frozen=True, tag="ping"):
    sequence: int


class Pong(Message, frozen=True, tag="pong"):
    sequence: int


def new_nonce() -> bytes:
    return secrets.token_bytes(16)


def hello_tag(secret: bytes, challenge: Challenge, role: LinkRole, peer_id: str, boot: int, nonce: bytes) -> bytes:
    """The connector's proof that it knows the cluster secret."""
    return _tag(secret, b"hello", challenge.nonce, nonce, role.value.encode(), peer_id.encode(), str(boot).encode())


def welcome_tag(
    secret: bytes, challenge: Challenge, hello: Hello, address: PeerAddress, region: RegionTicket | None
) -> bytes:
    """The listener's proof that it knows the cluster secret, and said this."""
    return _tag(secret, b"welcome", challenge.nonce, hello.nonce, msgspec.msgpack.encode((address, region)))


def link_keys(secret: bytes, challenge: Challenge, hello: Hello) -> tuple[bytes, bytes]:
    """Of the connector's frames, and of the listener's."""
    nonces = (challenge.nonce, hello.nonce)
    return _tag(secret, b"connector", *nonces), _tag(secret, b"listener", *nonces)


def tags_equal(one: bytes, other: bytes) -> bool:
    """Compared in constant time."""
    return hmac.compare_digest(one, other)


def _tag(secret: bytes, *parts: bytes) -> bytes:
    digest = hmac.new(secret, str(PROTOCOL_VERSION).encode(), hashlib.sha256)
    for part in parts:
        digest.update(len(part).to_bytes(4, "big") + part)
    return digest.digest()
