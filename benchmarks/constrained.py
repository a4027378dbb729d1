"""What following a grammar costs a batch: tokens/s of the same streams with and without one, in the same run.

Both sides generate the same number of tokens from the same prompts with one model, each in an engine of its own: one
samples at temperature 1 freely, the other within a grammar that never ends before the last token. They take turns of a
few steps, so that a machine that is slower at times is so for both.

    python -m benchmarks.constrained --model FOLDER --write
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from benchmarks.report import Report, Table, add_report_options, configuration, finish
from benchmarks.workload import random_prompt
from engine.config import EngineConfig
from engine.engine import Engine
from engine.grammar.compiler import GrammarCompiler
from engine.grammar.constraint import Constraint
from engine.grammar.masks import MaskFiller
from engine.kv_spec import KVPool
from engine.model.loader import LoadedModel, load_model
from engine.request import Request
from engine.sampling import Sampler
from protocol.sampling import Grammar, SamplingParams
from text.tokenizer import Tokenizer

_RECORD = {
    "type": "object",
    "properties": {
        "name": {"type": "string"},
        "age": {"type": "integer"},
        "tags": {"type": "array", "items": {"type": "string"}},
        "kind": {"enum": ["cat", "dog", "bird"]},
    },
    "required": ["name", "age", "tags", "kind"],
}
_SHORT = {"type": "object", "properties": {"name": {"type": "string", "maxLength": 20}}, "required": ["name"]}


def _array(items: object) -> Grammar:
    return Grammar(kind="json_schema", text=json.dumps({"type": "array", "items": items, "minItems": 200}))


GRAMMARS = {
    "JSON records": _array(_RECORD),
    "any JSON": _array({}),
    "bounded strings": _array(_SHORT),
    "regex": Grammar(kind="regex", text=r"([A-Z][a-z]+ [0-9]+, ){1000,2000}"),
    "counting regex": Grammar(kind="regex", text=r"([A-Z][a-z]{1,12} [0-9]{1,4}, ){1000,2000}"),
}
"""Counts and bounds are what takes the compiler's masks long."""


@dataclass(frozen=True)
class Turn:
    """Seconds that some steps took, by three clocks, and in how many of them the model was done and a mask was not."""

    wall: float
    engine_cpu: float
    """Of the engine thread alone: what a machine with a core to spare comes to, however busy this one is."""
    whole_cpu: float
    """Of all threads: what a machine with no core to spare comes to."""
    waited: float


_SHARES = ("of free", "median turn", "by engine CPU time", "by all CPU time", "waited for masks")
Pair = tuple[Turn, Turn]
"""A free turn and a constrained one, of equally many tokens, one straight after the other."""


class Side:
    """One engine and the streams on it."""

    def __init__(self, model: LoadedModel, *, pool_tokens: int, threads: int) -> None:
        config = EngineConfig(max_total_tokens=pool_tokens, enable_prefix_cache=False)
        self._masks = MaskFiller(vocab_size=model.config.vocab_size)
        self._engine = Engine(
            model=model,
            pool=KVPool(spec=model.kv_spec(config.page_size), num_pages=config.num_pages),
            config=config,
            sampler=Sampler(num_threads=threads),
            masks=self._masks,
        )

    def start(
        self,
        prompts: Sequence[list[int]],
        *,
        max_tokens: int,
        grammar: Grammar | None,
        constrain: Callable[[], Constraint | None],
    ) -> None:
        """Begin a stream for each prompt; returns once every step makes a token of each."""
        for key, prompt in enumerate(prompts):
            sampling = SamplingParams(seed=key, max_tokens=max_tokens, ignore_eos=True, grammar=grammar)
            self._engine.add(Request(key=key, prompt=prompt, sampling=sampling, constraint=constrain()))
        while self._step() < len(prompts):
            pass

    def take_turn(self, steps: int, *, streams: int) -> Turn:
        """Some steps of all streams."""
        waited, began = self._masks.counters.wait_seconds, _clocks()
        made = sum(self._step() for _ in range(steps))
        wall, engine_cpu, whole_cpu = (now - then for now, then in zip(_clocks(), began, strict=True))
        if made != steps * streams:
            raise RuntimeError(f"{steps} steps made {made} tokens for {streams} streams")
        return Turn(wall, engine_cpu, whole_cpu, self._masks.counters.wait_seconds - waited)

    def stop(self, *, streams: int) -> None:
        """End them."""
        for key in range(streams):
            self._engine.abort(key)

    def close(self) -> None:
        """End the thread."""
        self._masks.close()

    def _step(self) -> int:
        output = self._engine.step()
        if output.failed:
            raise RuntimeError(f"the engine failed a request: {output.failed}")
        return len(output.tokens)


def _clocks() -> tuple[float, float, float]:
    return time.perf_counter(), time.thread_time(), time.process_time()


