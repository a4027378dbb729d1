"""One half on a bench: a real engine over the toy model, a clock set by hand, and everything sent written down."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from decode.counters import DecodeStage
from decode.half import DecodeHalf
from decode.ports import DecodePorts
from engine.grammar.constraint import Constraint
from engine.outputs import Failed, StepOutput
from prefill.counters import PrefillStage
from prefill.half import PrefillHalf
from prefill.ports import PrefillPorts
from protocol.rooms import Job, Message, OpenDecode, OpenGenerate, OpenPrefill, PeerAddress, Room, TokenEvent
from protocol.sampling import SamplingParams
from tests.unit.rooms.copies import Copies, Key, pool_checksums
from tests.unit.toy_model import toy_engine
from transfer.jobs import FetchResult

M = TypeVar("M", bound=Message)
Constrain = Callable[[Room], Constraint | None]

PREFILL = PeerAddress("P", 1, "test", 1)
DECODE = PeerAddress("D", 1, "test", 2)


def job(prompt: Sequence[int], *, max_tokens: int = 4, logged: Sequence[int] = (), **sampling: Any) -> Job:
    """A greedy one."""
    return Job(list(prompt), SamplingParams(temperature=0.0, max_tokens=max_tokens, **sampling), logged=list(logged))


def open_prefill(room: Room, work: Job, *, ttl_ms: int = 60_000, decode: PeerAddress | None = DECODE) -> OpenPrefill:
    return OpenPrefill(room, work, ttl_ms, decode)


def open_decode(room: Room, work: Job, *, ttl_ms: int = 60_000) -> OpenDecode:
    return OpenDecode(room, work, ttl_ms, PREFILL)


def open_generate(room: Room, work: Job, *, ttl_ms: int = 60_000) -> OpenGenerate:
    return OpenGenerate(room, work, ttl_ms)


class _Bench:
    """What both benches have."""

    half: PrefillHalf | DecodeHalf

    def __init__(self, *, pages: int, **engine: Any) -> None:
        self.now = 50.0
        self.engine, self.model = toy_engine(pages=pages, page_size=2, **engine)
        self.sent: list[tuple[str, Message]] = []
        self.tokens: list[tuple[str, TokenEvent]] = []
        self.stages: list[PrefillStage | DecodeStage] = []

    def clock(self) -> float:
        return self.now

    def unix_time(self) -> float:
        return 1_000_000.0 + self.now

    def send(self, link: str, message: Message) -> None:
        self.sent.append((link, message))

    def emit(self, link: str, event: TokenEvent) -> None:
        self.tokens.append((link, event))

    def observe(self, stage: PrefillStage | DecodeStage, seconds: float) -> None:
        assert seconds >= 0.0
        self.stages.append(stage)

    def break_engine(self, why: str) -> None:
        """A step says of every room's request that it failed."""
        failed = [Failed(record.request, why) for record in self.half.rooms.values()]
        self.half.after_step(StepOutput(failed=failed))

    def run_pass(self) -> None:
        """As the engine thread does."""
        self.half.tick()
        if self.engine.has_work():
            self.half.after_step(self.engine.step())
        assert self.engine.audit().balanced

    def run(self) -> None:
        """Until nothing is left to compute, and once more for what that made possible."""
        self.run_pass()
        while self.engine.has_work():
            self.run_pass()
        self.half.tick()

    def wait(self, seconds: float) -> None:
        self.now += seconds
        self.half.tick()

    def take(self) -> list[tuple[str, Message]]:
        """What was sent since last asked."""
        sent, self.sent = self.sent, []
        return sent

    def take_all(self, kind: type[M]) -> list[M]:
        """Of what was sent since last asked, the messages of one kind."""
        return [message for _, message in self.take() if isinstance(message, kind)]


class PrefillBench(_Bench):
    def __init__(
        self,
        *,
        pages: int = 16,
        engine: dict[str, Any] | None = None,
        checksums: bool = True,
        constrain: Constrain = lambda room: None,
        **half: Any,
    ) -> None:
        super().__init__(pages=pages, **({"chunked_prefill_size": 4} | (engine or {})))
        self.verify = checksums
        self.half = PrefillHalf(
            PrefillPorts(
                engine=self.engine,
                checksums=self.checksums,
                send=self.send,
                emit=self.emit,
                constrain=constrain,
                clock=self.clock,
                unix_time=self.unix_time,
                observe=self.observe,
            ),
            **half,
        )

    def checksums(self, pages: Sequence[int], grain: int) -> list[int]:
        return pool_checksums(self.engine.pool, pages) if self.verify else []


class DecodeBench(_Bench):
    """Its peer is a `PrefillBench`, which is really copied from."""

    def __init__(
        self,
        peer: PrefillBench,
        *,
        pages: int = 16,
        engine: dict[str, Any] | None = None,
        constrain: Constrain = lambda room: None,
        **half: Any,
    ) -> None:
        super().__init__(pages=pages, **(engine or {}))
        self.peer = peer
        self.connects: list[PeerAddress] = []
        self.copies = Copies(self.engine.pool, lambda address: peer.engine.pool, lambda address: True)
        self.half = DecodeHalf(
            DecodePorts(
                engine=self.engine,
                fetcher=self.copies,
                on_fetched=self.on_fetched,
                connect=self.connect,
                send=self.send,
                emit=self.emit,
                constrain=constrain,
                clock=self.clock,
                unix_time=self.unix_time,
                observe=self.observe,
            ),
            **half,
        )

    def on_fetched(self, result: FetchResult) -> None:
        raise AssertionError("results are delivered by hand")

    def connect(self, address: PeerAddress) -> str:
        self.connects.append(address)
        return f"prefill#{len(self.connects)}"

    def copy(self, key: Key, *, corrupt: bool = False) -> None:
        """A copy is made and reported."""
        self.copies.land(key, corrupt=corrupt)
        self.half.fetched(self.copies.finish(key))

    def copy_all(self) -> None:
        for key in list(self.copies.running):
            self.copy(key)
