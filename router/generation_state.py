"""The states of a generation (`router/generation.py`), and which may follow which."""

from __future__ import annotations

import enum


class GenerationState(enum.Enum):
    NEW = "new"
    OPEN = "open"
    WAITING = "waiting"
    """Before the first epoch or between two: for a replica to come up, or for a pause to pass."""
    FINISHED = "finished"
    FAILED = "failed"
    ABORTED = "aborted"

    def may_become(self, state: GenerationState) -> bool:
        return state in _NEXT[self]


_ENDS = {GenerationState.FINISHED, GenerationState.FAILED, GenerationState.ABORTED}
_NEXT: dict[GenerationState, set[GenerationState]] = {
    GenerationState.NEW: {GenerationState.WAITING},
    GenerationState.OPEN: {GenerationState.WAITING, *_ENDS},
    GenerationState.WAITING: {GenerationState.OPEN, GenerationState.FAILED, GenerationState.ABORTED},
    **{end: set() for end in _ENDS},
}
