"""The decode half of a room: its states, and what each event does in each of them.

The table is the one in docs/protocol.md, as data. `DecodeHalf` carries it out; a move that is not in it is refused
(`IllegalMove`). Every message has a move in every state, so nothing a peer sends can be illegal.

A room that ends while copies may still be writing into its pages goes through DRAINING: the pages are in quarantine
until the transfer layer has acknowledged the end of every copy (DRAINED, which follows at once when there is none).
"""

from __future__ import annotations

import enum

from protocol.endings import Ending
from protocol.rooms import AbortReason, FailureCode
from protocol.transitions import Move, Transitions


class DecodeState(enum.Enum):
    ABSENT = "absent"
    """Never heard of, or heard of so long ago that nothing is left."""
    QUEUED = "queued"
    """Joined with prefill, waits for pages."""
    RECEIVING = "receiving"
    """Has pages for the whole prompt; takes what is offered."""
    RUNNING = "running"
    """In the engine, which generates or, after a preemption, recomputes."""
    DRAINING = "draining"
    """Over, but its pages are in quarantine until its copies have ended."""
    ENDED = "ended"
    """It lived here; only a tombstone is left."""
    BARRED = "barred"
    """Aborted before its open came; a tombstone refuses that open."""
    STALE = "stale"
    """A newer epoch of the request is known."""


class DecodeEvent(enum.Enum):
    OPEN_DECODE = "OpenDecode"
    OPEN_GENERATE = "OpenGenerate"
    OPEN_DRAINING = "an open while draining"
    OPEN_EMPTY = "an open without a prompt"
    OFFER = "Offer"
    HANDOFF = "Handoff"
    BAD_OFFER = "an Offer or Handoff that does not fit the room"
    ABORT = "Abort from the router"
    PEER_ABORT = "Abort from prefill"
    NEVER_OPENED = "Abort NEVER_OPENED from prefill"
    GRANTED = "pages granted"
    REVOKED = "pages revoked"
    FETCHED = "copy ended well"
    FETCH_FAILED = "copy failed, checksum wrong"
    COMPLETE = "all pages and the Handoff are here"
    DRAINED = "no copy is left"
    TOKEN = "token"
    LAST_TOKEN = "last token"
    TOO_LONG = "can never fit"
    GRAMMAR_FAILED = "its grammar cannot be followed"
    ENGINE_FAILED = "engine failed"
    PREFILL_LOST = "prefill link lost"
    ROUTER_LOST = "router link lost"
    DEADLINE = "deadline"
    SUPERSEDED = "newer epoch heard of"


class DecodeAction(enum.Enum):
    START = "start"
    """Make the room."""
    JOIN = "Join"
    """Link to prefill, and wait for pages."""
    ADD = "into the engine"
    REFUSE = "RoomFailed REFUSED"
    COUNT_DUPLICATE = "count duplicate"
    COUNT_STALE = "count stale"
    CLOSED = "Closed"
    """Acknowledge the abort to whoever sent it."""
    OWE_CLOSED = "Closed when drained"
    NOTE_OFFER = "note offer"
    NOTE_HANDOFF = "note handoff"
    NOTE_PAGES = "note pages"
    RESERVED = "Reservation"
    FETCH = "fetch"
    """Start copying what is offered and not here."""
    UNRESERVE = "give pages back"
    """And wait for others."""
    DELIVERED = "Delivered"
    ADMIT = "admit"
    EMIT = "token to router"
    """The last one after the room's phases, where they were asked for."""
    QUARANTINE = "quarantine pages"
    """And ask the copies to end."""
    FREE = "free pages"
    ANSWER_CLOSED = "Closed to all that are owed one"
    RELEASE = "release pages"
    BURY = "tombstone"
    """Until the deadline."""
    BAR = "tombstone that refuses the open"
    FORGET = "forget"
    """Nothing but the tombstone is left."""
    FAIL = "RoomFailed"
    """After the phases so far, where they were asked for."""
    TELL_PREFILL = "Abort to prefill"


_S, _E, _A = DecodeState, DecodeEvent, DecodeAction
_DecodeMove = Move[DecodeState, DecodeAction]


def _to(state: DecodeState, *actions: DecodeAction) -> _DecodeMove:
    return Move(actions, state)


