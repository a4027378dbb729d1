"""What replicas say of themselves, asked of a cluster's directory through Ray. As a program this is what asks.

It takes Ray a few seconds to let a program in, so one is let in for as long as the cluster lives, and asks whenever a
line comes on its standard input. It ends with the process that started it.
"""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_ANSWER_S = 60.0
_END_S = 30.0


class StateReader:
    """Owned by a test's cluster. `errors` is where the program complains; `close` before the cluster ends."""

    def __init__(self, environment: Mapping[str, str], errors: Path) -> None:
        self._errors = errors
        with errors.open("wb") as stderr:
            self._process = subprocess.Popen(
                [sys.executable, __file__],
                env=os.environ | environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
            )

    def read(self) -> dict[str, dict[str, Any]]:
        """By replica id. Raises AssertionError with what the program complained of."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(b"?\n")
            self._process.stdin.flush()
            answered, _, _ = select.select([self._process.stdout], [], [], _ANSWER_S)
            line = self._process.stdout.readline() if answered else b""
        except BrokenPipeError:
            line = b""
        assert line, self._errors.read_text()[-2000:]
        states: dict[str, dict[str, Any]] = json.loads(line)
        return states

    def close(self) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        try:
            self._process.wait(_END_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait(_END_S)
        self._process.stdout.close()


def main() -> None:
    import ray
    from ray import serve

    ray.init(namespace="serve", logging_level="ERROR", log_to_driver=False)
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")  # Ray may print
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    for _ in sys.stdin:
        states = serve.get_deployment_handle("Directory", "pd").states.remote().result(timeout_s=10)
        print(json.dumps(states, default=str), file=answers, flush=True)


if __name__ == "__main__":
    main()
