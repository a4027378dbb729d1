"""Whether a cluster can start here, and whether it has: its port before, its health after."""

from __future__ import annotations

import json
import socket
import ssl
import time
import urllib.error
import urllib.request
from collections.abc import Callable

_READY_TIMEOUT_S = 300.0
_PROBE_TIMEOUT_S = 5.0
_PROBE_PERIOD_S = 0.1
_CHECK_PERIOD_S = 1.0


class StartFailed(RuntimeError):
    """The cluster could not be started; the message says why and what to do."""


def check_port_free(host: str, port: int) -> None:
    """Raises `StartFailed` when nobody can listen there."""
    if not (isinstance(port, int) and 0 < port < 1 << 16):
        raise StartFailed(f"the port is {port!r}; give a number from 1 to 65535")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        raise StartFailed(f"port {port} on {host} cannot be used ({error}); choose one: PORT=8001") from error


def wait_until_healthy(url: str, *, is_starting: Callable[[], bool]) -> None:
    """Until the router has a replica of every pool: before that, one pool would take requests whole.

    `is_starting` is asked every second and raises when there is no use in waiting. Raises `StartFailed` when `url` is
    still not healthy five minutes after the last time that it was True: a large model may take longer to load.
    """
    next_check = time.monotonic() + _CHECK_PERIOD_S
    deadline = time.monotonic() + _READY_TIMEOUT_S
    last = "no answer"
    # Not by http_proxy, which is for other machines, and whatever name the certificate is for.
    trusting = urllib.request.HTTPSHandler(context=ssl._create_unverified_context())
    here = urllib.request.build_opener(urllib.request.ProxyHandler({}), trusting)
    while time.monotonic() < deadline:
        try:
            with here.open(f"{url}/health", timeout=_PROBE_TIMEOUT_S) as response:
                status = json.load(response)["status"]
            if status == "ok":
                return
            last = f"it is {status}"
        except (urllib.error.URLError, OSError) as error:
            last = str(error)
        if time.monotonic() >= next_check:
            if is_starting():
                deadline = time.monotonic() + _READY_TIMEOUT_S
            next_check = time.monotonic() + _CHECK_PERIOD_S
        time.sleep(_PROBE_PERIOD_S)
    raise StartFailed(f"{url}/health was not healthy within {_READY_TIMEOUT_S:.0f} s: {last}")
