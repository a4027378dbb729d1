"""What the head makes of a Serve that is slow to start."""

from __future__ import annotations

from concurrent.futures import Future

import pytest
from ray.exceptions import ActorDiedError

from cluster.head import wait_for_proxies
from cluster.launch_output import Progress


def failed(error: Exception) -> Future[None]:
    future: Future[None] = Future()
    future.set_exception(error)
    return future


@pytest.mark.parametrize("error", [ActorDiedError(), TimeoutError("not after 60 s\nmore")])
def test_late_proxies_are_left_to_the_health_check(error: Exception, capsys: pytest.CaptureFixture[str]) -> None:
    wait_for_proxies(failed(error), Progress())
    assert f"waiting for them: {str(error).splitlines()[0]}\n" in capsys.readouterr().out


def test_what_else_goes_wrong_with_serve_ends_the_start() -> None:
    with pytest.raises(RuntimeError, match="no Serve"):
        wait_for_proxies(failed(RuntimeError("no Serve")), Progress())
