"""A prefill and a decode replica without a model: real links, made-up tokens, as fast as asked.

Run as a process: it reads the cluster secret from the environment (`PD_CLUSTER_SECRET`), prints the addresses of both
as one JSON line, and lives until its standard input ends. Prefill answers each room with its first token at once, and
decode then sends a frame with one token of every stream each `--step-ms`, as an engine does after each step.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
import time
from dataclasses import dataclass

import msgspec

from benchmarks.workload import FIRST_TOKEN, LAST_TOKEN
from protocol.codec import AnyMessage
from protocol.endpoints import LinkServer
from protocol.link import Link
from protocol.membership import Member, ReplicaRole
from protocol.rooms import Abort, Closed, Load, OpenDecode, OpenGenerate, OpenPrefill, Room, StepFrame, TokenEvent
from protocol.sampling import FinishReason

SECRET_VARIABLE = "PD_CLUSTER_SECRET"
_LOAD = Load(0, 0, 0, 100_000, 0, 100_000)


@dataclass
class _Stream:
    link: Link
    room: Room
    choice: int
    position: int
    end: int


class StandIn:
    """One replica. `address` is known once `start` returns."""

    def __init__(self, role: ReplicaRole, secret: bytes, *, step_s: float) -> None:
        self._role = role
        self._step_s = step_s
        self._streams: dict[Room, _Stream] = {}
        self._stepping: asyncio.Task[None] | None = None
        self._server = LinkServer(
            secret=secret,
            replica_id=f"stand-in {role.value}",
            boot=time.time_ns(),
            region=None,
            on_up=lambda link: None,
            on_message=self._on_message,
            on_lost=lambda link, why: None,
        )

    async def start(self) -> Member:
        address = await self._server.start(host="127.0.0.1")
        return Member(address=address, role=self._role, page_size=16, max_total_tokens=1 << 24)

    def _on_message(self, link: Link, message: AnyMessage) -> None:
        if isinstance(message, Abort):
            self._streams.pop(message.room, None)
            link.send(Closed(message.room))
        elif isinstance(message, OpenPrefill):
            stream = _Stream(link, message.room, message.job.choice, 0, message.job.sampling.max_tokens)
            link.send(StepFrame([_next_token(stream)], _LOAD))
        elif isinstance(message, OpenDecode | OpenGenerate):
            first = 1 if isinstance(message, OpenDecode) else len(message.job.logged)
            end = message.job.sampling.max_tokens
            self._streams[message.room] = _Stream(link, message.room, message.job.choice, first, end)
            if self._stepping is None or self._stepping.done():
                self._stepping = asyncio.create_task(self._step())

    async def _step(self) -> None:
        """Frames until no stream is left."""
        while self._streams:
            await asyncio.sleep(self._step_s)
            frames: dict[Link, list[TokenEvent]] = {}
            for room, stream in list(self._streams.items()):
                frames.setdefault(stream.link, []).append(_next_token(stream))
                if stream.position == stream.end:
                    self._streams.pop(room, None)
            for link, events in frames.items():
                link.send(StepFrame(events, _LOAD))


def _next_token(stream: _Stream) -> TokenEvent:
    position = stream.position
    stream.position += 1
    token = FIRST_TOKEN + 7919 * position % (LAST_TOKEN - FIRST_TOKEN)
    finish = FinishReason.LENGTH if stream.position == stream.end else None
    return TokenEvent(stream.room.request_id, stream.room.epoch, stream.choice, position, token, finish=finish)


async def _serve(step_s: float) -> None:
    secret = os.environ[SECRET_VARIABLE].encode()
    roles = (ReplicaRole.PREFILL, ReplicaRole.DECODE)
    members = [await StandIn(role, secret, step_s=step_s).start() for role in roles]
    print(json.dumps(msgspec.to_builtins(members)), flush=True)
    await asyncio.to_thread(sys.stdin.read)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--step-ms", type=float, default=0.0)
    asyncio.run(_serve(parser.parse_args().step_ms / 1000))
