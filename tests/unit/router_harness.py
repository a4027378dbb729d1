"""A real router against scripted replicas: real links and real messages, only the model is missing.

A `FakeReplica` listens as a worker does. By hand, a test takes the opens it got (`opened`) and sends tokens or
failures; with `automatic=True` it answers each open at once with the tokens of `TEXT`.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any, TypeVar

from starlette.applications import Starlette
from tiny_tokenizers import CHAT_TEMPLATE, byte_level, save_model_folder

from protocol.codec import AnyMessage
from protocol.control import CacheFlushed, FlushCache
from protocol.endpoints import LinkServer
from protocol.link import Link
from protocol.membership import Member, ReplicaRole
from protocol.rooms import (
    Abort,
    Closed,
    FailureCode,
    Load,
    OpenDecode,
    OpenGenerate,
    OpenPrefill,
    PromptScores,
    Room,
    RoomFailed,
    StepFrame,
    TokenEvent,
)
from protocol.sampling import FinishReason
from protocol.scoring import PositionScores, Scoring
from router.app import build_asgi
from router.config import RouterConfig

SECRET = b"a secret of this test"
WAIT_S = 10.0
TEXT = "the quick brown fox 😀 jumps over the lazy dog"
TOKENIZER = byte_level()
TEXT_IDS = TOKENIZER.encode(TEXT, add_special_tokens=False)
(END_ID,) = TOKENIZER.encode("<|im_end|>", add_special_tokens=False)
IDLE = Load(0, 0, 0, 100, 0, 100)

Open = OpenPrefill | OpenDecode | OpenGenerate
Kind = TypeVar("Kind")
_BOOTS = itertools.count(1)


async def until(condition: Callable[[], bool]) -> None:
    """Let everything else run until `condition` holds."""
    async with asyncio.timeout(WAIT_S):
        while True:
            if condition():
                return
            await asyncio.sleep(0)


class FakeReplica:
    def __init__(self, replica_id: str, role: ReplicaRole, *, automatic: bool = False) -> None:
        self.role = role
        self.automatic = automatic
        self.busy_rooms = 0
        """How many rooms are open when its cache is to be flushed."""
        self.aborts: list[Abort] = []
        self.opens: list[Open] = []
        self._queue: asyncio.Queue[Open] = asyncio.Queue()
        self._server = LinkServer(
            secret=SECRET,
            replica_id=replica_id,
            boot=next(_BOOTS),
            region=None,
            on_up=lambda link: None,
            on_message=self._on_message,
            on_lost=lambda link, why: None,
        )

    async def start(self) -> Member:
        address = await self._server.start(host="127.0.0.1")
        return Member(address=address, role=self.role, page_size=16, max_total_tokens=16 * 100)

    @property
    def link(self) -> Link:
        (link,) = self._server.links
        return link

    def die(self) -> None:
        """Every connection ends and no new one is taken."""
        self._server.close()

    async def opened(self, kind: type[Kind]) -> Kind:
        """The next open, which must be of that kind."""
        async with asyncio.timeout(WAIT_S):
            message = await self._queue.get()
        assert isinstance(message, kind), message
        return message

    async def aborted(self, room: Room) -> Abort:
        await until(lambda: any(abort.room == room for abort in self.aborts))
        return next(abort for abort in self.aborts if abort.room == room)

    def send(
        self,
        room: Room,
        position: int,
        *tokens: int,
        finish: FinishReason | None = None,
        matched: str | int | None = None,
        cached: int | None = None,
        load: Load = IDLE,
        choice: int = 0,
        logprob: float | None = None,
    ) -> None:
        """One step frame with consecutive tokens; `finish` is the last one's."""
        last = position + len(tokens) - 1
        events = [
            TokenEvent(
                room.request_id,
                room.epoch,
                choice,
                number,
                token,
                logprob=logprob,
                finish=finish if number == last else None,
                matched=matched if number == last else None,
                cached_tokens=cached if number == position else None,
            )
            for number, token in enumerate(tokens, position)
        ]
        self.link.send(StepFrame(events, load))

    def report(self, load: Load) -> None:
        self.link.send(StepFrame([], load))

    def fail(self, room: Room, code: FailureCode, detail: str = "as scripted") -> None:
        self.link.send(RoomFailed(room, code, detail))

    def _on_message(self, link: Link, message: AnyMessage) -> None:
        if isinstance(message, Abort):
            self.aborts.append(message)
            link.send(Closed(message.room))
        elif isinstance(message, FlushCache):
            link.send(CacheFlushed(message.number, 0 if self.busy_rooms else 7, self.busy_rooms))
        elif isinstance(message, OpenPrefill | OpenDecode | OpenGenerate):
            self.opens.append(message)
            self._queue.put_nowait(message)
            if self.automatic:
                self._answer(message)

    def _answer(self, message: Open) -> None:
        job = message.job
        count = job.sampling.max_tokens
        tokens = [TEXT_IDS[position % len(TEXT_IDS)] for position in range(min(count, len(TEXT_IDS)))]
        finish = FinishReason.LENGTH
        if len(tokens) < count:
            tokens.append(END_ID)
            finish = FinishReason.STOP_TOKEN
        logprob = -0.5 if job.sampling.logprobs is not None else None
        first = len(job.logged)
        if job.scoring is not None and not isinstance(message, OpenDecode):
            self.link.send(PromptScores(message.room, scores_of(job.prompt, job.scoring)))
        if isinstance(message, OpenPrefill):
            end = finish if len(tokens) == 1 else None
            self.send(message.room, 0, tokens[0], finish=end, cached=3, choice=job.choice, logprob=logprob)
            return
        if isinstance(message, OpenDecode):
            first = 1
        if first < len(tokens):
            self.send(message.room, first, *tokens[first:], finish=finish, cached=7, choice=job.choice, logprob=logprob)


