"""`python -m cluster.launch`: a whole cluster on this machine in the foreground, until Ctrl-C.

Lifecycle: this process is the supervisor. It starts `cluster.head` (Ray and the application) in a session of its own,
so that Ctrl-C reaches only the supervisor, which then asks the head to end in order. When the head is gone, however it
went, every process that descends from the supervisor is ended, and its folder of sockets and logs removed. Nothing that
somebody else started is touched: another Ray cluster on the machine goes on.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from types import FrameType

from cluster.process_tree import adopt_orphans, end_descendants, reap_orphans

_ORDERLY_END_S = 100.0  # Serve gives an application a minute to finish its requests
_LONGEST_FOLDER = 24  # Unix socket paths below it must stay under 108 bytes


def main() -> int:
    """The head's exit code; 0 after Ctrl-C."""
    parser = argparse.ArgumentParser(prog="python -m cluster.launch", description=__doc__)
    parser.add_argument("--config", type=Path, default=Path("deploy/config.yaml"), help="as for `serve run`")
    parser.add_argument("--env-file", type=Path, default=Path("deploy/serve.env"), help="Ray's and Serve's variables")
    parser.add_argument("--host", help="address to listen on instead of the configuration's; 0.0.0.0 for all")
    parser.add_argument("--port", type=int, help="instead of the configuration's")
    options = parser.parse_args()
    for path in (options.config, options.env_file):
        if not path.is_file():
            parser.error(f"there is no file {path}; run this in the repository's folder or name another")

    adopt_orphans()
    folder = _short_folder()
    command = [sys.executable, "-m", "cluster.head", "--folder", str(folder), "--config", str(options.config)]
    command += ["--env-file", str(options.env_file)]
    command += [] if options.host is None else ["--host", options.host]
    command += [] if options.port is None else ["--port", str(options.port)]
    supervisor = _Supervisor(subprocess.Popen(command, env=_environment(folder), start_new_session=True))
    code = 1
    try:
        code = supervisor.wait()
        if supervisor.asked:
            code = 0
    finally:
        end_descendants()
        if code == 0 or not any(folder.iterdir()):
            shutil.rmtree(folder, ignore_errors=True)
        else:
            print(f"the logs are kept in {folder}", file=sys.stderr)
    return code


def _environment(folder: Path) -> dict[str, str]:
    """This process's, in which every Python process imports `cluster/startup/sitecustomize.py` first, and temporary
    files go into the folder that is removed: those of Ray's dashboard would stay."""
    path = [str(Path(__file__).parent / "startup"), *filter(None, [os.environ.get("PYTHONPATH")])]
    return os.environ | {"PYTHONPATH": os.pathsep.join(path), "TMPDIR": str(folder)}


class _Supervisor:
    """Waits for the head, passing the user's wish to stop on to it: once politely, the second time at once."""

    def __init__(self, head: subprocess.Popen[bytes]) -> None:
        self._head = head
        self.asked = False
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, self._on_signal)

    def wait(self) -> int:
        while not self.asked:
            try:
                return self._head.wait(timeout=0.5)
            except subprocess.TimeoutExpired:
                reap_orphans(but=self._head.pid)  # such as the helper processes of a replica that was killed
        try:
            return self._head.wait(timeout=_ORDERLY_END_S)
        except subprocess.TimeoutExpired:
            print(f"the cluster did not end within {_ORDERLY_END_S:.0f} s; ending its processes", file=sys.stderr)
            self._head.kill()
            self._head.wait()
            return 1

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        del number, frame
        if self.asked:
            self._head.kill()
        else:
            self.asked = True
            self._head.terminate()


def _short_folder() -> Path:
    """A new private folder whose path leaves room for the names of Ray's sockets."""
    parent = tempfile.gettempdir()
    if len(parent) > _LONGEST_FOLDER - len("/pd-12345678"):
        parent = "/tmp"
    return Path(tempfile.mkdtemp(prefix="pd-", dir=parent))


if __name__ == "__main__":
    os.environ.setdefault("PYTHONUNBUFFERED", "1")
    sys.exit(main())
