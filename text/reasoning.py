"""Splits an output into what the model thought and what it said, by `<think>` and `</think>`.

Thinking comes first or not at all. Newlines next to a tag belong to the tag.
"""

from __future__ import annotations

import enum
from typing import Literal

from text.message_events import Content, Event, Reasoning, merged

OPEN = "<think>"
CLOSE = "</think>"
TAGS = (OPEN, CLOSE)

ReasoningParserName = Literal["auto", "deepseek-r1", "qwen3", "none"]
ReasoningStyle = Literal["deepseek-r1", "qwen3"]
"""deepseek-r1 thinks first even where no tag opens it, qwen3 only where one does; both follow the end of the prompt."""


class Thinking(enum.Enum):
    """What a prompt leaves its output to begin with."""

    OPEN = "open"
    """Thinking: the prompt has opened it, or the model does so without a word."""
    FREE = "free"
    """Thinking, if the output begins with a tag."""
    CLOSED = "closed"
    """The answer: the prompt has closed the thinking."""


def choose_style(name: ReasoningParserName, template: str) -> ReasoningStyle | None:
    """The style configured as `name`; "auto": that of every model whose chat template has the tags, which follows the
    prompt. None: outputs are not split."""
    if name == "auto":
        return "qwen3" if OPEN in template or CLOSE in template else None
    return None if name == "none" else name


def thinking_after(prompt: str, style: ReasoningStyle, *, continued: str | None) -> Thinking:
    """How the output of a rendered prompt begins; `continued` is the beginning of the answer, if the prompt has one."""
    if continued:
        return Thinking.OPEN if continued.rfind(OPEN) > continued.rfind(CLOSE) else Thinking.CLOSED
    end = prompt.rstrip()
    if end.endswith(OPEN):
        return Thinking.OPEN
    if end.endswith(CLOSE):
        return Thinking.CLOSED
    return Thinking.OPEN if style == "deepseek-r1" else Thinking.FREE


class _State(enum.Enum):
    """START -> THINKING -> AFTER -> ANSWER, from left to right; START -> ANSWER where there is no thinking."""

    START = "start"
    THINKING_START = "thinking start"
    THINKING = "thinking"
    AFTER = "after"
    ANSWER = "answer"


class ReasoningSplitter:
    """Feed the text as it comes, then `finish`; tags are never shown, not even in part."""

    def __init__(self, thinking: Thinking) -> None:
        self._thinking = thinking is Thinking.OPEN
        self._state = _State.ANSWER if thinking is Thinking.CLOSED else _State.START
        self._held = ""
        self._fed = 0
        self._thought = 0

    @property
    def thought(self) -> int:
        """How many characters of the text are thinking, tags included."""
        begun = self._thinking or self._state is not _State.START
        return self._thought if self._state in (_State.AFTER, _State.ANSWER) else self._fed if begun else 0

    def feed(self, text: str) -> list[Event]:
        """What the next piece of text settles."""
        self._held += text
        self._fed += len(text)
        events: list[Event] = []
        while self._step(events):
            pass
        return merged(events)

    def finish(self) -> list[Event]:
        """What was held back, now that no more text follows."""
        held, self._held = self._held, ""
        if self._state is _State.AFTER or not held:
            return []
        if self._state in (_State.THINKING_START, _State.THINKING) or (self._state is _State.START and self._thinking):
            return [Reasoning(held)]
        return [Content(held)]

    def _step(self, events: list[Event]) -> bool:
        """One move through the states; False when more text is needed, or all is said."""
        if self._state is _State.START:
            return self._start()
        if self._state is _State.THINKING:
            return self._think(events)
        if self._state is _State.ANSWER:
            if self._held:
                events.append(Content(self._held))
            self._held = ""
            return False
        self._held = self._held.lstrip("\n")
        if self._held:
            self._state = _State.THINKING if self._state is _State.THINKING_START else _State.ANSWER
        return bool(self._held)

    def _start(self) -> bool:
        begun = self._held.lstrip()
        if begun.startswith(OPEN):
            self._held = begun[len(OPEN) :]
            self._state = _State.THINKING_START
            return True
        if OPEN.startswith(begun):
            return False
        self._state = _State.THINKING_START if self._thinking else _State.ANSWER
        return True

    def _think(self, events: list[Event]) -> bool:
        thought, tag, rest = self._held.partition(CLOSE)
        if tag:
            events.append(Reasoning(thought.rstrip("\n")))
            self._held, self._state = rest, _State.AFTER
            self._thought = self._fed - len(rest)
            return True
        kept = next(n for n in range(len(CLOSE) - 1, -1, -1) if self._held.endswith(CLOSE[:n]))
        shown = self._held[: len(self._held) - kept].rstrip("\n")
        events.append(Reasoning(shown))
        self._held = self._held[len(shown) :]
        return False
