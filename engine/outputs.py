"""What one engine step tells its caller. Made by `Engine.step`, read once, never changed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import msgspec

from engine.request import Request
from protocol.sampling import FinishReason
from protocol.scoring import PositionScores


class TokenOutput(msgspec.Struct, frozen=True):
    """One token sampled in this step."""

    request: Request
    position: int
    """Counts the request's generated tokens from 0, logged ones included."""
    token: int
    logprob: float | None
    top: Sequence[tuple[int, float]] | None
    """(token, logprob) of the most likely tokens, if asked for."""
    finish: FinishReason | None
    """Set on the last token; the request is then out of the engine."""
    matched: str | int | None
    """The stop string or stop token that ended the sequence."""
    cached_tokens: int | None
    """Prompt tokens found in the prefix cache; on the first token this engine reports of a request, else None."""
    named: list[float] | None
    """Logprobs of the tokens that the request names, if it does."""


@dataclass(frozen=True, slots=True)
class Failed:
    """A request that a step ended by an error; it holds nothing any more."""

    request: Request
    why: str
    by_grammar: bool = False
    """Whether its grammar is at fault, or cannot be followed: it would fail the same way anywhere else."""


@dataclass(frozen=True, slots=True)
class StepOutput:
    """Everything one step did that its caller may want to pass on."""

    tokens: list[TokenOutput] = field(default_factory=list)
    progress: list[tuple[Request, int]] = field(default_factory=list)
    """(request, tokens computed) of each retained request whose KV grew, in this step: complete pages among the first
    that many tokens can be offered to the peer."""
    scores: list[tuple[Request, PositionScores]] = field(default_factory=list)
    """The next scores of prompts that want any; a prompt's are complete before its first token."""
    failed: list[Failed] = field(default_factory=list)
