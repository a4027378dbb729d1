"""Who of a replica is told what: each event of the inbox goes to the half, or the halves, that it concerns.

Lifecycle: the engine thread owns it and is the only one that calls it.
"""

from __future__ import annotations

import logging

from cluster.engine_events import Call, Event, LinkLost, LinkUp, Received
from cluster.grammar_gate import GrammarGate, GrammarReady, Opening
from cluster.outbox import Outbox
from decode.half import DecodeHalf
from engine.engine import Engine
from prefill.half import PrefillHalf
from protocol.codec import AnyMessage
from protocol.control import CacheFlushed, FlushCache
from protocol.handshake import LinkRole
from protocol.rooms import (
    Abort,
    Closed,
    Delivered,
    Handoff,
    Join,
    Offer,
    OpenDecode,
    OpenGenerate,
    OpenPrefill,
    Reservation,
    Room,
)
from transfer.fetcher import FetchResult

log = logging.getLogger(__name__)


class EventHandler:
    """`routers` are the links of those that are connected."""

    def __init__(
        self, *, engine: Engine, outbox: Outbox, prefill: PrefillHalf, decode: DecodeHalf, gate: GrammarGate
    ) -> None:
        self._engine = engine
        self._outbox = outbox
        self._prefill = prefill
        self._decode = decode
        self._gate = gate
        self._decode_peers: set[str] = set()
        self.routers: set[str] = set()

    def handle(self, event: Event) -> None:
        match event:
            case Received(link_id, message):
                self._receive(link_id, message)
            case FetchResult():
                self._decode.fetched(event)
            case LinkUp(link_id, role):
                (self.routers if role is LinkRole.ROUTER else self._decode_peers).add(link_id)
            case LinkLost(link_id):
                self.routers.discard(link_id)
                self._decode_peers.discard(link_id)
                self._prefill.link_lost(link_id)
                self._decode.link_lost(link_id)
                self._gate.link_lost(link_id)
            case GrammarReady():
                self._open(self._gate.ready(event))
            case Call(run):
                run()

    def _receive(self, link_id: str, message: AnyMessage) -> None:
        match message:
            case OpenPrefill() | OpenDecode() | OpenGenerate() if message.job.sampling.grammar is not None:
                self._open(self._gate.hold(link_id, message))
            case OpenPrefill() | Join() | Reservation() | Delivered():
                self._prefill.handle(link_id, message)
            case OpenDecode() | OpenGenerate() | Offer() | Handoff():
                self._decode.handle(link_id, message)
            case Abort() | Closed():
                self._gate.aborted(message.room)
                for half in self._halves_of(link_id, message.room):
                    half.handle(link_id, message)
            case FlushCache(number):
                self._outbox.send(link_id, self._flushed(number))
            case _:
                log.warning("%s sent %s, which no replica takes", link_id, type(message).__name__)

    def _flushed(self, number: int) -> CacheFlushed:
        """Drop the prefix cache, unless a room may be using it."""
        rooms = len(self._prefill.rooms) + len(self._decode.rooms)
        return CacheFlushed(number, 0 if rooms else self._engine.flush_cache(), rooms)

    def _open(self, opened: tuple[str, Opening] | None) -> None:
        """An open whose grammar is there, if it is."""
        match opened:
            case (link_id, OpenPrefill() as opening):
                self._prefill.handle(link_id, opening)
            case (link_id, OpenDecode() | OpenGenerate() as opening):
                self._decode.handle(link_id, opening)

    def _halves_of(self, link_id: str, room: Room) -> list[PrefillHalf | DecodeHalf]:
        """Decode peers speak to our prefill half, prefill peers to our decode half, a router to the one it opened. An
        abort that comes before its open does not say which that would be, so both refuse it."""
        if link_id in self._decode_peers:
            return [self._prefill]
        if link_id not in self.routers:
            return [self._decode]
        if self._prefill.knows(room):
            return [self._prefill]
        return [self._decode] if self._decode.knows(room) else [self._decode, self._prefill]
