"""How much this router takes on at once: sequences under way, and prompt tokens that wait for their first answer; and
whether the tenant who asks may have more (`tenants.py`).

Whoever is refused is told at once and when to come back; nothing queues here.
"""

from __future__ import annotations

from router.config import RouterConfig
from router.errors import overloaded
from router.metrics import RouterMetrics
from router.tenants import TenantBook, TenantTicket


class Ticket:
    """One admitted request's share of the limits; give back with `close`."""

    def __init__(self, admission: Admission, place: TenantTicket, sequences: int, prompt_tokens: int) -> None:
        self._admission = admission
        self._place = place
        self._sequences = sequences
        self._queued_tokens = prompt_tokens

    def answered(self) -> None:
        """The first token is there: the prompt is no longer queued."""
        self._admission.queued_tokens -= self._queued_tokens
        self._queued_tokens = 0

    def generated(self, tokens: int) -> None:
        """So many output tokens were made for it."""
        self._place.generated(tokens)

    def close(self) -> None:
        """The request is over; harmless when repeated."""
        self._place.close()
        self.answered()
        self._admission.sequences -= self._sequences
        self._sequences = 0


class Admission:
    """Counts what is under way."""

    def __init__(self, config: RouterConfig, metrics: RouterMetrics, tenants: TenantBook) -> None:
        self._config = config
        self.tenants = tenants
        self.sequences = 0
        self.queued_tokens = 0
        metrics.add_gauge("router_admitted_sequences", "sequences admitted and not over", lambda: self.sequences)
        metrics.add_gauge("router_queued_tokens", "prompt tokens without an answer yet", lambda: self.queued_tokens)

    def admit(self, *, tenant: str, sequences: int, prompt_tokens: int, priority: int = 0) -> Ticket:
        """Take on a tenant's request of that many sequences; raises `ApiError`: 429 when it does not fit now, 403 for
        more `priority` than the tenant may have."""
        config = self._config
        if self.sequences + sequences > config.max_concurrent_sequences:
            message = (
                f"{self.sequences} sequences are under way and this request asks for {sequences}, over the limit of "
                f"{config.max_concurrent_sequences}; try again later"
            )
            raise overloaded(429, message, code="too_many_requests", retry_after_s=config.retry_after_s)
        # One request alone may exceed the limit on queued tokens: its context length bounds it.
        if self.queued_tokens and self.queued_tokens + prompt_tokens > config.max_queued_tokens:
            message = (
                f"{self.queued_tokens} prompt tokens wait and this request adds {prompt_tokens}, over the limit of "
                f"{config.max_queued_tokens}; try again later"
            )
            raise overloaded(429, message, code="too_many_tokens", retry_after_s=config.retry_after_s)
        place = self.tenants.admit(tenant, prompt_tokens=prompt_tokens, priority=priority)
        self.sequences += sequences
        self.queued_tokens += prompt_tokens
        return Ticket(self, place, sequences, prompt_tokens)
