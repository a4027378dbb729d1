"""What a load benchmark sends: prompts as token ids, output lengths and arrival times. Pure functions of a seed.

Prompts are random token ids, so no two share a prefix unless a trace says so. Traces are JSON lines with `timestamp`
(ms), `input_length`, `output_length` (tokens) and `hash_ids` (one per 512-token block of the prompt; equal ids are
equal blocks); they are replayed with smaller blocks, which keeps their sharing while fitting a small machine.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import msgspec

TRACE_BLOCK = 512
FIRST_TOKEN, LAST_TOKEN = 1_000, 20_000
"""Random prompts draw from these ids: above the special tokens, below the size of any vocabulary served here."""


@dataclass(frozen=True, kw_only=True)
class WorkItem:
    arrival_s: float
    """Seconds after the start of the run."""
    prompt: list[int]
    output_tokens: int


@dataclass(frozen=True, kw_only=True)
class Lengths:
    """Token counts drawn uniformly from `low` to `high`, both included."""

    low: int
    high: int

    @classmethod
    def parse(cls, text: str) -> Lengths:
        """`"512"` is fixed, `"32:1024"` is uniform. Raises ValueError for anything else."""
        low, colon, high = text.partition(":")
        try:
            lengths = cls(low=int(low), high=int(high if colon else low))
        except ValueError as error:
            raise ValueError(f"lengths are given as N or LOW:HIGH, not {text!r}") from error
        if not 1 <= lengths.low <= lengths.high:
            raise ValueError(f"lengths must be positive and in order: {text!r}")
        return lengths

    def draw(self, rng: random.Random) -> int:
        return rng.randint(self.low, self.high)


class TraceLine(msgspec.Struct):
    timestamp: float
    input_length: int
    output_length: int
    hash_ids: list[int]


def random_prompt(rng: random.Random, length: int) -> list[int]:
    """`length` token ids that share a prefix with nothing else."""
    return rng.choices(range(FIRST_TOKEN, LAST_TOKEN), k=length)


def poisson(*, rate: float, count: int, prompts: Lengths, outputs: Lengths, seed: object) -> list[WorkItem]:
    """`count` requests at `rate` per second on average, with exponentially distributed gaps."""
    rng = random.Random(f"poisson {seed}")
    items, now = [], 0.0
    for _ in range(count):
        now += rng.expovariate(rate)
        prompt = random_prompt(rng, prompts.draw(rng))
        items.append(WorkItem(arrival_s=now, prompt=prompt, output_tokens=outputs.draw(rng)))
    return items


def replay(path: Path, *, count: int, block: int, speed: float, max_tokens: int, seed: object) -> list[WorkItem]:
    """The first `count` requests of a trace that fit, with blocks of `block` tokens and time running `speed` times.

    Requests of more than `max_tokens` prompt and output tokens after scaling are left out, and their time with them
    stays. Output lengths shrink by the same factor as blocks.
    """
    items: list[WorkItem] = []
    for line in _lines(path):
        prompt = _trace_prompt(line, block=block, seed=seed)
        output_tokens = max(1, line.output_length * block // TRACE_BLOCK)
        if len(prompt) + output_tokens <= max_tokens:
            arrival_s = line.timestamp / 1000 / speed
            items.append(WorkItem(arrival_s=arrival_s, prompt=prompt, output_tokens=output_tokens))
        if len(items) == count:
            break
    return items


def _lines(path: Path) -> Iterator[TraceLine]:
    decoder = msgspec.json.Decoder(TraceLine)
    with path.open("rb") as file:
        for line in file:
            yield decoder.decode(line)


def _trace_prompt(line: TraceLine, *, block: int, seed: object) -> list[int]:
    """Every hash id becomes the same `block` tokens wherever it stands; a part-filled last block shrinks likewise."""
    length = max(1, line.input_length * block // TRACE_BLOCK)
    prompt: list[int] = []
    for hash_id in line.hash_ids:
        prompt += random_prompt(random.Random(f"block {seed} {hash_id}"), block)
    return prompt[:length]