def scores_of(prompt: list[int], scoring: Scoring) -> PositionScores:
    """What an automatic replica says: the logprob of position p is -p, others' are a tenth of their rank less."""
    positions = range(scoring.start, len(prompt))
    ranks = range(scoring.top)
    return PositionScores(
        first=scoring.start,
        logprobs=[-float(position) for position in positions],
        ranks=[position + 1 for position in positions] if scoring.ranks else [],
        top_tokens=[TEXT_IDS[rank % len(TEXT_IDS)] for _ in positions for rank in ranks],
        top_logprobs=[-position - rank / 10 for position in positions for rank in ranks],
        tokens=[-position - token / 1000 for position in positions for token in scoring.tokens],
    )


class Call:
    """One request made of the application directly, so that a test decides what is read and when the client leaves."""

    def __init__(
        self,
        app: Starlette,
        method: str,
        path: str,
        body: bytes | None,
        headers: dict[str, str],
        *,
        reading: bool = True,
        whole: bool = True,
    ) -> None:
        """A body of None never arrives, and the rest of one that is not `whole`."""
        self.status: int | None = None
        self.headers: dict[str, str] = {}
        self.body = b""
        self.reading = asyncio.Event()
        if reading:
            self.reading.set()
        self._gone = asyncio.Event()
        self._body: bytes | None = body
        self._whole = whole
        scope = {
            "type": "http",
            "http_version": "1.1",
            "asgi": {"version": "3.0"},
            "method": method,
            "scheme": "http",
            "path": path.partition("?")[0],
            "raw_path": path.partition("?")[0].encode(),
            "root_path": "",
            "query_string": path.partition("?")[2].encode(),
            "headers": [(name.lower().encode(), value.encode()) for name, value in headers.items()],
        }
        self.task = asyncio.create_task(self._run(app, scope))

    async def _run(self, app: Starlette, scope: dict[str, Any]) -> None:
        await app(scope, self._receive, self._send)

    async def _receive(self) -> dict[str, Any]:
        if self._body is not None:
            body, self._body = self._body, None
            return {"type": "http.request", "body": body, "more_body": not self._whole}
        await self._gone.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: Any) -> None:
        await self.reading.wait()
        if message["type"] == "http.response.start":
            self.status = message["status"]
            self.headers = {name.decode(): value.decode() for name, value in message["headers"]}
        else:
            self.body += message["body"]

    def leave(self) -> None:
        """The client closes its connection."""
        self._gone.set()

    async def done(self) -> Call:
        async with asyncio.timeout(WAIT_S):
            await self.task
        return self

    async def shows(self, text: str) -> None:
        await until(lambda: text in self.body.decode())

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def events(self) -> list[Any]:
        """The stream's events so far; the end mark as a string."""
        datas = [event.partition("data: ")[2] for event in self.body.decode().split("\n\n") if event]
        return [data if data == "[DONE]" else json.loads(data) for data in datas]

    @property
    def ids(self) -> list[str]:
        """The ids of the stream's events so far, "" for one that has none."""
        heads = [event.partition("data: ")[0] for event in self.body.decode().split("\n\n") if event]
        return [head.removeprefix("id: ").rstrip() for head in heads]

    @property
    def streamed_text(self) -> str:
        """The text of choice 0, joined."""
        choices = [event["choices"][0] for event in self.events if event != "[DONE]" and event.get("choices")]
        pieces = [choice.get("text") or choice.get("delta", {}).get("content") or "" for choice in choices]
        return "".join(pieces)


