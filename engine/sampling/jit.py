"""Choosing tokens on the CPU where there is no C++ compiler: draws by numba, the rest by torch."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from engine.grammar.filling import RowMasks
from engine.sampling.choose import Choice, Likeliest, TorchChooser


class JitChooser:
    """`Chooser` for logits in the CPU's memory; the kernel is compiled at the first draw and kept on disk."""

    def __init__(self) -> None:
        self._torch = TorchChooser()

    def greedy(self, logits: torch.Tensor) -> npt.NDArray[np.int64]:
        return self._torch.greedy(logits)

    def choose(self, logits: torch.Tensor, choice: Choice, masks: RowMasks | None = None) -> npt.NDArray[np.int64]:
        from engine.sampling.jit_kernel import choose_rows, mask_rows  # numba's import is slow, and rarely needed

        if masks is not None:
            mask_rows(logits.numpy(), masks.rows, masks.bits.numpy())
        tokens = np.empty(logits.shape[0], np.int64)
        greedy = choice.temperature == 0
        if greedy.any():
            tokens[greedy] = self.greedy(logits[torch.from_numpy(greedy)])
        filters = (choice.top_k, choice.top_p, choice.min_p_log)
        choose_rows(logits.numpy(), choice.temperature, *filters, choice.keys, tokens)
        return tokens

    def likeliest(self, logits: torch.Tensor, count: int) -> Likeliest:
        return self._torch.likeliest(logits, count)
