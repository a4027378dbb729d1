"""The copies of rooms' pages into this pool: begun here, known to their rooms while they run, counted when they end.

Every copy that is begun ends exactly once, also one that was cancelled: only then can nothing of it land any more.
"""

from __future__ import annotations

from decode.counters import DecodeCounters, DecodeStage
from decode.ports import DecodePorts
from decode.rooms import DecodeRoom
from decode.traffic import TrafficBook
from transfer.jobs import FetchJob, FetchResult


class Copies:
    """Of one decode half, and its `traffic`. Which copies run is in `DecodeRoom.jobs`."""

    def __init__(self, ports: DecodePorts, counters: DecodeCounters) -> None:
        self.traffic = TrafficBook()
        self._ports = ports
        self._counters = counters

    def begin(self, record: DecodeRoom) -> None:
        """One copy of everything that is offered and not here yet."""
        batch = record.intake.take_offered()
        if not batch:
            return
        assert record.address is not None
        number = record.num_jobs
        record.num_jobs += 1
        record.jobs[number] = [index for index, _, _ in batch]
        pages = record.request.pages
        self._counters.fetches += 1
        if record.timeline is not None:
            record.timeline.copy_begun(number, self._ports.clock())
        self._ports.fetcher.fetch(
            FetchJob(
                key=(record.room, number),
                peer=record.address,
                source_pages=[source for _, source, _ in batch],
                target_pages=[record.intake.target(index, pages) for index, _, _ in batch],
                checksums=[checksum for _, _, checksum in batch],
                grain_tokens=record.intake.grain_tokens,
                deadline=record.deadline,
            ),
            self._ports.on_fetched,
        )

    def cancel(self, record: DecodeRoom) -> None:
        """Ask all of the room's to end soon."""
        for number in record.jobs:
            self._ports.fetcher.cancel((record.room, number))

    def end(self, record: DecodeRoom, number: int, result: FetchResult, *, linked: bool) -> list[int]:
        """One is over; returns what it was to bring, as the intake counts it. `linked` says whether there is a link to
        its peer still. Raises KeyError for one that does not run."""
        indices = record.jobs.pop(number)
        if record.timeline is not None:
            record.timeline.copy_ended(number, result)
        self.traffic.count(result, linked=linked)
        if result.ok:
            self._counters.fetched_pages += record.intake.count_pages(indices)
            self._counters.fetched_bytes += result.bytes
            self._ports.observe(DecodeStage.TRANSFER_QUEUED, result.queued_seconds)
            self._ports.observe(DecodeStage.TRANSFER, result.seconds)
        elif not result.cancelled:
            self._counters.fetch_failures += 1
        return indices
