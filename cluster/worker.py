"""One replica: model, KV pool, engine thread, page server and fetcher, links. No Ray here; `replica.py` wraps it.

Lifecycle: the constructor loads the model and makes the pool (seconds, blocking); `start` opens the ports and starts
the engine thread; `drain` refuses new rooms and waits for the open ones; `stop` ends everything it started.

Every replica carries both halves. Its role only says which pool routers count it to: any replica can serve a whole
request when the other pool is gone.
"""

from __future__ import annotations

import asyncio
import time
from functools import partial
from typing import Any

import torch

from cluster.engine_thread import EngineThread
from cluster.grammar_gate import GrammarGate
from cluster.inbox import Inbox
from cluster.outbox import Outbox
from cluster.page_exchange import PageExchange
from cluster.peer_links import PeerLinks
from cluster.worker_config import TransferOptions, WorkerConfig
from cluster.worker_state import StateReporter, grammar_state
from decode.half import DecodeHalf
from decode.ports import DecodePorts
from engine.audit import AuditReport
from engine.engine import Engine
from engine.grammar.cache import GrammarCache
from engine.grammar.compiler import GrammarCompiler
from engine.grammar.masks import MaskFiller
from engine.kv_spec import KVPool
from engine.model.loader import load_model
from engine.sampling import Sampler
from engine.stopping import stop_texts
from prefill.half import PrefillHalf
from prefill.ports import PrefillPorts
from protocol.endpoints import Identity, LinkServer
from protocol.handshake import LinkRole
from protocol.membership import Member
from text.tokenizer import Tokenizer

__all__ = ["ReplicaWorker", "TransferOptions", "WorkerConfig", "WorkerUnhealthy"]


class WorkerUnhealthy(RuntimeError):
    """A thread has died or hangs, or there is no memory; only a new process helps."""


