"""One sequence to generate: its tokens, its pages and where it stands.

A `Request` is made by whoever brings it, registered with the engine by `Engine.add` or `Engine.reserve`, and from then
on changed by the engine thread alone. Its life:

    NEW -> WAITING            add: wants pages and a place in the batch
    NEW -> RECEIVING          reserve: has pages for all of its prompt, whose KV comes from elsewhere
    RECEIVING -> NEW          unreserve: the reservation was revoked
    WAITING -> RUNNING        scheduled: has pages, is computed in steps
    RECEIVING -> RUNNING      admit: the KV is there
    RUNNING -> WAITING        preempted: gave its pages up, will be computed again from its tokens
    RUNNING -> SENDING        retain: its first token is sampled, its pages stay for the peer that takes them
    any of them -> FINISHED   ended, released, aborted or failed
"""

from __future__ import annotations

import enum
from collections.abc import Hashable, Sequence

import numpy as np
import numpy.typing as npt

from engine.grammar.constraint import Constraint
from engine.page_table import PageTable
from protocol.sampling import SamplingParams
from protocol.scoring import Scoring


class RequestStatus(enum.Enum):
    NEW = "new"
    WAITING = "waiting"
    RECEIVING = "receiving"
    RUNNING = "running"
    SENDING = "sending"
    FINISHED = "finished"


_TRANSITIONS: dict[RequestStatus, frozenset[RequestStatus]] = {
    RequestStatus.NEW: frozenset({RequestStatus.WAITING, RequestStatus.RECEIVING}),
    RequestStatus.WAITING: frozenset({RequestStatus.RUNNING, RequestStatus.FINISHED}),
    RequestStatus.RECEIVING: frozenset({RequestStatus.RUNNING, RequestStatus.NEW, RequestStatus.FINISHED}),
    RequestStatus.RUNNING: frozenset({RequestStatus.WAITING, RequestStatus.SENDING, RequestStatus.FINISHED}),
    RequestStatus.SENDING: frozenset({RequestStatus.FINISHED}),
    RequestStatus.FINISHED: frozenset(),
}


class IllegalTransition(RuntimeError):
    """A request was told to make a move that its status does not allow."""


class Request:
    """A prompt, what was generated after it so far, and how to go on.

    `key` names the request in its engine. `logged` are tokens generated elsewhere before; generation goes on after
    them. With `retain` the request is prefill-only: after its first token its pages are kept until `Engine.release`.
    `constraint` is the place in its grammar after `logged`, if `sampling` has one.
    With `scoring` the prompt's tokens are scored as they are computed. Requests go by priority, the highest first, then
    by age: `arrival` is in any unit that grows; equal ones go by order of registration. Raises ValueError for an empty
    prompt.
    """

    def __init__(
        self,
        *,
        key: Hashable,
        prompt: Sequence[int],
        sampling: SamplingParams,
        choice: int = 0,
        logged: Sequence[int] = (),
        namespace: str = "",
        retain: bool = False,
        arrival: float = 0.0,
        constraint: Constraint | None = None,
        scoring: Scoring | None = None,
        priority: int = 0,
    ) -> None:
        if not prompt:
            raise ValueError("the prompt is empty; at least one token is needed to generate from")
        if scoring is not None and logged:
            raise ValueError("a prompt after which tokens are logged has been scored before; leave scoring out")
        self.key = key
        self.sampling = sampling
        self.constraint = constraint
        self.choice = choice
        self.namespace = namespace
        self.retain = retain
        self.arrival = arrival
        self.priority = priority
        self.num_prompt_tokens = len(prompt)
        """Tokens of the prompt proper, `logged` not included."""
        self.scoring = scoring
        self.next_score = len(prompt) if scoring is None else min(scoring.start, len(prompt))
        """Position of the next token to be scored; the prompt's length when none is left."""
        self.num_tokens = len(prompt) + len(logged)
        """All tokens known: prompt, logged and generated."""
        self._buffer = np.empty(self.num_tokens + 32, np.int64)
        self._buffer[: len(prompt)] = prompt
        self._buffer[len(prompt) : self.num_tokens] = logged

        self.table = PageTable()
        self.num_computed = 0
        """Leading tokens whose KV is in the pages."""
        self.num_cached = 0
        """Leading tokens whose KV the prefix cache had when pages were first given."""
        self.num_outputs = 0
        """Tokens this engine has reported."""
        self.num_preemptions = 0
        self.overtaken = 0
        """Later requests let in while this one waited and did not fit."""
        self.room_sought = (-1, 0)
        """(insertions into the prefix cache so far, pages missing) when pages were last sought."""
        self.registration = 0
        """Number given by the engine; with `arrival` the age."""
        self.limit = 0
        """Tokens the sequence may have in all, set by the engine."""
        self._status = RequestStatus.NEW

    @property
    def status(self) -> RequestStatus:
        return self._status

    def move_to(self, status: RequestStatus) -> None:
        """Change the status; raises `IllegalTransition` for a move that is not in the table."""
        if status not in _TRANSITIONS[self._status]:
            raise IllegalTransition(f"request {self.key!r} cannot go from {self._status.name} to {status.name}")
        self._status = status

    @property
    def age_key(self) -> tuple[int, float, int]:
        """Ascending from the oldest request of the highest priority to the youngest of the lowest."""
        return (-self.priority, self.arrival, self.registration)

    @property
    def tokens(self) -> npt.NDArray[np.int64]:
        """int64 `[num_tokens]`, a view: prompt, logged, generated."""
        return self._buffer[: self.num_tokens]

    @property
    def num_reusable(self) -> int:
        """Leading tokens whose KV may come from the prefix cache: a scored token needs the logits before it, and the
        next one those of the last."""
        if self.next_score < self.num_prompt_tokens:
            return self.next_score - 1
        return self.num_tokens - 1

    def num_scored(self, count: int) -> int:
        """Prompt tokens that the logits of the next `count` tokens to be computed score."""
        computed = min(self.num_computed + count, self.num_prompt_tokens - 1)
        return max(0, computed - (self.next_score - 1))

    @property
    def num_generated(self) -> int:
        """Tokens after the prompt, logged ones included: the position of the next token."""
        return self.num_tokens - self.num_prompt_tokens

    @property
    def generated(self) -> list[int]:
        """Tokens after the prompt, logged ones included."""
        tokens: list[int] = self._buffer[self.num_prompt_tokens : self.num_tokens].tolist()
        return tokens

    @property
    def pages(self) -> list[int]:
        """Page ids in order of position."""
        return self.table.to_list()

    def append(self, token: int) -> None:
        """Add a generated token."""
        if self.num_tokens == len(self._buffer):
            self._buffer = np.concatenate([self._buffer, np.empty_like(self._buffer)])
        self._buffer[self.num_tokens] = token
        self.num_tokens += 1
