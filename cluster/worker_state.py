"""What a replica tells of itself: a snapshot of plain values twice a second, and how long each stage of a room took.

The engine thread writes (`observe`, `publish`), the event loop reads (`latest`, `take_observations`) and passes on to
the directory and to Ray's metrics, so that exporting never costs a step anything.
"""

from __future__ import annotations

import dataclasses
import enum
from collections import Counter, deque
from collections.abc import Callable
from typing import Any

import msgspec

from decode.half import DecodeHalf
from engine.engine import Engine
from engine.grammar.cache import GrammarCache
from engine.grammar.masks import MaskFiller
from prefill.half import PrefillHalf
from protocol.rooms import Load

_MAX_OBSERVATIONS = 100_000


class StateReporter:
    """Written by the engine thread, read by the event loop; every handover between them is one atomic operation."""

    def __init__(self, *, grammars: Callable[[], dict[str, Any]] = dict) -> None:
        """`grammars` says what they have cost so far, as in `grammar_state`."""
        self._grammars = grammars
        self.latest: dict[str, Any] = {}
        """The newest snapshot; never changed once it is here."""
        self._observations: deque[tuple[str, float]] = deque(maxlen=_MAX_OBSERVATIONS)

    def observe(self, stage: enum.Enum, seconds: float) -> None:
        """A stretch of a room's life is over."""
        self._observations.append((stage.value, seconds))

    def take_observations(self) -> list[tuple[str, float]]:
        """(stage, seconds) of everything observed since the last call, oldest first."""
        taken = []
        while self._observations:
            taken.append(self._observations.popleft())
        return taken

    def publish(self, load: Load, engine: Engine, prefill: PrefillHalf, decode: DecodeHalf) -> None:
        """Take a snapshot. When idle it also balances the books; counting pages is too slow for a busy moment."""
        state: dict[str, Any] = {
            "load": msgspec.structs.asdict(load),
            "engine": _plain(engine.counters),
            "prefill": {"rooms": _by_state(prefill), "counters": _plain(prefill.counters)},
            "decode": {"rooms": _by_state(decode), "counters": _plain(decode.counters)},
            "grammars": self._grammars(),
            "transfers": [
                {"transport": transport, **_plain(traffic)}
                for transport, traffic in decode.traffic.by_transport.items()
            ],
            "peer_transfers": [
                {"transport": transport, "peer": peer.replica_id, **_plain(traffic)}
                for peer, transport, traffic in decode.traffic.by_peer()
            ],
        }
        if not engine.has_work():
            report = engine.audit()
            state["books"] = {
                "balanced": report.balanced,
                "free": report.free,
                "cached": report.cached,
                "used": report.used,
                "quarantined": report.quarantined,
                "total": report.total,
            }
        self.latest = state


def grammar_state(cache: GrammarCache, masks: MaskFiller) -> dict[str, Any]:
    """What grammars have cost, and hold now."""
    return {
        "counters": {**_plain(cache.counters), **_plain(masks.counters)},
        "waiting": cache.num_waiting,
        "bytes": cache.num_bytes,
    }


def _by_state(half: PrefillHalf | DecodeHalf) -> dict[str, int]:
    return dict(Counter(record.state.value for record in half.rooms.values()))


def _plain(value: Any) -> Any:
    """Dataclasses as dictionaries, enums by their names on the wire."""
    if dataclasses.is_dataclass(value):
        return {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {_plain(key): _plain(item) for key, item in value.items()}
    return value.value if isinstance(value, enum.Enum) else value
