"""The directory as its clients call it: a Serve deployment handle behind plain methods."""

from __future__ import annotations

from typing import Any

from ray.serve.handle import DeploymentHandle

from cluster.member_book import Snapshot
from protocol.membership import Member, RouterReport


class DirectoryHandle:
    """Satisfies `membership.DirectoryClient` and `router_gossip.Exchange`.

    Calls raise whatever Ray raises while the directory is away.
    """

    def __init__(self, handle: DeploymentHandle[Any]) -> None:
        self._handle = handle

    async def heartbeat(self, member: Member, state: dict[str, Any]) -> None:
        await self._handle.heartbeat.remote(member, state)

    async def leave(self, replica_id: str, boot: int) -> None:
        await self._handle.leave.remote(replica_id, boot)

    async def watch(self, known: tuple[int, int] | None, patience_s: float) -> Snapshot:
        snapshot: Snapshot = await self._handle.watch.remote(known, patience_s)
        return snapshot

    async def exchange(self, report: RouterReport) -> list[RouterReport]:
        reports: list[RouterReport] = await self._handle.exchange.remote(report)
        return reports