def _opens(state: DecodeState, *actions: DecodeAction) -> dict[DecodeEvent, _DecodeMove]:
    return {_E.OPEN_DECODE: _to(state, *actions), _E.OPEN_GENERATE: _to(state, *actions)}


def _from_peer(state: DecodeState, *actions: DecodeAction) -> dict[DecodeEvent, _DecodeMove]:
    """Messages of prefill that come when they mean nothing."""
    return {
        _E.OFFER: _to(state, _A.COUNT_STALE),
        _E.HANDOFF: _to(state, _A.COUNT_STALE),
        _E.PEER_ABORT: _to(state, *actions),
        _E.NEVER_OPENED: _to(state, *actions),
    }


def _endings(state: DecodeState, *giving_up: DecodeAction, closed: DecodeAction) -> dict[DecodeEvent, _DecodeMove]:
    """What ends a room that has a prefill half."""
    failed = _to(state, _A.BURY, *giving_up, _A.FAIL, _A.TELL_PREFILL)
    return {
        _E.ABORT: _to(state, _A.BURY, *giving_up, closed, _A.TELL_PREFILL),
        _E.PEER_ABORT: _to(state, _A.BURY, *giving_up, closed),
        _E.NEVER_OPENED: _to(state, _A.BURY, *giving_up, closed, _A.FAIL),
        _E.PREFILL_LOST: _to(state, _A.BURY, *giving_up, _A.FAIL),
        _E.ROUTER_LOST: _to(state, _A.BURY, *giving_up, _A.TELL_PREFILL),
        _E.SUPERSEDED: _to(state, _A.BURY, *giving_up, _A.TELL_PREFILL),
        _E.DEADLINE: failed,
        _E.ENGINE_FAILED: failed,
        _E.BAD_OFFER: failed,
    }


_GIVEN_UP = _to(_S.ENDED, _A.BURY, _A.RELEASE, _A.FORGET, _A.FAIL)

