"""One assistant message, read from the text of one output: its reasoning, its content and its calls of tools."""

from __future__ import annotations

from text.message_events import Content, Event, merged
from text.reasoning import ReasoningSplitter
from text.tools.parser import ToolParser


class MessageReader:
    """Feed the text as it comes, then `finish`. All events joined do not depend on where the text was cut."""

    def __init__(self, *, reasoning: ReasoningSplitter | None, tools: ToolParser | None) -> None:
        self._reasoning = reasoning
        self._tools = tools

    @property
    def thought(self) -> int:
        """How many characters of the text so far are reasoning, tags included."""
        return 0 if self._reasoning is None else self._reasoning.thought

    def feed(self, text: str) -> list[Event]:
        if self._reasoning is None:
            return self._read(text)
        return self._pass_on(self._reasoning.feed(text))

    def finish(self) -> list[Event]:
        events = self._pass_on(self._reasoning.finish()) if self._reasoning is not None else []
        return merged([*events, *(self._tools.finish() if self._tools is not None else [])])

    def _pass_on(self, events: list[Event]) -> list[Event]:
        """What is said goes through the parser of calls; what is thought does not."""
        result: list[Event] = []
        for event in events:
            result += self._read(event.text) if isinstance(event, Content) else [event]
        return result

    def _read(self, text: str) -> list[Event]:
        if self._tools is not None:
            return self._tools.feed(text)
        return [Content(text)] if text else []
