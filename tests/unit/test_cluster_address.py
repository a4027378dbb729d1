"""Where a cluster is reached, by IPv4, IPv6 and names."""

from __future__ import annotations

import socket
import urllib.parse

import pytest

from cluster.address import is_ipv6, reachable_url
from cluster.readiness import StartFailed, check_port_free


@pytest.mark.parametrize(
    ("host", "tls", "url"),
    [
        ("127.0.0.1", False, "http://127.0.0.1:8000"),
        ("0.0.0.0", False, "http://127.0.0.1:8000"),
        ("localhost", True, "https://localhost:8000"),
        ("::1", False, "http://[::1]:8000"),
        ("::", True, "https://[::1]:8000"),
        ("fd00::12", False, "http://[fd00::12]:8000"),
    ],
)
def test_the_url_works_on_this_machine(host: str, tls: bool, url: str) -> None:
    assert reachable_url(host, 8000, tls=tls) == url
    parts = urllib.parse.urlsplit(url)
    assert parts.port == 8000
    assert is_ipv6(host) == (":" in (parts.hostname or ""))


@pytest.mark.parametrize(("family", "host"), [(socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1")])
def test_a_port_that_is_taken_is_found_out(family: socket.AddressFamily, host: str) -> None:
    try:
        taken = socket.create_server((host, 0), family=family)
    except OSError as error:
        pytest.skip(f"no {host} here: {error}")
    port = taken.getsockname()[1]
    with taken, pytest.raises(StartFailed, match=f"port {port} on {host} cannot be used"):
        check_port_free(host, port)
    check_port_free(host, port)