DECODE_TABLE: Transitions[DecodeState, DecodeEvent, DecodeAction] = Transitions(
    {
        _S.ABSENT: {
            _E.OPEN_DECODE: _to(_S.QUEUED, _A.START, _A.JOIN),
            _E.OPEN_GENERATE: _to(_S.RUNNING, _A.START, _A.ADD),
            _E.OPEN_DRAINING: _to(_S.ENDED, _A.BURY, _A.FAIL),
            _E.OPEN_EMPTY: _to(_S.ENDED, _A.BURY, _A.FAIL),
            _E.ABORT: _to(_S.BARRED, _A.BAR, _A.CLOSED),
            **_from_peer(_S.ABSENT, _A.COUNT_STALE, _A.CLOSED),
        },
        _S.QUEUED: {
            **_opens(_S.QUEUED, _A.COUNT_DUPLICATE),
            _E.OFFER: _to(_S.QUEUED, _A.NOTE_OFFER),
            _E.HANDOFF: _to(_S.QUEUED, _A.NOTE_HANDOFF),
            _E.GRANTED: _to(_S.RECEIVING, _A.RESERVED, _A.FETCH),
            _E.TOO_LONG: _to(_S.ENDED, _A.BURY, _A.FORGET, _A.FAIL, _A.TELL_PREFILL),
            **_endings(_S.ENDED, _A.FORGET, closed=_A.CLOSED),
        },
        _S.RECEIVING: {
            **_opens(_S.RECEIVING, _A.COUNT_DUPLICATE),
            _E.OFFER: _to(_S.RECEIVING, _A.NOTE_OFFER, _A.FETCH),
            _E.HANDOFF: _to(_S.RECEIVING, _A.NOTE_HANDOFF),
            _E.FETCHED: _to(_S.RECEIVING, _A.NOTE_PAGES),
            _E.FETCH_FAILED: _to(_S.DRAINING, _A.BURY, _A.QUARANTINE, _A.FAIL, _A.TELL_PREFILL),
            _E.COMPLETE: _to(_S.RUNNING, _A.DELIVERED, _A.ADMIT),
            _E.REVOKED: _to(_S.QUEUED, _A.UNRESERVE),
            **_endings(_S.DRAINING, _A.QUARANTINE, closed=_A.OWE_CLOSED),
        },
        _S.RUNNING: {
            **_opens(_S.RUNNING, _A.COUNT_DUPLICATE),
            **_from_peer(_S.RUNNING, _A.COUNT_STALE),
            _E.TOKEN: _to(_S.RUNNING, _A.EMIT),
            _E.LAST_TOKEN: _to(_S.ENDED, _A.BURY, _A.EMIT, _A.FORGET),
            _E.ABORT: _to(_S.ENDED, _A.BURY, _A.RELEASE, _A.FORGET, _A.CLOSED),
            _E.ROUTER_LOST: _to(_S.ENDED, _A.BURY, _A.RELEASE, _A.FORGET),
            _E.SUPERSEDED: _to(_S.ENDED, _A.BURY, _A.RELEASE, _A.FORGET),
            _E.DEADLINE: _GIVEN_UP,
            _E.TOO_LONG: _GIVEN_UP,
            _E.GRAMMAR_FAILED: _GIVEN_UP,
            _E.ENGINE_FAILED: _GIVEN_UP,
        },
        _S.DRAINING: {
            **_opens(_S.DRAINING, _A.COUNT_DUPLICATE),
            **_from_peer(_S.DRAINING, _A.OWE_CLOSED),
            _E.ABORT: _to(_S.DRAINING, _A.OWE_CLOSED),
            _E.FETCHED: _to(_S.DRAINING),
            _E.FETCH_FAILED: _to(_S.DRAINING),
            _E.ROUTER_LOST: _to(_S.DRAINING),
            _E.PREFILL_LOST: _to(_S.DRAINING),
            _E.ENGINE_FAILED: _to(_S.DRAINING),
            _E.DRAINED: _to(_S.ENDED, _A.FREE, _A.FORGET, _A.ANSWER_CLOSED),
        },
        _S.ENDED: {
            **_opens(_S.ENDED, _A.COUNT_DUPLICATE),
            **_from_peer(_S.ENDED, _A.COUNT_STALE, _A.CLOSED),
            _E.ABORT: _to(_S.ENDED, _A.CLOSED),
        },
        _S.BARRED: {
            **_opens(_S.BARRED, _A.REFUSE),
            **_from_peer(_S.BARRED, _A.COUNT_STALE, _A.CLOSED),
            _E.ABORT: _to(_S.BARRED, _A.CLOSED),
        },
        _S.STALE: {
            **_opens(_S.STALE, _A.COUNT_STALE, _A.REFUSE),
            **_from_peer(_S.STALE, _A.COUNT_STALE, _A.CLOSED),
            _E.ABORT: _to(_S.STALE, _A.COUNT_STALE, _A.CLOSED),
        },
    }
)


DECODE_ENDINGS: dict[DecodeEvent, Ending] = {
    _E.OPEN_DRAINING: Ending(FailureCode.DRAINING, AbortReason.DRAINING),
    _E.OPEN_EMPTY: Ending(FailureCode.INTERNAL, AbortReason.PEER_FAILED),
    _E.BAD_OFFER: Ending(FailureCode.TRANSFER_FAILED, AbortReason.TRANSFER_FAILED),
    _E.FETCH_FAILED: Ending(FailureCode.TRANSFER_FAILED, AbortReason.TRANSFER_FAILED),
    _E.TOO_LONG: Ending(FailureCode.TOO_LONG, AbortReason.PEER_FAILED),
    _E.GRAMMAR_FAILED: Ending(FailureCode.BAD_GRAMMAR, AbortReason.PEER_FAILED),
    _E.ENGINE_FAILED: Ending(FailureCode.INTERNAL, AbortReason.PEER_FAILED),
    _E.PREFILL_LOST: Ending(FailureCode.PEER_LOST, AbortReason.PEER_FAILED),
    _E.NEVER_OPENED: Ending(FailureCode.PEER_LOST, AbortReason.NEVER_OPENED),
    _E.ROUTER_LOST: Ending(FailureCode.PEER_LOST, AbortReason.CLIENT_GONE),
    _E.DEADLINE: Ending(FailureCode.DEADLINE, AbortReason.DEADLINE),
    _E.SUPERSEDED: Ending(FailureCode.REFUSED, AbortReason.SUPERSEDED),
}
"""`ABORT` and `PEER_ABORT` bring their own reason; a room that finished has none."""
