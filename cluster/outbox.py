"""What one pass of the engine thread has to send.

Lifecycle: the thread owns it. The halves put in, in the order in which things happen; `take` empties it once a pass or
oftener.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable

from protocol.rooms import Load, Message, Phases, PromptScores, StepFrame, TokenEvent

Outgoing = list[tuple[str, Message]]


class Outbox:
    """Messages in order, and one step frame per router. Phases and scores go before the tokens: a room's last token
    ends it for the router, and its first one needs the scores."""

    def __init__(self) -> None:
        self._first: Outgoing = []
        self._messages: Outgoing = []
        self._tokens: dict[str, list[TokenEvent]] = defaultdict(list)

    def send(self, link_id: str, message: Message) -> None:
        (self._first if isinstance(message, Phases | PromptScores) else self._messages).append((link_id, message))

    def emit(self, link_id: str, event: TokenEvent) -> None:
        self._tokens[link_id].append(event)

    def take(self, load_now: Callable[[], Load], *, report_to: frozenset[str] = frozenset()) -> Outgoing:
        """Everything gathered, tokens before messages: a client waits for them. Routers in `report_to` get a frame
        anyway."""
        if not (self._messages or self._tokens or self._first or report_to):
            return []
        outgoing: Outgoing = self._first
        if self._tokens or report_to:
            load = load_now()
            for link_id in self._tokens.keys() | report_to:
                outgoing.append((link_id, StepFrame(self._tokens.get(link_id, []), load)))
        outgoing += self._messages
        self._first, self._messages = [], []
        self._tokens.clear()
        return outgoing
