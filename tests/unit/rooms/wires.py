"""Links that deliver in order until they break, and lose whatever was in flight then."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from protocol.rooms import Message


@dataclass
class Wire:
    """One connection between two named ends; its `name` is the link id at both."""

    name: str
    ends: tuple[str, str]
    queues: dict[str, deque[Message]] = field(default_factory=dict)
    """Messages in flight, by the end they go to."""
    broken: bool = False
    noticed: set[str] = field(default_factory=set)
    """Ends that know that the wire is broken."""

    def __post_init__(self) -> None:
        self.queues = {end: deque() for end in self.ends}

    def send(self, sender: str, message: Message) -> None:
        """What is sent over a broken wire is lost."""
        if not self.broken:
            self.queues[self.other(sender)].append(message)

    def other(self, end: str) -> str:
        return self.ends[1] if end == self.ends[0] else self.ends[0]

    def lose(self, end: str) -> None:
        """`end` notices; what was on its way to it is gone."""
        self.queues[end].clear()
        self.noticed.add(end)

    def vanish(self, end: str) -> None:
        """`end` has died: it notices nothing, and its other end will."""
        self.broken = True
        self.lose(end)
