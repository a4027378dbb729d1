"""What is wrong with a schema, and where."""

from __future__ import annotations


class SchemaError(ValueError):
    """A schema that no grammar can enforce. `where` is the JSON pointer of the part at fault."""

    def __init__(self, where: str, words: str) -> None:
        super().__init__(f"at {where or '/'}: {words}")


class UnsatisfiableError(SchemaError):
    """No value at all matches."""
