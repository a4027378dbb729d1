"""Between routers: a stream moves to the router to which its client has come back."""

from __future__ import annotations

from protocol.rooms import Message


class ClaimStream(Message, frozen=True, tag="claim_stream"):
    """Give this stream up to the sender, if it is that tenant's; a run that still writes it is ended first."""

    token: str
    tenant: str
    router_key: str
    """The sender's, as ids name it."""


class StreamState(Message, frozen=True, tag="stream_state"):
    """The answer to a claim: everything about the stream. The sender has forgotten it."""

    token: str
    tenant: str
    path: str
    body: bytes
    log: bytes
    """Written and read by routers alone."""
    epochs: dict[int, int]
    rooms: str
    restart: int


class NoStream(Message, frozen=True, tag="no_stream"):
    """The answer to a claim of what is not here."""

    token: str
    moved_to: str = ""
    """The key of the router that has it now, as far as is known."""
    over: bool = False
    """It was here, and its time is over."""
    why: str = ""
    """It was here and never was kept, for this reason."""
