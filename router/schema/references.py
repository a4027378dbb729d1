"""What `$ref` means within one schema."""

from __future__ import annotations

from typing import Any
from urllib.parse import unquote

from router.schema.errors import SchemaError


class References:
    """Looks references up in `root`."""

    def __init__(self, root: Any) -> None:
        self._root = root
        self._sizes: dict[str, int] = {}

    def target(self, reference: Any, where: str) -> Any:
        """The schema that `reference` names; raises `SchemaError` when there is none within this one."""
        if not isinstance(reference, str) or not (reference == "#" or reference.startswith("#/")):
            raise SchemaError(
                where, f"$ref {reference!r} is no pointer into this schema; copy what it names into $defs"
            )
        found = self._root
        for part in reference[2:].split("/") if reference != "#" else []:
            name = unquote(part).replace("~1", "/").replace("~0", "~")
            if isinstance(found, dict) and name in found:
                found = found[name]
            elif isinstance(found, list) and name.isdecimal() and int(name) < len(found):
                found = found[int(name)]
            else:
                raise SchemaError(where, f"$ref {reference!r} names nothing in this schema")
        if not isinstance(found, dict | bool):
            raise SchemaError(where, f"$ref {reference!r} names no schema")
        return found

    def size(self, reference: str, target: Any) -> int:
        """Characters of `target`, which `reference` names."""
        if reference not in self._sizes:
            self._sizes[reference] = len(str(target))
        return self._sizes[reference]
