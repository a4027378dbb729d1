"""What each tenant does, and how much of it their limits allow, over all routers.

Each router counts its own requests exactly and hears every second, by way of the directory, what the others have
counted (`report`, `take_reports`). What it hears is taken off its own buckets, as a debt where need be. So over any
time t a tenant is let in for at most limit x (1 + t / 60 s), plus what all routers but one let in while the news is
under way, two seconds at most; without the directory, each router allows the whole limit. Output tokens are spent as
they are generated: requests that were let in may overdraw the tokens, and the next ones wait until that is paid.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from protocol.membership import RouterReport, TenantUse
from router.auth_keys import TenantLimits
from router.errors import ApiError
from router.metrics import RouterMetrics
from router.tenant_bucket import Bucket

_MOST_LABELS = 200
"""Tenants with numbers of their own in the metrics; further ones are counted together."""
_OTHERS = "(others)"
_ANYBODY = "(anybody)"
_BUSY_RETRY_S = 1


@dataclass
class _Account:
    """One tenant here."""

    started: int = 0
    spent: int = 0
    """Tokens."""
    concurrent: int = 0
    buckets: dict[str, Bucket] = field(default_factory=dict)


class TenantTicket:
    """One request's place in its tenant's account; `close` it at the end."""

    def __init__(self, book: TenantBook, tenant: str) -> None:
        self._book = book
        self._tenant = tenant
        self._open = True

    def generated(self, tokens: int) -> None:
        self._book.spend(self._tenant, tokens)

    def close(self) -> None:
        """The request is over; harmless when repeated."""
        if self._open:
            self._open = False
            self._book.leave(self._tenant)


class TenantBook:
    """Accounts by tenant. `limits` says what a tenant may do now; times are seconds of `clock`."""

    def __init__(
        self, limits: Callable[[str], TenantLimits], *, clock: Callable[[], float], metrics: RouterMetrics
    ) -> None:
        self._limits = limits
        self._clock = clock
        self._metrics = metrics
        self._accounts: dict[str, _Account] = {}
        self._labels: dict[str, str] = {}
        self._peers: dict[str, dict[str, TenantUse]] = {}
        """What each other router last said, by its key."""

    def admit(self, tenant: str, *, prompt_tokens: int, priority: int = 0) -> TenantTicket:
        """Let a request in; raises `ApiError` where a limit says no: 429, and 403 for too much `priority`."""
        now, limits = self._clock(), self._limits(tenant)
        if priority > limits.max_priority:
            raise _too_eager(priority, limits.max_priority)
        account = self._account(tenant, now)
        refusal = self._busy(tenant, limits.max_concurrent_requests, account.concurrent) or _spent(
            account.buckets, {"requests": 1, "tokens": prompt_tokens}, now
        )
        if refusal is not None:
            self._metrics.tenant_refusals.add(label=self._label(tenant))
            raise refusal
        account.started += 1
        account.concurrent += 1
        self._metrics.tenant_requests.add(label=self._label(tenant))
        if (requests := account.buckets.get("requests")) is not None:
            requests.spend(1, now)
        self.spend(tenant, prompt_tokens)
        return TenantTicket(self, tenant)

    def spend(self, tenant: str, tokens: int) -> None:
        """Tokens were computed for the tenant."""
        account = self._accounts[tenant]
        account.spent += tokens
        self._metrics.tenant_tokens.add(tokens, label=self._label(tenant))
        if (bucket := account.buckets.get("tokens")) is not None:
            bucket.spend(tokens, self._clock())

    def leave(self, tenant: str) -> None:
        self._accounts[tenant].concurrent -= 1

    def headers(self, tenant: str) -> list[tuple[bytes, bytes]]:
        """The usual headers about what is left, of those limits that there are."""
        now = self._clock()
        told: list[tuple[bytes, bytes]] = []
        for name, bucket in self._account(tenant, now).buckets.items():
            left = max(0, math.floor(bucket.level(now)))
            full_in = bucket.wait_s(bucket.per_minute, now)
            for what, value in (("limit", bucket.per_minute), ("remaining", left), ("reset", f"{full_in:.1f}s")):
                told.append((f"x-ratelimit-{what}-{name}".encode(), str(value).encode()))
        return told

    # ---- between routers ----------------------------------------------------------------------------------------

    def report(self) -> dict[str, TenantUse]:
        """What the other routers need to know of this one."""
        now = self._clock()
        return {
            tenant: TenantUse(
                started=account.started,
                spent=account.spent,
                concurrent=account.concurrent,
                levels={name: bucket.level(now) for name, bucket in account.buckets.items()},
            )
            for tenant, account in self._accounts.items()
        }

    def take_reports(self, reports: Iterable[RouterReport]) -> None:
        """What all other routers that live have said last."""
        now = self._clock()
        fresh = {report.key: report.tenants for report in reports}
        for key, uses in fresh.items():
            known = self._peers.get(key)
            for tenant, use in uses.items():
                buckets = self._account(tenant, now).buckets
                if known is None:
                    # A router that was not known to this one: its counts began long ago, its levels are of now.
                    for name, level in use.levels.items():
                        if name in buckets:
                            buckets[name].lower_to(level, now)
                    continue
                before = known.get(tenant, TenantUse())
                if "requests" in buckets:
                    buckets["requests"].spend(use.started - before.started, now)
                if "tokens" in buckets:
                    buckets["tokens"].spend(use.spent - before.spent, now)
        self._peers = fresh

    # ---- inner workings -----------------------------------------------------------------------------------------

    def _account(self, tenant: str, now: float) -> _Account:
        """The tenant's account, its buckets as the limits are now."""
        account = self._accounts.setdefault(tenant, _Account())
        limits = self._limits(tenant)
        for name, limit in (("requests", limits.requests_per_minute), ("tokens", limits.tokens_per_minute)):
            if limit is None:
                account.buckets.pop(name, None)
            elif name in account.buckets:
                account.buckets[name].resize(limit, now)
            else:
                account.buckets[name] = Bucket(limit, now)
        return account

    def _busy(self, tenant: str, most: int | None, here: int) -> ApiError | None:
        elsewhere = sum(uses[tenant].concurrent for uses in self._peers.values() if tenant in uses)
        if most is None or here + elsewhere < most:
            return None
        busy = here + elsewhere
        message = f"{busy} requests of this tenant are under way, and {most} are allowed; wait for one to end"
        return _limited(message, retry_after_s=_BUSY_RETRY_S)

    def _label(self, tenant: str) -> str:
        if tenant not in self._labels:
            if len(self._labels) >= _MOST_LABELS:
                return _OTHERS
            self._labels[tenant] = tenant or _ANYBODY
        return self._labels[tenant]


