"""What a request is given when it comes, and what everything about it that is drawn or dated follows from.

A stamp's token is the body of the response's id. It names the router that had the request first and carries the time,
and the seed is a function of it: so the same body parsed again with the same token is the same request.
"""

from __future__ import annotations

import hashlib
import secrets
import time
from dataclasses import dataclass

_OWNER_DIGITS = 8
_TIME_DIGITS = 8
_RANDOM_BYTES = 8
_TOKEN_DIGITS = _OWNER_DIGITS + _TIME_DIGITS + 2 * _RANDOM_BYTES
_HEX = frozenset("0123456789abcdef")


def new_router_key() -> str:
    """What stamps call a router, in this life of it."""
    return secrets.token_hex(_OWNER_DIGITS // 2)


@dataclass(frozen=True)
class Stamp:
    """One request's token, and the tenant it came from ("" where there are no keys)."""

    token: str
    tenant: str = ""

    @classmethod
    def new(cls, router_key: str, *, tenant: str = "") -> Stamp:
        return cls(f"{router_key}{int(time.time()):0{_TIME_DIGITS}x}{secrets.token_hex(_RANDOM_BYTES)}", tenant)

    @property
    def owner(self) -> str:
        """The key of the router that made it."""
        return self.token[:_OWNER_DIGITS]

    @property
    def created(self) -> int:
        """Unix time."""
        return int(self.token[_OWNER_DIGITS : _OWNER_DIGITS + _TIME_DIGITS], 16)

    @property
    def seed(self) -> int:
        """For a request that brings none: below 2**63."""
        return int.from_bytes(hashlib.blake2b(self.token.encode(), digest_size=8).digest()) >> 1

    def namespace(self, salt: str | None) -> str:
        """The prefix-cache namespace of this tenant's requests with that salt; the salt itself is not in it."""
        if salt is None:
            return self.tenant
        return f"{self.tenant}/{hashlib.blake2b(salt.encode(), digest_size=16).hexdigest()}"


def token_of(response_id: str) -> str | None:
    """The token in a response's id, such as "chatcmpl-..." or the bare token; None where there is none."""
    token = response_id.rpartition("-")[2]
    return token if len(token) == _TOKEN_DIGITS and _HEX.issuperset(token) else None
