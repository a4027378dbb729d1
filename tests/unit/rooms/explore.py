"""Which schedules of a world are tried: all that deviate a bounded number of times from the plain one, and random ones.

The plain schedule always takes the first step there is. A deviation is any other step, or a fault, taken instead; after
the last one the world goes on plainly to its end, where everything must have ended well. Schedules are replayed from
the start, because that is cheaper than copying a world; a state that was reached before with as many deviations left
is not followed again. (Delay-bounded scheduling: Emmi, Qadeer, Rakamarić, 2011.)
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

from tests.unit.rooms.fingerprint import fingerprint
from tests.unit.rooms.replica import LawBroken
from tests.unit.rooms.world import Step, World

MakeWorld = Callable[[], World]


@dataclass
class Explored:
    """What an exploration covered."""

    schedules: int = 0
    states: int = 0
    deepest: int = 0


def explore(make: MakeWorld, *, deviations: int) -> Explored:
    """Try every schedule of at most `deviations` deviations. Raises what a schedule raises, with the schedule."""
    explored = Explored()
    seen: dict[int, int] = {}
    stack: list[tuple[tuple[Step, ...], int]] = [((), deviations)]
    while stack:
        path, left = stack.pop()
        explored.schedules += 1
        try:
            _follow(make, path, left, seen, stack)
        except Exception as error:
            raise LawBroken(f"{error} after {list(path)} and then plainly") from error
        explored.deepest = max(explored.deepest, len(path))
    explored.states = len(seen)
    return explored


def _follow(
    make: MakeWorld,
    path: tuple[Step, ...],
    left: int,
    seen: dict[int, int],
    stack: list[tuple[tuple[Step, ...], int]],
) -> None:
    world = make()
    for step in path[:-1]:
        world.do(step, check=False)
    if path:
        world.do(path[-1])
    done = path
    while True:
        state = fingerprint(world)
        if seen.get(state, -1) >= left:
            return
        seen[state] = left
        steps = world.steps()
        if left:
            stack += [((*done, other), left - 1) for other in [*steps[1:], *world.faults()]]
        if not steps:
            break
        world.do(steps[0])
        done = (*done, steps[0])
    world.run_out()


def walk(
    make: MakeWorld, *, seed: int, faults: int, fault_rate: float, wait_rate: float = 0.0, length: int = 80
) -> World:
    """Take random steps, and up to `faults` faults among them; then let the world end.

    At `wait_rate` time passes though something could happen, up to the next lease or retry.
    """
    choose = random.Random(seed)
    world = make()
    for _ in range(length):
        if choose.random() < wait_rate and world.next_wait < 30.0:
            world.do(("wait",))
        wrong = world.faults() if faults and choose.random() < fault_rate else []
        possible = wrong or world.steps()
        if not possible:
            break
        faults -= bool(wrong)
        world.do(choose.choice(possible))
    world.run_out()
    return world
