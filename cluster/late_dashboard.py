"""Ray's dashboard, started beside the application instead of before it.

`ray.init` starts the dashboard first and nothing else until it answers: a quarter of the time until a small cluster
serves, though nothing that serves needs it. Ray 2.60 has no setting for this, so the one method that starts it is put
off and called from a thread of low priority. A Ray without that method starts its dashboard in its own way.

Lifecycle: `held_back()` around `ray.init`, then `start()` once. The dashboard's processes end with the cluster.
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


class LateDashboard:
    """The dashboard of the node that this process starts."""

    def __init__(self) -> None:
        self._start: Callable[[], str | None] | None = None
        self._done = threading.Event()
        self._url: str | None = None

    @contextlib.contextmanager
    def held_back(self) -> Iterator[None]:
        """While it lasts, a node that starts leaves its dashboard to `start`."""
        from ray._private.node import Node

        original = getattr(Node, "start_api_server", None)
        if original is None:
            yield
            return

        def keep(node: Any, **options: Any) -> None:
            def start() -> str | None:
                original(node, **options)
                return node.webui_url  # type: ignore[no-any-return]

            self._start = start

        Node.start_api_server = keep
        try:
            yield
        finally:
            Node.start_api_server = original

    def start(self, url: str | None) -> None:
        """Start it in the background if it was held back; otherwise `url` is where Ray says that it is."""
        if self._start is None:
            self._url = url
            self._done.set()
        else:
            threading.Thread(target=self._run, args=(self._start,), name="dashboard", daemon=True).start()

    def url(self, *, timeout_s: float) -> str | None:
        """Host and port once it answers; None when it could not start or takes longer than `timeout_s`."""
        self._done.wait(timeout_s)
        return self._url

    def _run(self, start: Callable[[], str | None]) -> None:
        if sys.platform.startswith("linux"):  # there it is the thread's own, and what the thread starts inherits it
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICENESS)
        try:
            url = start()
        except Exception:
            log.exception("Ray's dashboard did not start; the cluster serves without it")
        else:
            self._url = None if url is None else url.removeprefix("http://")
        self._done.set()
        threading.Event().wait()  # for ever: the kernel ends what Ray started when the thread that started it ends
