"""The tables in docs/protocol.md are the tables in the code, cell by cell."""

from __future__ import annotations

import enum
from collections.abc import Sequence
from pathlib import Path

import pytest

from decode.table import DECODE_TABLE, DecodeEvent, DecodeState
from prefill.table import PREFILL_TABLE, PrefillEvent, PrefillState
from protocol.transitions import Transitions

DOCUMENT = Path(__file__).parents[2] / "docs" / "protocol.md"


def render(table: Transitions, states: Sequence[enum.Enum], events: Sequence[enum.Enum]) -> str:
    """The table as Markdown: a row per event, a column per state."""
    lines = [
        "| event | " + " | ".join(state.name for state in states) + " |",
        "| --- " * (len(states) + 1) + "|",
    ]
    for event in events:
        cells = [_cell(table, state, event) for state in states]
        lines.append(f"| {event.value} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cell(table: Transitions, state: enum.Enum, event: enum.Enum) -> str:
    if (state, event) not in table:
        return "-"
    move = table.move(state, event)
    actions = ", ".join(action.value for action in move.actions) or "nothing"
    return actions if move.state is state else f"{actions} → {move.state.name}"


@pytest.mark.parametrize(
    ("name", "table", "states", "events"),
    [
        ("prefill", PREFILL_TABLE, PrefillState, PrefillEvent),
        ("decode", DECODE_TABLE, DecodeState, DecodeEvent),
    ],
)
def test_the_document_has_the_table(
    name: str, table: Transitions, states: type[enum.Enum], events: type[enum.Enum]
) -> None:
    expected = render(table, list(states), list(events))
    assert expected in DOCUMENT.read_text(), f"the {name} table in {DOCUMENT.name} should be:\n{expected}"
