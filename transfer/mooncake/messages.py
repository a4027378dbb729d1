"""What a replica and its mooncake processes tell each other, and what a door tells peers."""

from __future__ import annotations

import msgspec

IDENTITY_BYTES = 32


class DoorAddress(msgspec.Struct, frozen=True):
    """Travels as JSON in the replica's ticket. Addresses are those of the door's process."""

    protocol: str
    """"tcp" or "rdma"."""
    session: str
    """host:port of the library's handshake."""
    base: int
    """Where page 0 begins."""
    identity_at: int
    """Where `identity` stands: read along with pages, it tells this life of the door from any other."""
    identity: str
    """Hexadecimal."""


class Settings(msgspec.Struct, frozen=True):
    """A mooncake process's command line."""

    socket_fd: int
    memory_fd: int
    memory_bytes: int
    host: str
    ib_device: str
    serves: bool
    """Registers its memory for peers to read, instead of reading from them into it."""
    identity: str = ""


class Ready(msgspec.Struct, frozen=True, tag="ready"):
    """The first message of the child, when the library runs."""

    session: str
    base: int
    identity_at: int


class Refused(msgspec.Struct, frozen=True, tag="refused"):
    """The first and last message of a child that cannot do its work."""

    error: str


class Open(msgspec.Struct, frozen=True, tag="open"):
    """Shake hands with `session`, so that the first read need not. Not answered."""

    session: str


class Read(msgspec.Struct, frozen=True, tag="read"):
    """Answered by exactly one `Done`."""

    number: int
    session: str
    spans: list[tuple[int, int, int]]
    """(address at the peer, offset in our bounce memory, bytes)."""


class Done(msgspec.Struct, frozen=True, tag="done"):
    number: int
    error: str | None
    begun: bool
    """False when it failed before the library was asked to write anything."""


Request = Open | Read
Answer = Ready | Refused | Done

MAX_SPANS = 256
MAX_MESSAGE_BYTES = 32 << 10
"""Holds a `Read` of `MAX_SPANS` spans; a dozen of them fit a Unix socket's default buffer."""
