"""A whole cluster on this machine for a test: started as a user starts it, watched over HTTP, hurt by process id.

Lifecycle: `LiveCluster.start` runs `python -m cluster.launch` and returns when `/health` answers; `stop` ends it as
Ctrl-C does. Every process of it descends from the launcher, so none of another cluster is ever touched.
"""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import yaml
from state_reader import StateReader

from cluster.process_tree import descendants

ROOT = Path(__file__).parents[2]
READY_S = 240.0
STOP_S = 120.0  # a cluster finishes its requests first, within its own bounds
SETTLE_S = 180.0
_POLL_S = 0.1


class LiveCluster:
    """One running cluster. `folder` keeps its configuration and output, `temporary` what its launcher was given for
    temporary files."""

    def __init__(self, process: subprocess.Popen[bytes], url: str, log: Path, temporary: Path) -> None:
        self.process = process
        self.url = url
        self.log = log
        self.temporary = temporary
        self._reader: StateReader | None = None

    @classmethod
    def start(
        cls, settings: Mapping[str, Any], folder: Path, *, http_options: Mapping[str, Any] | None = None
    ) -> LiveCluster:
        """Raises AssertionError with its output when it is not healthy in time."""
        config, log = folder / "config.yaml", folder / "output.log"
        application = {
            "name": "pd",
            "route_prefix": "/",
            "import_path": "cluster.app:build_app",
            "args": dict(settings),
        }
        config.write_text(yaml.safe_dump({"http_options": dict(http_options or {}), "applications": [application]}))
        port = _free_port()
        command = [sys.executable, "-m", "cluster.launch", "--config", str(config), "--port", str(port)]
        temporary = folder / "temporary"
        temporary.mkdir()
        environment = os.environ | {"TMPDIR": str(temporary)}
        with log.open("wb") as output:
            process = subprocess.Popen(
                command, stdout=output, stderr=output, cwd=ROOT, env=environment, start_new_session=True
            )
        scheme = "https" if http_options and "ssl_certfile" in http_options else "http"
        cluster = cls(process, f"{scheme}://127.0.0.1:{port}", log, temporary)
        try:
            cluster.wait(lambda: b"Ctrl-C stops everything" in log.read_bytes(), "the cluster to be ready", READY_S)
        except BaseException:
            cluster.stop()
            raise
        return cluster

    def stop(self) -> None:
        self._stop_reading()
        self.process.send_signal(signal.SIGINT)
        try:
            self.process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            for pid in descendants(self.process.pid) | {self.process.pid}:
                os.kill(pid, signal.SIGKILL)
            raise

    def _stop_reading(self) -> None:
        if self._reader is not None:
            self._reader.close()
            self._reader = None

    def state(self) -> dict[str, Any]:
        """What a router says of itself and the replicas."""
        with urllib.request.urlopen(f"{self.url}/internal/state", timeout=5) as answer:
            state: dict[str, Any] = json.load(answer)
        return state

    def ray_environment(self) -> dict[str, str]:
        """The variables with which Ray's programs and drivers find this cluster and may use it."""
        return dict(re.findall(r"\b(RAY_[A-Z_]+)=(\S+)", self.log.read_text()))

    def replica_states(self) -> dict[str, dict[str, Any]]:
        """What each replica says of itself, its audited books included, by replica id: asked of the directory."""
        if self._reader is None:
            self._reader = StateReader(self.ray_environment(), self.log.with_name("reader.log"))
        try:
            return self._reader.read()
        except AssertionError:
            self._stop_reading()  # the next question has another one asked
            raise

    def deployment_pids(self, deployment: str) -> list[int]:
        """Processes of the replicas of a Serve deployment, such as `Decode`."""
        title = f"ray::ServeReplica:pd:{deployment}".encode()
        pids = []
        for pid in descendants(self.process.pid):
            try:
                if Path(f"/proc/{pid}/cmdline").read_bytes().startswith(title):
                    pids.append(pid)
            except (FileNotFoundError, ProcessLookupError):
                continue  # it ended while we looked
        return sorted(pids)

    def signal(self, deployment: str, number: signal.Signals) -> None:
        """Send a signal to one replica of a deployment."""
        os.kill(self.deployment_pids(deployment)[0], number)

    def wait_whole(self, *, prefill: int, decode: int) -> None:
        """Until so many replicas can be used again."""

        def whole() -> bool:
            usable = [member["role"] for member in self.state()["members"] if member["usable"]]
            return (usable.count("prefill"), usable.count("decode")) == (prefill, decode)

        self.wait(whole, f"{prefill} prefill and {decode} decode replicas", READY_S)

    def wait_balanced(self) -> None:
        """Until no room is open and every page is free or cached, then let the auditor of every replica confirm it."""

        def idle() -> bool:
            state = self.state()
            loads = [member["load"] for member in state["members"]]
            return (
                not state["rooms"]
                and all(member["open_rooms"] == 0 for member in state["members"])
                and all(load and load["free_pages"] + load["cached_pages"] == load["total_pages"] for load in loads)
            )

        self.wait(idle, "every page to be free or cached", SETTLE_S)

        def audited() -> bool:
            states = self.replica_states().values()
            return all(_balanced(state) and not _rooms(state) for state in states)

        self.wait(audited, "balanced books", SETTLE_S)

    def wait(self, condition: Callable[[], bool], what: str, seconds: float) -> None:
        """Until `condition` holds; a router that does not answer counts as "no". Raises AssertionError at the end."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            assert self.process.poll() is None, f"the cluster ended: {self._tail()}"
            try:
                if condition():
                    return
            except (urllib.error.URLError, OSError):
                pass
            time.sleep(_POLL_S)
        raise AssertionError(f"waited {seconds:.0f} s for {what}; the cluster said: {self._tail()}")

    def _tail(self) -> str:
        return self.log.read_text(errors="replace")[-2000:]


def _balanced(state: Mapping[str, Any]) -> bool:
    books = state.get("books", {})
    return bool(books.get("balanced")) and books["used"] == 0 and books["quarantined"] == 0


def _rooms(state: Mapping[str, Any]) -> int:
    """Rooms that hold anything: those that have ended leave only a tombstone."""
    counts = [state[half]["rooms"] for half in ("prefill", "decode")]
    return sum(number for rooms in counts for name, number in rooms.items() if name != "ended")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port
