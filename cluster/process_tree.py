"""Keeps hold of every process that this one starts, however deep, so that all of them and nothing else can be ended.

Ray's processes start others, and some of these outlive their parents (a dashboard's helpers, HAProxy). On Linux the
launcher becomes the reaper of its descendants: an orphan among them becomes its child instead of init's, so that the
tree below the launcher is always complete. Nothing is ever found by its name.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
import time

_PR_SET_CHILD_SUBREAPER = 36


def adopt_orphans() -> bool:
    """Make this process the parent of descendants whose own parent dies; False where the system cannot do that."""
    if not sys.platform.startswith("linux"):
        return False
    libc = ctypes.CDLL(None, use_errno=True)
    return bool(libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) == 0)


def descendants(of_pid: int | None = None) -> set[int]:
    """Living descendants of a process (of this one by default); zombies are not counted. Empty without /proc."""
    children: dict[int, list[int]] = {}
    for pid, parent in _parents().items():
        children.setdefault(parent, []).append(pid)
    found: set[int] = set()
    unvisited = [os.getpid() if of_pid is None else of_pid]
    while unvisited:
        for child in children.get(unvisited.pop(), []):
            found.add(child)
            unvisited.append(child)
    return found


def reap_orphans(*, but: int) -> None:
    """Collect the exit states of adopted processes that have ended, or they stay on as zombies. That of the child `but`
    is left for whoever waits for it, and ends the round."""
    if not sys.platform.startswith("linux"):
        return
    with contextlib.suppress(ChildProcessError):  # no children left
        while (ended := os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)) and ended.si_pid != but:
            os.waitpid(ended.si_pid, 0)


def end_descendants(*, patience_s: float = 3.0) -> set[int]:
    """Ask every descendant to end, then make it; returns those still there after twice `patience_s` (none, mostly)."""
    for ask in (signal.SIGTERM, signal.SIGKILL):
        deadline = time.monotonic() + patience_s
        asked: set[int] = set()
        while (living := descendants()) and time.monotonic() < deadline:
            for pid in living - asked:
                _signal(pid, ask)
            asked |= living
            _reap()
            time.sleep(0.02)
    _reap()
    return descendants()


def _signal(pid: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):  # it ended by itself
        os.kill(pid, number)


def _reap() -> None:
    """Collect the exit states of children that have ended."""
    with contextlib.suppress(ChildProcessError):  # no children left
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


def _parents() -> dict[int, int]:
    """Parent of every process that is not a zombie."""
    parents: dict[int, int] = {}
    try:
        entries = os.listdir("/proc")
    except OSError:
        return parents
    for entry in entries:
        if not entry.isdigit():
            continue
        try:
            with open(f"/proc/{entry}/stat") as file:
                state, parent = file.read().rpartition(")")[2].split()[:2]
        except OSError:
            continue  # it ended while we looked
        if state != "Z":
            parents[int(entry)] = int(parent)
    return parents
