"""What an API request asks for once it is parsed and tokenised, in the same shape for every API."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from operator import itemgetter

from protocol.rooms import Job, TokenEvent
from protocol.sampling import FinishReason
from router.score_log import ScoreLog
from router.timeline import SequenceTimeline
from text.detokenizer import IncrementalDetokenizer
from text.output_text import OutputText
from text.tokenizer import Tokenizer


@dataclass(frozen=True, kw_only=True)
class Work:
    """Prompts times choices. Sequence `p * choices + c` is choice `c` of prompt `p`, and each is a room of its own.

    Choices of one prompt differ in `Job.choice`, which is part of the sampling randomness.
    """

    response_id: str
    jobs: list[Job]
    choices: int
    """How many choices each prompt has."""
    stream: bool
    names: Mapping[str, Sequence[int]] = field(default_factory=dict)
    """The sequences that each name of a client's stands for, by which it may have them ended."""

    @property
    def prompt_tokens(self) -> int:
        """Of every prompt, each counted once."""
        return sum(len(job.prompt) for job in self.jobs[:: self.choices])

    @property
    def priority(self) -> int:
        """Of all its sequences; the highest go first."""
        return self.jobs[0].priority

    @property
    def scored_tokens(self) -> int:
        """Tokens of prompts whose scores the answer tells."""
        return sum(max(0, len(job.prompt) - job.scoring.start) for job in self.jobs if job.scoring is not None)


@dataclass(slots=True)
class Delta:
    """What some new tokens add to a sequence."""

    text: str
    events: list[TokenEvent]
    """The tokens, without a final stop token, which is no part of the output's content unless that was asked for."""
    finish: FinishReason | None


@dataclass(slots=True)
class SequenceOutput:
    """One sequence's output so far."""

    job: Job
    tokenizer: Tokenizer
    keeps_tokens: bool = True
    """False where none was asked for: the engine always makes one, which is then no part of the output."""
    tokens: list[int] = field(default_factory=list)
    """All generated tokens, a final stop token included."""
    events: list[TokenEvent] = field(default_factory=list)
    """As in `Delta`; kept only when logprobs were asked for."""
    texts: list[str] = field(default_factory=list)
    finish: FinishReason | None = None
    matched: str | int | None = None
    cached_tokens: int = 0
    timeline: SequenceTimeline | None = field(init=False)
    """Where the time went, if the job asks for it; complete when the sequence has finished."""
    scores: ScoreLog | None = field(init=False)
    """Of the prompt's tokens, if the job asks for them; complete before the first token."""
    logprob_sum: float = 0.0
    """Of all tokens, a final stop token included; kept only when logprobs were asked for."""
    _output: OutputText = field(init=False)

    def __post_init__(self) -> None:
        job = self.job
        self.timeline = SequenceTimeline() if job.timeline else None
        self.scores = None if job.scoring is None else ScoreLog(job.scoring, prompt_tokens=len(job.prompt))
        self._output = OutputText(self.tokenizer, self.job.prompt, self.job.sampling)

    @property
    def text(self) -> str:
        return "".join(self.texts)

    def tokens_within(self, characters: int) -> int:
        """How many tokens it took to write that much of the text's beginning."""
        sampling, written = self.job.sampling, 0
        detokenizer = IncrementalDetokenizer(
            self.tokenizer,
            self.job.prompt,
            skip_special_tokens=sampling.skip_special_tokens,
            shown_special_ids=sampling.shown_special_ids,
        )
        for number, token in enumerate(self.tokens):
            if written >= characters:
                return number
            written += len(detokenizer.push(token))
        return len(self.tokens) if characters else 0

    def push(self, events: list[TokenEvent]) -> Delta:
        """Take the next tokens, in order; nothing may follow one that finishes the sequence."""
        pieces: list[str] = []
        content = events
        for event in events:
            if event.finish is FinishReason.ABORT:
                self.finish, content = event.finish, events[:-1]
                pieces.append(self._output.flush())
                break
            if not self.keeps_tokens:
                self.finish, content = FinishReason.LENGTH, []
                self.cached_tokens = event.cached_tokens or 0
                break
            self.tokens.append(event.token)
            self.logprob_sum += event.logprob or 0.0
            if event.position == 0:
                self.cached_tokens = event.cached_tokens or 0
            if event.finish is FinishReason.STOP_TOKEN and not self.job.sampling.include_stop:
                content = events[:-1]
            else:
                pieces.append(self._output.push(event.token)[0])
            if event.finish is not None:
                self.finish, self.matched = event.finish, event.matched
                if event.finish is not FinishReason.STOP_STRING:
                    pieces.append(self._output.flush())
        text = "".join(pieces)
        self.texts.append(text)
        if self.job.sampling.logprobs is not None:
            self.events += content
        return Delta(text, content, self.finish)


def pushed(outputs: Sequence[SequenceOutput], ready: list[tuple[int, TokenEvent]]) -> list[tuple[int, Delta]]:
    """What new tokens, each with the index of its sequence, add to the sequences that they are of."""
    if len(outputs) > 1:
        ready.sort(key=itemgetter(0))  # stable: tokens of one sequence stay in order
    return [
        (index, outputs[index].push([event for _, event in group]))
        for index, group in itertools.groupby(ready, key=itemgetter(0))
    ]
