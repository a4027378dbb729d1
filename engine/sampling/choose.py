"""Choosing one token per row from edited logits: temperature, filters, noise, argmax. In torch, for any device.

The order is temperature, top-k, top-p on what top-k left (renormalised), min-p, then Gumbel noise and argmax; the
same as transformers' and SGLang's. Each filter keeps the tokens at or above some value, so together they are one
threshold per row; tokens equal to it are all kept. Equal maxima go to the lowest token id.

`engine/kernels/csrc/sampling.h` does the same for the CPU in a fraction of the time; tests hold the two together.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch

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


class Chooser(Protocol):
    """Chooses tokens from logits float32 `[rows, vocab]`, contiguous: int64 `[rows]`, -1 where no logit is finite."""

    def greedy(self, logits: torch.Tensor) -> npt.NDArray[np.int64]: ...

    def choose(self, logits: torch.Tensor, choice: Choice) -> npt.NDArray[np.int64]: ...


class TorchChooser:
    """Chooses with torch operations, on whatever device the logits are."""

    def greedy(self, logits: torch.Tensor) -> npt.NDArray[np.int64]:
        return _first_argmax(logits)

    def choose(self, logits: torch.Tensor, choice: Choice) -> npt.NDArray[np.int64]:
        tokens = np.empty(logits.shape[0], np.int64)
        greedy = choice.temperature == 0
        if greedy.any():
            tokens[greedy] = self.greedy(logits[torch.from_numpy(greedy).to(logits.device)])
        drawn = np.flatnonzero(~greedy)
        if len(drawn):
            scaled = logits[torch.from_numpy(drawn).to(logits.device)]
            scaled = scaled / torch.from_numpy(choice.temperature[drawn]).to(logits.device)[:, None]
            scaled.masked_fill_(torch.isnan(scaled), -torch.inf)
            for place, row in enumerate(drawn.tolist()):
                threshold = _threshold(
                    scaled[place], int(choice.top_k[row]), float(choice.top_p[row]), choice.min_p_log[row]
                )
                if threshold > -math.inf:
                    scaled[place].masked_fill_(scaled[place] < threshold, -torch.inf)
            keys = torch.from_numpy(choice.keys[drawn]).to(logits.device)
            tokens[drawn] = _first_argmax(scaled + gumbel_noise(keys, logits.shape[1]))
        return tokens


def _threshold(scaled: torch.Tensor, top_k: int, top_p: float, min_p_log: np.float32) -> float:
    """The lowest of `scaled` `[vocab]` that all three filters keep; -inf when none is set."""
    threshold = -math.inf
    vocab_size = scaled.shape[0]
    if 0 < top_k < vocab_size or top_p < 1.0:
        ordered = torch.sort(scaled, descending=True).values
        if 0 < top_k < vocab_size:
            threshold = float(ordered[top_k - 1])
            ordered = ordered[ordered >= threshold]
        if top_p < 1.0:
            mass = torch.exp(ordered.to(torch.float64) - ordered[0].to(torch.float64))
            above = torch.cumsum(mass, 0) - mass
            # Kept while what lies above has not reached top_p: always the first, up to the one that crosses it.
            kept = int((above < top_p * mass.sum()).sum())
            threshold = float(ordered[max(kept, 1) - 1])
    if min_p_log > -np.inf:
        threshold = max(threshold, float(np.float32(scaled.max().item()) + min_p_log))
    return threshold


def _first_argmax(values: torch.Tensor) -> npt.NDArray[np.int64]:
    """int64 `[rows]`: the lowest index of each row's maximum, NaN counting as -inf; -1 where nothing is finite."""
    values = torch.where(torch.isnan(values), -torch.inf, values)
    first = values.argmax(dim=1, keepdim=True)
    best = values.gather(1, first)
    return torch.where(torch.isfinite(best), first, -1)[:, 0].cpu().numpy()
