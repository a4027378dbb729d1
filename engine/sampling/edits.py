"""Changes to logits before a token is chosen: penalties, biases, and tokens that may not come.

Mostly few entries of a row are touched, so all rows' entries are gathered into one flat list, changed at once and
written back. What each penalty counts follows vLLM: repetition sees prompt and output, presence and frequency only
output.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from engine.sampling.row import SampleRow

_LEAST_REPETITION = 1e-4
"""A lower repetition penalty counts as this, for the same reason that biases are bounded (`row.py`)."""


def edit_logits(logits: torch.Tensor, rows: Sequence[SampleRow]) -> None:
    """Apply penalties, then biases, then what is allowed and banned to `logits` float32 `[rows, vocab]`, contiguous, in
    place."""
    flat = logits.view(-1)
    vocab_size = logits.shape[1]
    _penalise(flat, [(i * vocab_size, row) for i, row in enumerate(rows) if row.counts is not None])
    biased = [(i * vocab_size + row.bias_ids, row.bias_values) for i, row in enumerate(rows) if len(row.bias_ids)]
    if biased:
        places = _concatenated([place for place, _ in biased], flat.device)
        flat[places] += _concatenated([value for _, value in biased], flat.device)
    for i, row in enumerate(rows):
        if len(row.allowed_ids):
            _keep_only(logits[i], torch.from_numpy(row.allowed_ids).to(logits.device))
    banned = [i * vocab_size + row.banned_ids for i, row in enumerate(rows) if len(row.banned_ids)]
    if banned:
        flat[_concatenated(banned, flat.device)] = -torch.inf


def _keep_only(logits: torch.Tensor, ids: torch.Tensor) -> None:
    kept = logits[ids]
    logits.fill_(-torch.inf)
    logits[ids] = kept


def _penalise(flat: torch.Tensor, penalised: list[tuple[int, SampleRow]]) -> None:
    if not penalised:
        return
    places, counts, sizes = [], [], []
    for start, row in penalised:
        assert row.counts is not None
        places.append(start + row.counts.ids)
        counts.append(row.counts.generated)
        sizes.append(len(row.counts.ids))
    params = [row.params for _, row in penalised]

    def spread(values: list[float]) -> torch.Tensor:
        return torch.from_numpy(np.repeat(np.asarray(values, np.float32), sizes)).to(flat.device)

    repetition = spread([max(p.repetition_penalty, _LEAST_REPETITION) for p in params])
    presence = spread([p.presence_penalty for p in params])
    frequency = spread([p.frequency_penalty for p in params])
    index = _concatenated(places, flat.device)
    generated = _concatenated(counts, flat.device)
    values = flat[index]
    values = torch.where(values > 0, values / repetition, values * repetition)
    flat[index] = values - frequency * generated - presence * (generated > 0)


def _concatenated(parts: Sequence[np.ndarray[tuple[int], np.dtype[np.generic]]], device: torch.device) -> torch.Tensor:
    return torch.from_numpy(np.concatenate(parts)).to(device)