class Bench:
    """Both sides, over one model; compiles the grammars."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        model = load_model(arguments.model, dtype=arguments.dtype, num_threads=arguments.threads)
        ends, width = model.config.eos_token_ids, model.config.vocab_size
        compiler = GrammarCompiler(Tokenizer.load(arguments.model), vocab_size=width, eos_token_ids=ends)
        self._compiled = {each: compiler.compile(each) for each in GRAMMARS.values()}
        self._free, self._constrained = self._sides = [
            Side(model, pool_tokens=arguments.pool_tokens, threads=arguments.threads) for _ in range(2)
        ]

    def run(self, prompts: list[list[int]], *, turns: int, steps: int, grammar: Grammar) -> list[Pair]:
        """Turns of `steps` steps each, once all streams have begun."""
        max_tokens = turns * steps + len(prompts) + 1
        compiled = self._compiled[grammar]
        self._free.start(prompts, max_tokens=max_tokens, grammar=None, constrain=lambda: None)
        self._constrained.start(prompts, max_tokens=max_tokens, grammar=grammar, constrain=lambda: Constraint(compiled))
        pairs = []
        for number in range(turns):
            order = self._sides if number % 2 else self._sides[::-1]
            turns_of = {side: side.take_turn(steps, streams=len(prompts)) for side in order}
            pairs.append((turns_of[self._free], turns_of[self._constrained]))
        for side in self._sides:
            side.stop(streams=len(prompts))
        return pairs

    def close(self) -> None:
        """End the threads."""
        for side in self._sides:
            side.close()


def main() -> None:
    arguments = _parse()
    bench = Bench(arguments)
    rounds: dict[tuple[int, str], list[list[Pair]]] = defaultdict(list)
    rng = random.Random("constrained")
    for round_number in range(-1, arguments.rounds):
        for streams in arguments.streams:
            prompts = [random_prompt(rng, arguments.prompt_tokens) for _ in range(streams)]
            for name, grammar in GRAMMARS.items():
                pairs = bench.run(prompts, turns=arguments.turns, steps=arguments.steps, grammar=grammar)
                if round_number >= 0:  # the first warms up
                    rounds[streams, name].append(pairs)
        print(f"round {round_number + 1} of {arguments.rounds}", file=sys.stderr, flush=True)
    bench.close()
    finish(_report(arguments, rounds), arguments)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="what following a grammar costs a batch")
    parser.add_argument("--model", required=True, help="folder with safetensors weights")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--threads", type=int, default=1, help="of the model; the masks have one of their own")
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--prompt-tokens", type=int, default=32)
    parser.add_argument("--turns", type=int, default=32, help="of each side in a round")
    parser.add_argument("--steps", type=int, default=4, help="of the engine in a turn")
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--pool-tokens", type=int, default=16_384, help="of each side")
    add_report_options(parser)
    return parser.parse_args()


def _report(arguments: argparse.Namespace, rounds: Mapping[tuple[int, str], Sequence[Sequence[Pair]]]) -> Report:
    columns = ["streams", "grammar", "free tokens/s", "constrained", *_SHARES]
    table = Table(title="All rounds", columns=columns)
    spread = Table(title="Every round, constrained / free", columns=["streams", "grammar", "ratios"])
    for (streams, name), runs in rounds.items():
        pairs = [pair for run in runs for pair in run]
        tokens = len(pairs) * arguments.steps * streams
        free, constrained = (sum(pair[side].wall for pair in pairs) for side in (0, 1))
        ratios = [pair[0].wall / pair[1].wall for pair in pairs]
        error = 1.25 * statistics.stdev(ratios) / len(ratios) ** 0.5
        table.add(
            streams,
            name,
            tokens / free,
            tokens / constrained,
            _percent(_ratio(pairs, "wall")),
            f"{100 * statistics.median(ratios):.1f} ± {100 * error:.1f} %",
            _percent(_ratio(pairs, "engine_cpu")),
            _percent(_ratio(pairs, "whole_cpu")),
            _percent(sum(pair[1].waited for pair in pairs) / constrained),
        )
        spread.add(streams, name, ", ".join(f"{_ratio(run, 'wall'):.3f}" for run in runs))
    return Report(
        name="constrained",
        purpose="Decode rate of constrained streams against that of free ones with the same model in the same run.",
        configuration=configuration(arguments),
        tables=[table, spread],
        notes=[
            "Both sides sample at temperature 1 and go past any end of sequence; prompts' own steps are not counted.",
            "Of free is by the time of all turns together; the median over the pairs of turns has its standard error.",
        ],
    )


def _ratio(pairs: Sequence[Pair], clock: str) -> float:
    """The constrained side's rate as a part of the free one's."""
    free, constrained = (sum(float(getattr(pair[side], clock)) for pair in pairs) for side in (0, 1))
    return free / constrained


def _percent(part: float) -> str:
    return f"{100 * part:.1f} %"


if __name__ == "__main__":
    main()