class RouterHarness:
    """A router and its replicas; `add` lists a replica and waits until its link is up."""

    def __init__(self, app: Starlette) -> None:
        self.app = app
        self.members: dict[FakeReplica, Member] = {}

    @property
    def metrics(self) -> Any:
        return self.app.state.metrics

    @property
    def dispatcher(self) -> Any:
        return self.app.state.dispatcher

    async def add(self, replica_id: str, role: ReplicaRole, *, automatic: bool = False) -> FakeReplica:
        replica = FakeReplica(replica_id, role, automatic=automatic)
        self.members[replica] = await replica.start()
        self.update()
        await until(lambda: self.view(replica).usable)
        return replica

    async def pair(self, *, automatic: bool = False) -> tuple[FakeReplica, FakeReplica]:
        number = len(self.members)
        prefill = await self.add(f"prefill-{number}", ReplicaRole.PREFILL, automatic=automatic)
        return prefill, await self.add(f"decode-{number}", ReplicaRole.DECODE, automatic=automatic)

    def update(self) -> None:
        self.app.state.members.update(list(self.members.values()))

    def remove(self, replica: FakeReplica) -> None:
        del self.members[replica]
        self.update()

    def view(self, replica: FakeReplica) -> Any:
        key = (self.members[replica].address.replica_id, self.members[replica].address.boot)
        return next(view for view in self.app.state.members.views if view.key == key)

    def post(self, path: str, body: Any, *, headers: dict[str, str] | None = None, reading: bool = True) -> Call:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        return Call(self.app, "POST", path, data, headers or {}, reading=reading)

    def get(self, path: str, *, headers: dict[str, str] | None = None) -> Call:
        return Call(self.app, "GET", path, b"", headers or {})

    def request(self, method: str, path: str, *, headers: dict[str, str] | None = None) -> Call:
        return Call(self.app, method, path, b"", headers or {})

    def complete(self, **fields: Any) -> Call:
        """A streamed completion of a short prompt."""
        return self.post("/v1/completions", {"prompt": "a fox", "max_tokens": 8, "stream": True, **fields})

    async def idle(self) -> None:
        """Nothing is open or charged any more."""
        await until(lambda: not self.dispatcher.generations)
        admission = self.app.state.admission
        await until(lambda: (admission.sequences, admission.queued_tokens) == (0, 0))
        for view in self.app.state.members.views:
            assert not view.rooms


@contextlib.asynccontextmanager
async def running_router(
    folder: Path, *, chat_template: str | None = CHAT_TEMPLATE, **settings: Any
) -> AsyncIterator[RouterHarness]:
    """A router over the tiny tokenizer, with 256 tokens of context unless told otherwise."""
    save_model_folder(folder, chat_template=chat_template)
    settings = {"context_length": 256, "secret": SECRET} | settings
    app = build_asgi(RouterConfig(model_name="tiny", tokenizer_folder=folder, **settings))
    async with app.router.lifespan_context(app):
        harness = RouterHarness(app)
        yield harness
        for replica in harness.members:
            replica.die()
