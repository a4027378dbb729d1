"""What grammars may take of one replica."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class GrammarLimits:
    """`GrammarSection` of the cluster's configuration says what users need to know of these."""

    compile_threads: int = 2
    compile_timeout_s: float = 8.0
    """How long a request waits for its grammar; less than a peer's `Join` waits for its room."""
    max_waiting: int = 256
    """Requests that wait for the compiler."""
    max_compiled_bytes: int = 64 << 20
    """Of one grammar."""
    cache_bytes: int = 256 << 20
    """Of all that are kept."""
    follow_budget_s: float = 0.5
    """Processor time that one sequence's slow tokens and masks may take together."""
    mask_timeout_s: float = 2.0
    """How long a step waits for one row's mask."""
