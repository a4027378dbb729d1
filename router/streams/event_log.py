"""The tokens of one response in the order and the batches in which they were written, in a few bytes each.

Written again from it, by the same code, a stream has the same events: so an event's number stands for all before it.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence

import msgspec

from protocol.rooms import TokenEvent
from router.token_stream import Ready

_BYTES_PER_TOKEN = 12
_BYTES_PER_RICH_EVENT = 400
_BYTES_PER_TOP = 80


class PackedLog(msgspec.Struct, frozen=True, array_like=True):
    """An `EventLog` as it travels to another router."""

    indices: bytes
    tokens: bytes
    ends: bytes
    rich: dict[int, TokenEvent]


class EventLog:
    def __init__(self) -> None:
        self._indices = array("i")
        """Of each event's sequence."""
        self._tokens = array("i")
        self._ends = array("i")
        """Where each batch ends."""
        self._rich: dict[int, TokenEvent] = {}
        """Events that say more than their token, by their place."""
        self._tops = 0

    def __bool__(self) -> bool:
        return bool(self._ends)

    @property
    def num_bytes(self) -> int:
        """About what it occupies."""
        rich = _BYTES_PER_RICH_EVENT * len(self._rich) + _BYTES_PER_TOP * self._tops
        return _BYTES_PER_TOKEN * len(self._tokens) + rich

    def append(self, batch: Sequence[tuple[int, TokenEvent]]) -> None:
        """Add the events that were written together, at least one; those of a sequence come in order of position."""
        for index, event in batch:
            if event != TokenEvent(event.request_id, event.epoch, event.choice, event.position, event.token):
                self._rich[len(self._tokens)] = event
                self._tops += len(event.top or ())
            self._indices.append(index)
            self._tokens.append(event.token)
        self._ends.append(len(self._tokens))

    def batches(self) -> Iterator[Ready]:
        """The batches again; most events no longer say which room they were of."""
        positions: dict[int, int] = {}
        start = 0
        for end in self._ends:
            batch: Ready = []
            for place in range(start, end):
                index = self._indices[place]
                position = positions.get(index, 0)
                positions[index] = position + 1
                event = self._rich.get(place) or TokenEvent("", 0, 0, position, self._tokens[place])
                batch.append((index, event))
            yield batch
            start = end

    def packed(self) -> PackedLog:
        return PackedLog(self._indices.tobytes(), self._tokens.tobytes(), self._ends.tobytes(), self._rich)

    @classmethod
    def unpacked(cls, packed: PackedLog) -> EventLog:
        log = cls()
        log._indices.frombytes(packed.indices)
        log._tokens.frombytes(packed.tokens)
        log._ends.frombytes(packed.ends)
        log._rich = dict(packed.rich)
        log._tops = sum(len(event.top or ()) for event in packed.rich.values())
        return log
