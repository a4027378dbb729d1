"""What a sequence needs between one token and the next: its sampling state and its watch for the end.

Made when a request's first token is due, from all tokens before it, and kept until the request leaves the engine,
through preemptions too.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence

from engine.grammar.masks import MaskedRow, MaskFiller, RowMasks
from engine.request import Request
from engine.sampling import SampleRow
from engine.stopping import Ending, Stopper, StopTextFactory


class Generations:
    """The sampling states and stoppers of one engine's requests, by key."""

    def __init__(
        self, *, eos_token_ids: Sequence[int], stop_texts: StopTextFactory | None, masks: MaskFiller | None = None
    ) -> None:
        self._eos_token_ids = eos_token_ids
        self._stop_texts = stop_texts
        self._masks = masks
        self._rows: dict[Hashable, SampleRow] = {}
        self._stoppers: dict[Hashable, Stopper] = {}

    @property
    def has_text(self) -> bool:
        """Whether stop strings can be looked for."""
        return self._stop_texts is not None

    @property
    def has_masks(self) -> bool:
        """Whether grammars can be followed."""
        return self._masks is not None

    def begin(self, requests: Sequence[Request]) -> list[SampleRow]:
        """The rows of a batch whose logits are about to be computed; their masks are filled meanwhile."""
        rows = [self._row(request) for request in requests]
        if self._masks is not None:
            self._masks.begin(
                [
                    MaskedRow(index, request.constraint, rows[index].avoided_ids)
                    for index, request in enumerate(requests)
                    if request.constraint is not None
                ]
            )
        return rows

    def masks(self) -> RowMasks | None:
        """The masks of the rows begun, if there are any; waits for them."""
        return self._masks.finish() if self._masks is not None else None

    def _row(self, request: Request) -> SampleRow:
        """What the sampler must know to draw the request's next token."""
        row = self._rows.get(request.key)
        if row is None:
            row = self._rows[request.key] = SampleRow(
                params=request.sampling,
                prompt=request.tokens[: request.num_prompt_tokens],
                generated=request.generated,
                choice=request.choice,
                eos_token_ids=self._eos_token_ids,
            )
        return row

    def check(self, request: Request, token: int) -> Ending | None:
        """How the request ends if `token` comes next; ask once for each token, before `append`.

        Raises `GrammarMismatch`, a ValueError, for one that its grammar does not allow.
        """
        if request.constraint is not None:
            request.constraint.accept(token)
        stopper = self._stoppers.get(request.key)
        if stopper is None:
            stopper = self._stoppers[request.key] = Stopper(
                request, eos_token_ids=self._eos_token_ids, stop_texts=self._stop_texts
            )
        return stopper.check(token, length=request.num_tokens + 1)

    def append(self, request: Request, token: int) -> None:
        """`token` is the request's next."""
        request.append(token)
        row = self._rows.get(request.key)
        if row is not None:
            row.append(token)

    def forget(self, key: Hashable) -> None:
        """The request has left the engine."""
        self._rows.pop(key, None)
        self._stoppers.pop(key, None)
