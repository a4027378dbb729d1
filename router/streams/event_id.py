"""Ids of events: which stream, which event of it, and, for a stream of one sequence, which tokens it came from.

`{response id}:{number}`, then for one sequence `.{before}.{through}.{within}.{checksum}`: the event is number `within`
of those written for the tokens from `before` up to `through`, and the checksum is that of all tokens up to there. With
that and the request, a stream whose log is lost can be made again up to this very event, or it is seen that it cannot.
"""

from __future__ import annotations

import re
import zlib
from array import array
from collections.abc import Iterable
from dataclasses import dataclass

from router.errors import ApiError
from router.stamp import token_of

_COUNT = r"(\d{1,9})"
_EVENT_ID = re.compile(rf"([\w-]+):{_COUNT}(?:\.{_COUNT}\.{_COUNT}\.{_COUNT}\.([0-9a-f]{{8}}))?", re.ASCII)


@dataclass(frozen=True)
class Place:
    """Where an event stands among the tokens of its sequence."""

    before: int
    through: int
    within: int
    checksum: int


@dataclass(frozen=True)
class EventId:
    token: str
    """The stream's."""
    number: int
    """Of the event, from 1 on."""
    place: Place | None


def parse_event_id(text: str) -> EventId:
    """Raises `ApiError` (400) for what is no id of an event."""
    found = _EVENT_ID.fullmatch(text)
    token = None if found is None else token_of(found[1])
    place = None
    if found is not None and found[3] is not None:
        place = Place(int(found[3]), int(found[4]), int(found[5]), int(found[6], 16))
    if found is None or token is None or not _is_possible(int(found[2]), place):
        message = f"Last-Event-ID is {text[:100]!r}, which is no id of an event of this server; send one as it came"
        raise ApiError(400, message, param="Last-Event-ID", code="invalid_value")
    return EventId(token, int(found[2]), place)


def _is_possible(number: int, place: Place | None) -> bool:
    if place is None:
        return True
    is_batch = place.before < place.through or place.through == 0
    return is_batch and 1 <= place.within <= number


def checksum(tokens: Iterable[int], before: int = 0) -> int:
    """Of tokens after those with the checksum `before`."""
    return zlib.crc32(array("i", tokens).tobytes(), before)
