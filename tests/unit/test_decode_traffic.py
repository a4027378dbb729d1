"""What a decode half counts of its copies: totals for ever, peers while they are there."""

from __future__ import annotations

from typing import Any

from decode.traffic import Traffic, TrafficBook
from protocol.rooms import PeerAddress
from transfer.jobs import FetchResult

ONE, TWO = PeerAddress("one", 1, "test", 1), PeerAddress("two", 1, "test", 2)


def ended(peer: PeerAddress = ONE, **fields: Any) -> FetchResult:
    values: dict[str, Any] = {
        "key": 0,
        "peer": peer,
        "ok": True,
        "error": None,
        "cancelled": False,
        "bytes": 100,
        "seconds": 0.5,
        "queued_seconds": 0.25,
        "transport": "shm",
    }
    return FetchResult(**(values | fields))


def test_copies_are_counted_by_transport_and_peer() -> None:
    book = TrafficBook()
    for result in (ended(), ended(bytes=300), ended(TWO, transport="tcp")):
        book.count(result, linked=True)
    shm = Traffic(copies=2, bytes=400, seconds=1.0, queue_seconds=0.5)
    tcp = Traffic(copies=1, bytes=100, seconds=0.5, queue_seconds=0.25)
    assert book.by_transport == {"shm": shm, "tcp": tcp}
    assert list(book.by_peer()) == [(ONE, "shm", shm), (TWO, "tcp", tcp)]


def test_failures_bring_no_bytes_and_cancelled_copies_nothing_at_all() -> None:
    book = TrafficBook()
    book.count(ended(ok=False, error="reset"), linked=True)
    book.count(ended(ok=False, error="cancelled", cancelled=True), linked=True)
    book.count(ended(ok=False, error="not attached", transport=""), linked=True)
    assert book.by_transport == {"shm": Traffic(failures=1), "none": Traffic(failures=1)}


def test_a_peer_that_is_gone_leaves_its_part_of_the_totals_only() -> None:
    book = TrafficBook()
    book.count(ended(), linked=True)
    book.forget(ONE)
    book.count(ended(ok=False, error="stopped"), linked=False)
    assert list(book.by_peer()) == []
    assert (book.by_transport["shm"].copies, book.by_transport["shm"].failures) == (1, 1)