def _spent(buckets: dict[str, Bucket], wanted: dict[str, int], now: float) -> ApiError | None:
    """Why these buckets do not hold what is wanted."""
    for name, bucket in buckets.items():
        amount = wanted[name]
        if amount > bucket.per_minute:
            most = bucket.per_minute
            message = f"the request takes {amount} {name}, and this tenant may use {most} a minute; send less"
            return _limited(message, retry_after_s=None)
        wait_s = bucket.wait_s(amount, now)
        if wait_s > 0:
            seconds = math.ceil(wait_s)
            message = (
                f"the request takes {amount} {name}, and {max(0, math.floor(bucket.level(now)))} of this tenant's "
                f"{bucket.per_minute} a minute are left; try again in {seconds} s"
            )
            return _limited(message, retry_after_s=seconds)
    return None


def _too_eager(priority: int, most: int) -> ApiError:
    """In words that are true of APIs where the greatest number goes first, and of those where the least does."""
    message = (
        f"priority: the request asks to go {priority} before others, and this tenant may go {most} before them; "
        "ask for less, leave it out, or have max_priority raised in the file of keys"
    )
    return ApiError(403, message, kind="permission_error", param="priority", code="priority_not_allowed")


def _limited(message: str, *, retry_after_s: int | None) -> ApiError:
    code = "rate_limit_exceeded"
    return ApiError(429, message, kind="rate_limit_error", code=code, retry_after_s=retry_after_s)
