"""How many log-probabilities one request may ask for: the router holds them all until it answers."""

from __future__ import annotations

from collections.abc import Iterable

from protocol.rooms import Job
from router.api.fields import invalid, shown
from router.work import Work

MAX_NUMBERS = 1 << 21
"""About the prompts of one request, each some tens of bytes once it is written."""


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


def check_output_numbers(work: Work, *, most: int, param: str, limit_name: str) -> None:
    """Raises `ApiError` (400) where the outputs could have more than `most` log-probabilities.

    `param` is the field that asks for the likeliest tokens, or for any; `limit_name` bounds the number of tokens.
    """
    numbers = sum(job.sampling.max_tokens * job.sampling.numbers_per_token for job in work.jobs)
    if numbers > most:
        each = max(job.sampling.numbers_per_token for job in work.jobs)
        tokens = max(job.sampling.max_tokens for job in work.jobs)
        raise invalid(
            param,
            f"{len(work.jobs)} outputs (prompts times n) of up to {tokens} tokens ({limit_name}, or what the context "
            f"leaves) with {each} log-probabilities each are {numbers} numbers, over the limit of {most} a request; "
            f"lower {limit_name}, n or {param}, or send fewer prompts at a time",
        )
