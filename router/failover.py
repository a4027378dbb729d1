"""What the failures of a sequence so far say about where its next epoch should go.

Nothing here is a verdict on a replica for others: one sequence avoids those that failed it, while others are still up.
"""

from __future__ import annotations

from protocol.rooms import AbortReason, FailureCode
from router.pairing import Route, RouteRequest
from router.replica_view import ReplicaKey, ReplicaView

_NOT_ITS_FAULT = frozenset({FailureCode.LEASE_EXPIRED, FailureCode.REFUSED})
"""A lease says that decode had no space in time; a refusal, that the other half had failed already."""


class Failover:
    """Remembers one sequence's failures."""

    def __init__(self) -> None:
        self._avoid: set[ReplicaKey] = set()
        self._prefer: ReplicaKey | None = None
        self._whole = False

    def half_failed(self, code: FailureCode, view: ReplicaView, other: ReplicaView | None) -> AbortReason:
        """`view` gave its half up with a retryable `code`; returns what to tell the `other` half."""
        if code is FailureCode.TRANSFER_FAILED:
            # Decode says so, and what of the prompt arrived or was cached there makes it the best place to recompute.
            self._prefer, self._whole = view.key, True
            return AbortReason.TRANSFER_FAILED
        if code is FailureCode.PEER_LOST:
            if other is not None:
                self._avoid.add(other.key)
        elif code not in _NOT_ITS_FAULT:
            self._avoid.add(view.key)
        return AbortReason.PEER_FAILED

    def link_lost(self, view: ReplicaView) -> None:
        self._avoid.add(view.key)

    def request(self, *, prompt_tokens: int, logged: int, chain: list[int], single_token: bool) -> RouteRequest:
        """What to ask of pairing for the next epoch; with tokens logged, one replica goes on with all of it."""
        return RouteRequest(
            num_tokens=prompt_tokens + logged,
            chain=chain,
            single_token=single_token,
            whole=self._whole or logged > 0,
            avoid=self._avoid,
            prefer=self._prefer,
        )

    def is_second_try(self, route: Route) -> bool:
        """Whether the route uses a replica that failed this sequence, for want of another."""
        return any(view is not None and view.key in self._avoid for view in (route.prefill, route.decode))
