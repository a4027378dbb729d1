"""A link: one persistent, authenticated, multiplexed connection between two processes of the cluster.

Lifecycle: the handshake of `endpoints.py` runs first. From then on both ends send messages whenever they like, one
frame each, in order, tagged under keys of this link alone. Pings keep a silent link alive; a link that hears nothing
for `silence_s`, gets a frame that is malformed or not the peer's next one, or whose peer reads too slowly to keep the
send buffer under its bound, is closed. Its end is reported exactly once by `on_lost`.

Silence is counted in our own pings: a process that was stopped, or starved, heard nothing meanwhile because it did not
listen, which is no fault of its peers.

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
from protocol.sealing import FrameSeal, LinkSeals

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
    """One side of the authentication; `receive` answers with the link's seals when that message establishes it."""

    def start(self, link: Link) -> None: ...

    def receive(self, link: Link, message: AnyMessage) -> LinkSeals | None: ...


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
        self._seal: FrameSeal | None = None
        """Of what is sent, once the link is established."""
        self._pings = 0
        self._unanswered = 0
        """Pings since the peer was last heard, whatever it said."""
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
            transport.write(encode_frame(message, self._seal))
        except ProtocolError as error:
            self.fail(str(error))
            return
        if transport.get_write_buffer_size() > self._max_buffered_bytes:
            self.fail(f"the peer left more than {self._max_buffered_bytes} bytes unread")

    def close(self) -> None:
        """Send what is queued, within `silence_s`, then end the link; `on_lost` follows."""
        self._report_lost("closed here")
        transport = self._transport
        if transport is not None and not transport.is_closing():
            transport.close()
            self._timer = asyncio.get_running_loop().call_later(self._timings.silence_s, transport.abort)

    def fail(self, why: str) -> None:
        """End the link at once, dropping what is queued."""
        if self._transport is not None:
            self._transport.abort()
        self._report_lost(why)

    # ---- asyncio.Protocol ---------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)  # uvloop's has its methods but is no instance of it
        if self._lost:  # it had to go before it began
            self._transport.abort()
            return
        raw = transport.get_extra_info("socket")
        if raw is not None and raw.family in (socket.AF_INET, socket.AF_INET6):
            raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._timer = asyncio.get_running_loop().call_later(self._timings.handshake_s, self._handshake_late)
        self._handshake.start(self)

    def data_received(self, data: bytes) -> None:
        self._unanswered = 0
        try:
            for message in self._reader.feed(data):
                if self._lost:
                    return
                self._dispatch(message)
        except (ProtocolError, LinkError) as error:
            self.fail(str(error))

    def connection_lost(self, exc: Exception | None) -> None:
        self._report_lost(f"connection lost: {exc}" if exc else "closed by the peer")
        self._cancel_timer()

    # ---- inner workings -----------------------------------------------------------------------------------

    def _dispatch(self, message: AnyMessage) -> None:
        if not self._established:
            seals = self._handshake.receive(self, message)
            if seals is not None:
                self._establish(seals)
                self._on_up(self)
        elif isinstance(message, Ping):
            self.send(Pong(message.sequence))
        elif isinstance(message, Pong):
            pass
        elif isinstance(message, Hello | Challenge | Welcome):
            raise ProtocolError("a handshake message after the handshake")
        else:
            self._on_message(self, message)

    def _establish(self, seals: LinkSeals) -> None:
        self._established = True
        self._seal = seals.outgoing
        self._reader.trust(seals.incoming, max_frame_bytes=MAX_FRAME_BYTES)
        self._cancel_timer()
        self._schedule_ping()

    def _handshake_late(self) -> None:
        self.fail(f"no handshake within {self._timings.handshake_s} s")

    def _schedule_ping(self) -> None:
        self._timer = asyncio.get_running_loop().call_later(self._timings.ping_s, self._ping)

    def _ping(self) -> None:
        silent_s = self._unanswered * self._timings.ping_s
        if silent_s >= self._timings.silence_s:
            self.fail(f"the peer was silent for {silent_s:.1f} s")
            return
        self._pings += 1
        self._unanswered += 1
        self.send(Ping(self._pings))
        if not self._lost:
            self._schedule_ping()

    def _report_lost(self, why: str) -> None:
        if self._lost:
            return
        self._lost = True
        self._cancel_timer()
        self._on_lost(self, why)

    def _cancel_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
