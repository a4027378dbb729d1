"""One run of a stream that can be come back to: numbers its events, leaves out those the client has, fills the log.

Made for one run of a request; the record is its owner's to keep afterwards.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from router.errors import ApiError
from router.generation import Generation
from router.streams.event_id import Place, checksum
from router.streams.record import StreamRecord
from router.token_stream import Ready
from router.work import SequenceOutput


class StreamSession:
    def __init__(
        self, record: StreamRecord, *, response_id: str, single: bool, seen: int, lost: Place | None = None
    ) -> None:
        """The client has the events up to number `seen`. `single`: the stream is of one sequence, and its events tell
        their place. `lost` is the place of event `seen` where that is all that is left of the stream."""
        self._record = record
        self._head = f"id: {response_id}:".encode()
        self._single = single
        self._seen = seen
        self.lost = lost
        self._number = 0
        self._before = self._through = self._within = self._checksum = 0

    @property
    def has_begun(self) -> bool:
        """Whether there are batches to be written again first."""
        return bool(self._record.log)

    @property
    def rooms(self) -> str:
        """What the names of this stream's rooms have beside the response's id."""
        return self._record.rooms

    def batches(self) -> Iterator[Ready]:
        """What earlier runs have written, each batch to be written before the next is taken."""
        if self._seen < self._record.restart:
            raise ApiError(410, "the stream's beginning is lost; send the request again", code="stream_gone")
        for count, batch in enumerate(self._record.log.batches()):
            if count == 1 and self._record.restart:
                self._number = self._record.restart
            self._advance(batch)
            yield batch

    def check_seen(self) -> None:
        """Once all is written again; raises `ApiError` (400) where the client claims to have more."""
        if self._seen > self._number:
            message = f"Last-Event-ID names event {self._seen}, but the stream had {self._number}; send one as it came"
            raise ApiError(400, message, param="Last-Event-ID", code="invalid_value")

    def wrote(self, batch: Ready) -> None:
        """New tokens are about to be written."""
        self._record.log.append(batch)
        self._advance(batch)

    def split(self, ready: Ready, place: Place) -> list[Ready]:
        """The tokens of a stream that is made again, in batches as far as `place` tells them; raises `ApiError` (410)
        where they are not those that the client has had."""
        tokens = [event.token for _, event in ready[: place.through]]
        if len(tokens) < place.through or checksum(tokens) != place.checksum:
            message = "the stream's log is lost, and the model did not generate the same again; send the request anew"
            raise ApiError(410, message, code="stream_gone")
        batches = [ready[: place.before], ready[place.before : place.through], ready[place.through :]]
        if place.before:
            self._record.restart = self._seen - place.within
        return [batch for batch in batches if batch]

    def restart(self) -> None:
        """The first batch of a stream that is made again is written: its events were other ones, all of them seen."""
        if self._record.restart:
            self._number = self._record.restart

    def numbered(self, data: bytes) -> bytes:
        """These events with their ids, without those that the client has."""
        if not data:
            return data
        pieces = []
        for event in data.split(b"\n\n")[:-1]:
            self._number += 1
            self._within += 1
            if self._number > self._seen:
                pieces.append(b"%b%d%b\n%b\n\n" % (self._head, self._number, self._place(), event))
        return b"".join(pieces)

    def epoch(self, index: int) -> int:
        """The last epoch of a sequence, -1 for none."""
        return self._record.epochs.get(index, -1)

    def on_claim(self, cut: Callable[[], None]) -> None:
        """`cut` is called to end this run, when its client has come back already."""
        self._record.cut = cut

    def begins(self, outputs: Sequence[SequenceOutput]) -> None:
        """Give a run what earlier ones know of the prompts."""
        for index, packed in self._record.scores.items():
            scores = outputs[index].scores
            assert scores is not None, "the same request has the same scores"
            scores.restore(packed)

    def ended(self, generations: Sequence[Generation], outputs: Sequence[SequenceOutput]) -> None:
        """The run writes no more."""
        self._record.epochs |= {each.index: each.epoch for each in generations}
        self._record.scores = {
            index: output.scores.packed() for index, output in enumerate(outputs) if output.scores is not None
        }

    def _place(self) -> bytes:
        if not self._single:
            return b""
        return b".%d.%d.%d.%08x" % (self._before, self._through, self._within, self._checksum)

    def _advance(self, batch: Ready) -> None:
        self._before, self._within = self._through, 0
        self._through += len(batch)
        if self._single:
            self._checksum = checksum((event.token for _, event in batch), self._checksum)
