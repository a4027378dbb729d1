"""Two replicas, a router and the wires between them, driven one step at a time by whoever explores schedules.

A step is a tuple: its kind and what it is done to. `steps` are the ones that any run must be able to take in any order;
`faults` those that the world may but need not do. Everything is deterministic: the same steps from the same start lead
to the same world.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence

from engine.kv_spec import KVPool
from prefill.table import PrefillState
from protocol.rooms import Message, Offer, PeerAddress, Room, TokenEvent
from tests.unit.rooms.replica import LawBroken, Replica
from tests.unit.rooms.router import Asked, Router
from tests.unit.rooms.wires import Wire

Step = tuple[object, ...]
START = 100.0
"""What the clock reads at the beginning."""


class World:
    """Replica `P` prefills, `D` decodes. All clients ask at the beginning."""

    def __init__(
        self,
        asked: Sequence[Asked],
        *,
        pages: tuple[int, int] = (8, 8),
        deadline: float = 60.0,
        break_law: Callable[[Replica], None] | None = None,
        unreliable: bool = False,
    ) -> None:
        """`pages` are those of P's pool and of D's; `break_law` is done to every replica that boots, for proving that
        the tests notice. Where wires are `unreliable`, single messages can get lost or overtake each other, which no
        link lets them: then nothing wrong may happen either, but it may take leases and deadlines to end."""
        self.now = START
        self.wires: dict[str, Wire] = {}
        self.replicas: dict[str, Replica] = {}
        self.rooms: list[Room] = []
        self.hastened = 0
        """Offers that were handled in the middle of a step."""
        self._two_sided: set[Room] = set()
        self._pools: dict[PeerAddress, KVPool] = {}
        self._addresses: dict[str, PeerAddress] = {}
        """The peer that each wire of D's own leads to."""
        self._pages = dict(zip(("P", "D"), pages, strict=True))
        self._break_law = break_law
        self._unreliable = unreliable
        self._numbers = itertools.count(1)
        self._boots = {"P": 0, "D": 0}
        self.router = Router(self, asked, deadline=self.now + deadline)
        for name in ("P", "D"):
            self._boot(name)
        self.router.start()

    # ---- what the parts ask of it -------------------------------------------------------------------------------

    def clock(self) -> float:
        return self.now

    def pool_of(self, address: PeerAddress) -> KVPool:
        return self._pools[address]

    def known_address(self, name: str) -> PeerAddress:
        return self.replicas[name].address

    def reaches(self, address: PeerAddress) -> bool:
        """Whether the peer's memory is attached: it is until the link's loss is noticed."""
        return any(known == address and "D" not in self.wires[name].noticed for name, known in self._addresses.items())

    def connect(self, name: str, address: PeerAddress) -> str:
        wire = self._wire(name, address.replica_id)
        self._addresses[wire.name] = address
        peer = self.replicas[address.replica_id]
        if not peer.alive or peer.address != address:
            wire.vanish(address.replica_id)
        return wire.name

    def reconnect(self, name: str) -> None:
        """The router has lost a replica: it finds it again at once if it lives."""
        if self.replicas[name].alive:
            self.router.wires[name] = self._wire("router", name).name

    def send(self, sender: str, wire: str, message: Message) -> None:
        if wire in self.wires and sender not in self.wires[wire].noticed:
            self.wires[wire].send(sender, message)

    def opened(self, room: Room, two_sided: bool) -> None:
        if room not in self.rooms:
            self.rooms.append(room)
        if two_sided:
            self._two_sided.add(room)

    def two_sided(self, room: Room) -> bool:
        return room in self._two_sided

    def check_token(self, event: TokenEvent) -> None:
        """Whoever generates it, there is one right token at each position."""
        answer = self.router.clients[event.request_id].asked.answer
        if event.position >= len(answer) or answer[event.position] != event.token:
            raise LawBroken(f"token {event} but the answer is {answer}")

    # ---- steps ----------------------------------------------------------------------------------------------------

    def steps(self) -> list[Step]:
        """What can happen now without anything going wrong or time passing."""
        found: list[Step] = []
        for wire in self.wires.values():
            found += [("deliver", wire.name, end) for end in wire.ends if wire.queues[end]]
            if wire.broken:
                found += [("lose", wire.name, end) for end in wire.ends if end not in wire.noticed]
        for name, replica in self.replicas.items():
            if not replica.alive:
                found.append(("restart", name))
                continue
            if replica.wants_pass:
                found.append(("pass", name))
                found += [("hasten", wire.name, name) for wire in self.wires.values() if self._offers(wire, name)]
            for key, copy in replica.copies.running.items():
                if not copy.copied:
                    found.append(("land", name, key))
                if copy.copied or copy.stopped:
                    found.append(("finish", name, key))
        return found

    def faults(self) -> list[Step]:
        """What may go wrong now, time that passes included."""
        found: list[Step] = []
        for wire in self.wires.values():
            if not wire.broken:
                found.append(("break", wire.name))
                found += [("repeat", wire.name, end) for end in wire.ends if wire.queues[end]]
                if self._unreliable:
                    found += [("drop", wire.name, end) for end in wire.ends if wire.queues[end]]
                    found += [("overtake", wire.name, end) for end in wire.ends if len(wire.queues[end]) > 1]
        for name, replica in self.replicas.items():
            if replica.alive:
                found.append(("kill", name))
                if replica.engine.has_work():
                    found.append(("fail", name))
                if name not in self.router.draining:
                    found.append(("drain", name))
                found += [("corrupt", name, key) for key, copy in replica.copies.running.items() if not copy.copied]
        found += [("gone", client.name) for client in self.router.clients.values() if not client.result]
        if self.next_deadline is not None:
            found.append(("wait",))
        return found

    def do(self, step: Step, *, check: bool = True) -> None:
        """Take one step, then check everything that must always hold."""
        match step:
            case ("deliver", str(name), str(end)):
                self._deliver(self.wires[name], end, keep=False)
            case ("repeat", str(name), str(end)):
                self._deliver(self.wires[name], end, keep=True)
            case ("drop", str(name), str(end)):
                self.wires[name].queues[end].popleft()
            case ("overtake", str(name), str(end)):
                first = self.wires[name].queues[end].popleft()
                self.wires[name].queues[end].insert(1, first)
            case ("lose", str(name), str(end)):
                self._lose(self.wires[name], end)
            case ("pass", str(name)):
                self.replicas[name].run_pass()
            case ("hasten", str(name), str(end)):
                self.replicas[end].run_pass(lambda: self._hasten(self.wires[name], end))
            case ("land", str(name), key):
                self.replicas[name].land(key)
            case ("corrupt", str(name), key):
                self.replicas[name].land(key, corrupt=True)
            case ("finish", str(name), key):
                self.replicas[name].finish(key)
            case ("break", str(name)):
                self.wires[name].broken = True
            case ("kill", str(name)):
                self._kill(name)
            case ("restart", str(name)):
                self._boot(name)
            case ("fail", str(name)):
                self.replicas[name].fail_next_step()
            case ("drain", str(name)):
                self.replicas[name].drain()
                self.router.draining.add(name)
            case ("gone", str(name)):
                self.router.gone(name)
            case ("wait",):
                assert self.next_deadline is not None
                self.now = max(self.now, self.next_deadline)
                self.router.tick()
            case _:
                raise AssertionError(f"unknown step {step}")
        if check:
            self.check([name for name in ("P", "D") if name in step])

    @property
    def next_wait(self) -> float:
        """Seconds until something happens by itself."""
        return float("inf") if self.next_deadline is None else self.next_deadline - self.now

    @property
    def next_deadline(self) -> float | None:
        times = [replica.next_deadline for replica in self.replicas.values() if replica.alive]
        times.append(self.router.next_deadline)
        return min((when for when in times if when is not None), default=None)

    # ---- laws -----------------------------------------------------------------------------------------------------

    def check(self, names: Iterable[str] = ("P", "D")) -> None:
        """What must hold of these replicas after every step that touches them."""
        for name in names:
            replica = self.replicas[name]
            if not replica.alive:
                continue
            replica.check(self.rooms)
            ahead = sum(
                record.num_pages
                for record in replica.prefill.rooms.values()
                if record.waits_for_reservation and record.state is not PrefillState.WAITING
            )
            if ahead > self._pages[name] // 2:
                raise LawBroken(f"{name}: {ahead} pages of rooms that decode has not reserved")

    def settle(self) -> int:
        """Let everything happen that needs no time, in a fixed order; returns how many steps that took."""
        taken = 0
        while steps := self.steps():
            self.do(steps[0])
            taken += 1
            if taken > 2000:
                raise LawBroken(f"no end: {steps}")
        return taken

    def check_settled(self) -> None:
        """With nothing in flight, both halves of a room live or neither does, and nobody holds what nobody wants."""
        if self._unreliable:
            return
        for name, replica in self.replicas.items():
            for room in self.rooms:
                if replica.live_halves(room) and not self.router.believes_open(room, name):
                    raise LawBroken(f"{name} still holds {room}, which is over")
        for client in self.router.clients.values():
            for name in client.halves:
                lives = self.replicas[name].live_halves(client.room)
                if not client.result and not lives and name != "P":
                    raise LawBroken(f"the router waits for {client.room} at {name}, where it is over")

    def run_out(self) -> None:
        """Let everything happen and all time pass that is needed: in the end there is one result each and no debt."""
        self.settle()
        self.check_settled()
        for _ in range(200):
            if all(client.result for client in self.router.clients.values()) and self.is_idle:
                return
            if self.next_deadline is None:
                break
            self.do(("wait",))
            self.settle()
            self.check_settled()
        raise LawBroken(
            f"no end: {[client.result for client in self.router.clients.values()]}, "
            f"{[(dict(replica.prefill.rooms), dict(replica.decode.rooms)) for replica in self.replicas.values()]}"
        )

    @property
    def is_idle(self) -> bool:
        return all(replica.is_empty for replica in self.replicas.values() if replica.alive)

    # ---- inside -----------------------------------------------------------------------------------------------------

    def _wire(self, one: str, other: str) -> Wire:
        wire = Wire(f"{one}-{other}#{next(self._numbers)}", (one, other))
        self.wires[wire.name] = wire
        return wire

    def _boot(self, name: str) -> None:
        self._boots[name] += 1
        self.router.draining.discard(name)
        replica = Replica(self, name, self._boots[name], pages=self._pages[name])
        if self._break_law is not None:
            self._break_law(replica)
        self.replicas[name] = replica
        self._pools[replica.address] = replica.engine.pool
        if name not in self.router.wires:
            self.router.wires[name] = self._wire("router", name).name

    def _deliver(self, wire: Wire, end: str, *, keep: bool) -> None:
        queue = wire.queues[end]
        message = queue[0] if keep else queue.popleft()
        if end == "router":
            self.router.receive(wire.name, message)
        else:
            self.replicas[end].receive(wire.name, message)

    def _offers(self, wire: Wire, end: str) -> bool:
        """Whether an offer is the next thing that comes to `end`, while its engine may step."""
        queue = wire.queues.get(end)
        return bool(queue) and isinstance(queue[0], Offer) and self.replicas[end].engine.has_work()

    def _hasten(self, wire: Wire, end: str) -> None:
        offer = wire.queues[end][0]
        assert isinstance(offer, Offer)
        if self.replicas[end].decode.hasten(wire.name, offer):
            wire.queues[end].popleft()
            self.hastened += 1

    def _lose(self, wire: Wire, end: str) -> None:
        wire.lose(end)
        if end == "router":
            self.router.lose(wire.name)
            return
        if end == "D" and wire.name in self._addresses:
            self.replicas["D"].copies.fence(self._addresses[wire.name])
        self.replicas[end].lose(wire.name)

    def _kill(self, name: str) -> None:
        self.replicas[name].alive = False
        for wire in self.wires.values():
            if name in wire.ends and name not in wire.noticed:
                wire.vanish(name)
