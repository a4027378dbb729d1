"""What following a grammar costs a batch: tokens/s of the same streams with and without one, in the same run.

Both sides generate the same number of tokens from the same prompts with the same engine: one samples at temperature 1
freely, the other within a grammar that never ends before the last token. The sides take turns, so that a machine that
is busy at times is so for both; reported are medians over the rounds and of the ratios within each round.

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
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from benchmarks.report import Report, Table, add_report_options, finish
from benchmarks.workload import random_prompt
from engine.config import EngineConfig
from engine.engine import Engine
from engine.grammar.compiled import CompiledGrammar
from engine.grammar.compiler import GrammarCompiler
from engine.grammar.constraint import Constraint
from engine.grammar.masks import MaskFiller
from engine.kv_spec import KVPool
from engine.model.loader import load_model
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
FREE = "free"


@dataclass(frozen=True)
class Rates:
    """Tokens per second, by three clocks, and the share of the time in which the model was done and a mask was not."""

    wall: float
    engine_cpu: float
    """Of the engine thread's own time: what a machine with a core to spare comes to, however busy this one is."""
    whole_cpu: float
    """Of all threads' time: what a machine with no core to spare comes to."""
    waited: float


def _clocks() -> tuple[float, float, float]:
    return time.perf_counter(), time.thread_time(), time.process_time()


class Bench:
    """One engine, and runs of it."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        tokenizer = Tokenizer.load(arguments.model)
        model = load_model(arguments.model, dtype=arguments.dtype, num_threads=arguments.threads)
        shape = model.config
        compiler = GrammarCompiler(tokenizer, vocab_size=shape.vocab_size, eos_token_ids=shape.eos_token_ids)
        self._compiled: dict[Grammar, CompiledGrammar] = {each: compiler.compile(each) for each in GRAMMARS.values()}
        config = EngineConfig(max_total_tokens=arguments.pool_tokens)
        self._masks = MaskFiller(vocab_size=shape.vocab_size)
        self._engine = Engine(
            model=model,
            pool=KVPool(spec=model.kv_spec(config.page_size), num_pages=config.num_pages),
            config=config,
            sampler=Sampler(num_threads=arguments.threads),
            masks=self._masks,
        )
        self._requests = 0

    def run(self, prompts: list[list[int]], *, new_tokens: int, grammar: Grammar | None) -> Rates:
        """Rates of what is generated once every stream has its first token."""
        for prompt in prompts:
            self._requests += 1
            sampling = SamplingParams(seed=self._requests, max_tokens=new_tokens, ignore_eos=True, grammar=grammar)
            constraint = Constraint(self._compiled[grammar]) if grammar is not None else None
            self._engine.add(Request(key=self._requests, prompt=prompt, sampling=sampling, constraint=constraint))
        started = tokens = 0
        began: tuple[float, ...] = ()
        waited = 0.0
        while self._engine.has_work():
            output = self._engine.step()
            if output.failed:
                raise RuntimeError(f"the engine failed a request: {output.failed}")
            tokens += len(output.tokens)
            if not began:
                started += len(output.tokens)
                if started == len(prompts):
                    began, tokens = _clocks(), 0
                    waited = self._masks.counters.wait_seconds
        expected = len(prompts) * (new_tokens - 1)
        if tokens != expected:
            raise RuntimeError(f"{tokens} tokens were generated where {expected} were asked for")
        wall, engine_cpu, whole_cpu = (now - then for now, then in zip(_clocks(), began, strict=True))
        waited = (self._masks.counters.wait_seconds - waited) / wall
        return Rates(tokens / wall, tokens / engine_cpu, tokens / whole_cpu, waited)

    def close(self) -> None:
        """End the thread."""
        self._masks.close()


def main() -> None:
    arguments = _parse()
    bench = Bench(arguments)
    rates: dict[tuple[int, str], list[Rates]] = defaultdict(list)
    rng = random.Random("constrained")
    sides: list[tuple[str, Grammar | None]] = [(FREE, None), *GRAMMARS.items()]
    for round_number in range(-1, arguments.rounds):
        for streams in arguments.streams:
            prompts = [random_prompt(rng, arguments.prompt_tokens) for _ in range(streams)]
            turn = round_number % len(sides)
            for name, grammar in sides[turn:] + sides[:turn]:
                rate = bench.run(prompts, new_tokens=arguments.new_tokens, grammar=grammar)
                if round_number >= 0:  # the first warms up
                    rates[streams, name].append(rate)
        print(f"round {round_number + 1} of {arguments.rounds}", file=sys.stderr, flush=True)
    bench.close()
    finish(_report(arguments, rates), arguments)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="what following a grammar costs a batch")
    parser.add_argument("--model", required=True, help="folder with safetensors weights")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--threads", type=int, default=1, help="of the model; the masks have one of their own")
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--prompt-tokens", type=int, default=32)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--pool-tokens", type=int, default=32_768)
    add_report_options(parser)
    return parser.parse_args()


def _report(arguments: argparse.Namespace, rates: Mapping[tuple[int, str], Sequence[Rates]]) -> Report:
    table = Table(
        title="Medians",
        columns=[
            "streams",
            "grammar",
            "free tokens/s",
            "constrained",
            "of free",
            "by engine CPU time",
            "by all CPU time",
            "waited for masks",
        ],
    )
    spread = Table(title="Every round, constrained / free", columns=["streams", "grammar", "ratios"])
    for streams in arguments.streams:
        free = rates[streams, FREE]
        for name in GRAMMARS:
            pairs = list(zip(rates[streams, name], free, strict=True))
            wall = [own.wall / other.wall for own, other in pairs]
            engine = [own.engine_cpu / other.engine_cpu for own, other in pairs]
            whole = [own.whole_cpu / other.whole_cpu for own, other in pairs]
            shares = [f"{100 * statistics.median(ratios):.1f} %" for ratios in (wall, engine, whole)]
            middle = [statistics.median(each[side].wall for each in pairs) for side in (1, 0)]
            shares.append(f"{100 * statistics.median(own.waited for own, _ in pairs):.1f} %")
            table.add(streams, name, *middle, *shares)
            spread.add(streams, name, ", ".join(f"{ratio:.3f}" for ratio in wall))
    shown = {key: value for key, value in vars(arguments).items() if key not in ("write", "results")}
    return Report(
        name="constrained",
        purpose="Decode rate of constrained streams against that of free ones with the same engine in the same run.",
        configuration=shown,
        tables=[table, spread],
        notes=[
            "Both sides sample at temperature 1 and go past any end of sequence; prompts' own steps are not counted."
        ],
    )


if __name__ == "__main__":
    main()
