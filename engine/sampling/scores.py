"""Log-probabilities of given tokens in rows of raw logits, and of the likeliest ones there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from engine.sampling.choose import Chooser


@dataclass(frozen=True, slots=True, kw_only=True)
class RowScores:
    """Log-softmax of the logits, one row for each of theirs."""

    logprobs: npt.NDArray[np.float64]
    """`[rows]`: each row's own token's."""
    ranks: npt.NDArray[np.int64]
    """`[rows]`: that token's place, 1 for the likeliest; `[0]` where nobody asked."""
    top_tokens: npt.NDArray[np.int64]
    """`[rows, top]`, likeliest first; -1 where there are no more."""
    top_logprobs: npt.NDArray[np.float64]
    """`[rows, top]`."""
    named: npt.NDArray[np.float64]
    """`[rows, named]`."""


def score_rows(
    chooser: Chooser,
    logits: torch.Tensor,
    tokens: npt.NDArray[np.int64],
    *,
    top: int,
    named: Sequence[int],
    ranks: bool,
) -> RowScores:
    """Scores of `tokens[i]` in row `i` of `logits` float32 `[rows, vocab]`, contiguous.

    Each row has exactly `top` entries, so that rows of one request can be put side by side; all of the vocabulary
    is followed by -1.
    """
    rows, vocab_size = logits.shape
    found = chooser.likeliest(logits, min(top, vocab_size))
    sums = found.log_sums
    own = torch.from_numpy(np.ascontiguousarray(tokens)).to(logits.device)[:, None]
    values = logits.gather(1, own)
    columns = torch.tensor(list(named), dtype=torch.int64, device=logits.device)
    top_tokens = np.full((rows, top), -1, np.int64)
    top_tokens[:, : found.tokens.shape[1]] = found.tokens
    top_logprobs = np.zeros((rows, top), np.float64)
    top_logprobs[:, : found.logits.shape[1]] = found.logits - sums[:, None]
    return RowScores(
        logprobs=values[:, 0].cpu().numpy() - sums,
        ranks=((logits > values).sum(dim=1) + 1).cpu().numpy() if ranks else np.empty(0, np.int64),
        top_tokens=top_tokens,
        top_logprobs=top_logprobs,
        named=logits[:, columns].cpu().numpy() - sums[:, None],
    )
