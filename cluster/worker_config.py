"""What one replica is told, resolved: numbers and paths, no `auto`."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from engine.config import EngineConfig
from engine.grammar.limits import GrammarLimits
from protocol.membership import ReplicaRole
from transfer.choice import TransportName


@dataclass(frozen=True, kw_only=True)
class TransferOptions:
    """How KV pages move between replicas."""

    transport: TransportName = "auto"
    wire_dtype: Literal["auto", "int8"] = "auto"
    checksum: bool = True
    num_threads: int = 1
    ib_device: str = ""
    folder: Path | None = None
    folder_max_bytes: int = 4 << 30

    def __post_init__(self) -> None:
        if self.transport == "disk" and not self.checksum:
            raise ValueError("transport 'disk' finds pages by their checksums; set transfer.checksum to true")


@dataclass(frozen=True, kw_only=True)
class WorkerConfig:
    """What one replica is told; `cluster/replica.py` derives it from the user's configuration."""

    replica_id: str
    role: ReplicaRole
    model_path: Path
    engine: EngineConfig
    secret: bytes
    dtype: str = "auto"
    device: str = "cpu"
    num_threads: int = 1
    bind_host: str = "127.0.0.1"
    advertise_host: str = "127.0.0.1"
    transfer: TransferOptions = field(default_factory=TransferOptions)
    grammars: GrammarLimits = GrammarLimits()
