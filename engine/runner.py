"""One step's work on the model: packed into a batch, computed into the pool, its logits made scores and next tokens."""

from __future__ import annotations

from collections.abc import Sequence

from engine.batch import Piece, pack_batch
from engine.generation import Generations
from engine.interfaces import Model, TokenSampler
from engine.kv_spec import KVPool
from engine.request import Request
from engine.sampling import Sampled
from engine.scheduler import Scheduled
from engine.scoring import Scored, score_prompts


class ModelRunner:
    """All that an engine does on the model and the device. Changes no request; `generations` are the engine's."""

    def __init__(self, *, model: Model, pool: KVPool, sampler: TokenSampler, generations: Generations) -> None:
        self._model = model
        self._pool = pool
        self._sampler = sampler
        self._generations = generations

    def run(self, work: Sequence[Scheduled], sampling: Sequence[Request]) -> tuple[list[Sampled], list[Scored]]:
        """Compute `work`; the next token of each request of `sampling`, those that it finishes in the same order, and
        the scores of prompts that it computes by the way.

        Raises `LogitsError` by row of `sampling`, `PromptLogitsError`, and whatever the model raises.
        """
        pieces = [
            Piece(
                item.request.tokens,
                item.request.table.ids,
                item.request.num_computed,
                item.request.num_computed + item.count,
                item.scored + item.finishes,
            )
            for item in work
        ]
        batch = pack_batch(pieces, page_size=self._pool.spec.page_size)
        rows = self._generations.begin(sampling)
        logits = self._model.forward(batch, self._pool)
        scored: list[Scored] = []
        if any(item.scored for item in work):
            scored, logits = score_prompts(self._sampler, work, logits)
        if not sampling:
            return [], scored
        return self._sampler.sample(logits, rows, self._generations.masks()), scored
