"""Runs cases through a real engine at temperature 1 and judges what comes out.

    python -m tests.schemas.run --packaged 220 --made 120 --part 1/4

Prints each wrong output and the counts; exits with 1 if any is wrong, or fewer than `--enough` schemas ended by
themselves. A part is every so-manieth case, and a share of what is enough.
"""

from __future__ import annotations

import argparse
import itertools
import os
import re
import sys
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import xgrammar

from engine.config import EngineConfig
from engine.engine import Engine
from engine.grammar.compiled import CompiledGrammar
from engine.grammar.compiler import GrammarCompiler
from engine.grammar.constraint import Constraint
from engine.grammar.masks import MaskFiller
from engine.kv_spec import KVPool
from engine.model.embedded import default_model_folder, fetch_embedded_model
from engine.model.loader import load_model
from engine.request import Request
from engine.sampling import Sampler
from protocol.sampling import FinishReason, SamplingParams
from tests.schemas.cases import Case, schema_case
from tests.schemas.made import made_schema
from tests.schemas.packaged import packaged_schemas
from tests.schemas.written import SCHEMAS, text_cases
from text.tokenizer import Tokenizer

_COMPILE_S = 60.0


@dataclass(frozen=True)
class _Run:
    """A case under way."""

    case: Case
    compiled: CompiledGrammar
    tokens: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class Verdict:
    """What became of one case; `wrong` says what is wrong with it, if anything is."""

    case: Case
    text: str
    complete: bool
    wrong: str = ""


class _Ahead:
    """Compiles the next cases while the model runs. Close it at the end."""

    def __init__(self, cases: Sequence[Case], compiler: GrammarCompiler, *, ahead: int) -> None:
        self._cases = enumerate(cases)
        self._compiler = compiler
        self._thread = ThreadPoolExecutor(1)
        self._next: deque[tuple[int, Case, Future[CompiledGrammar]]] = deque()
        self._begin(ahead)

    def take(self) -> tuple[int, _Run] | None:
        """The next case, waited for: equal runs make equal batches."""
        if not self._next:
            return None
        index, case, compiled = self._next.popleft()
        self._begin(1)
        return index, _Run(case, compiled.result(_COMPILE_S))

    def close(self) -> None:
        self._thread.shutdown(cancel_futures=True)

    def _begin(self, count: int) -> None:
        for index, case in itertools.islice(self._cases, count):
            self._next.append((index, case, self._thread.submit(self._compiler.compile, case.grammar)))


def run_cases(
    cases: Sequence[Case], *, folder: Path, max_tokens: int, seed: int = 0, running: int = 32, num_threads: int = 1
) -> Iterator[Verdict]:
    """Every case once, as they end; `running` at a time, so that constrained rows of all kinds share batches."""
    tokenizer = Tokenizer.load(folder)
    model = load_model(folder, num_threads=num_threads)
    shape = model.config
    compiler = GrammarCompiler(tokenizer, vocab_size=shape.vocab_size, eos_token_ids=shape.eos_token_ids)
    config = EngineConfig(max_total_tokens=32_768, max_running_requests=running)
    masks = MaskFiller(vocab_size=shape.vocab_size)
    engine = Engine(
        model=model,
        pool=KVPool(spec=model.kv_spec(config.page_size), num_pages=config.num_pages),
        config=config,
        sampler=Sampler(num_threads=num_threads),
        masks=masks,
    )
    ahead = _Ahead(cases, compiler, ahead=running)
    under_way: dict[int, _Run] = {}
    try:
        while True:
            while len(under_way) < running and (taken := ahead.take()) is not None:
                index, run = taken
                under_way[index] = run
                engine.add(_request(index, run, tokenizer, seed=seed + index, max_tokens=max_tokens))
            if not under_way:
                return
            output = engine.step()
            for failed in output.failed:
                run = under_way.pop(int(str(failed.request.key)))
                yield Verdict(run.case, "", complete=False, wrong=f"it failed: {failed.why}")
            for token in output.tokens:
                index = int(str(token.request.key))
                run = under_way[index]
                if token.finish is not FinishReason.STOP_TOKEN:
                    run.tokens.append(token.token)
                if token.finish is not None:
                    del under_way[index]
                    yield _judged(run, token.finish is FinishReason.STOP_TOKEN, tokenizer)
    finally:
        ahead.close()
        masks.close()


