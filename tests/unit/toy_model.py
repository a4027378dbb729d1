"""A model so small that its right answer is known: the oracle of the engine's tests.

It really reads and writes the KV pool. Each position's KV is a running hash that continues from the KV of the position
before, and the scores of all tokens are hashes of all KV of the sequence. So a page that is missing, stale, in the
wrong place or shared with another prefix gives another token than `toy_generate`, which never sees a page.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from engine.batch import Batch
from engine.config import EngineConfig
from engine.engine import Engine
from engine.grammar.masks import MaskFiller, RowMasks
from engine.interfaces import TokenSampler
from engine.kv_spec import KVCacheSpec, KVPool
from engine.sampling import RowScores, Sampled, Sampler, SampleRow
from engine.sampling.choose import TorchChooser
from engine.stopping import StopTextFactory

VOCAB = 97
_PRIME = 1_048_573
"""Below 2**24, so that float32 holds every hash exactly."""


@dataclass(frozen=True)
class ToyLimits:
    max_position_embeddings: int = 4096
    eos_token_ids: tuple[int, ...] = ()
    vocab_size: int = VOCAB


class ToyModel:
    """`fail_at` holds the numbers of the forward passes, from 1 on, that raise after writing half of their KV."""

    def __init__(self, config: ToyLimits | None = None) -> None:
        self.config = config or ToyLimits()
        self.passes = 0
        self.computed_tokens = 0
        self.widest_batch = 0
        self.fail_at: set[int] = set()
        self.meanwhile: Callable[[], None] = lambda: None
        """Called in each pass."""

    def kv_spec(self, page_size: int) -> KVCacheSpec:
        return KVCacheSpec(num_layers=1, num_kv_heads=1, head_dim=1, page_size=page_size, dtype=torch.float32)

    def forward(self, batch: Batch, pool: KVPool) -> torch.Tensor:
        self.passes += 1
        self.computed_tokens += batch.num_tokens
        self.widest_batch = max(self.widest_batch, batch.num_seqs)
        self.meanwhile()
        page_size = pool.spec.page_size
        memory = pool.data.view(pool.num_pages, 2, page_size).numpy()
        starts = batch.query_start.tolist()
        tokens, positions, slots = batch.token_ids.numpy(), batch.positions.numpy(), batch.slots.numpy()
        held = []
        for index, (length, row) in enumerate(zip(batch.kv_lens.tolist(), batch.page_table.numpy(), strict=True)):
            span = slice(starts[index], starts[index + 1])
            first = int(positions[span][0])
            assert int(positions[span][-1]) + 1 == length
            before = 0
            if first:
                before = int(memory[row[(first - 1) // page_size], 0, (first - 1) % page_size])
            hashes = _hashes(tokens[span], first, before)
            memory[slots[span] // page_size, 0, slots[span] % page_size] = hashes
            if self.passes in self.fail_at:
                raise RuntimeError("the toy model was told to fail")
            memory[slots[span] // page_size, 1, slots[span] % page_size] = (hashes * 7 + 3) % _PRIME
            pages = row[: -(-length // page_size)]
            keys, values = (memory[pages, part].reshape(-1)[:length].astype(np.int64) for part in (0, 1))
            held.append((keys, values))
        rows = batch.logit_rows.numpy()
        known = (slice(0, int(positions[row]) + 1) for row in rows)
        owners = np.searchsorted(starts, rows, side="right") - 1
        logits = np.zeros((len(rows), VOCAB))
        for index, (owner, span) in enumerate(zip(owners, known, strict=True)):
            keys, values = held[owner]
            logits[index] = _scores(keys[span], values[span])
        return torch.from_numpy((logits / _PRIME * 4).astype(np.float32))


class GreedySampler:
    """The most likely token, whatever the parameters say."""

    def sample(self, logits: torch.Tensor, rows: Sequence[SampleRow], masks: RowMasks | None = None) -> list[Sampled]:
        assert masks is None
        assert len(rows) == logits.shape[0]
        return [Sampled(token=token, logprob=None, top=None) for token in logits.argmax(dim=-1).tolist()]

    def score(
        self, logits: torch.Tensor, tokens: np.ndarray, *, top: int, named: Sequence[int], ranks: bool
    ) -> RowScores:
        return Sampler(chooser=TorchChooser()).score(logits, tokens, top=top, named=named, ranks=ranks)


def toy_logits(tokens: Sequence[int]) -> torch.Tensor:
    """float32 `[vocab]`: what the model expects after `tokens`."""
    keys = _hashes(np.asarray(tokens, np.int64), 0, 0)
    return torch.from_numpy((_scores(keys, (keys * 7 + 3) % _PRIME) / _PRIME * 4).astype(np.float32))


def toy_next(tokens: Sequence[int]) -> int:
    """The token that follows `tokens`."""
    return int(toy_logits(tokens).argmax())


def toy_generate(prompt: Sequence[int], count: int) -> list[int]:
    """The `count` tokens that follow `prompt`."""
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(toy_next(tokens))
    return tokens[len(prompt) :]


def toy_engine(
    *,
    pages: int = 64,
    page_size: int = 4,
    max_running_requests: int = 16,
    chunked_prefill_size: int = 32,
    enable_prefix_cache: bool = True,
    decode_headroom_tokens: int = 8,
    max_overtakes: int = 4,
    limits: ToyLimits | None = None,
    sampler: TokenSampler | None = None,
    stop_texts: StopTextFactory | None = None,
    masks: MaskFiller | None = None,
) -> tuple[Engine, ToyModel]:
    """An engine over a toy model, small enough for its limits to be met."""
    config = EngineConfig(
        page_size=page_size,
        max_total_tokens=pages * page_size,
        max_running_requests=max_running_requests,
        chunked_prefill_size=chunked_prefill_size,
        enable_prefix_cache=enable_prefix_cache,
        decode_headroom_tokens=decode_headroom_tokens,
        max_overtakes=max_overtakes,
    )
    model = ToyModel(limits)
    pool = KVPool(spec=model.kv_spec(page_size), num_pages=pages)
    pool.data.fill_(-1.0)
    sampler = sampler or GreedySampler()
    return Engine(model=model, pool=pool, config=config, sampler=sampler, stop_texts=stop_texts, masks=masks), model


def _hashes(tokens: np.ndarray, first: int, before: int) -> np.ndarray:
    """Running hashes `[tokens]` of a sequence's tokens from position `first` on, after the hash `before`."""
    positions = np.arange(first, first + len(tokens), dtype=np.int64)
    mixed = (tokens + 1) * 7919 * ((positions * 104_729 + 31) % 65_537 + 1) % _PRIME
    return (before + np.cumsum(mixed)) % _PRIME


def _scores(keys: np.ndarray, values: np.ndarray) -> np.ndarray:
    """All different, `[vocab]`, each below `_PRIME`; logits are these divided to lie below 4."""
    weights = (np.arange(len(keys), dtype=np.int64) * 15_485_863 + 7) % 32_749 + 1
    total = int(((keys * weights) % _PRIME + (values * (weights + 1)) % _PRIME).sum() % _PRIME)
    return (np.arange(VOCAB, dtype=np.int64) * 40_503 + total) * 7919 % _PRIME
