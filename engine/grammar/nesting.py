"""Groups within groups in the patterns of JSON schemas: the compiler reads those by recursion, without a bound."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

from engine.grammar.errors import GrammarRefused

_MOST_DEEP = 100
_PARTS = re.compile(r"\\.|\[(?:\\.|[^\]\\])*\]?|[()]", re.DOTALL)
"""What is escaped, a class of characters, or the edge of a group."""


def check_patterns(text: str) -> None:
    """Of every schema in a JSON text; raises `GrammarRefused`."""
    for pattern in _patterns(json.loads(text)):
        depth = 0
        for part in _PARTS.finditer(pattern):
            depth += {"(": 1, ")": -1}.get(part.group(), 0)
            if depth > _MOST_DEEP:
                raise GrammarRefused(
                    f"it has a pattern with more than {_MOST_DEEP} groups in each other; make it flatter"
                )


def _patterns(value: Any) -> Iterator[str]:
    """Everything that may be one."""
    left = [value]
    while left:
        part = left.pop()
        if isinstance(part, list):
            left += part
        elif isinstance(part, dict):
            left += part.values()
            for key in ("pattern", "patternProperties"):
                found = part.get(key)
                yield from [found] if isinstance(found, str) else found if isinstance(found, dict) else ()
