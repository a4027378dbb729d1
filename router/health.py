"""Endpoints for whoever watches the router: whether it can serve, whether it does serve, and what it is doing."""

from __future__ import annotations

from typing import Any

import msgspec
from starlette.types import Scope

from protocol.membership import ReplicaRole
from router.endpoints import Endpoint, RouterCore, request_timeout_s
from router.errors import overloaded
from router.exchange import Exchange
from router.health_probe import PROBE_TIMEOUT_S, HealthProbe
from router.metrics import Counter, Gauge, Histogram
from router.replica_view import ReplicaView


class Health(Endpoint):
    """GET /health: 200 when requests can be served, else 503.

    `status` is "ok" with at least one usable pair (or aggregated replica), "degraded" when only replicas of one pool
    are left to take requests whole.
    """

    async def respond(self, exchange: Exchange, scope: Scope) -> None:
        usable = _usable_roles(self.core)
        counts = {role.value: usable.count(role) for role in ReplicaRole}
        status = "ok" if self.core.dispatcher.members.is_whole else "degraded"
        await exchange.answer_json(200, {"status": status, "usable": counts})


class HealthGenerate(Endpoint):
    """GET /health_generate: 200 once two real tokens were made, the first by prefill and the second by decode."""

    def __init__(self, core: RouterCore) -> None:
        super().__init__(core)
        self._probe = HealthProbe(core)

    async def respond(self, exchange: Exchange, scope: Scope) -> None:
        _usable_roles(self.core)  # a probe asks how things are now: it does not wait for a replica as requests do
        timeout_s = min(PROBE_TIMEOUT_S, request_timeout_s(exchange, self.core.config))
        seconds = await self._probe.seconds(exchange, timeout_s=timeout_s)
        await exchange.answer_json(200, {"status": "ok", "seconds": seconds})


def _usable_roles(core: RouterCore) -> list[ReplicaRole]:
    """Of each replica that may be given rooms; raises `ApiError` (503) when there is none."""
    usable = [view.role for view in core.dispatcher.members.views if view.usable]
    if not usable:
        raise overloaded(503, "no replica is up", code="no_replica", retry_after_s=core.config.retry_after_s)
    return usable


class InternalState(Endpoint):
    """GET /internal/state: members, open sequences and counters, for people and tests."""

    async def respond(self, exchange: Exchange, scope: Scope) -> None:
        core = self.core
        dispatcher = core.dispatcher
        rooms = [
            {
                "request_id": each.request_id,
                "epoch": each.epoch,
                "state": each.state.value,
                "tokens": len(each.log.tokens),
                "replicas": [view.address.replica_id for view in each.replicas],
            }
            for each in dispatcher.generations.values()
        ]
        state = {
            "members": [member_state(view) for view in dispatcher.members.views],
            "rooms": rooms,
            "admission": {"sequences": core.admission.sequences, "queued_tokens": core.admission.queued_tokens},
            "metrics": {metric.name: _value(metric) for metric in core.metrics.collect()},
        }
        await exchange.answer_json(200, state)


def member_state(view: ReplicaView) -> dict[str, Any]:
    """A replica as this router sees it."""
    return {
        "replica_id": view.address.replica_id,
        "boot": view.address.boot,
        "address": f"{view.address.host}:{view.address.port}",
        "role": view.role.value,
        "up": view.is_up,
        "draining": view.draining,
        "usable": view.usable,
        "open_rooms": len(view.rooms),
        "prefill_tokens": view.prefill_tokens,
        "kv_tokens": view.kv_tokens,
        "cached_blocks_believed": len(view.prefixes),
        "load": None if view.load is None else msgspec.structs.asdict(view.load),
    }


def _value(metric: Counter | Gauge | Histogram) -> Any:
    if isinstance(metric, Counter):
        return metric.values if metric.label else metric.total
    if isinstance(metric, Gauge):
        return metric.read()
    return {"count": metric.count, "sum": metric.sum}
