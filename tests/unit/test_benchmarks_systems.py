"""A benchmark that is ended leaves no system running, whatever ended it."""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
WAIT_S = 60

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="adopting orphans needs Linux")

SERVER = """
import signal, socket, sys, threading
from http.server import BaseHTTPRequestHandler, HTTPServer

port, health = map(int, sys.argv[1:])

class Health(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(health)
        self.end_headers()

web = HTTPServer(("127.0.0.2", port), Health)
threading.Thread(target=web.serve_forever, daemon=True).start()
test = socket.create_connection(("127.0.0.1", port))
signal.signal(signal.SIGINT, lambda *_: test.sendall(b"interrupted\\n"))
test.sendall(b"here\\n")
test.recv(1)  # until the test lets it go, or is gone itself
"""

BENCHMARK = """
import asyncio, sys
from pathlib import Path
from benchmarks.systems import System, running

async def measure(url, folder, command):
    async with running(System(name="a", url=url, command=command), ready_s=600, log_folder=Path(folder)):
        print("running", flush=True)
        await asyncio.Event().wait()

asyncio.run(measure(*sys.argv[1:]))
"""


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    process: subprocess.Popen[str]
    output: TextIO
    server: socket.socket
    """To the system that it has started."""
    said: TextIO
    """By the system."""


@contextlib.contextmanager
def benchmark(folder: Path, *, health: int) -> Iterator[Benchmark]:
    """One whose system is there, and answers with the status `health`."""
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(socket.create_server(("127.0.0.1", 0)))  # the server has its port at 127.0.0.2
        listener.settimeout(WAIT_S)
        port = listener.getsockname()[1]
        server = Path(folder, "server.py")
        server.write_text(SERVER)
        started = shlex.join([sys.executable, str(server), str(port), str(health)])
        arguments = [f"http://127.0.0.2:{port}", str(folder), started]
        process = subprocess.Popen(
            [sys.executable, "-c", BENCHMARK, *arguments], cwd=REPOSITORY, stdout=subprocess.PIPE, text=True
        )
        stack.callback(process.wait)
        stack.callback(process.kill)
        assert process.stdout is not None
        connection = stack.enter_context(listener.accept()[0])
        connection.settimeout(WAIT_S)
        said = stack.enter_context(connection.makefile())
        assert said.readline() == "here\n"
        yield Benchmark(process=process, output=stack.enter_context(process.stdout), server=connection, said=said)


@pytest.mark.parametrize("health", [200, 503])
def test_sigterm_ends_a_benchmark_after_its_systems(tmp_path: Path, health: int) -> None:
    """While they run, and while they start."""
    with benchmark(tmp_path, health=health) as ended:
        if health == 200:
            assert ended.output.readline() == "running\n"
        ended.process.send_signal(signal.SIGTERM)
        assert ended.said.readline() == "interrupted\n"
        for again in (signal.SIGTERM, signal.SIGINT):
            ended.process.send_signal(again)
        with pytest.raises(subprocess.TimeoutExpired):  # it waits for its server all the same
            ended.process.wait(0.3)
        ended.server.sendall(b"!")
        assert ended.said.read() == "", "the server has ended"
        assert ended.process.wait(WAIT_S) == -signal.SIGTERM


STARTS_TWO = """
import asyncio
from pathlib import Path
from benchmarks.systems import System, running
from cluster.process_tree import descendants, end_descendants

async def measure():
    commands = ["sleep 60", "no-such-program"]
    systems = [System(name=command, url="http://127.0.0.1:1", command=command) for command in commands]
    async with running(*systems, ready_s=60, log_folder=Path("logs")):
        pass

try:
    asyncio.run(measure())
finally:
    print(len(descendants()))
    end_descendants()
"""


def test_a_system_that_cannot_be_started_takes_the_others_along(tmp_path: Path) -> None:
    command = [sys.executable, "-c", STARTS_TWO]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=WAIT_S)
    assert "no-such-program" in done.stderr
    assert done.stdout == "0\n", "nothing is left running"
