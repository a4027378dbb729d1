"""Where the HTTP port is: as a URL that works on this machine, and whether HAProxy can be there."""

from __future__ import annotations

_EVERYWHERE = {"0.0.0.0": "127.0.0.1", "::": "::1"}


def is_ipv6(host: str) -> bool:
    """Whether it is an IPv6 address, as the only hosts that have colons are."""
    return ":" in host


def reachable_url(host: str, port: int, *, tls: bool) -> str:
    """The URL by which a server that listens on `host` is reached from here."""
    host = _EVERYWHERE.get(host, host)
    name = f"[{host}]" if is_ipv6(host) else host
    return f"{'https' if tls else 'http'}://{name}:{port}"
