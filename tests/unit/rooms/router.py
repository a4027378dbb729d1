"""The router's table of docs/protocol.md in its shortest form: clients, token logs, epochs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from protocol.rooms import (
    RETRYABLE,
    Abort,
    AbortReason,
    Closed,
    Job,
    Message,
    OpenDecode,
    OpenGenerate,
    OpenPrefill,
    PromptScores,
    Room,
    RoomFailed,
    StepFrame,
    TokenEvent,
)
from protocol.sampling import FinishReason, SamplingParams
from protocol.scoring import Scoring
from router.score_log import ScoreLog
from tests.unit.rooms.replica import LawBroken
from tests.unit.toy_model import toy_generate, toy_logits

if TYPE_CHECKING:
    from tests.unit.rooms.world import World

MAX_EPOCHS = 4


@dataclass(frozen=True)
class Asked:
    """What one client asks for."""

    prompt: tuple[int, ...]
    max_tokens: int = 3
    stops_early: bool = False
    """The first token is a stop token."""
    scoring: Scoring | None = None
    """Which of the prompt's tokens are scored."""

    @property
    def answer(self) -> list[int]:
        """What it must get."""
        return toy_generate(self.prompt, 1 if self.stops_early else self.max_tokens)

    @property
    def scores(self) -> list[float]:
        """What the scored ones must get."""
        if self.scoring is None:
            return []
        rows = {end: toy_logits(self.prompt[:end]).log_softmax(dim=0) for end in range(1, len(self.prompt))}
        return [float(rows[place][self.prompt[place]]) for place in range(self.scoring.start, len(self.prompt))]

    def job(self, logged: Sequence[int], scoring: Scoring | None) -> Job:
        stops = tuple(self.answer[:1]) if self.stops_early else ()
        sampling = SamplingParams(temperature=0.0, max_tokens=self.max_tokens, stop_token_ids=stops)
        return Job(list(self.prompt), sampling, logged=list(logged), timeline=True, scoring=scoring)


@dataclass
class Client:
    """One request as the router sees it."""

    name: str
    asked: Asked
    deadline: float
    epoch: int = -1
    log: list[TokenEvent] = field(default_factory=list)
    early: dict[int, TokenEvent] = field(default_factory=dict)
    halves: dict[str, str] = field(default_factory=dict)
    """Replica -> wire of each half of this epoch that may still be open."""
    transfer_failed: bool = False
    result: str = ""
    scores: ScoreLog | None = field(init=False)

    def __post_init__(self) -> None:
        scoring = self.asked.scoring
        self.scores = None if scoring is None else ScoreLog(scoring, prompt_tokens=len(self.asked.prompt))

    @property
    def room(self) -> Room:
        return Room(self.name, self.epoch)


