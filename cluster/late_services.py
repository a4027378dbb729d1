"""Ray's dashboard and monitors, started when the application serves instead of before it.

`ray.init` starts the dashboard and nothing else until it answers, and two monitors, five seconds of processor time
altogether: a third of the time until a small cluster serves, though nothing that serves needs them. Ray 2.60 has no
setting for this, so the methods that start them are put off and called from a thread of low priority. In a Ray that has
no such methods they start in its own way.

Lifecycle: `held_back()` around `ray.init`, then `start()` once. The processes end with the cluster.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

log = logging.getLogger(__name__)

_NICENESS = 10  # to look at a cluster must not slow it down
_DASHBOARD = "start_api_server"
_SERVICES = (_DASHBOARD, "start_log_monitor", "start_monitor")
"""Methods of Ray's `Node`, in the order in which they are made up for."""


class LateServices:
    """Those of the node that this process starts."""

    def __init__(self) -> None:
        self._starts: dict[str, Callable[[], Any]] = {}
        self._dashboard_done = threading.Event()
        self._dashboard_url: str | None = None

    @contextlib.contextmanager
    def held_back(self) -> Iterator[None]:
        """While it lasts, a node that starts leaves its services to `start`."""
        from ray._private.node import Node

        originals = {name: getattr(Node, name) for name in _SERVICES if hasattr(Node, name)}
        for name, original in originals.items():
            setattr(Node, name, self._keep(name, original))
        try:
            yield
        finally:
            for name, original in originals.items():
                setattr(Node, name, original)

    def start(self, dashboard_url: str | None) -> None:
        """Start in the background what was held back; `dashboard_url` is where Ray says that it is, if it was not."""
        if _DASHBOARD not in self._starts:
            self._dashboard_url = dashboard_url
            self._dashboard_done.set()
        threading.Thread(target=self._run, name="late services", daemon=True).start()

    def dashboard_url(self, *, timeout_s: float) -> str | None:
        """Host and port once it answers; None when it could not start or takes longer than `timeout_s`."""
        self._dashboard_done.wait(timeout_s)
        return self._dashboard_url

    def _keep(self, name: str, original: Callable[..., None]) -> Callable[..., None]:
        def keep(node: Any, **options: Any) -> None:
            def start() -> None:
                original(node, **options)
                if name == _DASHBOARD and node.webui_url is not None:
                    self._dashboard_url = node.webui_url.removeprefix("http://")

            self._starts[name] = start

        return keep

    def _run(self) -> None:
        if sys.platform.startswith("linux"):  # there it is the thread's own, and what the thread starts inherits it
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICENESS)
        for name in _SERVICES:
            if name in self._starts:
                try:
                    self._starts[name]()
                except Exception:
                    log.exception("Ray's node could not %s; the cluster serves without it", name)
            if name == _DASHBOARD:
                self._dashboard_done.set()
        threading.Event().wait()  # for ever: the kernel ends what Ray started when the thread that started it ends
