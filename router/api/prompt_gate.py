"""Holds a stream's pieces back until what they begin with is known: the scores of their prompt.

Only the first choice of a prompt has it scored, and its scores are complete before its own first token, which is what
opens the gate: so a stream that is written again from its tokens has the same events. Other choices may be ahead of it.
"""

from __future__ import annotations

from collections.abc import Sequence

from router.work import Delta, SequenceOutput

Piece = tuple[int, Delta]


class PromptGate:
    """`outputs` are prompts times `choices`, in order."""

    def __init__(self, outputs: Sequence[SequenceOutput], *, choices: int) -> None:
        self._outputs = outputs
        self._choices = choices
        self._held: dict[int, list[Piece]] = {}

    def first(self, index: int) -> SequenceOutput:
        """The first choice of the prompt of sequence `index`: the one that has its scores."""
        return self._outputs[index - index % self._choices]

    def take(self, index: int, delta: Delta) -> list[Piece]:
        """The pieces that may be written now that this one has come."""
        first = self.first(index)
        prompt = index // self._choices
        if first.scores is None or first.tokens or first.finish is not None:
            return [*self._held.pop(prompt, ()), (index, delta)]
        self._held.setdefault(prompt, []).append((index, delta))
        return []