class Router:
    """One router with a wire to each living replica."""

    def __init__(self, world: World, asked: Sequence[Asked], *, deadline: float) -> None:
        self.world = world
        self.wires: dict[str, str] = {}
        """Replica -> wire, for those believed to live."""
        self.clients = {
            name: Client(name, one, deadline) for name, one in zip(("one", "two", "three"), asked, strict=False)
        }
        self.draining: set[str] = set()
        """Replicas that take no new rooms: their step frames say so."""
        self.failures: list[str] = []

    def start(self) -> None:
        for client in self.clients.values():
            self._open(client)

    # ---- what comes over the wires ------------------------------------------------------------------------------

    def receive(self, wire: str, message: Message) -> None:
        if isinstance(message, StepFrame):
            for event in message.tokens:
                self._token(self.clients[event.request_id], event)
        elif isinstance(message, RoomFailed):
            self._failed(self.clients[message.room.request_id], wire, message)
        elif isinstance(message, PromptScores):
            client = self.clients[message.room.request_id]
            if message.room == client.room and not client.result:
                assert client.scores is not None
                client.scores.offer(message.scores)
        else:
            assert isinstance(message, Closed)

    def lose(self, wire: str) -> None:
        for replica in [replica for replica, known in self.wires.items() if known == wire]:
            del self.wires[replica]
            self.world.reconnect(replica)
        for client in self.clients.values():
            lost = [replica for replica, known in client.halves.items() if known == wire]
            for replica in lost:
                del client.halves[replica]
            if lost and not client.result:
                self._reopen(client)

    def gone(self, name: str) -> None:
        """The client hangs up."""
        self._abort(self.clients[name], AbortReason.CLIENT_GONE)
        self._end(self.clients[name], "gone")

    def tick(self) -> None:
        for client in self.clients.values():
            if not client.result and client.deadline <= self.world.now:
                self._abort(client, AbortReason.DEADLINE)
                self._end(client, "deadline")

    @property
    def next_deadline(self) -> float | None:
        return min((client.deadline for client in self.clients.values() if not client.result), default=None)

    def believes_open(self, room: Room, replica: str) -> bool:
        client = self.clients[room.request_id]
        return not client.result and client.epoch == room.epoch and replica in client.halves

    # ---- rules ----------------------------------------------------------------------------------------------------

    def _token(self, client: Client, event: TokenEvent) -> None:
        if event.epoch != client.epoch or client.result:
            return
        if event.position < len(client.log):
            assert client.log[event.position].token == event.token
            return
        client.early[event.position] = event
        while len(client.log) in client.early:
            event = client.early.pop(len(client.log))
            client.log.append(event)
            if client.scores is not None and not client.scores.is_complete:
                raise LawBroken(f"{client.name} has a token, but scores up to {list(client.scores)} only")
            if event.position > 0 and self.world.two_sided(client.room):
                # Decode's first token: it has every page, so prefill's part is over.
                client.halves.pop("P", None)
            if event.finish is not None:
                self._finish(client, event.finish)

    def _finish(self, client: Client, reason: FinishReason) -> None:
        tokens = [event.token for event in client.log]
        if tokens != client.asked.answer:
            raise LawBroken(f"{client.name} got {tokens} instead of {client.asked.answer}")
        if client.scores is not None:
            np.testing.assert_allclose([each.logprob for each in client.scores], client.asked.scores, atol=1e-5)
        expected = FinishReason.STOP_TOKEN if client.asked.stops_early else FinishReason.LENGTH
        assert reason is expected
        client.halves.clear()
        self._end(client, "finished")

    def _failed(self, client: Client, wire: str, message: RoomFailed) -> None:
        replica = next((replica for replica, known in client.halves.items() if known == wire), None)
        if message.room != client.room or client.result or replica is None:
            return
        del client.halves[replica]
        self.failures.append(f"{message.room} {message.code.value}: {message.detail}")
        client.transfer_failed |= message.code.value == "transfer_failed"
        if message.code in RETRYABLE:
            self._reopen(client)
        else:
            self._abort(client, AbortReason.PEER_FAILED)
            self._end(client, message.code.value)

    def _reopen(self, client: Client) -> None:
        self._abort(client, AbortReason.PEER_FAILED)
        client.early.clear()
        if client.epoch + 1 >= MAX_EPOCHS:
            self._end(client, "too many epochs")
        else:
            self._open(client)

    def _open(self, client: Client) -> None:
        usable = self.wires.keys() - self.draining
        if not usable:
            self._end(client, "no replica")
            return
        client.epoch += 1
        scoring = None if client.scores is None else client.scores.rest
        room, job = client.room, client.asked.job([event.token for event in client.log], scoring)
        ttl_ms = int(1000 * (client.deadline - self.world.now))
        if {"P", "D"} <= usable and not client.log and not client.transfer_failed:
            self._send(client, "P", OpenPrefill(room, job, ttl_ms, self.world.replicas["D"].address))
            self._send(client, "D", OpenDecode(room, job, ttl_ms, self.world.known_address("P")))
        else:
            self._send(client, "D" if "D" in usable else "P", OpenGenerate(room, job, ttl_ms))

    def _abort(self, client: Client, reason: AbortReason) -> None:
        for replica, wire in client.halves.items():
            if self.wires.get(replica) == wire:
                self.world.send("router", wire, Abort(client.room, reason))
        client.halves.clear()

    def _send(self, client: Client, replica: str, message: Message) -> None:
        self.world.opened(client.room, isinstance(message, OpenPrefill | OpenDecode))
        client.halves[replica] = self.wires[replica]
        self.world.send("router", self.wires[replica], message)

    def _end(self, client: Client, result: str) -> None:
        if client.result:
            raise LawBroken(f"{client.name} has two results: {client.result} and {result}")
        client.result = result
