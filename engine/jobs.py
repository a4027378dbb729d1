"""A job that came over a link, as a request to an engine."""

from __future__ import annotations

from engine.grammar.constraint import Constraint
from engine.request import Request
from protocol.rooms import Job, Room


def request_of(
    job: Job,
    room: Room,
    *,
    arrival: float,
    constraint: Constraint | None,
    retain: bool = False,
    scored_elsewhere: bool = False,
) -> Request:
    """The request of `room`, under that key; what is not the job's is described at `Request`. A prompt that is
    `scored_elsewhere` is not scored here, whatever the job says."""
    return Request(
        key=room,
        prompt=job.prompt,
        sampling=job.sampling,
        choice=job.choice,
        logged=job.logged,
        namespace=job.namespace,
        retain=retain,
        arrival=arrival,
        constraint=constraint,
        scoring=None if scored_elsewhere else job.scoring,
        priority=job.priority,
    )
