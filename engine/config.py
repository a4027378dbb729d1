"""What an engine can be told: sizes and limits, checked once when the engine is made."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """Limits of one engine. Raises ValueError naming the field, its value and what would be accepted."""

    page_size: int = 16
    """Tokens in a KV page; the unit of sharing, transfer and eviction."""
    max_total_tokens: int
    """Tokens the KV pool holds: `num_pages` whole pages."""
    max_running_requests: int = 64
    """Requests that are computed in one step, or have pages reserved to be, at most."""
    chunked_prefill_size: int = 512
    """Tokens of one step at most. Sequences that generate come first with one token each; what they leave, at least
    one page, goes to prompts."""
    enable_prefix_cache: bool = True
    decode_headroom_tokens: int = 64
    """Tokens by which every running request must still be able to grow when another one is let in."""
    max_overtakes: int = 32
    """A waiting request that does not fit is passed over by this many later ones; then they wait for it."""

    def __post_init__(self) -> None:
        for name in ("page_size", "max_running_requests"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        for name in ("decode_headroom_tokens", "max_overtakes"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be 0 or more")
        if self.max_total_tokens < 2 * self.page_size:
            raise ValueError(
                f"max_total_tokens is {self.max_total_tokens}, less than two pages of {self.page_size} tokens; "
                "raise it or lower page_size"
            )
        if self.chunked_prefill_size < self.page_size:
            raise ValueError(
                f"chunked_prefill_size is {self.chunked_prefill_size}, less than page_size {self.page_size}; "
                "raise it to at least one page"
            )

    @property
    def num_pages(self) -> int:
        """Whole pages in the pool."""
        return self.max_total_tokens // self.page_size
