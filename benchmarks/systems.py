"""Systems under test: servers at a URL, started and stopped by the benchmark when a command is given.

Systems of one run live one after another, or together where they are asked in turn and none does anything unasked. A
started system may detach processes of its own (Ray does); the benchmark is the reaper of its descendants, so all of
them can be counted and ended.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import shlex
import signal
import subprocess
import tempfile
import time
from collections.abc import AsyncIterator, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import aiohttp

from cluster.process_tree import adopt_orphans, end_descendants

_STOP_S = 30.0
_POLL_S = 0.2


@dataclass(frozen=True, kw_only=True)
class System:
    name: str
    url: str
    command: str | None = None
    """What starts it; None when it runs already."""


def add_system_options(parser: argparse.ArgumentParser) -> None:
    """Give a command line the options that `parse_systems` and `running` take."""
    parser.add_argument("--system", action="append", default=[], metavar="NAME=URL", help="may be given repeatedly")
    parser.add_argument("--start", action="append", default=[], metavar="NAME=COMMAND", help="what starts a system")
    add_start_options(parser)


def add_start_options(parser: argparse.ArgumentParser) -> None:
    """The options of `running` alone."""
    parser.add_argument("--ready-s", type=float, default=180.0, help="how long a started system may take")
    logs = Path(tempfile.gettempdir()) / "pd-serve-benchmarks"
    parser.add_argument("--logs", type=Path, default=logs, metavar="FOLDER", help="output of the started systems")


def parse_systems(targets: Iterable[str], commands: Iterable[str]) -> list[System]:
    """Systems of `NAME=URL` and `NAME=COMMAND` options. Raises ValueError where the names do not fit together."""
    urls = dict(_pair(target) for target in targets)
    starts = dict(_pair(command) for command in commands)
    if not urls:
        raise ValueError("no system is given: add --system NAME=URL")
    if unknown := starts.keys() - urls.keys():
        raise ValueError(f"a command is given for {sorted(unknown)}, but systems are {sorted(urls)}: add NAME=URL")
    return [System(name=name, url=url, command=starts.get(name)) for name, url in urls.items()]


def _pair(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not (name and equals and value):
        raise ValueError(f"expected NAME=VALUE, found {text!r}")
    return name, value


@contextlib.asynccontextmanager
async def running(*systems: System, ready_s: float, log_folder: Path) -> AsyncIterator[None]:
    """The systems, all of them answering `/health`; at the end those are stopped that were started here. Within another
    such block nothing may be started: the end of either stops it. SIGTERM, as Ctrl-C, ends what is done in the block;
    the process then ends by it. To be used in the main thread.

    Raises RuntimeError when one exits or is not ready within `ready_s`; its output is in `log_folder`.
    """
    deadline = time.monotonic() + ready_s
    adopt_orphans()
    with _sigterm_after_cancelling():
        processes: list[subprocess.Popen[bytes] | None] = []
        try:
            for system in systems:
                processes.append(_start(system, log_folder))
            await asyncio.gather(
                *(_wait_ready(*pair, deadline, log_folder) for pair in zip(systems, processes, strict=True))
            )
            yield
        finally:
            started = [process for process in processes if process is not None]
            with ThreadPoolExecutor(max_workers=1) as stopper:  # whose end waits, also if we are cancelled meanwhile
                await asyncio.get_running_loop().run_in_executor(stopper, _stop, started)


@contextlib.contextmanager
def _sigterm_after_cancelling() -> Iterator[None]:
    """Within it SIGTERM cancels the present task, as asyncio has Ctrl-C do; what it would have done comes after that.

    Not by way of SIGINT, which is ignored in what a shell runs in the background.
    """
    task, loop = asyncio.current_task(), asyncio.get_running_loop()
    assert task is not None
    asked = False

    def cancel(number: int, frame: FrameType | None) -> None:
        nonlocal asked
        if not asked:
            asked = True
            loop.call_soon_threadsafe(task.cancel)

    before = signal.signal(signal.SIGTERM, cancel)
    try:
        yield
    except asyncio.CancelledError:
        if not asked:
            raise
    finally:
        signal.signal(signal.SIGTERM, before)
    if asked:
        signal.raise_signal(signal.SIGTERM)


def _log(system: System, folder: Path) -> Path:
    return folder / f"{system.name.replace(' ', '-')}.log"


def _start(system: System, log_folder: Path) -> subprocess.Popen[bytes] | None:
    """In a session of its own: a Ctrl-C at the terminal reaches it once, through `_stop`, and not twice."""
    if system.command is None:
        return None
    log_folder.mkdir(parents=True, exist_ok=True)
    with _log(system, log_folder).open("wb") as log:
        return subprocess.Popen(shlex.split(system.command), stdout=log, stderr=log, start_new_session=True)


async def _wait_ready(
    system: System, process: subprocess.Popen[bytes] | None, deadline: float, log_folder: Path
) -> None:
    where = "" if process is None else f"; its output is in {_log(system, log_folder)}"
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=2)) as session:
        while time.monotonic() < deadline:
            if process is not None and process.poll() is not None:
                raise RuntimeError(f"{system.name} exited with status {process.returncode} before it was ready{where}")
            with contextlib.suppress(aiohttp.ClientError, TimeoutError):
                async with session.get(f"{system.url.rstrip('/')}/health") as response:
                    if response.status == 200 and b"degraded" not in await response.read():
                        return  # degraded is our router before it has seen both pools
            await asyncio.sleep(_POLL_S)
    raise RuntimeError(f"{system.name} at {system.url} was not ready in time{where}")


def _stop(processes: list[subprocess.Popen[bytes]]) -> None:
    """Interrupt the commands as Ctrl-C would, then end whatever of them is still there."""
    if not processes:
        return
    for process in processes:
        if process.poll() is None:
            process.send_signal(signal.SIGINT)
    for process in processes:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_STOP_S)
    if left := end_descendants():
        raise RuntimeError(f"processes {sorted(left)} did not end")
