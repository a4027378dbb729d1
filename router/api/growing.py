"""JSON values that are written again and again while they grow, as in streams that repeat all there is so far.

Each part is encoded once; writing the value once more only copies bytes.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec


class GrowingText:
    """A text that gets longer."""

    def __init__(self) -> None:
        self._encoded = bytearray(b'"')

    def extend(self, text: str) -> None:
        self._encoded += msgspec.json.encode(text)[1:-1]

    @property
    def json(self) -> msgspec.Raw:
        """The text so far, for an encoder to take as it is."""
        return msgspec.Raw(b"".join([self._encoded, b'"']))


class GrowingList:
    """A list that gets longer."""

    def __init__(self) -> None:
        self._encoded = bytearray(b"[")
        self._length = 0

    def __len__(self) -> int:
        return self._length

    def extend(self, items: Sequence[object]) -> None:
        if not items:
            return
        if self._length:
            self._encoded += b","
        self._encoded += msgspec.json.encode(items)[1:-1]
        self._length += len(items)

    @property
    def json(self) -> msgspec.Raw:
        """The list so far, for an encoder to take as it is."""
        return msgspec.Raw(b"".join([self._encoded, b"]"]))
