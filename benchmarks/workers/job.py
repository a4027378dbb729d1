"""What a worker is told and what it answers, for engines measured side by side in processes of their own.

A worker reads one JSON job from standard input and writes JSON lines to standard output: `ready` once its engine has
generated a first token, then one line for each task. The times are CLOCK_MONOTONIC, which all processes of a machine
share. Only the standard library is used here: a peer's environment has nothing of ours.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TextIO

Generate = Callable[[list[list[int]], int], int]
"""Generate `max_tokens` tokens for each of the prompts, greedily and past any EOS; returns the tokens generated."""


@dataclass(frozen=True, kw_only=True)
class Task:
    name: str
    prompts: list[list[int]]
    """Token ids; no two prompts of a job share a prefix."""
    max_tokens: int


@dataclass(frozen=True, kw_only=True)
class Job:
    model: str
    """Folder of safetensors weights and a tokenizer."""
    dtype: str
    threads: int
    max_model_len: int
    pool_tokens: int
    """Tokens of KV cache, where the engine takes them as such."""
    tasks: list[Task]
    """The first is the warm-up that ends the start-up."""
    options: dict[str, Any] = field(default_factory=dict)
    """Further settings, in the engine's own words."""

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Job:
        fields = json.loads(text)
        return cls(**{**fields, "tasks": [Task(**task) for task in fields["tasks"]]})


def run_worker(start: Callable[[Job], Generate]) -> None:
    """Read the job, start the engine, do the tasks, report each."""
    results = _own_stdout()
    job = Job.from_json(sys.stdin.read())
    generate = start(job)
    generate(job.tasks[0].prompts, job.tasks[0].max_tokens)
    _report(results, {"event": "ready", "at": time.monotonic()})
    for task in job.tasks[1:]:
        began = time.perf_counter()
        tokens = generate(task.prompts, task.max_tokens)
        seconds = time.perf_counter() - began
        expected = len(task.prompts) * task.max_tokens
        if tokens != expected:
            raise RuntimeError(f"{task.name}: {tokens} tokens were generated where {expected} were asked for")
        _report(results, {"event": "task", "name": task.name, "seconds": seconds})


def _own_stdout() -> TextIO:
    """Standard output for results alone: whatever else prints goes to standard error."""
    results = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    return results


def _report(results: TextIO, line: dict[str, Any]) -> None:
    results.write(json.dumps(line) + "\n")
    results.flush()
