"""The prefill half of a room: its states, and what each event does in each of them.

The table is the one in docs/protocol.md, as data. `PrefillHalf` carries it out; a move that is not in it is refused
(`IllegalMove`). Every message has a move in every state, so nothing a peer sends can be illegal.
"""

from __future__ import annotations

import enum

from protocol.endings import Ending
from protocol.rooms import AbortReason, FailureCode
from protocol.transitions import Move, Transitions


class PrefillState(enum.Enum):
    ABSENT = "absent"
    """Never heard of, or heard of so long ago that nothing is left."""
    WAITING = "waiting"
    """Open, but not in the engine: it would compute too far ahead of its reservation."""
    COMPUTING = "computing"
    """In the engine."""
    RETAINED = "retained"
    """First token sampled; the pages stay for decode, under a lease."""
    ENDED = "ended"
    """It lived here; only a tombstone is left."""
    BARRED = "barred"
    """Aborted before its open came; a tombstone refuses that open."""
    STALE = "stale"
    """A newer epoch of the request is known."""


class PrefillEvent(enum.Enum):
    OPEN = "OpenPrefill"
    OPEN_DRAINING = "OpenPrefill while draining"
    OPEN_EMPTY = "OpenPrefill without a prompt"
    JOIN = "Join"
    RESERVATION = "Reservation"
    DELIVERED = "Delivered"
    ABORT = "Abort from the router"
    PEER_ABORT = "Abort from decode"
    PLACED = "let into the engine"
    CHUNK = "chunk computed"
    FIRST_TOKEN = "first token"
    LAST_TOKEN = "first token ends the sequence"
    ORPHAN_TOKEN = "first token goes on, but no decode half exists"
    TOO_LONG = "can never fit"
    GRAMMAR_FAILED = "its grammar cannot be followed"
    ENGINE_FAILED = "engine failed"
    DECODE_LOST = "decode link lost"
    ROUTER_LOST = "router link lost"
    DEADLINE = "deadline"
    LEASE_OVER = "lease over"
    SUPERSEDED = "newer epoch heard of"


class PrefillAction(enum.Enum):
    START = "start"
    """Make the room, take what is parked for it."""
    PARK = "park"
    REFUSE = "RoomFailed REFUSED"
    COUNT_DUPLICATE = "count duplicate"
    COUNT_STALE = "count stale"
    CLOSED = "Closed"
    """Acknowledge the abort to whoever sent it."""
    ANSWER_ABORT = "answer Abort"
    """Tell a `Join` that came too late why the room ended."""
    BIND = "bind link"
    """Offers and the handoff go to the link that the `Join` came over."""
    NOTE_RESERVED = "note reservation"
    """Skip the pages decode holds, and no longer count the room as ahead of its reservation."""
    OFFER = "offer"
    """Offer the computed pages that are not offered yet, when joined: at the end of this pass."""
    EMIT = "token to router"
    """After the phases up to it, where they were asked for."""
    HANDOFF = "Handoff"
    """When joined."""
    START_LEASE = "start lease"
    RELEASE = "release pages"
    BURY = "tombstone"
    """Forget the room, leave a tombstone until its deadline, answer what is parked for it."""
    BAR = "tombstone that refuses the open"
    """The same for a room whose open has not come."""
    FAIL = "RoomFailed"
    """After the phases not told yet, where they were asked for."""
    TELL_DECODE = "Abort to decode"
    """When joined; else the tombstone tells."""


_S, _E, _A = PrefillState, PrefillEvent, PrefillAction
_PrefillMove = Move[PrefillState, PrefillAction]


def _to(state: PrefillState, *actions: PrefillAction) -> _PrefillMove:
    return Move(actions, state)


_FAILED = _to(_S.ENDED, _A.BURY, _A.RELEASE, _A.FAIL, _A.TELL_DECODE)
_LIVE: dict[PrefillEvent, _PrefillMove] = {
    _E.ABORT: _to(_S.ENDED, _A.BURY, _A.RELEASE, _A.CLOSED, _A.TELL_DECODE),
    _E.PEER_ABORT: _to(_S.ENDED, _A.BURY, _A.RELEASE, _A.CLOSED),
    _E.DECODE_LOST: _to(_S.ENDED, _A.BURY, _A.RELEASE, _A.FAIL),
    _E.ROUTER_LOST: _to(_S.ENDED, _A.BURY, _A.RELEASE, _A.TELL_DECODE),
    _E.SUPERSEDED: _to(_S.ENDED, _A.BURY, _A.RELEASE, _A.TELL_DECODE),
    _E.DEADLINE: _FAILED,
    _E.ENGINE_FAILED: _FAILED,
}
"""What ends a room in whatever state it lives."""


def _over(state: PrefillState, *first: PrefillAction) -> dict[PrefillEvent, _PrefillMove]:
    """What messages do to a room that is no more."""
    return {
        _E.JOIN: _to(state, *first, _A.ANSWER_ABORT),
        _E.RESERVATION: _to(state, _A.COUNT_STALE),
        _E.DELIVERED: _to(state, _A.COUNT_STALE),
        _E.ABORT: _to(state, *first, _A.CLOSED),
        _E.PEER_ABORT: _to(state, *first, _A.CLOSED),
    }


