"""Memory for the log-probabilities of output tokens, over all requests of one router.

They are kept until their request is over: an answer that is not streamed is written from them, and a stream that is
come back to once more. A request takes space for them as they come. Nobody waits for space: a request that finds none
ends, so that many large ones cannot end the router.
"""

from __future__ import annotations

from collections.abc import Sequence

from protocol.rooms import Job
from router.errors import overloaded
from router.metrics import RouterMetrics
from router.token_stream import Ready


class NumberSpace:
    """Of one router, on its event loop."""

    def __init__(self, *, most: int, retry_after_s: int, metrics: RouterMetrics) -> None:
        """`most` numbers are kept at once."""
        self._most = most
        self._retry_after_s = retry_after_s
        self._taken = 0
        metrics.add_gauge("router_output_logprobs", "log-probabilities of outputs kept", lambda: self._taken)

    def hold(self, jobs: Sequence[Job]) -> HeldNumbers:
        """The part of a request of these jobs, nothing as yet."""
        return HeldNumbers(self, [job.sampling.numbers_per_token for job in jobs])

    def take(self, count: int) -> None:
        """Have space for so many, until they are given back; raises `ApiError` (429) where there is too little."""
        if self._taken + count > self._most:
            message = (
                f"the log-probabilities that requests under way have asked for are {self._taken} numbers, and this "
                f"router has space for {self._most}; try again, or ask for fewer (logprobs, top_logprobs)"
            )
            raise overloaded(429, message, code="too_many_logprobs", retry_after_s=self._retry_after_s)
        self._taken += count

    def give_back(self, count: int) -> None:
        self._taken -= count


class HeldNumbers:
    """What one request has of the space; `close` it when the request is over."""

    def __init__(self, space: NumberSpace, per_token: Sequence[int]) -> None:
        """`per_token` are the numbers that come with each token of each sequence."""
        self._space = space
        self._per_token = per_token if any(per_token) else ()
        self._held = 0

    def take(self, ready: Ready) -> None:
        """Have space for what comes with these tokens; raises `ApiError` (429) where there is too little."""
        if self._per_token:
            count = sum(self._per_token[index] for index, _ in ready)
            self._space.take(count)
            self._held += count

    def close(self) -> None:
        """Give everything back; harmless when repeated."""
        self._space.give_back(self._held)
        self._held = 0
