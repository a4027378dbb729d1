"""One replica as this router sees it: its link, what it says of its load, and what this router has sent it.

Load is counted in tokens, and at dispatch: a replica's own report lags by a step and a flight, and a burst decided on
it would all go to one place. So a view adds up what this router has under way there, and takes from the report only
what must be other routers' share.
"""

from __future__ import annotations

from dataclasses import dataclass

from protocol.link import Link
from protocol.membership import Member, ReplicaRole
from protocol.rooms import Load, Message, PeerAddress
from router.prefix_index import PrefixIndex

ReplicaKey = tuple[str, int]
"""(replica id, boot): a restarted replica is another one."""


@dataclass(slots=True)
class Charge:
    """What one room costs a replica, in tokens."""

    prefill_tokens: int
    """Prompt tokens it still has to compute."""
    kv_tokens: int
    """Tokens whose KV it holds or will."""


class ReplicaView:
    """Mutable, on the router's event loop only."""

    def __init__(self, member: Member) -> None:
        self.member = member
        self.listed = True
        """False once the directory no longer names it: nothing new goes there."""
        self.link: Link | None = None
        self.load: Load | None = None
        self.prefixes = PrefixIndex(max_tokens=member.max_total_tokens)
        self.rooms: dict[str, Charge] = {}
        """What this router has open there, by request id."""
        self.dispatched = 0
        """Rooms ever sent there; breaks ties."""
        self._own_prefill = 0
        self._own_kv = 0
        self._others_prefill = 0
        self._others_kv = 0

    @property
    def key(self) -> ReplicaKey:
        return (self.member.address.replica_id, self.member.address.boot)

    @property
    def address(self) -> PeerAddress:
        return self.member.address

    @property
    def role(self) -> ReplicaRole:
        return self.member.role

    @property
    def is_up(self) -> bool:
        return self.link is not None and self.link.is_open

    @property
    def draining(self) -> bool:
        return self.member.draining or (self.load is not None and self.load.draining)

    @property
    def usable(self) -> bool:
        """May be given new rooms."""
        return self.listed and self.is_up and not self.draining

    @property
    def prefill_tokens(self) -> int:
        """Prompt tokens waiting to be computed there."""
        return self._own_prefill + self._others_prefill

    @property
    def kv_tokens(self) -> int:
        """Tokens in use in its KV pool, or about to be."""
        return self._own_kv + self._others_kv

    def send(self, message: Message) -> None:
        """Nothing happens when the link is down; its loss has been or will be reported."""
        if self.link is not None:
            self.link.send(message)

    def observe(self, load: Load) -> None:
        """Take a report; what exceeds this router's own count is other routers' work."""
        self.load = load
        in_use = (load.total_pages - load.free_pages - load.cached_pages) * self.member.page_size
        self._others_prefill = max(0, load.waiting_tokens - self._own_prefill)
        self._others_kv = max(0, in_use - self._own_kv)

    def charge(self, request_id: str, charge: Charge) -> None:
        """Count a room that is being opened there."""
        self.release(request_id)
        self.rooms[request_id] = charge
        self.dispatched += 1
        self._own_prefill += charge.prefill_tokens
        self._own_kv += charge.kv_tokens

    def prompt_computed(self, request_id: str) -> None:
        """The room's prompt no longer waits there."""
        charge = self.rooms.get(request_id)
        if charge is not None:
            self._own_prefill -= charge.prefill_tokens
            charge.prefill_tokens = 0

    def release(self, request_id: str) -> None:
        """The room is over there."""
        charge = self.rooms.pop(request_id, None)
        if charge is not None:
            self._own_prefill -= charge.prefill_tokens
            self._own_kv -= charge.kv_tokens