PREFILL_TABLE: Transitions[PrefillState, PrefillEvent, PrefillAction] = Transitions(
    {
        _S.ABSENT: {
            _E.OPEN: _to(_S.WAITING, _A.START),
            _E.OPEN_DRAINING: _to(_S.ENDED, _A.BURY, _A.FAIL),
            _E.OPEN_EMPTY: _to(_S.ENDED, _A.BURY, _A.FAIL),
            _E.JOIN: _to(_S.ABSENT, _A.PARK),
            _E.RESERVATION: _to(_S.ABSENT, _A.PARK),
            _E.DELIVERED: _to(_S.ABSENT, _A.COUNT_STALE),
            _E.ABORT: _to(_S.BARRED, _A.BAR, _A.CLOSED),
            _E.PEER_ABORT: _to(_S.BARRED, _A.BAR, _A.CLOSED),
        },
        _S.WAITING: {
            _E.OPEN: _to(_S.WAITING, _A.COUNT_DUPLICATE),
            _E.JOIN: _to(_S.WAITING, _A.BIND),
            _E.RESERVATION: _to(_S.WAITING, _A.NOTE_RESERVED),
            _E.DELIVERED: _to(_S.WAITING, _A.COUNT_STALE),
            _E.PLACED: _to(_S.COMPUTING),
            _E.TOO_LONG: _FAILED,
            **_LIVE,
        },
        _S.COMPUTING: {
            _E.OPEN: _to(_S.COMPUTING, _A.COUNT_DUPLICATE),
            _E.JOIN: _to(_S.COMPUTING, _A.BIND, _A.OFFER),
            _E.RESERVATION: _to(_S.COMPUTING, _A.NOTE_RESERVED, _A.OFFER),
            _E.DELIVERED: _to(_S.COMPUTING, _A.COUNT_STALE),
            _E.CHUNK: _to(_S.COMPUTING, _A.OFFER),
            _E.FIRST_TOKEN: _to(_S.RETAINED, _A.EMIT, _A.HANDOFF, _A.OFFER, _A.START_LEASE),
            _E.LAST_TOKEN: _to(_S.ENDED, _A.BURY, _A.EMIT, _A.TELL_DECODE),
            _E.ORPHAN_TOKEN: _to(_S.ENDED, _A.BURY, _A.EMIT, _A.RELEASE, _A.FAIL),
            _E.GRAMMAR_FAILED: _FAILED,
            **_LIVE,
        },
        _S.RETAINED: {
            _E.OPEN: _to(_S.RETAINED, _A.COUNT_DUPLICATE),
            _E.JOIN: _to(_S.RETAINED, _A.BIND, _A.HANDOFF, _A.OFFER),
            _E.RESERVATION: _to(_S.RETAINED, _A.NOTE_RESERVED, _A.OFFER, _A.START_LEASE),
            _E.DELIVERED: _to(_S.ENDED, _A.BURY, _A.RELEASE),
            _E.LEASE_OVER: _FAILED,
            **_LIVE,
        },
        _S.ENDED: {
            _E.OPEN: _to(_S.ENDED, _A.COUNT_DUPLICATE),
            **_over(_S.ENDED),
        },
        _S.BARRED: {
            _E.OPEN: _to(_S.BARRED, _A.REFUSE),
            **_over(_S.BARRED),
        },
        _S.STALE: {
            _E.OPEN: _to(_S.STALE, _A.COUNT_STALE, _A.REFUSE),
            **_over(_S.STALE, _A.COUNT_STALE),
        },
    }
)


PREFILL_ENDINGS: dict[PrefillEvent, Ending] = {
    _E.OPEN_DRAINING: Ending(FailureCode.DRAINING, AbortReason.DRAINING),
    _E.OPEN_EMPTY: Ending(FailureCode.INTERNAL, AbortReason.PEER_FAILED),
    _E.TOO_LONG: Ending(FailureCode.TOO_LONG, AbortReason.PEER_FAILED),
    _E.GRAMMAR_FAILED: Ending(FailureCode.BAD_GRAMMAR, AbortReason.PEER_FAILED),
    _E.ENGINE_FAILED: Ending(FailureCode.INTERNAL, AbortReason.PEER_FAILED),
    _E.ORPHAN_TOKEN: Ending(FailureCode.INTERNAL, AbortReason.PEER_FAILED),
    _E.DECODE_LOST: Ending(FailureCode.PEER_LOST, AbortReason.PEER_FAILED),
    _E.ROUTER_LOST: Ending(FailureCode.PEER_LOST, AbortReason.CLIENT_GONE),
    _E.DEADLINE: Ending(FailureCode.DEADLINE, AbortReason.DEADLINE),
    _E.LEASE_OVER: Ending(FailureCode.LEASE_EXPIRED, AbortReason.PEER_FAILED),
    _E.SUPERSEDED: Ending(FailureCode.REFUSED, AbortReason.SUPERSEDED),
    _E.LAST_TOKEN: Ending(FailureCode.INTERNAL, AbortReason.FINISHED_EARLY),
}
"""`ABORT` and `PEER_ABORT` bring their own reason; `DELIVERED` needs none."""
