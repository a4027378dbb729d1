"""Choosing one token per row from edited logits: temperature, filters, noise, argmax. In torch, for any device.

The order is temperature, top-k, top-p on what top-k left (renormalised), min-p, then Gumbel noise and argmax; the
same as transformers' and SGLang's. Each filter keeps the tokens at or above some value, so together they are one
threshold per row; tokens equal to it are all kept. Equal maxima go to the lowest token id.

`engine/kernels/csrc/sampling.h` does the same for the CPU in a fraction of the time; tests hold the two together.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch

from engine.grammar.filling import RowMasks
from engine.sampling.noise import gumbel_noise


@dataclass(frozen=True, kw_only=True)
class Choice:
    """How to choose in each row of a batch, as arrays of length `rows`."""

    temperature: npt.NDArray[np.float32]
    """0 is greedy: neither filters nor noise apply."""
    top_k: npt.NDArray[np.int32]
    """0 keeps every token."""
    top_p: npt.NDArray[np.float32]
    min_p_log: npt.NDArray[np.float32]
    """Logarithm of min-p; -inf keeps every token."""
    keys: npt.NDArray[np.int64]
    """`[rows, 2]`: 32-bit noise keys."""


@dataclass(frozen=True, kw_only=True)
class Likeliest:
    """What log-probabilities are made of."""

    log_sums: npt.NDArray[np.float64]
    """`[rows]`: log(sum(exp(logits)))."""
    tokens: npt.NDArray[np.int64]
    """`[rows, count]`: the likeliest tokens, best first; -1 where a row has fewer finite logits."""
    logits: npt.NDArray[np.float32]
    """`[rows, count]`: theirs."""


class Chooser(Protocol):
    """Reads logits float32 `[rows, vocab]`, contiguous, NaN counting as -inf."""

    def greedy(self, logits: torch.Tensor) -> npt.NDArray[np.int64]:
        """The first maximum of each row, `[rows]`; -1 where no logit is finite."""

    def choose(self, logits: torch.Tensor, choice: Choice, masks: RowMasks | None = None) -> npt.NDArray[np.int64]:
        """A token for each row, `[rows]`, among those that `masks` leaves, for which logits may be written; -1 where no
        logit is finite."""

    def likeliest(self, logits: torch.Tensor, count: int) -> Likeliest:
        """The `count` likeliest tokens of each row (at most the vocabulary)."""


class TorchChooser:
    """Chooses with torch operations, on whatever device the logits are."""

    def greedy(self, logits: torch.Tensor) -> npt.NDArray[np.int64]:
        return _first_argmax(logits)

    def choose(self, logits: torch.Tensor, choice: Choice, masks: RowMasks | None = None) -> npt.NDArray[np.int64]:
        if masks is not None:
            _mask(logits, masks)
        tokens = np.empty(logits.shape[0], np.int64)
        greedy = choice.temperature == 0
        if greedy.any():
            tokens[greedy] = self.greedy(logits[torch.from_numpy(greedy).to(logits.device)])
        drawn = np.flatnonzero(~greedy)
        if len(drawn):
            device = logits.device
            scaled = logits[torch.from_numpy(drawn).to(device)]
            scaled = scaled / torch.from_numpy(choice.temperature[drawn]).to(device)[:, None]
            scaled = torch.where(torch.isnan(scaled), -torch.inf, scaled)
            scaled.masked_fill_(scaled < _thresholds(scaled, choice, drawn), -torch.inf)
            noise = gumbel_noise(torch.from_numpy(choice.keys[drawn]).to(device), logits.shape[1])
            tokens[drawn] = _first_argmax(scaled + noise)
        return tokens

    def likeliest(self, logits: torch.Tensor, count: int) -> Likeliest:
        finite = torch.where(torch.isnan(logits), -torch.inf, logits)
        values, tokens = torch.topk(finite, count, dim=1)
        return Likeliest(
            log_sums=torch.logsumexp(finite.to(torch.float64), dim=1).cpu().numpy(),
            tokens=torch.where(torch.isfinite(values), tokens, -1).cpu().numpy(),
            logits=values.cpu().numpy(),
        )


def _mask(logits: torch.Tensor, masks: RowMasks) -> None:
    """Set what the masks leave out to -inf in place."""
    device = logits.device
    shifts = torch.arange(32, dtype=torch.int32, device=device)
    words = masks.bits.to(device)
    banned = ((words[:, :, None] >> shifts) & 1 == 0).flatten(1)[:, : logits.shape[1]]
    places = torch.from_numpy(masks.rows).to(device)
    logits[places] = logits[places].masked_fill(banned, -torch.inf)


def _thresholds(scaled: torch.Tensor, choice: Choice, drawn: npt.NDArray[np.int64]) -> torch.Tensor:
    """float32 `[rows, 1]`: the lowest value that all filters of row `drawn[i]` keep of `scaled[i]`."""
    device, vocab_size = scaled.device, scaled.shape[1]
    thresholds = scaled.amax(dim=1, keepdim=True) + torch.from_numpy(choice.min_p_log[drawn]).to(device)[:, None]
    sorting = np.flatnonzero((choice.top_k[drawn] > 0) | (choice.top_p[drawn] < 1))
    if not len(sorting):
        return thresholds
    top_k, top_p = choice.top_k[drawn[sorting]].astype(np.int64), choice.top_p[drawn[sorting]]
    ranks = np.where((top_k > 0) & (top_k < vocab_size), top_k, vocab_size)
    rows = torch.from_numpy(sorting).to(device)
    ordered = torch.sort(scaled[rows], dim=1, descending=True).values
    by_rank = ordered.gather(1, torch.from_numpy(ranks).to(device)[:, None] - 1)
    mass = torch.exp(ordered.to(torch.float64) - ordered[:, :1].to(torch.float64))
    mass.masked_fill_(ordered < by_rank, 0.0)
    needed = torch.from_numpy(top_p.astype(np.float64)).to(device)[:, None] * mass.sum(dim=1, keepdim=True)
    # A token is kept while what lies above it has not reached top_p: the first always, up to the one that crosses it.
    kept = (torch.cumsum(mass, dim=1) - mass < needed).sum(dim=1, keepdim=True).clamp_min(1)
    by_mass = torch.where(torch.from_numpy(top_p < 1).to(device)[:, None], ordered.gather(1, kept - 1), by_rank)
    thresholds[rows] = torch.maximum(thresholds[rows], torch.maximum(by_rank, by_mass))
    return thresholds


def _first_argmax(values: torch.Tensor) -> npt.NDArray[np.int64]:
    """int64 `[rows]`: the lowest index of each row's maximum, NaN counting as -inf; -1 where nothing is finite."""
    values = torch.where(torch.isnan(values), -torch.inf, values)
    first = values.argmax(dim=1, keepdim=True)
    best = values.gather(1, first)
    return torch.where(torch.isfinite(best), first, -1)[:, 0].cpu().numpy()
