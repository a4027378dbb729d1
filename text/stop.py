"""Stop strings in a growing text: found however the text is cut into pieces, and never shown even in part."""

from __future__ import annotations

from collections.abc import Sequence


class StopStringMatcher:
    """Watches one text for the first of several strings.

    `push` returns what may be shown and, once, the stop string that ended the text; text that could be the beginning
    of a stop string is held back until it is clear. The stop string whose last character comes first wins, the longest
    of those that end together: so the result does not depend on where the pieces were cut.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        """Raises ValueError for an empty stop string, which would match everywhere."""
        if "" in stops:
            raise ValueError("a stop string is empty; give at least one character, or no stop string at all")
        self._stops = tuple(stops)
        self._held = ""
        self.matched: str | None = None
        self.ending = ""
        """The end of the text that matched."""

    def skip(self, text: str) -> None:
        """Text that no match may be in, but that comes before what is pushed."""

    def push(self, text: str) -> tuple[str, str | None]:
        """(what to show, the stop string that was reached or None); after a match everything is dropped."""
        if self.matched is not None:
            return "", self.matched
        if not self._stops:
            return text, None
        buffer = self._held + text
        end, stop = self._first_match(buffer)
        if stop is not None:
            self.matched, self.ending, self._held = stop, stop, ""
            return buffer[: end - len(stop)], stop
        kept = self._possible_prefix(buffer)
        self._held = buffer[len(buffer) - kept :]
        return buffer[: len(buffer) - kept], None

    def flush(self) -> str:
        """What was held back, now that no more text follows."""
        held, self._held = self._held, ""
        return held

    def _first_match(self, buffer: str) -> tuple[int, str | None]:
        best_end, best = len(buffer) + 1, None
        for stop in self._stops:
            start = buffer.find(stop)
            if start < 0:
                continue
            end = start + len(stop)
            if end < best_end or (end == best_end and best is not None and len(stop) > len(best)):
                best_end, best = end, stop
        return best_end, best

    def _possible_prefix(self, buffer: str) -> int:
        """Length of the longest end of `buffer` that some stop string begins with."""
        for length in range(min(len(buffer), max(map(len, self._stops)) - 1), 0, -1):
            end = buffer[len(buffer) - length :]
            if any(stop.startswith(end) for stop in self._stops):
                return length
        return 0
