"""How much work one schema may be: references multiply what a short text asks for."""

from __future__ import annotations

from router.schema.errors import SchemaError

MOST_PARTS = 10_000
"""Where nothing else is said."""
_PART = 64
"""What a part costs, in characters of text to copy."""


class Budget:
    """What is left to one pass over one schema of `max_parts` at most; the pass owns it."""

    def __init__(self, max_parts: int) -> None:
        self._max_parts = max_parts
        self._left = max_parts * _PART

    def spend(self, where: str, *, parts: int = 0, characters: int = 0) -> None:
        """Count work at `where`; raises `SchemaError` when the schema has had its share."""
        self._left -= parts * _PART + characters
        if self._left < 0:
            raise SchemaError(
                where,
                f"it is too large once its references are put in ({self._max_parts} parts at most); make it smaller",
            )
