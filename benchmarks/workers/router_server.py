"""The router's application alone, under the server that Ray Serve would run it with, for `benchmarks.router`.

Reads the replicas from `--members` (JSON, as `replica_stand_in` prints them) and serves until it is ended.
"""

from __future__ import annotations

import argparse
import contextlib
import os
from collections.abc import AsyncIterator
from pathlib import Path

import msgspec
import uvicorn
from starlette.applications import Starlette

from benchmarks.workers.replica_stand_in import SECRET_VARIABLE
from protocol.membership import Member
from router.app import build_asgi
from router.config import RouterConfig


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--members", required=True)
    parser.add_argument("--port", type=int, required=True)
    options = parser.parse_args()
    members = msgspec.json.decode(options.members, type=list[Member])
    config = RouterConfig(
        model_name="model",
        tokenizer_folder=options.model,
        context_length=1 << 20,
        secret=os.environ[SECRET_VARIABLE].encode(),
    )
    app = build_asgi(config)
    _tell(app, members)
    uvicorn.run(app, host="127.0.0.1", port=options.port, log_level="warning", access_log=False)


def _tell(app: Starlette, members: list[Member]) -> None:
    """Give it the replicas once its event loop runs, as the directory would."""
    inner = app.router.lifespan_context

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        async with inner(app):
            app.state.members.update(members)
            yield

    app.router.lifespan_context = lifespan


if __name__ == "__main__":
    main()
