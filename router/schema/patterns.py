"""Patterns that may be tried here.

A client chooses both the pattern and the text, and most patterns have texts on which they run for ever. So only those
are tried that read a text once: a fixed beginning, and one class of characters from end to end.
"""

from __future__ import annotations

import re

REPEATED = re.compile(r"\^?(\[\^?(?:[^\[\]\\]|\\.)+\]|\\[wdsWDS]|\.)([+*])\$?")
"""A pattern of one class of characters, repeated: it can take lengths."""
_BEGINNING = re.compile(r"\^[A-Za-z0-9_-]*\$?")


def can_be_tried(pattern: str) -> bool:
    """Whether trying `pattern` takes no longer than reading the text."""
    if _BEGINNING.fullmatch(pattern):
        return True
    return pattern.startswith("^") and pattern.endswith("$") and REPEATED.fullmatch(pattern) is not None


def is_found(pattern: str, text: str) -> bool:
    """Whether `text` matches a pattern that can be tried."""
    return re.search(pattern, text) is not None