class ReplicaWorker:
    """Everything of one replica but Ray. Use it from one event loop.

    Nothing that it owns knows of it once it was stopped, so that its model and its pool go with the last mention of it
    and need not be found by the cycle collector, which sees only a few small objects.
    """

    def __init__(self, config: WorkerConfig) -> None:
        self.config = config
        self.boot = time.time_ns()
        torch.set_num_threads(config.num_threads)
        model = load_model(config.model_path, dtype=config.dtype, device=config.device, num_threads=config.num_threads)
        shape = model.config
        spec = model.kv_spec(config.engine.page_size)
        self._pages = PageExchange(config, spec, model_id=shape.model_id, boot=self.boot)
        tokenizer = Tokenizer.load(config.model_path)
        limits = config.grammars
        self._grammars = GrammarCache(
            GrammarCompiler(
                tokenizer,
                vocab_size=shape.vocab_size,
                eos_token_ids=shape.eos_token_ids,
                max_bytes=limits.max_compiled_bytes,
                follow_budget_s=limits.follow_budget_s,
            ),
            limits,
        )
        self._masks = MaskFiller(vocab_size=shape.vocab_size, timeout_s=limits.mask_timeout_s)
        self._engine = Engine(
            model=model,
            pool=KVPool(spec=spec, num_pages=config.engine.num_pages, buffer=self._pages.memory.view),
            config=config.engine,
            sampler=Sampler(device=config.device, num_threads=config.num_threads),
            stop_texts=stop_texts(tokenizer),
            masks=self._masks,
        )
        self._draining = False

    async def start(self) -> Member:
        """Open the ports and start the engine thread; from now on routers can send rooms here."""
        config = self.config
        loop = asyncio.get_running_loop()

        def doors_moved() -> None:
            loop.call_soon_threadsafe(lambda: self._server.move_region(self._pages.ticket()))

        inbox = Inbox()
        self._pages.open(on_moved=doors_moved)
        self._links = PeerLinks(
            secret=config.secret,
            identity=Identity(role=LinkRole.REPLICA, peer_id=config.replica_id, boot=self.boot),
            post=inbox.post,
            attach=self._pages.fetcher.attach,
            detach=self._pages.fetcher.detach,
            loop=loop,
        )
        outbox = Outbox()
        self.reporter = StateReporter(grammars=partial(grammar_state, self._grammars, self._masks))
        gate = GrammarGate(
            cache=self._grammars, post=inbox.post, send=outbox.send, timeout_s=config.grammars.compile_timeout_s
        )
        self._prefill = PrefillHalf(
            PrefillPorts(
                engine=self._engine,
                checksums=self._pages.checksums,
                send=outbox.send,
                emit=outbox.emit,
                constrain=gate.constraint,
                observe=self.reporter.observe,
            )
        )
        self._decode = DecodeHalf(
            DecodePorts(
                engine=self._engine,
                fetcher=self._pages.fetcher,
                on_fetched=inbox.post,
                connect=self._links.connect,
                send=outbox.send,
                emit=outbox.emit,
                constrain=gate.constraint,
                observe=self.reporter.observe,
            )
        )
        self._server = LinkServer(
            secret=config.secret,
            replica_id=config.replica_id,
            boot=self.boot,
            region=self._pages.ticket(),
            on_up=self._links.accepted,
            on_message=self._links.received,
            on_lost=self._links.lost,
        )
        self._thread = EngineThread(
            engine=self._engine,
            outbox=outbox,
            prefill=self._prefill,
            decode=self._decode,
            gate=gate,
            inbox=inbox,
            loop=loop,
            deliver=self._links.deliver,
            on_crash=partial(_cut_links, self._server, self._links),
            reporter=self.reporter,
        )
        await self._server.start(host=config.bind_host, advertise_host=config.advertise_host)
        self._thread.start()
        self._pages.prefault()
        return self.member

    @property
    def member(self) -> Member:
        """What the directory lists."""
        return Member(
            address=self._server.address,
            role=self.config.role,
            page_size=self.config.engine.page_size,
            max_total_tokens=self.config.engine.max_total_tokens,
            draining=self._draining,
        )

    def check(self, *, hang_timeout_s: float) -> None:
        """Raises `WorkerUnhealthy` when the engine thread or one that moves pages has died, when the engine thread made
        no pass for `hang_timeout_s`, or when the system has not enough memory for the pool."""
        if self._pages.memory_error is not None:
            raise WorkerUnhealthy(f"the KV pool of {self.config.replica_id}: {self._pages.memory_error}")
        if not self._thread.is_alive:
            raise WorkerUnhealthy(f"the engine thread of {self.config.replica_id} died: {self._thread.crash!r}")
        if not self._pages.is_alive:
            raise WorkerUnhealthy(f"a thread of {self.config.replica_id} that moves pages died; its log says of what")
        silent = self._thread.seconds_since_beat
        if silent > hang_timeout_s:
            raise WorkerUnhealthy(
                f"the engine thread of {self.config.replica_id} has been in one step for {silent:.0f} s, "
                f"more than {hang_timeout_s:.0f} s"
            )

    def state(self) -> dict[str, Any]:
        """What the replica reported of itself last, at most half a second old: plain values, for people."""
        return self.reporter.latest

    async def audit(self) -> AuditReport:
        """The books of the KV pool, counted between two steps."""
        return await asyncio.wrap_future(self._thread.call(self._engine.audit))

    async def is_idle(self) -> bool:
        """Whether no room is open here."""
        return await asyncio.wrap_future(self._thread.call(lambda: self._prefill.idle and self._decode.idle))

    async def drain(self, *, timeout_s: float) -> bool:
        """Refuse new rooms and wait until the open ones are done; False when some are left at the end."""
        self._draining = True
        deadline = time.monotonic() + timeout_s
        await asyncio.wrap_future(self._thread.drain())
        while not await self.is_idle():
            if time.monotonic() >= deadline:
                return False
            await asyncio.sleep(0.05)
        return True

    async def stop(self) -> None:
        """End the thread, the ports and the memory. Routers see their links end and open lost rooms elsewhere."""
        _cut_links(self._server, self._links)
        await asyncio.to_thread(self._thread.stop)
        await asyncio.to_thread(self._masks.close)
        await asyncio.to_thread(self._grammars.close)
        await asyncio.to_thread(self._pages.close)


def _cut_links(server: LinkServer, links: PeerLinks) -> None:
    """Nobody can reach this replica any more, and everybody who could knows at once."""
    server.close()
    links.close()
