"""POST /generate: SGLang's native API, for one prompt or a batch, as text or token ids.

Sampling parameters come nested in `sampling_params` (one object for all prompts, or a list with one for each) or at
top level. A stream repeats the whole text so far in each event; batches and several choices say which `index` it
belongs to.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import msgspec

from protocol.sampling import SamplingParams
from protocol.scoring import Scoring
from router.api.fields import invalid
from router.api.native_fields import (
    GenerateRequest,
    NativeSampling,
    check_kind,
    described_tokens,
    names,
    per_prompt,
    read_fields,
    read_sampling,
)
from router.api.native_format import Described, NativeFormat
from router.api.openai import make_work
from router.api.prompts import ModelText, read_prompts
from router.api.score_limit import check_output_numbers, check_scores
from router.work import SequenceOutput, Work

_DEFAULT_TOKENS = 128
"""What SGLang generates when max_new_tokens is not given."""


async def parse_generate(body: bytes, model: ModelText) -> tuple[Work, list[SequenceOutput], NativeFormat]:
    """The work a request asks for and how to answer it; raises `ApiError`."""
    request, beside = read_fields(body)
    param = "text" if request.text is not None else "input_ids"
    given = request.text if request.text is not None else request.input_ids
    check_kind(param, given)
    prompts = await read_prompts(given, model, param=param)
    parsed = read_sampling(request, beside, prompts=len(prompts))
    described = _described(request, prompts, model)
    sampling = [
        _sampling(fields, each, model, prompt, param=param)
        for fields, each, prompt in zip(parsed, described, prompts, strict=True)
    ]
    n = parsed[0].n
    work = make_work(
        model,
        response_id=model.stamp.token,
        cache_salt=request.cache_salt if request.cache_salt is not None else request.extra_key,
        prompts=prompts,
        sampling=sampling,
        choices=n,
        stream=request.stream,
        timeline=request.return_timeline,
        priority=request.priority,
        scoring=[_scoring(each, prompt) for each, prompt in zip(described, prompts, strict=True)],
    )
    _check_scores(request, work, most=model.config.max_logprobs)
    outputs = [
        SequenceOutput(job, model.tokenizer, keeps_tokens=parsed[index // n].max_new_tokens != 0)
        for index, job in enumerate(work.jobs)
    ]
    many = n > 1 or (isinstance(given, list) and isinstance(given[0], str | list))
    rid = work.response_id if request.rid is None else request.rid
    ids = names(rid, prompts=len(prompts), choices=n, many=many)
    work = dataclasses.replace(work, names=_called(rid, ids, choices=n))
    written = NativeFormat(
        outputs,
        ids,
        described,
        tokenizer=model.tokenizer,
        choices=n,
        many=many,
        prompt_ids=request.return_prompt_token_ids,
    )
    return work, outputs, written


def _called(rid: str | list[str], ids: Sequence[str], *, choices: int) -> dict[str, list[int]]:
    """The sequences that each name stands for: one output, one prompt's, or all."""
    called = {name: [index] for index, name in enumerate(ids)}
    if not isinstance(rid, list):
        return {**called, rid: list(range(len(ids)))}
    return {**called, **{each: list(range(p * choices, (p + 1) * choices)) for p, each in enumerate(rid)}}


def _described(request: GenerateRequest, prompts: Sequence[list[int]], model: ModelText) -> list[Described | None]:
    """What is to be told of each prompt's tokens and of those generated after it; raises `ApiError` (400)."""
    count = len(prompts)
    described: list[Described | None] = []
    for prompt, asked, start, top, tokens in zip(
        prompts,
        per_prompt("return_logprob", request.return_logprob, count),
        per_prompt("logprob_start_len", request.logprob_start_len, count),
        per_prompt("top_logprobs_num", request.top_logprobs_num, count),
        described_tokens(request.token_ids_logprob, count),
        strict=True,
    ):
        if start >= len(prompt):
            raise invalid("logprob_start_len", f"{start} is not within the prompt, which has {len(prompt)} tokens")
        if tokens:
            model.check_ids(tokens, param="token_ids_logprob")
        start = len(prompt) - 1 if start < 0 else start
        one = Described(start_len=start, top=top, tokens=tokens, with_text=request.return_text_in_logprobs)
        described.append(one if asked else None)
    return described


def _scoring(described: Described | None, prompt: Sequence[int]) -> Scoring | None:
    if described is None or described.start_len == len(prompt) - 1:
        return None
    return Scoring(described.start_len + 1, described.top, tuple(described.tokens))


def _check_scores(request: GenerateRequest, work: Work, *, most: int) -> None:
    if any(job.sampling.logprobs for job in work.jobs):
        named = "top_logprobs_num"
    else:
        named = "token_ids_logprob" if request.token_ids_logprob else "logprob_start_len"
    check_scores(work.jobs, param=named, value=getattr(request, named))
    named = "return_logprob" if named == "logprob_start_len" else named
    check_output_numbers(work, most=most, param=named, limit_name="max_new_tokens")


def _sampling(
    fields: NativeSampling, described: Described | None, model: ModelText, prompt: list[int], *, param: str
) -> SamplingParams:
    limit = model.output_room(
        len(prompt), fields.max_new_tokens, param=param, limit_name="max_new_tokens", default=_DEFAULT_TOKENS
    )
    if limit == 0 and fields.min_new_tokens:
        raise invalid("min_new_tokens", f"{fields.min_new_tokens} is more than max_new_tokens, which is 0 here")
    sampling = fields.params(
        max_tokens=max(limit, 1),
        min_tokens=fields.min_new_tokens,
        names=("min_new_tokens", "max_new_tokens"),
        seed=model.stamp.seed if fields.sampling_seed is None else fields.sampling_seed,
        logprobs=None if described is None else described.top,
        tokenizer=model.tokenizer,
        reader=model.grammars,
    )
    return sampling if described is None else msgspec.structs.replace(sampling, logprob_tokens=tuple(described.tokens))
