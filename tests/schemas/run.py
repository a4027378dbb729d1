"""Runs cases through a real engine at temperature 1 and judges what comes out.

    python -m tests.schemas.run --packaged 220 --made 120 --rounds 1

Prints each wrong output and the counts; exits with 1 if any is wrong, or fewer than `--enough` schemas ended by
themselves.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
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


def run_cases(
    cases: Sequence[Case], *, folder: Path, max_tokens: int, seed: int = 0, running: int = 16
) -> Iterator[Verdict]:
    """Every case once, as they end; `running` at a time, so that constrained rows of all kinds share batches."""
    tokenizer = Tokenizer.load(folder)
    model = load_model(folder, num_threads=1)
    shape = model.config
    compiler = GrammarCompiler(tokenizer, vocab_size=shape.vocab_size, eos_token_ids=shape.eos_token_ids)
    config = EngineConfig(max_total_tokens=32_768, max_running_requests=running)
    masks = MaskFiller(vocab_size=shape.vocab_size)
    engine = Engine(
        model=model,
        pool=KVPool(spec=model.kv_spec(config.page_size), num_pages=config.num_pages),
        config=config,
        sampler=Sampler(num_threads=1),
        masks=masks,
    )
    under_way: dict[int, _Run] = {}
    waiting = list(enumerate(cases))[::-1]
    while waiting or under_way:
        while waiting and len(under_way) < running:
            index, case = waiting.pop()
            run = under_way[index] = _Run(case, compiler.compile(case.grammar))
            engine.add(
                Request(
                    key=index,
                    prompt=tokenizer.encode(case.prompt),
                    sampling=SamplingParams(seed=seed + index, max_tokens=max_tokens, grammar=case.grammar),
                    constraint=Constraint(run.compiled),
                )
            )
        output = engine.step()
        for request, why in output.failed:
            yield Verdict(under_way.pop(int(str(request.key))).case, "", complete=False, wrong=f"it failed: {why}")
        for token in output.tokens:
            run = under_way[int(str(token.request.key))]
            if token.finish is not FinishReason.STOP_TOKEN:
                run.tokens.append(token.token)
            if token.finish is not None:
                del under_way[int(str(token.request.key))]
                yield _judged(run, token.finish is FinishReason.STOP_TOKEN, tokenizer)
    masks.close()


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


def main() -> int:
    parser = argparse.ArgumentParser(description="schemas, regexes and grammars with a real model")
    parser.add_argument("--packaged", type=int, default=220)
    parser.add_argument("--made", type=int, default=120)
    parser.add_argument("--rounds", type=int, default=1, help="times each, with other seeds")
    parser.add_argument("--max-tokens", type=int, default=400)
    parser.add_argument("--enough", type=int, default=200, help="schemas that must end by themselves, of one round")
    parser.add_argument("--model", type=Path)
    options = parser.parse_args()
    folder = options.model or fetch_embedded_model(default_model_folder())
    schemas = all_schemas(packaged=options.packaged, made=options.made)
    good = True
    for number in range(options.rounds):
        for kind, cases in (("schemas", schemas), ("regexes and grammars", text_cases())):
            complete = wrong = 0
            verdicts = run_cases(cases, folder=folder, max_tokens=options.max_tokens, seed=1000 * number)
            for done, verdict in enumerate(verdicts, 1):
                complete += verdict.complete
                if verdict.wrong:
                    wrong += 1
                    print(f"WRONG {verdict.case.name}: {verdict.wrong}\n    {verdict.text[:300]!r}")
                if done % 20 == 0 or done == len(cases):
                    counts = f"{done} of {len(cases)} done, {complete} ended by themselves, {wrong} wrong"
                    print(f"round {number}, {kind}: {counts}", flush=True)
            good &= not wrong and (kind != "schemas" or complete >= options.enough)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
