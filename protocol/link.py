"""A link: one persistent, authenticated, multiplexed connection between two processes of the cluster.

Lifecycle: the handshake of `endpoints.py` runs first. From then on both ends send messages whenever they like, one
frame each, in order. Pings keep a silent link alive; a link that hears nothing for `silence_s`, gets a malformed frame,
or whose peer reads too slowly to keep the send buffer under its bound, is closed. Its end is reported exactly once by
`on_lost`.

Everything here runs on one event loop. `send` never blocks and never raises.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, cast

from protocol.codec import MAX_FRAME_BYTES, AnyMessage, FrameReader, ProtocolError, encode_frame
from protocol.handshake import Challenge, Hello, LinkRole, Ping, Pong, RegionTicket, Welcome
from protocol.rooms import Message

_HANDSHAKE_FRAME_BYTES = 16 << 10


class LinkError(ConnectionError):
    """A link could not be made: unreachable, not authenticated, another version, or another life of the peer."""


@dataclass(frozen=True, kw_only=True)
class LinkTimings:
    """Seconds; the defaults find a stopped peer within five and a closed one at once."""

    handshake_s: float = 5.0
    ping_s: float = 1.0
    silence_s: float = 5.0


class Handshake(Protocol):
    """One side of the authentication; `receive` answers True when the link is established by that message."""

    def start(self, link: Link) -> None: ...

    def receive(self, link: Link, message: AnyMessage) -> bool: ...


UpHandler = Callable[["Link"], None]
MessageHandler = Callable[["Link", AnyMessage], None]
LostHandler = Callable[["Link", str], None]


class Link(asyncio.Protocol):
    """One end of a connection. Use `LinkServer` or `connect` to get one that is authenticated."""

    def __init__(
        self,
        *,
        handshake: Handshake,
        on_up: UpHandler,
        on_message: MessageHandler,
        on_lost: LostHandler,
        timings: LinkTimings,
        max_buffered_bytes: int = 256 << 20,
    ) -> None:
        self.peer_id = ""
        self.boot = 0
        self.role = LinkRole.REPLICA
        self.region: RegionTicket | None = None
        """The listener's KV pool, as its `Welcome` said; None on the listener's own side."""
        self._handshake = handshake
        self._on_up = on_up
        self._on_message = on_message
        self._on_lost = on_lost
        self._timings = timings
        self._max_buffered_bytes = max_buffered_bytes
        self._reader = FrameReader(max_frame_bytes=_HANDSHAKE_FRAME_BYTES)
        self._transport: asyncio.Transport | None = None
        self._established = False
        self._lost = False
        self._heard_at = 0.0
        self._pings = 0
        self._timer: asyncio.TimerHandle | None = None

    @property
    def is_open(self) -> bool:
        return self._established and not self._lost

    def send(self, message: Message) -> None:
        """Queue one message; dropped silently once the link is lost, since `on_lost` then tells."""
        transport = self._transport
        if transport is None or self._lost:
            return
        try:
            transport.write(encode_frame(message))
        except ProtocolError as error:
            self.fail(str(error))
            return
        if transport.get_write_buffer_size() > self._max_buffered_bytes:
            self.fail(f"the peer left more than {self._max_buffered_bytes} bytes unread")

    def close(self) -> None:
        """Send what is queued, then end the link; `on_lost` follows."""
        if self._transport is not None and not self._transport.is_closing():
            self._transport.close()
        self._report_lost("closed here")

    def fail(self, why: str) -> None:
        """End the link at once, dropping what is queued."""
        if self._transport is not None:
            self._transport.abort()
        self._report_lost(why)

    # ---- asyncio.Protocol ---------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)  # uvloop's has its methods but is no instance of it
        raw = transport.get_extra_info("socket")
        if raw is not None and raw.family in (socket.AF_INET, socket.AF_INET6):
            raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        loop = asyncio.get_running_loop()
        self._heard_at = loop.time()
        self._timer = loop.call_later(self._timings.handshake_s, self._handshake_late)
        self._handshake.start(self)

    def data_received(self, data: bytes) -> None:
        self._heard_at = asyncio.get_running_loop().time()
        try:
            for message in self._reader.feed(data):
                if self._lost:
                    return
                self._dispatch(message)
        except (ProtocolError, LinkError) as error:
            self.fail(str(error))

    def connection_lost(self, exc: Exception | None) -> None:
        self._report_lost(f"connection lost: {exc}" if exc else "closed by the peer")

    # ---- inner workings -----------------------------------------------------------------------------------

    def _dispatch(self, message: AnyMessage) -> None:
        if not self._established:
            if self._handshake.receive(self, message):
                self._establish()
                self._on_up(self)
        elif isinstance(message, Ping):
            self.send(Pong(message.sequence))
        elif isinstance(message, Pong):
            pass
        elif isinstance(message, Hello | Challenge | Welcome):
            raise ProtocolError("a handshake message after the handshake")
        else:
            self._on_message(self, message)

    def _establish(self) -> None:
        self._established = True
        self._reader.raise_limit(MAX_FRAME_BYTES)
        if self._timer is not None:
            self._timer.cancel()
        self._schedule_ping()

    def _handshake_late(self) -> None:
        self.fail(f"no handshake within {self._timings.handshake_s} s")

    def _schedule_ping(self) -> None:
        self._timer = asyncio.get_running_loop().call_later(self._timings.ping_s, self._ping)

    def _ping(self) -> None:
        silent = asyncio.get_running_loop().time() - self._heard_at
        if silent > self._timings.silence_s:
            self.fail(f"the peer was silent for {silent:.1f} s")
            return
        self._pings += 1
        self.send(Ping(self._pings))
        if not self._lost:
            self._schedule_ping()

    def _report_lost(self, why: str) -> None:
        if self._lost:
            return
        self._lost = True
        if self._timer is not None:
            self._timer.cancel()
        self._on_lost(self, why)
