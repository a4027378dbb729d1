"""Logits to tokens for a whole batch, and their log-probabilities.

The order of operations: penalties, biases and bans (`edits.py`); the masks of grammars; then temperature, filters,
noise and argmax (`choose.py`). Log-probabilities are of the logits before all of that. Every step treats each row by
itself, so a row's token depends on its own logits, mask and `SampleRow` alone, not on the batch it is in.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Collection, Sequence

import numpy as np
import numpy.typing as npt
import torch

from engine.grammar.masks import RowMasks
from engine.sampling.choose import Choice, Chooser, TorchChooser
from engine.sampling.edits import edit_logits
from engine.sampling.jit import JitChooser
from engine.sampling.kernel import KernelChooser
from engine.sampling.row import Sampled, SampleRow
from engine.sampling.scores import RowScores, score_rows
from native.compiler import NativeUnavailable
from protocol.sampling import SamplingParams

_LOG = logging.getLogger(__name__)


class LogitsError(RuntimeError):
    """The model gave a row without any finite logit, or its mask left none, so no token can be chosen from it."""

    def __init__(self, rows: list[int], masked: Collection[int] = ()) -> None:
        """`masked` are those of `rows` whose masks leave no token at all."""
        super().__init__(f"no finite logit in row {', '.join(map(str, rows))} of the batch")
        self.rows = rows
        self.masked = frozenset(masked)


class Sampler:
    """Samples one token per row. Holds no state of any sequence."""

    def __init__(self, *, device: str = "cpu", num_threads: int = 1, chooser: Chooser | None = None) -> None:
        """`chooser` defaults to the fastest there is for logits on `device`; all choose the same tokens."""
        self._chooser = chooser or _fastest_chooser(device, num_threads)

    @torch.inference_mode()
    def sample(self, logits: torch.Tensor, rows: Sequence[SampleRow], masks: RowMasks | None = None) -> list[Sampled]:
        """One token for each row of `logits` float32 `[rows, vocab]`, which is scratch afterwards, among those that
        `masks` leaves.

        Raises `LogitsError` naming the rows from which nothing can be chosen.
        """
        assert logits.shape[0] == len(rows), "one SampleRow for each row of logits"
        if not rows:
            return []
        logits = logits.contiguous()
        asking = [index for index, row in enumerate(rows) if row.params.logprobs is not None]
        edited = any(row.edits_logits for row in rows)
        # Edits spoil the raw logits that log-probabilities are made of.
        raw = logits if len(asking) == len(rows) and not edited and masks is None else logits[asking]
        if edited:
            edit_logits(logits, rows)
        if masks is None and all(row.greedy for row in rows):
            chosen = self._chooser.greedy(logits)
        else:
            chosen = self._chooser.choose(logits, _choice_of(rows, logits.shape[1]), masks)
        tokens: list[int] = chosen.tolist()
        if min(tokens) < 0:
            raise LogitsError(
                [index for index, token in enumerate(tokens) if token < 0],
                masked=[] if masks is None else masks.without_any(),
            )
        sampled = [Sampled(token) for token in tokens]
        if asking:
            described = self._with_logprobs(raw, [tokens[index] for index in asking], [rows[i].params for i in asking])
            for index, with_logprobs in zip(asking, described, strict=True):
                sampled[index] = with_logprobs
        return sampled

    @torch.inference_mode()
    def score(
        self, logits: torch.Tensor, tokens: npt.NDArray[np.int64], *, top: int, named: Sequence[int], ranks: bool
    ) -> RowScores:
        """The log-probability of `tokens[i]` in row `i` of `logits` float32 `[rows, vocab]`, which stay as they are.

        With them those of the `top` likeliest tokens and of the `named` ones, and `tokens[i]`'s rank. Raises
        `LogitsError` naming the rows without any finite logit.
        """
        scores = score_rows(self._chooser, logits.contiguous(), tokens, top=top, named=named, ranks=ranks)
        wrong = np.flatnonzero(np.isnan(scores.logprobs))
        if len(wrong):
            raise LogitsError(wrong.tolist())
        return scores

    def _with_logprobs(self, raw: torch.Tensor, tokens: list[int], params: list[SamplingParams]) -> list[Sampled]:
        """`tokens[i]`, chosen for row `i` of `raw`, with its logprob and those of the others that `params[i]` wants."""
        wanted = [each.logprobs or 0 for each in params]
        found = self._chooser.likeliest(raw, min(max(wanted), raw.shape[1]))
        sums: list[float] = found.log_sums.tolist()
        values = raw.gather(1, torch.tensor(tokens, device=raw.device)[:, None])[:, 0].tolist()
        sampled = []
        for row, (token, count) in enumerate(zip(tokens, wanted, strict=True)):
            best = zip(found.tokens[row, :count].tolist(), found.logits[row, :count].tolist(), strict=True)
            top = [(other, logit - sums[row]) for other, logit in best if other >= 0]
            named = [float(raw[row, other]) - sums[row] for other in params[row].logprob_tokens]
            sampled.append(Sampled(token, values[row] - sums[row], top if count > 0 else None, named or None))
        return sampled


def _fastest_chooser(device: str, num_threads: int) -> Chooser:
    if torch.device(device).type != "cpu":
        return TorchChooser()
    try:
        return KernelChooser(num_threads=num_threads)
    except NativeUnavailable as error:
        _LOG.warning("no C++ sampling kernel here, falling back to numba (slower): %s", error)
        return JitChooser()


def _choice_of(rows: Sequence[SampleRow], vocab_size: int) -> Choice:
    return Choice(
        temperature=np.array([0.0 if row.greedy else row.params.temperature for row in rows], np.float32),
        top_k=np.array([min(row.params.top_k, vocab_size) for row in rows], np.int32),
        top_p=np.array([row.params.top_p for row in rows], np.float32),
        min_p_log=np.array([math.log(row.params.min_p) if row.params.min_p else -math.inf for row in rows], np.float32),
        keys=np.array([row.noise_key for row in rows], np.int64),
    )
