"""Ending everything that was started, orphans included, and nothing else."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from cluster.process_tree import descendants

REPOSITORY = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="adopting orphans needs Linux")

LAUNCHER = """
import subprocess, sys
from cluster.process_tree import adopt_orphans, descendants, end_descendants

assert adopt_orphans()
# A child that starts a grandchild in a session of its own, which ignores SIGTERM, and dies.
stubborn = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('up', flush=True); time.sleep(99)"
child = f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {stubborn!r}], start_new_session=True)"
started = subprocess.Popen([sys.executable, "-c", child], stdout=subprocess.PIPE)
assert started.stdout.readline() == b"up\\n"
started.wait()
orphans = descendants()
assert len(orphans) == 1, orphans
assert end_descendants(patience_s=0.3) == set()
print(*orphans)
"""


def test_an_orphan_that_ignores_sigterm_is_ended_and_a_bystander_is_not() -> None:
    bystander = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    try:
        command = [sys.executable, "-c", LAUNCHER]
        done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True, timeout=60)
        (orphan,) = map(int, done.stdout.split())
        assert not Path(f"/proc/{orphan}").exists()
        assert bystander.poll() is None
        assert bystander.pid in descendants(os.getpid())
    finally:
        bystander.kill()
        bystander.wait()


REAPER = """
import os, subprocess, sys
from pathlib import Path
from cluster.process_tree import adopt_orphans, reap_orphans

assert adopt_orphans()
# A child that starts a grandchild, which lives until its input ends, and dies.
child = "import subprocess, sys; print(subprocess.Popen([sys.executable, '-c', 'input()']).pid)"
pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
started = subprocess.Popen([sys.executable, "-c", child], **pipes)
orphan = int(started.stdout.readline())
assert started.wait() == 0
head = subprocess.Popen([sys.executable, "-c", "raise SystemExit(7)"])
reap_orphans(but=head.pid)
assert Path(f"/proc/{orphan}").exists()
started.stdin.close()
for pid in (orphan, head.pid):
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
assert Path(f"/proc/{orphan}").exists(), "a zombie"
reap_orphans(but=head.pid)
assert not Path(f"/proc/{orphan}").exists()
assert head.wait() == 7
"""


def test_orphans_that_end_leave_no_zombies_and_the_head_its_exit_code() -> None:
    subprocess.run([sys.executable, "-c", REAPER], cwd=REPOSITORY, check=True, timeout=60)
