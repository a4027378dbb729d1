"""The halves of one epoch's room: which replicas hold them, what they were charged, and how they are told.

A half is open from `open` until `close` (it ended by itself, or its part is done) or `abort` (it is told to end).
"""

from __future__ import annotations

from collections.abc import Sequence

from protocol.rooms import Abort, AbortReason, Job, OpenDecode, OpenGenerate, OpenPrefill, Room
from router.metrics import RouterMetrics
from router.pairing import Route
from router.replica_view import Charge, ReplicaView


class HalfRooms:
    """At most one epoch's halves at a time."""

    def __init__(self, *, chain: Sequence[int], reused: Sequence[int], metrics: RouterMetrics) -> None:
        """`chain` is the prompt's `prefix_chain`, `reused` the part of it that whoever computes it may have cached."""
        self.prefill: ReplicaView | None = None
        self.decode: ReplicaView | None = None
        self._room = Room("", -1)
        self._chain = chain
        self._reused = reused
        self._metrics = metrics

    @property
    def views(self) -> list[ReplicaView]:
        """The replicas on which a half may still be open."""
        return [view for view in (self.prefill, self.decode) if view is not None]

    def open(self, room: Room, route: Route, job: Job, *, ttl_ms: int) -> None:
        """Charge the replicas of `route` and send them their halves, both at once."""
        assert not self.views, "the last epoch's halves are still open"
        self._room = room
        prefill, decode = self.prefill, self.decode = route.prefill, route.decode
        self._charge(route, len(job.prompt) + len(job.logged))
        if prefill is None:
            assert decode is not None
            decode.send(OpenGenerate(room, job, ttl_ms))
            return
        prefill.send(OpenPrefill(room, job, ttl_ms, decode.address if decode is not None else None))
        # Sending can find the link broken, and then these halves have been given up already.
        if decode is not None and self._room == room and self.decode is decode:
            page_size = prefill.member.page_size
            decode.send(OpenDecode(room, job, ttl_ms, prefill.address, prefill_page_size=page_size))

    def prompt_computed(self) -> None:
        """The first token is there: no prompt of this room waits any more."""
        for view in self.views:
            view.prompt_computed(self._room.request_id)

    def close(self, view: ReplicaView) -> None:
        """That replica's half is over."""
        view.release(self._room.request_id)
        if view is self.prefill:
            self.prefill = None
        if view is self.decode:
            self.decode = None

    def close_all(self) -> None:
        for view in self.views:
            self.close(view)

    def abort(self, reason: AbortReason) -> None:
        """End every half that is still open."""
        for view in self.views:
            self.close(view)
            self._metrics.aborts.add(label=reason.value)
            view.send(Abort(self._room, reason))

    def _charge(self, route: Route, tokens: int) -> None:
        computing = route.prefill or route.decode
        for view in (route.prefill, route.decode):
            if view is None:
                continue
            missing = tokens - view.prefixes.matched_tokens(self._reused) if view is computing else 0
            view.charge(self._room.request_id, Charge(missing, tokens))
            view.prefixes.record(self._chain)
