"""How long a step may wait for prompts whose last copies are running.

A prompt that lands a moment after a step began waits for all of that step. Waiting for it instead costs every running
stream the wait, so it may last until the streams have lost as much together as the prompts can gain: a step each. Under
load this is what brings the handover below a step; without streams there is no step to wait before.
"""

from __future__ import annotations

from collections.abc import Set as AbstractSet

from protocol.rooms import Room


class LandingWait:
    """Owned by the engine thread. Waits for a room once only: on a slow path its copy can take many steps."""

    def __init__(self, *, longest_s: float = 0.005) -> None:
        self._longest_s = longest_s
        self._waited_for: AbstractSet[Room] = frozenset()
        self._step_s = 0.0

    def stepped(self, seconds: float) -> None:
        """How long a step has just taken."""
        self._step_s = seconds

    def seconds(self, landing: AbstractSet[Room], *, running: int) -> float:
        """The longest wait before the next step, `running` streams being in it."""
        num_new = len(landing - self._waited_for)
        self._waited_for = landing
        return min(self._longest_s, self._step_s * num_new / max(1, running))
