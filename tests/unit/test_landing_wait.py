"""A step waits for prompts that land in a moment, no longer than that pays, and for each of them once."""

from __future__ import annotations

import pytest

from cluster.landing_wait import LandingWait
from protocol.rooms import Room

A, B = Room("a", 0), Room("b", 0)


def waiting(step_s: float) -> LandingWait:
    wait = LandingWait(longest_s=0.005)
    wait.stepped(step_s)
    return wait


@pytest.mark.parametrize(
    ("landing", "running", "seconds"),
    [
        ([], 8, 0.0),
        ([A], 8, 0.002),  # eight streams lose as much as one prompt gains
        ([A, B], 8, 0.004),
        ([A, B], 4, 0.005),  # the limit
        ([A], 0, 0.005),
    ],
)
def test_the_wait_is_worth_what_it_costs(landing: list[Room], running: int, seconds: float) -> None:
    assert waiting(0.016).seconds(frozenset(landing), running=running) == pytest.approx(seconds)


def test_nothing_is_waited_for_before_the_first_step() -> None:
    assert LandingWait().seconds(frozenset([A]), running=1) == 0.0


def test_a_room_is_waited_for_once() -> None:
    wait = waiting(0.016)
    assert wait.seconds(frozenset([A]), running=8) > 0
    assert wait.seconds(frozenset([A]), running=8) == 0
    assert wait.seconds(frozenset([A, B]), running=8) == pytest.approx(0.002), "for the new one alone"
