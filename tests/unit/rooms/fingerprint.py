"""One value for everything that decides how a world can go on: equal worlds need be explored once only.

Counters and metrics are left out. Orders are kept where they matter (queues, waiting lines, eviction), else sorted.
"""

from __future__ import annotations

from collections.abc import Hashable

import msgspec

from decode.rooms import DecodeRoom
from engine.engine import Engine
from prefill.rooms import PrefillRoom
from protocol.room_memory import RoomMemory
from tests.unit.rooms.replica import Replica
from tests.unit.rooms.router import Client
from tests.unit.rooms.world import World

_ENCODE = msgspec.msgpack.Encoder().encode


def fingerprint(world: World) -> int:
    """A hash of the whole world."""
    wires = [
        (wire.name, wire.broken, tuple(sorted(wire.noticed)), *(_ENCODE(list(wire.queues[end])) for end in wire.ends))
        for wire in world.wires.values()
        if len(wire.noticed) < 2
    ]
    clients = [_client(client) for client in world.router.clients.values()]
    replicas = [_replica(replica) for replica in world.replicas.values()]
    routes = tuple(sorted(world.router.wires.items()))
    draining = tuple(sorted(world.router.draining))
    return hash((world.now, tuple(sorted(wires)), tuple(clients), tuple(replicas), routes, draining))


def _client(client: Client) -> Hashable:
    halves = tuple(sorted(client.halves.items()))
    early = tuple(sorted(client.early))
    scored = 0 if client.scores is None else len(list(client.scores))
    return (client.epoch, len(client.log), early, halves, client.transfer_failed, client.result, scored)


def _replica(replica: Replica) -> Hashable:
    if not replica.alive:
        return (replica.address.boot, False)
    prefill, decode = replica.prefill, replica.decode
    copies = [
        (key, tuple(copy.job.source_pages), tuple(copy.job.target_pages), copy.copied, copy.stopped, copy.cancelled)
        for key, copy in replica.copies.running.items()
    ]
    return (
        replica.address.boot,
        replica.touched,
        replica._model.passes + 1 in replica._model.fail_at,
        tuple(sorted((room, _prefill_room(record)) for room, record in prefill.rooms.items())),
        tuple(prefill._ahead._waiting),
        tuple(sorted((room, _decode_room(record)) for room, record in decode.rooms.items())),
        (tuple(decode._queue._waiting), decode._queue._changed, decode._queue._tried_at),
        tuple(sorted((address.boot, link) for address, link in decode._actions.links.items())),
        _memory(prefill._memory),
        _memory(decode._memory),
        (prefill._actions.timers.next(), decode._actions.timers.next()),
        tuple(sorted(copies)),
        _engine(replica.engine),
    )


def _prefill_room(record: PrefillRoom) -> Hashable:
    offered = (record.offered.start, record.offered.stop)
    return (record.state.value, record.router, record.decode or "", record.reserved, record.held_pages, offered)


def _decode_room(record: DecodeRoom) -> Hashable:
    return (
        record.state.value,
        record.router,
        record.prefill or "",
        record.handoff is not None,
        record.queued_at,
        record.progress_at,
        tuple(record.intake._stages),
        str(record.intake._offers),
        str(record.jobs),
        tuple(record.owed),
    )


def _memory(memory: RoomMemory) -> Hashable:
    stones = [(name, stone.epoch, str(stone.reason), stone.lived) for name, stone in memory.tombstones._stones.items()]
    spots = [
        (spot.room, tuple((parked.link, _ENCODE(parked.message)) for parked in spot.parked))
        for spot in memory.parking._spots.values()
    ]
    return (tuple(sorted(stones)), tuple(sorted(spots)))


def _engine(engine: Engine) -> Hashable:
    scheduler, memory = engine._scheduler, engine._memory
    lines = [[request.key for request in line] for line in (scheduler.waiting, scheduler.running, scheduler.reserved)]
    requests = [
        (key, request.status.value, request.num_computed, request.num_tokens, request.num_cached, tuple(request.pages))
        for key, request in engine._requests.items()
    ]
    cached = [
        (namespace, node.key, tuple(node.pages), node.locks)
        for namespace, node in sorted(memory.cache.nodes(), key=lambda found: found[1].last_used)
    ]
    return (
        str(lines),
        tuple(sorted(requests)),
        memory.allocator.states().tobytes(),
        tuple(cached),
        engine.pool.data.numpy().tobytes(),
    )
