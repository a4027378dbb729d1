"""What the compiler makes of a grammar."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class CompiledGrammar:
    """One grammar over one model's vocabulary; never changes. `handle` is xgrammar's."""

    handle: Any
    num_bytes: int
