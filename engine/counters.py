"""What an engine has done since it was made: numbers that only grow, for metrics."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class EngineCounters:
    """Changed by the engine thread; read a copy elsewhere."""

    steps: int = 0
    computed_tokens: int = 0
    """Tokens put through the model, those computed again after a preemption included."""
    generated_tokens: int = 0
    """Tokens sampled."""
    prompt_tokens: int = 0
    """Tokens of requests when they were first given pages; the prefix cache was asked for each of them."""
    cached_tokens: int = 0
    """How many of those it had."""
    preemptions: int = 0
    failed: int = 0
    """Requests ended by an error in a step, those with a grammar at fault apart."""
    grammar_failures: int = 0
    """Requests ended because their grammar could not be followed."""
