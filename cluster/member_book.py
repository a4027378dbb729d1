"""The list of living replicas, as the directory keeps it. Pure: no Ray, no clock of its own.

A replica is known by its id and told apart from its earlier lives by its boot. Every change of the list raises the
version, so that a reader can ask for what it has not seen yet.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import msgspec

from protocol.membership import Member


class Snapshot(msgspec.Struct, frozen=True):
    """The list at one version."""

    version: tuple[int, int]
    """(which life of the directory, number of the change): never equal for two different lists."""
    members: list[Member]
    complete: bool
    """False while a restarted directory may not have heard of everyone yet: nobody is to be dropped on its word."""


@dataclass
class _Entry:
    member: Member
    heard_at: float


@dataclass(kw_only=True)
class MemberBook:
    """Who is alive. Times are seconds on the caller's clock."""

    boot: int
    timeout_s: float
    started_at: float
    _entries: dict[str, _Entry] = field(default_factory=dict)
    _changes: int = 0

    def heard(self, member: Member, now: float) -> bool:
        """Note a heartbeat; True if the list changed. One of an earlier life of the replica is ignored."""
        replica_id = member.address.replica_id
        known = self._entries.get(replica_id)
        if known is not None and known.member.address.boot > member.address.boot:
            return False
        self._entries[replica_id] = _Entry(member, now)
        return self._changed(known is None or known.member != member)

    def left(self, replica_id: str, boot: int) -> bool:
        """Drop this life of a replica; True if the list changed."""
        known = self._entries.get(replica_id)
        if known is None or known.member.address.boot != boot:
            return False
        del self._entries[replica_id]
        return self._changed(True)

    def expire(self, now: float) -> list[Member]:
        """Drop those not heard of for `timeout_s`; these are returned."""
        silent = [entry.member for entry in self._entries.values() if now - entry.heard_at > self.timeout_s]
        for member in silent:
            del self._entries[member.address.replica_id]
        self._changed(bool(silent))
        return silent

    def paused(self, now: float) -> None:
        """Whoever keeps the book heard nobody for a while because it was stopped or starved itself: silence counts from
        now on."""
        for entry in self._entries.values():
            entry.heard_at = now

    def next_expiry(self) -> float | None:
        """When `expire` may next drop someone."""
        return min((entry.heard_at + self.timeout_s for entry in self._entries.values()), default=None)

    def snapshot(self, now: float) -> Snapshot:
        """The list now; `complete` once everyone living has had time to report."""
        members = [self._entries[key].member for key in sorted(self._entries)]
        return Snapshot((self.boot, self._changes), members, now - self.started_at >= self.timeout_s)

    def _changed(self, yes: bool) -> bool:
        self._changes += yes
        return yes


@dataclass
class MemberView:
    """What one reader believes: the last snapshot, and whom it inherited from an earlier life of the directory."""

    members: list[Member] = field(default_factory=list)
    _inherited: dict[str, Member] = field(default_factory=dict)
    _life: int | None = None

    def take(self, snapshot: Snapshot) -> bool:
        """Take the next snapshot; True if `members` changed.

        A directory in a new life does not know everyone yet. Those that it has not spoken of stay until it says that
        its list is complete.
        """
        life, _ = snapshot.version
        if life != self._life:
            self._life = life
            self._inherited = {member.address.replica_id: member for member in self.members}
        if snapshot.complete:
            self._inherited.clear()
        for member in snapshot.members:
            self._inherited.pop(member.address.replica_id, None)
        before, self.members = self.members, [*snapshot.members, *self._inherited.values()]
        return before != self.members
