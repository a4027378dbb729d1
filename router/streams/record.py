"""One stream that can be come back to: what was asked, what has been written, and how often each sequence was begun."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import msgspec

from protocol.streams import StreamState
from router.errors import ApiError
from router.score_log import PackedScores
from router.stamp import Stamp
from router.streams.event_log import EventLog, PackedLog


@dataclass(kw_only=True)
class StreamRecord:
    """Belongs to the run that writes the stream now, else to the shelf."""

    stamp: Stamp
    path: str
    """Of the endpoint that was asked."""
    body: bytes
    """Empty while a stream is written that cannot be come back to."""
    log: EventLog = field(default_factory=EventLog)
    scores: dict[int, PackedScores] = field(default_factory=dict)
    """Of prompts, by sequence, as far as earlier runs had them."""
    epochs: dict[int, int] = field(default_factory=dict)
    """The last epoch of each sequence that was begun."""
    rooms: str = ""
    """What its rooms' names have beside the response's id, so that a router that is gone had other rooms."""
    restart: int = 0
    """Where the log's first batch stands for several that are not known any more: how many events these had."""
    unkept: str = ""
    """Why the stream cannot be come back to, where that is so."""
    cut: Callable[[], None] | None = None
    """Ends the run that writes the stream now."""

    @property
    def num_bytes(self) -> int:
        return len(self.body) + self.log.num_bytes + sum(each.num_bytes for each in self.scores.values())

    def leave_unkept(self, why: str) -> None:
        """Let go of what was asked: the stream cannot be come back to."""
        self.body, self.unkept = b"", why

    def check_is_asked_again(self, path: str, body: bytes) -> None:
        """Raises `ApiError` (400) for another request than the one that began the stream."""
        if path == self.path and (body == self.body or _same_json(body, self.body)):
            return
        message = "Last-Event-ID names a stream of another request; send the same body again, or GET the stream"
        raise ApiError(400, message, param="Last-Event-ID", code="stream_mismatch")

    def packed(self) -> StreamState:
        """As it travels to another router."""
        log = msgspec.msgpack.encode((self.log.packed(), self.scores))
        return StreamState(
            self.stamp.token, self.stamp.tenant, self.path, self.body, log, self.epochs, self.rooms, self.restart
        )

    @classmethod
    def unpacked(cls, state: StreamState) -> StreamRecord:
        log, scores = msgspec.msgpack.decode(state.log, type=tuple[PackedLog, dict[int, PackedScores]])
        stamp = Stamp(state.token, state.tenant)
        return cls(
            stamp=stamp,
            path=state.path,
            body=state.body,
            log=EventLog.unpacked(log),
            scores=scores,
            epochs=dict(state.epochs),
            rooms=state.rooms,
            restart=state.restart,
        )


def _same_json(one: bytes, other: bytes) -> bool:
    try:
        return bool(msgspec.json.decode(one) == msgspec.json.decode(other))
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return False
