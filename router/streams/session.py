"""One run of a stream that can be come back to: numbers its events, leaves out those the client has, fills the log.

Made for one run of a request; the record is its owner's to keep afterwards.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from router.errors import ApiError
from router.generation import Generation
from router.stamp import token_of
from router.streams.record import StreamRecord
from router.token_stream import Ready


def parse_event_id(event_id: str) -> tuple[str, int]:
    """(stream's token, number) of an event's id; raises `ApiError` (400) for anything else."""
    response_id, _, number = event_id.rpartition(":")
    token = token_of(response_id)
    if token is None or not number.isascii() or not number.isdecimal() or len(number) > 9:
        message = f"Last-Event-ID is {event_id[:100]!r}, which is no id of an event of this server; send one as it came"
        raise ApiError(400, message, param="Last-Event-ID", code="invalid_value")
    return token, int(number)


class StreamSession:
    def __init__(self, record: StreamRecord, *, response_id: str, seen: int) -> None:
        """The client has the events up to number `seen`."""
        self._record = record
        self._head = f"id: {response_id}:".encode()
        self._seen = seen
        self._number = 0

    @property
    def has_begun(self) -> bool:
        """Whether there are batches to be written again first."""
        return bool(self._record.log)

    def batches(self) -> Iterator[Ready]:
        """What earlier runs have written."""
        return self._record.log.batches()

    def check_seen(self) -> None:
        """Once all is written again; raises `ApiError` (400) where the client claims to have more."""
        if self._seen > self._number:
            message = (
                f"Last-Event-ID names event {self._seen}, but the stream has had {self._number}; send one as it came"
            )
            raise ApiError(400, message, param="Last-Event-ID", code="invalid_value")

    def wrote(self, batch: Ready) -> None:
        """New tokens are about to be written."""
        self._record.log.append(batch)

    def numbered(self, data: bytes) -> bytes:
        """These events with their ids, without those that the client has."""
        if not data:
            return data
        pieces = []
        for event in data.split(b"\n\n")[:-1]:
            self._number += 1
            if self._number > self._seen:
                pieces.append(b"%b%d\n%b\n\n" % (self._head, self._number, event))
        return b"".join(pieces)

    def epoch(self, index: int) -> int:
        """The last epoch of a sequence, -1 for none."""
        return self._record.epochs.get(index, -1)

    def on_claim(self, cut: Callable[[], None]) -> None:
        """`cut` is called to end this run, when its client has come back already."""
        self._record.cut = cut

    def ended(self, generations: Sequence[Generation]) -> None:
        """The run writes no more."""
        self._record.epochs |= {each.index: each.epoch for each in generations}
