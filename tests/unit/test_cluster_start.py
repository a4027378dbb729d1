"""How a cluster comes up quickly: what is noticed at once, read ahead, and what Python spends its time on meanwhile."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from cluster import read_ahead, readiness
from cluster.node_start import noticed_at_once, wait_until_registered
from cluster.readiness import StartFailed, wait_until_healthy

STARTUP = Path(__file__).parents[2] / "cluster" / "startup"


class HealthServer(HTTPServer):
    """Answers with one status after another, the last one for ever."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.statuses: list[str] = []
        self.url = f"http://127.0.0.1:{self.server_address[1]}"


class Answer(BaseHTTPRequestHandler):
    server: HealthServer

    def do_GET(self) -> None:
        statuses = self.server.statuses
        status = statuses.pop(0) if len(statuses) > 1 else statuses[0]
        self.send_response(200 if status == "ok" else 503)
        self.end_headers()
        self.wfile.write(json.dumps({"status": status}).encode())

    def log_message(self, format: str, *values: object) -> None:
        del format, values


@pytest.fixture
def health() -> Iterator[HealthServer]:
    server = HealthServer()
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_cluster_is_ready_when_its_health_says_so(health: HealthServer) -> None:
    health.statuses = ["starting", "degraded", "ok"]
    wait_until_healthy(health.url, is_starting=lambda: True)
    assert health.statuses == ["ok"]


def test_waiting_for_health_ends_when_serve_has_given_up(health: HealthServer, monkeypatch: pytest.MonkeyPatch) -> None:
    def given_up() -> bool:
        raise RuntimeError("no such model")

    monkeypatch.setattr(readiness, "_CHECK_PERIOD_S", 0.0)
    health.statuses = ["starting"]
    with pytest.raises(RuntimeError, match="no such model"):
        wait_until_healthy(health.url, is_starting=given_up)


def test_the_patience_counts_from_the_end_of_the_start(health: HealthServer, monkeypatch: pytest.MonkeyPatch) -> None:
    starting = [True, True, True, False]
    monkeypatch.setattr(readiness, "_CHECK_PERIOD_S", 0.0)
    monkeypatch.setattr(readiness, "_PROBE_PERIOD_S", 0.0)
    monkeypatch.setattr(readiness, "_READY_TIMEOUT_S", 0.5)
    health.statuses = ["starting"]
    with pytest.raises(StartFailed, match="not healthy within 0 s: HTTP Error 503"):
        wait_until_healthy(health.url, is_starting=lambda: starting.pop(0) if len(starting) > 1 else starting[0])
    assert starting == [False]


def test_a_node_is_used_as_soon_as_it_is_registered() -> None:
    class Store:
        answers = [{}, {}, {"a node": "its address"}]

        def get_all_node_info(self, timeout: float) -> dict[str, str]:
            return self.answers.pop(0)

    wait_until_registered(Store())
    assert Store.answers == []


def test_ray_starts_nodes_in_its_own_way_afterwards() -> None:
    from ray._private.node import Node

    original = Node.start_ray_processes
    with noticed_at_once():
        assert Node.start_ray_processes is not original
    assert Node.start_ray_processes is original


def test_weights_are_read_ahead_unless_they_are_too_large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, int]] = []
    monkeypatch.setattr(os, "posix_fadvise", lambda _, start, length, advice: asked.append((start, length)))
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    (tmp_path / "tokenizer.json").write_bytes(b"{}")
    read_ahead.read_weights(tmp_path)
    assert asked == [(0, 0)], "the whole of one file"
    monkeypatch.setattr(read_ahead, "_MOST_WEIGHTS", 6)
    read_ahead.read_weights(tmp_path)
    assert len(asked) == 1


def test_reading_ahead_of_what_is_not_there_is_quiet(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "cluster.read_ahead", str(tmp_path / "nowhere")]
    done = subprocess.run(command, capture_output=True, check=False, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")


@pytest.mark.parametrize("has_own", [False, True])
def test_python_collects_seldom_and_still_imports_the_machines_own_customisation(tmp_path: Path, has_own: bool) -> None:
    if has_own:
        (tmp_path / "sitecustomize.py").write_text("print('own')")
    code = "import gc, sys; print(gc.get_threshold()[0], any('startup' in folder for folder in sys.path))"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(STARTUP), str(tmp_path)])}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout == ("own\n" if has_own else "") + "10000 False\n"
    assert done.stderr == ""
