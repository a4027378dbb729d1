"""API keys and tenants' limits, as one file says them: YAML or JSON, read whole and never changed afterwards.

```yaml
keys:
  - key: sk-alice-1          # or its SHA-256: `sha256: 9f86d0...`, which is all that is kept of it in memory
    tenant: alice
    admin: true              # may use the endpoints that act on everybody's requests
tenants:                     # limits over all routers; what is left out is not limited
  alice: {max_concurrent_requests: 8, requests_per_minute: 600, tokens_per_minute: 100000, max_priority: 10}
default_limits: {requests_per_minute: 60}    # of tenants that are not listed
```
"""

from __future__ import annotations

import hashlib
import hmac
import re
from typing import Annotated, Any

import msgspec

_TENANT = re.compile(r"[A-Za-z0-9_.@-]{1,64}")
_DIGEST = re.compile(r"[0-9a-fA-F]{64}")

Limit = Annotated[int, msgspec.Meta(ge=1, lt=2**53)]
Priority = Annotated[int, msgspec.Meta(ge=0, lt=2**31)]


class BadKeyFile(ValueError):
    """The file cannot be used; the message says where and why, and never quotes a key."""


class TenantLimits(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What one tenant may do over all routers; None is no limit."""

    max_concurrent_requests: Limit | None = None
    requests_per_minute: Limit | None = None
    tokens_per_minute: Limit | None = None
    """Prompt and output tokens together."""
    max_priority: Priority = 0
    """How far a request may go before those that ask for no priority: nobody overtakes other tenants who was not told
    that they may. Any request may step back."""


NO_LIMITS = TenantLimits(max_priority=2**31 - 1)
"""Where there are no keys, and so nobody else to overtake."""


class Principal(msgspec.Struct, frozen=True):
    """Who a request is from."""

    tenant: str
    admin: bool = False


ANYONE = Principal("", admin=True)
"""Everybody, where there are no keys."""


class _Entry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    tenant: str
    key: str | None = None
    sha256: str | None = None
    admin: bool = False


class _File(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    keys: list[_Entry]
    tenants: dict[str, TenantLimits] = {}
    default_limits: TenantLimits = TenantLimits()


class KeyTable:
    """The keys of one reading of the file, by digest only."""

    def __init__(
        self, principals: dict[bytes, Principal], limits: dict[str, TenantLimits], default: TenantLimits
    ) -> None:
        self._principals = principals
        self._limits = limits
        self._default = default

    def __len__(self) -> int:
        return len(self._principals)

    def find(self, key: str) -> Principal | None:
        """Whose key it is. The time this takes tells nothing about the keys there are."""
        presented = hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()
        found = None
        for digest, principal in self._principals.items():
            if hmac.compare_digest(digest, presented):
                found = principal
        return found

    def limits(self, tenant: str) -> TenantLimits:
        return self._limits.get(tenant, self._default)


def parse_keys(text: str) -> KeyTable:
    """The table in a file's text; raises `BadKeyFile`."""
    file = _read(text)
    if not file.keys:
        raise BadKeyFile("keys is empty, so nobody could use the server; list a key, or set no api_keys_file")
    principals: dict[bytes, Principal] = {}
    for number, entry in enumerate(file.keys):
        digest = _digest(entry, f"keys[{number}]")
        if digest in principals:
            raise BadKeyFile(f"keys[{number}]: the key of tenant {entry.tenant!r} stands there twice; remove one")
        principals[digest] = Principal(_tenant(entry.tenant, f"keys[{number}].tenant"), entry.admin)
    for name in file.tenants:
        _tenant(name, "tenants")
    return KeyTable(principals, file.tenants, file.default_limits)


def _read(text: str) -> _File:
    import yaml

    try:
        document: Any = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: a date that there is not, for one
        mark = getattr(error, "problem_mark", None)  # the error's own words may quote a key
        place = "" if mark is None else f" (line {mark.line + 1})"
        raise BadKeyFile(f"it is neither YAML nor JSON{place}") from None
    try:
        return msgspec.convert(document, _File)
    except msgspec.ValidationError as error:
        raise BadKeyFile(f"{error}; router/auth_keys.py has an example") from None


def _digest(entry: _Entry, place: str) -> bytes:
    if (entry.key is None) == (entry.sha256 is None):
        raise BadKeyFile(f"{place} needs either key or sha256")
    if entry.sha256 is not None:
        if not _DIGEST.fullmatch(entry.sha256):
            raise BadKeyFile(f"{place}.sha256 is not a SHA-256; give the 64 hexadecimal digits of `sha256sum`")
        return bytes.fromhex(entry.sha256)
    assert entry.key is not None
    if not (entry.key.isascii() and entry.key.isprintable()) or not entry.key or " " in entry.key:
        raise BadKeyFile(f"{place}.key cannot stand in a header; use visible ASCII characters without spaces")
    return hashlib.sha256(entry.key.encode()).digest()


def _tenant(name: str, place: str) -> str:
    if not _TENANT.fullmatch(name):
        raise BadKeyFile(f"{place} is {name[:80]!r}; use 1 to 64 letters, digits and _ . @ -")
    return name
