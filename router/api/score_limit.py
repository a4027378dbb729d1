"""How many log-probabilities of its prompts one request may ask for: the router holds them all until it answers."""

from __future__ import annotations

from collections.abc import Iterable

from protocol.rooms import Job
from router.api.fields import invalid, shown

MAX_NUMBERS = 1 << 21
"""Of one request, each some tens of bytes once it is written."""


def check_scores(jobs: Iterable[Job], *, param: str, value: object) -> None:
    """Raises `ApiError` (400) for more than the limit; `param` is the field that asks for most, with its `value`."""
    numbers = 0
    for job in jobs:
        if job.scoring is not None:
            positions = max(0, len(job.prompt) - job.scoring.start)
            numbers += positions * (1 + 2 * job.scoring.top + len(job.scoring.tokens))
    if numbers > MAX_NUMBERS:
        raise invalid(
            param,
            f"{shown(value)} asks for {numbers} numbers about the prompts' tokens, over the limit of {MAX_NUMBERS} a "
            "request; ask for less, or send fewer or shorter prompts",
        )
