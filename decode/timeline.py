"""Where the time of one decode half goes, for the router of a request that asked. Made with its room, gone with it.

A half that receives its prompt has queue, one pair of phases for each copy, admit, first decode and decode; one that
generates from the start has queue, compute and decode.
"""

from __future__ import annotations

from protocol.phases import Phase, PhaseLog, PhaseName
from transfer.jobs import FetchResult


class DecodeTimeline:
    """Turns what happens to the half into phases. All times are readings of the half's clock, the fetcher's too."""

    def __init__(self, log: PhaseLog, *, opened_at: float, receives: bool) -> None:
        self._log = log
        self._receives = receives
        self._queued_at = opened_at
        self._copies: dict[int, float] = {}
        """When each running copy was asked for."""
        self._ready_at = opened_at
        """When the last thing came that admission needs."""
        self._compute_began: float | None = None
        self._first_token_at: float | None = None

    def granted(self, now: float) -> None:
        """Pages are there."""
        self._log.add(PhaseName.QUEUE, self._queued_at, now)
        self._ready_at = max(self._ready_at, now)

    def revoked(self, now: float) -> None:
        """Pages were taken back: it waits again."""
        self._queued_at = now

    def copy_begun(self, number: int, now: float) -> None:
        """Copy `number` was asked for."""
        self._copies[number] = now

    def copy_ended(self, number: int, result: FetchResult) -> None:
        """Its last byte was written before this was heard of, which is why its own times are used."""
        asked_at = self._copies.pop(number)
        began = asked_at + result.queued_seconds
        ended = began + result.seconds
        peer = result.peer.replica_id
        error = "" if result.ok else result.error or "failed"
        self._log.add(PhaseName.TRANSFER_QUEUE, asked_at, began, transport=result.transport, peer=peer)
        self._log.add(
            PhaseName.TRANSFER,
            began,
            ended,
            transport=result.transport,
            peer=peer,
            num_bytes=result.bytes if result.ok else 0,
            error=error,
        )
        self._ready_at = max(self._ready_at, ended)

    def handed_over(self, now: float) -> None:
        """The handoff is here."""
        self._ready_at = max(self._ready_at, now)

    def stepped(self, began: float) -> None:
        """A step that began then computed part of the prompt of a half that generates from the start."""
        if self._compute_began is None:
            self._compute_began = began
            self._log.add(PhaseName.QUEUE, self._queued_at, began)

    def sampled(self, step_began: float, now: float, *, last: bool) -> None:
        """A token is there."""
        if self._first_token_at is None:
            self._first_token_at = now
            if self._receives:
                self._log.add(PhaseName.ADMIT, self._ready_at, step_began)
                self._log.add(PhaseName.FIRST_DECODE, step_began, now)
            else:
                self.stepped(step_began)
                assert self._compute_began is not None
                self._log.add(PhaseName.COMPUTE, self._compute_began, now)
        elif last:
            self._log.add(PhaseName.DECODE, self._first_token_at, now)

    def take(self) -> list[Phase]:
        """What the router has not been told yet."""
        return self._log.take()
