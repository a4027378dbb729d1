"""Where the time of one prefill half goes, for the router of a request that asked. Made with its room, gone with it."""

from __future__ import annotations

from protocol.phases import Phase, PhaseLog, PhaseName


class PrefillTimeline:
    """Turns what happens to the half into phases. All times are readings of the half's clock."""

    def __init__(self, log: PhaseLog, *, opened_at: float) -> None:
        self._log = log
        self._opened_at = opened_at
        self._joined = False
        self._compute_began: float | None = None

    def joined(self, now: float) -> None:
        """Decode has said where offers go. It may say so again over another link: only the first time counts."""
        if not self._joined:
            self._joined = True
            self._log.add(PhaseName.HANDSHAKE, self._opened_at, now)

    def stepped(self, began: float) -> None:
        """A step that began then computed part of the prompt."""
        if self._compute_began is None:
            self._compute_began = began
            self._log.add(PhaseName.QUEUE, self._opened_at, began)

    def sampled(self, now: float) -> None:
        """The first token is there."""
        assert self._compute_began is not None, "a token without a step"
        self._log.add(PhaseName.COMPUTE, self._compute_began, now)

    def take(self) -> list[Phase]:
        """What the router has not been told yet."""
        return self._log.take()
