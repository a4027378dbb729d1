"""The router's settings: frozen, checked once when made."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from pathlib import Path

from protocol.link import LinkTimings
from text.reasoning import ReasoningParserName
from text.tools.families import ToolParserName

_MAY_BE_ZERO = frozenset({"resume_window_s"})


@dataclass(frozen=True, kw_only=True)
class RouterConfig:
    """Times are seconds. Raises ValueError naming the field, its value and what is wanted."""

    model_name: str
    """What clients call the model; requests for another one are refused."""
    tokenizer_folder: str | Path
    context_length: int
    """Tokens of prompt and output together."""
    secret: bytes = field(repr=False)
    """The cluster secret, which replicas ask for."""

    max_concurrent_sequences: int = 1024
    """Sequences (each of a request's choices is one) that may be under way; more are answered 429."""
    max_queued_tokens: int = 1 << 19
    """Prompt tokens that may wait for their first output token; more are answered 429."""
    max_sequences_per_request: int = 128
    max_body_bytes: int = 16 << 20
    max_bodies_bytes: int = 256 << 20
    """What the bodies of requests that are being read may take together; more are answered 429. One always fits."""
    max_grammar_bytes: int = 256 << 10
    """Of a request's grammar or schema."""
    max_schema_parts: int = 10_000
    """Of a JSON schema with its references put in."""
    max_logprobs: int = 1 << 20
    """Log-probabilities that a request may ask for of its outputs: sequences x tokens x (1 + top)."""
    max_logprobs_together: int = 1 << 22
    """Those of requests under way that may be kept at once, some 100 bytes each; a request whose next ones find no
    space ends with 429. One request's always fit."""
    max_buffered_tokens: int = 4096
    """Tokens kept for a client that does not read; one more ends its request."""

    request_timeout_s: float = 600.0
    """Deadline of a request; X-Request-Timeout can shorten it."""
    body_timeout_s: float = 30.0
    send_timeout_s: float = 30.0
    """Longest time one write to a client may take."""

    api_keys_file: str | Path | None = None
    """Who may come in, and with which limits; None lets everybody in. Read again when it changes."""
    cors_origins: tuple[str, ...] = ()
    """Web pages that may use the API, as "https://app.example.com"; "*" is all of them."""

    resume_window_s: float = 60.0
    """How long a stream can be come back to after its connection has ended; 0 for never, and no ids on events."""
    resume_max_streams: int = 10_000
    resume_max_bytes: int = 64 << 20
    """What streams without a client may occupy; the oldest go first."""
    listen_host: str = "127.0.0.1"
    """Where other routers reach this one."""

    chat_template: str | Path | None = None
    """A file with the chat template to use in the place of the model's own."""
    allow_request_chat_template: bool = False
    """Whether requests may bring a `chat_template`: one can keep the router busy for as long as its author likes."""
    tool_parser: ToolParserName = "auto"
    """How calls of tools are written: `auto` goes by the chat template, `none` leaves them in the text."""
    reasoning_parser: ReasoningParserName = "auto"
    """How reasoning is told from the answer: `auto` goes by the chat template, `none` leaves it in the text."""

    max_epochs: int = 4
    """Attempts at the next token of a sequence, the first included; those that a draining replica ends do not count."""
    failover_wait_s: float = 10.0
    """How long a sequence waits for a replica to come up, at its start or when it has lost its own."""
    retry_after_s: int = 1
    """What Retry-After says."""
    thread_characters: int = 16_384
    """Prompts longer than this are tokenised in a thread."""
    link_timings: LinkTimings = LinkTimings()

    def __post_init__(self) -> None:
        if not self.model_name:
            raise ValueError("model_name is empty; give the name that clients use for the model")
        if not self.secret:
            raise ValueError("secret is empty; give the cluster secret, the same that the replicas have")
        for setting in fields(self):
            value = getattr(self, setting.name)
            if setting.name in _MAY_BE_ZERO or isinstance(value, bool):
                continue
            if isinstance(value, int | float) and value <= 0:
                raise ValueError(f"{setting.name} is {value}; give a positive number")
