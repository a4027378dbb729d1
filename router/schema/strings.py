"""Lengths and patterns of strings.

The compiler ignores lengths beside a pattern, and lets control characters into strings that have lengths alone. So
lengths become part of a pattern.
"""

from __future__ import annotations

import re

from router.schema.errors import SchemaError, UnsatisfiableError
from router.schema.patterns import REPEATED
from router.schema.words import Schema

_LOOK_AROUND = re.compile(r"\(\?(?:[=!]|<[=!])")
_PIECES = re.compile(r"\\.|\[(?:\\.|[^\]\\])*(?:\]|\\?\Z)|.", re.DOTALL)
"""Escaped characters, classes (one left open reaches to the end), and single characters."""


def enforceable_string(schema: Schema, where: str) -> Schema:
    """`schema`'s string keywords in terms of `pattern` or `format` alone."""
    least, most = schema.get("minLength", 0), schema.get("maxLength")
    pattern = schema.get("pattern")
    if most is not None and most < least:
        raise UnsatisfiableError(where, f"minLength {least} is more than maxLength {most}")
    limited = least > 0 or most is not None
    if pattern is None:
        if not limited:
            return {"format": schema["format"]} if "format" in schema else {}
        # Formats are annotations; lengths are not.
        return {"pattern": f"^[\\s\\S]{_times(least, most)}$"}
    if _LOOK_AROUND.search(pattern):
        raise SchemaError(where, f"the pattern {pattern!r} looks around, which no grammar can; write it without")
    if _has_inner_anchor(pattern):
        raise SchemaError(where, f"the pattern {pattern!r} has ^ or $ within; use them at its ends only")
    if not limited:
        return {"pattern": pattern}
    simple = REPEATED.fullmatch(pattern)
    if simple is None or not (pattern.startswith("^") and pattern.endswith("$")):
        raise SchemaError(where, "pattern cannot be combined with lengths here; write the lengths into the pattern")
    least = max(least, 1 if simple[2] == "+" else 0)
    return {"pattern": f"^{simple[1]}{_times(least, most)}$"}


def _has_inner_anchor(pattern: str) -> bool:
    """Whether ^ or $ stands elsewhere than at the ends of the pattern, or of what a bar parts it into."""
    pieces = ["|", *_PIECES.findall(pattern), "|"]
    return any(
        (piece == "^" and before != "|") or (piece == "$" and after != "|")
        for before, piece, after in zip(pieces, pieces[1:], pieces[2:], strict=False)
    )


def _times(least: int, most: int | None) -> str:
    return f"{{{least},{'' if most is None else most}}}"
