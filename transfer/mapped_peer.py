"""A peer as the shared-memory transport knows it: whether its memory is mapped, and what waits for that.

Its life: CONNECTING (its memory was asked for; copies wait) -> MAPPED (copies run) -> DETACHED (unmapped when the last
running copy has ended), or LOST for a while when its memory could not be had.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from transfer.client_handshake import ClientHandshake
from transfer.jobs import PageCopy, Peer
from transfer.memory import PeerMemory


class MappingState(enum.Enum):
    CONNECTING = enum.auto()
    MAPPED = enum.auto()
    LOST = enum.auto()
    DETACHED = enum.auto()


_LEGAL = {
    MappingState.CONNECTING: {MappingState.MAPPED, MappingState.LOST, MappingState.DETACHED},
    MappingState.MAPPED: {MappingState.DETACHED},
    MappingState.LOST: {MappingState.CONNECTING, MappingState.DETACHED},
    MappingState.DETACHED: set[MappingState](),
}


@dataclass(kw_only=True, eq=False)
class MappedPeer:
    """One attachment of a peer. Guarded by the transport's lock; `handshake` belongs to the loop."""

    peer: Peer
    state: MappingState = MappingState.CONNECTING
    waiting: list[PageCopy] = field(default_factory=list)
    """For its memory."""
    running: int = 0
    """Copies that read its memory."""
    memory: PeerMemory | None = None
    source: npt.NDArray[np.uint8] | None = None
    """The memory's bytes."""
    handshake: ClientHandshake | None = None
    retry_at: float = 0.0
    """When it may be asked for its memory again, once it is LOST; `error` says why it is."""
    error: str = ""

    def move_to(self, state: MappingState) -> None:
        assert state in _LEGAL[self.state], f"a mapping cannot go from {self.state} to {state}"
        self.state = state

    def take_unused(self) -> PeerMemory | None:
        """The memory of a detached peer that no copy reads any more, to be closed outside the lock."""
        if self.state is not MappingState.DETACHED or self.running:
            return None
        memory, self.memory, self.source = self.memory, None, None
        return memory
