"""Transition tables as data: state x event -> actions, next state.

A table is made once, from a literal that reads like the one in docs/protocol.md, and never changes. It knows nothing of
rooms or messages: the half that owns it looks a move up, enters the next state and carries the actions out in order.
"""

from __future__ import annotations

import enum
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Generic, TypeVar

S = TypeVar("S", bound=enum.Enum)
E = TypeVar("E", bound=enum.Enum)
A = TypeVar("A", bound=enum.Enum)


class IllegalMove(RuntimeError):
    """An event came in a state that the table has no move for: a bug of the half, never of a peer."""


@dataclass(frozen=True, slots=True)
class Move(Generic[S, A]):
    """What one event does in one state."""

    actions: tuple[A, ...]
    """Carried out in this order, after the state was entered."""
    state: S
    """The next state."""


class Transitions(Generic[S, E, A]):
    """The moves of one kind of room."""

    def __init__(self, moves: Mapping[S, Mapping[E, Move[S, A]]]) -> None:
        self._moves = {(state, event): move for state, row in moves.items() for event, move in row.items()}

    def move(self, state: S, event: E) -> Move[S, A]:
        """The move of `event` in `state`; raises `IllegalMove` when there is none."""
        try:
            return self._moves[state, event]
        except KeyError:
            raise IllegalMove(f"{event.name} cannot happen to a room that is {state.name}") from None

    def __contains__(self, key: tuple[S, E]) -> bool:
        return key in self._moves

    def __iter__(self) -> Iterator[tuple[S, E, Move[S, A]]]:
        """Every (state, event, move), in the order of the literal."""
        for (state, event), move in self._moves.items():
            yield state, event, move

    def replaced(self, state: S, event: E, move: Move[S, A]) -> Transitions[S, E, A]:
        """The same table with one move in place of another; for tests that prove a rule matters."""
        changed: dict[S, dict[E, Move[S, A]]] = {}
        for (one, other), old in self._moves.items():
            changed.setdefault(one, {})[other] = move if (one, other) == (state, event) else old
        return Transitions(changed)
