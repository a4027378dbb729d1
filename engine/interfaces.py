"""What the engine asks of the model and the sampler it is given."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch

from engine.batch import Batch
from engine.grammar.masks import RowMasks
from engine.kv_spec import KVPool
from engine.sampling import RowScores, Sampled, SampleRow


class ModelLimits(Protocol):
    """The part of a model's configuration that the engine reads."""

    @property
    def max_position_embeddings(self) -> int: ...

    @property
    def eos_token_ids(self) -> tuple[int, ...]: ...

    @property
    def vocab_size(self) -> int: ...


class Model(Protocol):
    """One forward pass over packed tokens."""

    @property
    def config(self) -> ModelLimits: ...

    def forward(self, batch: Batch, pool: KVPool) -> torch.Tensor:
        """Write the batch's K and V into the pool; logits float32 `[rows, vocab]` of `batch.logit_rows`."""


class TokenSampler(Protocol):
    """Logits to tokens. `engine.sampling.LogitsError` names rows from which none can be chosen."""

    def sample(self, logits: torch.Tensor, rows: Sequence[SampleRow], masks: RowMasks | None = None) -> list[Sampled]:
        """One token for each row of `logits` float32 `[rows, vocab]`, which are scratch afterwards; only tokens that
        `masks` leaves."""

    def score(
        self, logits: torch.Tensor, tokens: npt.NDArray[np.int64], *, top: int, named: Sequence[int], ranks: bool
    ) -> RowScores:
        """Log-probabilities of `tokens[i]` and others in row `i` of `logits`, which stay as they are."""
