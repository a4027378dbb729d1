"""A rate limit of so much a minute: a bucket that holds one minute's worth and fills evenly.

What is spent may exceed what is there: the debt is paid before anything new is let in. Times are the caller's seconds.
"""

from __future__ import annotations

_MINUTE_S = 60.0


class Bucket:
    def __init__(self, per_minute: int, now: float) -> None:
        self.per_minute = per_minute
        self._level = float(per_minute)
        self._filled_at = now

    def level(self, now: float) -> float:
        """What may be spent now; negative while there is debt."""
        fresh = max(0.0, now - self._filled_at) * self.per_minute / _MINUTE_S
        self._level = min(float(self.per_minute), self._level + fresh)
        self._filled_at = max(now, self._filled_at)
        return self._level

    def spend(self, amount: float, now: float) -> None:
        self._level = self.level(now) - amount

    def wait_s(self, amount: float, now: float) -> float:
        """Until `amount` is there; 0 when it is."""
        return max(0.0, amount - self.level(now)) * _MINUTE_S / self.per_minute

    def lower_to(self, level: float, now: float) -> None:
        """Another one who watches the same limit has seen more spent."""
        self._level = min(self.level(now), level)

    def resize(self, per_minute: int, now: float) -> None:
        """The limit has changed; what is spent stays spent."""
        if per_minute != self.per_minute:
            spent = self.per_minute - self.level(now)
            self.per_minute = per_minute
            self._level = per_minute - spent
