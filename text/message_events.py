"""What an assistant's output is made of, in the order in which it was generated."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Content:
    """Text for the reader."""

    text: str


@dataclass(frozen=True, slots=True)
class Reasoning:
    """Text the model wrote for itself."""

    text: str


@dataclass(frozen=True, slots=True)
class CallStart:
    """A call of a tool begins; its arguments follow, until the next event of another kind."""

    name: str


@dataclass(frozen=True, slots=True)
class CallArguments:
    """A piece of the JSON of the arguments of the call that began last."""

    text: str


Event = Content | Reasoning | CallStart | CallArguments


def merged(events: list[Event]) -> list[Event]:
    """The same with adjacent texts of one kind joined, and nothing empty."""
    result: list[Event] = []
    for event in events:
        last = result[-1] if result else None
        if isinstance(event, CallStart):
            result.append(event)
        elif isinstance(event, Content) and isinstance(last, Content):
            result[-1] = Content(last.text + event.text)
        elif isinstance(event, Reasoning) and isinstance(last, Reasoning):
            result[-1] = Reasoning(last.text + event.text)
        elif isinstance(event, CallArguments) and isinstance(last, CallArguments):
            result[-1] = CallArguments(last.text + event.text)
        elif event.text:
            result.append(event)
    return result
