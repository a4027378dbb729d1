"""Scoring prompts: what becomes of the rows of a step's logits that belong to prompts' own tokens.

The rows of one request lie side by side, those that score its prompt before the one it samples from. They are described
and dropped within their step, so a prompt of any length costs the memory of one chunk.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from engine.interfaces import TokenSampler
from engine.request import Request
from engine.sampling import LogitsError
from engine.scheduler import Scheduled
from protocol.scoring import PositionScores

_MAX_LOGITS = 1 << 26
"""Logits of scored tokens in one step, about: a quarter of a gigabyte."""

Scored = tuple[Request, PositionScores]


class PromptLogitsError(RuntimeError):
    """The model gave a row without any finite logit within this request's prompt."""

    def __init__(self, request: Request) -> None:
        super().__init__(f"no finite logit within the prompt of {request.key!r}")
        self.request = request


def max_scored_tokens(vocab_size: int) -> int:
    """Tokens that one step may score."""
    return max(1, _MAX_LOGITS // vocab_size)


def score_prompts(
    sampler: TokenSampler, work: Sequence[Scheduled], logits: torch.Tensor
) -> tuple[list[Scored], torch.Tensor]:
    """The scores in all rows that score prompts, and the other rows, from which tokens are sampled.

    Changes no request. Raises `PromptLogitsError` for one whose prompt cannot be scored.
    """
    scored: list[Scored] = []
    sampled_rows: list[int] = []
    row = 0
    for item in work:
        if item.scored:
            scored.append((item.request, _score(sampler, item.request, logits[row : row + item.scored])))
            row += item.scored
        if item.finishes:
            sampled_rows.append(row)
            row += 1
    return scored, logits[sampled_rows]


def _score(sampler: TokenSampler, request: Request, logits: torch.Tensor) -> PositionScores:
    scoring, first = request.scoring, request.next_score
    assert scoring is not None, f"request {request.key!r} wants no scores"
    tokens = request.tokens[first : first + logits.shape[0]]
    try:
        rows = sampler.score(logits, tokens, top=scoring.top, named=scoring.tokens, ranks=scoring.ranks)
    except LogitsError as error:
        raise PromptLogitsError(request) from error
    return PositionScores(
        first=first,
        logprobs=rows.logprobs.tolist(),
        ranks=rows.ranks.tolist(),
        top_tokens=rows.top_tokens.ravel().tolist(),
        top_logprobs=rows.top_logprobs.ravel().tolist(),
        tokens=rows.named.ravel().tolist(),
    )
