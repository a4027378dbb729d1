"""Runs random schedules of fetch, cancel, deadline, detach, attach and faults in the worlds of `transfer_world.py`.

A schedule is a pure function of its seed. One that fails says its seed, its operations and how to run it again alone.
"""

from __future__ import annotations

import contextlib
import logging
import os
import random
import threading
from collections.abc import Callable, Iterator

import pytest
from transfer_world import Operation, World

_SEED = "SCHEDULE_SEED"


def run_schedules(make: Callable[[random.Random], World], count: int, *, length: int = 25, keep: bool = False) -> None:
    """Run the schedules of the seeds from 0 on, each in the world that `make` gives for it.

    Half of them end by closing the fetcher in the middle of everything; none with `keep`, which leaves the worlds as
    they are for the next.
    """
    chosen = os.environ.get(_SEED)
    for seed in range(count) if chosen is None else [int(chosen)]:
        choose = random.Random(seed)
        operations: list[Operation] = []
        world = make(choose)
        closes = not keep and choose.random() < 0.5
        try:
            for _ in range(choose.randint(0, length)):
                operations.append(world.draw(choose))
                world.run(operations[-1])
            if not closes:
                world.rest()
            if not keep:
                world.close()
        except Exception as error:
            error.add_note(f"in the schedule of seed {seed}: {operations}, then {'close' if closes else 'rest'}")
            error.add_note(f"again: {_SEED}={seed} python -m pytest '{os.environ.get('PYTEST_CURRENT_TEST', '')}'")
            with contextlib.suppress(Exception):  # so that nothing of it outlives the test
                world.go()
                world.fetcher.close()
                world.memory.close()
            raise


@contextlib.contextmanager
def unharmed(caplog: pytest.LogCaptureFixture, *, quiet: int = logging.ERROR) -> Iterator[None]:
    """Nothing of the schedules is left behind, and nothing was logged at level `quiet` or above."""
    before = threading.active_count()
    yield
    assert threading.active_count() == before
    assert [record.getMessage() for record in caplog.records if record.levelno >= quiet] == []
