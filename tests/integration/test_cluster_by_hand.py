"""A Ray started by hand and `serve run`, without HAProxy's variables: Serve's Python proxy, aggregated mode."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from openai import OpenAI

pytestmark = [pytest.mark.integration, pytest.mark.ray]

ROOT = Path(__file__).parents[2]
READY_S = 240.0


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    """Short, because Ray puts Unix sockets below it."""
    path = Path(tempfile.mkdtemp(prefix="pd-", dir="/tmp"))
    yield path
    shutil.rmtree(path, ignore_errors=True)


@pytest.fixture(scope="module")
def url(folder: Path) -> Iterator[str]:
    document = yaml.safe_load((ROOT / "deploy" / "config-aggregated.yaml").read_text())
    document["http_options"]["port"] = free_port()
    (folder / "config.yaml").write_text(yaml.safe_dump(document))
    command = [sys.executable, str(Path(__file__).with_name("started_by_hand.py")), str(folder / "config.yaml")]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    with (folder / "output.log").open("wb") as output:
        process = subprocess.Popen(
            [*command, str(free_port()), str(folder / "ray")],
            cwd=ROOT,
            env=environment | {"PYTHONPATH": str(ROOT), "RAY_AUTH_MODE": "disabled"},
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=output,
        )
    url = f"http://127.0.0.1:{document['http_options']['port']}"
    try:
        wait_healthy(url, process, folder / "output.log")
        yield url
    finally:
        assert process.stdin is not None
        process.stdin.close()
        process.wait(60)


def wait_healthy(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + READY_S
    while time.monotonic() < deadline:
        assert process.poll() is None, log.read_text()
        try:
            with urllib.request.urlopen(f"{url}/health", timeout=5):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.1)
    raise AssertionError(log.read_text())


def test_it_answers_and_names_the_ingress_it_found(url: str, folder: Path) -> None:
    client = OpenAI(base_url=f"{url}/v1", api_key="none", timeout=60.0, max_retries=0)
    stream = client.completions.create(
        model="SmolLM2-135M-Instruct", prompt="The capital of France is", max_tokens=8, temperature=0, stream=True
    )
    assert "Paris" in "".join(chunk.choices[0].text for chunk in stream)
    logs = (folder / "ray" / "session_latest" / "logs" / "serve").glob("replica_pd_Router_*.log")
    assert any("HTTP enters by Serve's Python proxy" in log.read_text() for log in logs)
