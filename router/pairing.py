"""Which replicas serve a request: one call picks both halves, from load, cached prefixes and the way between them.

Costs are in prompt tokens to be computed, the thing that takes most of the time to a first token: work waiting at the
prefill replica, the part of this prompt it does not hold; KV in use at the decode replica and what this prompt adds,
which slows every step a little; and the transfer between hosts.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from protocol.membership import ReplicaRole
from router.replica_view import ReplicaKey, ReplicaView

_HELD_COST = 0.1
"""A token held in a decode pool, relative to a token computed: it is read at each step, not multiplied through."""
_REMOTE_COST = 0.1
"""A token's KV moved to another host, relative to a token computed."""


@dataclass(frozen=True, kw_only=True)
class RouteRequest:
    """What pairing knows of a sequence."""

    num_tokens: int
    """Prompt and logged tokens."""
    chain: Sequence[int]
    """`prefix_chain` of the prompt."""
    single_token: bool = False
    """Only one token can come: no decode half is needed."""
    whole: bool = False
    """One replica does both halves (recompute and resume)."""
    avoid: Collection[ReplicaKey] = ()
    """Replicas that failed this sequence; used again only when no other lives."""
    prefer: ReplicaKey | None = None
    """The replica that holds most of it already."""


@dataclass(frozen=True)
class Route:
    """Both: a prefill and a decode half. Only `prefill`: its first token is all. Only `decode`: it does everything."""

    prefill: ReplicaView | None
    decode: ReplicaView | None

    @property
    def is_makeshift(self) -> bool:
        """A replica of one pool does everything."""
        return self.prefill is None and self.decode is not None and self.decode.role is not ReplicaRole.AGGREGATED


class PairingPolicy:
    """Lowest cost first; equal costs go to the replica that has had fewer rooms."""

    def choose(
        self, request: RouteRequest, prefills: Sequence[ReplicaView], decodes: Sequence[ReplicaView]
    ) -> Route | None:
        """The route with the lowest cost among usable replicas, or None when none lives.

        `decodes` holds aggregated replicas too, which take a request whole. When one of the pools is empty, a replica
        of the other one takes it whole: slower than a pair, better than a refusal.
        """
        usable_prefills = [view for view in prefills if view.usable]
        usable_decodes = [view for view in decodes if view.usable]
        if request.avoid:
            good_prefills = [view for view in usable_prefills if view.key not in request.avoid]
            good_decodes = [view for view in usable_decodes if view.key not in request.avoid]
            route = self._choose(request, good_prefills, good_decodes)
            if route is not None:
                return route
        return self._choose(request, usable_prefills, usable_decodes)

    def _choose(
        self, request: RouteRequest, prefills: Sequence[ReplicaView], decodes: Sequence[ReplicaView]
    ) -> Route | None:
        aggregated = [view for view in decodes if view.role is ReplicaRole.AGGREGATED]
        routes = [Route(None, view) for view in aggregated]
        if request.whole:
            routes = [Route(None, view) for view in decodes]
        elif request.single_token:
            routes += [Route(view, None) for view in prefills]
        else:
            partners = [view for view in decodes if view.role is ReplicaRole.DECODE]
            routes += [Route(prefill, decode) for prefill in prefills for decode in partners]
        if not routes:
            routes = [Route(None, view) for view in (*decodes, *prefills)]
        # Once for each replica: a long prompt's chain is walked, and there are as many routes as pairs.
        missing = {
            view.key: request.num_tokens - view.prefixes.matched_tokens(request.chain) for view in (*prefills, *decodes)
        }
        return min(routes, key=lambda route: _cost(request, route, missing), default=None)


def _cost(request: RouteRequest, route: Route, missing: Mapping[ReplicaKey, int]) -> tuple[bool, float, int]:
    """`missing` is how much of the request each replica does not hold."""
    prefill = route.prefill or route.decode
    assert prefill is not None
    cost = float(prefill.prefill_tokens + missing[prefill.key])
    dispatched = prefill.dispatched
    if route.decode is not None:
        new = missing[route.decode.key]
        cost += _HELD_COST * (route.decode.kv_tokens + new)
        dispatched += route.decode.dispatched
        if prefill.address.host != route.decode.address.host:
            cost += _REMOTE_COST * new
    preferred = request.prefer is not None and route.decode is not None and route.decode.key == request.prefer
    return (not preferred, cost, dispatched)