def _request(index: int, run: _Run, tokenizer: Tokenizer, *, seed: int, max_tokens: int) -> Request:
    return Request(
        key=index,
        prompt=tokenizer.encode(run.case.prompt),
        sampling=SamplingParams(seed=seed, max_tokens=max_tokens, grammar=run.case.grammar),
        constraint=Constraint(run.compiled),
    )


def _judged(run: _Run, complete: bool, tokenizer: Tokenizer) -> Verdict:
    text = tokenizer.decode(run.tokens)
    try:
        if complete:
            run.case.check(text)
        else:
            # Byte by byte, not by the tokens that the masks allowed.
            written = b"".join(map(tokenizer.bytes_of, run.tokens))
            assert xgrammar.GrammarMatcher(run.compiled.handle).accept_string(written), "it is no prefix"
    except Exception as error:
        return Verdict(run.case, text, complete, f"{type(error).__name__}: {str(error)[:300]}")
    return Verdict(run.case, text, complete)


def all_schemas(*, packaged: int, made: int) -> list[Case]:
    """Hand-written, made and packaged schemas."""
    return [
        *(schema_case(name, schema) for name, schema in SCHEMAS.items()),
        *(schema_case(f"made {number}", made_schema(number)) for number in range(made)),
        *(schema_case(name, schema) for name, schema in packaged_schemas(packaged)),
    ]


def _part(text: str) -> tuple[int, int]:
    found = re.fullmatch(r"(\d+)/(\d+)", text)
    if found is None or not 1 <= int(found[1]) <= int(found[2]):
        raise argparse.ArgumentTypeError(f"{text!r} is no part; give one like 1/4")
    return int(found[1]), int(found[2])


def _report(kind: str, cases: Sequence[Case], verdicts: Iterator[Verdict]) -> tuple[int, int]:
    """Prints what is wrong, and the counts as they grow; returns how many were complete and how many wrong."""
    complete = wrong = 0
    began = time.monotonic()
    for done, verdict in enumerate(verdicts, 1):
        complete += verdict.complete
        if verdict.wrong:
            wrong += 1
            print(f"WRONG {verdict.case.name}: {verdict.wrong}\n    {verdict.text[:300]!r}")
        if done % 20 == 0 or done == len(cases):
            counts = f"{done} of {len(cases)} done, {complete} ended by themselves, {wrong} wrong"
            print(f"{kind}: {counts}, {time.monotonic() - began:.0f} s", flush=True)
    return complete, wrong


def main() -> int:
    parser = argparse.ArgumentParser(description="schemas, regexes and grammars with a real model")
    parser.add_argument("--packaged", type=int, default=220)
    parser.add_argument("--made", type=int, default=120)
    parser.add_argument("--rounds", type=int, default=1, help="times each, with other seeds")
    parser.add_argument("--part", type=_part, default=(1, 1), help="such as 2/4: the second quarter")
    parser.add_argument("--max-tokens", type=int, default=400)
    parser.add_argument("--enough", type=int, default=200, help="schemas that must end by themselves, of one round")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--model", type=Path)
    options = parser.parse_args()
    folder = options.model or fetch_embedded_model(default_model_folder())
    part, parts = options.part
    schemas = all_schemas(packaged=options.packaged, made=options.made)[part - 1 :: parts]
    texts = text_cases()[part - 1 :: parts]
    good = True
    for number in range(options.rounds):
        for kind, cases in (("schemas", schemas), ("regexes and grammars", texts)):
            verdicts = run_cases(
                cases,
                folder=folder,
                max_tokens=options.max_tokens,
                seed=1000 * number + part,
                num_threads=options.threads,
            )
            complete, wrong = _report(f"round {number}, {kind}", cases, verdicts)
            good &= not wrong and (kind != "schemas" or complete >= options.enough // parts)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
