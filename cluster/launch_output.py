"""What `make serve` prints on its way: each step with the seconds since the start, and in the end how to use it all."""

from __future__ import annotations

import os
import time
from pathlib import Path


class Progress:
    """Prints what happens, with the seconds since the start."""

    def __init__(self) -> None:
        self._started = time.monotonic()

    def __call__(self, line: str) -> None:
        print(f"[{time.monotonic() - self._started:5.1f} s] {line}", flush=True)


def print_usage(url: str) -> None:
    body = '{"messages": [{"role": "user", "content": "What is the capital of France?"}], "stream": true}'
    print(
        f"""
  OpenAI API   {url}/v1

  curl -N {url}/v1/chat/completions -H 'Content-Type: application/json' -d '{body}'
""",
        flush=True,
    )


def print_tools(ray_address: str, dashboard: str | None, session: Path) -> None:
    """How to look inside: with a browser, in files of Ray's session, and with Ray's own programs in another shell."""
    token = os.environ["RAY_AUTH_TOKEN_PATH"]
    environment = {
        "RAY_ADDRESS": ray_address,
        "RAY_AUTH_MODE": os.environ["RAY_AUTH_MODE"],
        "RAY_AUTH_TOKEN_PATH": token,
    }
    at = (
        "did not start; its logs say why"
        if dashboard is None
        else f"http://{dashboard}  (it asks for the token in {token})"
    )
    print(
        f"""  dashboard    {at}
  logs         {session / "logs" / "serve"}
  metrics      {session / "prom_metrics_service_discovery.json"}  (for Prometheus's file_sd_configs)
  Ray          {" ".join(f"{name}={value}" for name, value in environment.items())}

Ctrl-C stops everything.
""",
        flush=True,
    )
