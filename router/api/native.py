"""POST /generate: SGLang's native API, for one prompt or a batch, as text or token ids.

Sampling parameters come nested in `sampling_params` (one object for all prompts, or a list with one for each) or at
top level. A stream repeats the whole text so far in each event; batches and several choices say which `index` it
belongs to.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from pydantic import Field

from protocol.sampling import FinishReason, SamplingParams
from router.api.fields import ApiModel, decode_object, invalid, read_object, shown
from router.api.openai import make_work
from router.api.prompts import ModelText, read_prompts
from router.api.response import DONE, encode, event
from router.api.sampling import SamplingFields
from router.work import Delta, SequenceOutput, Work

_DEFAULT_TOKENS = 128
"""What SGLang generates when max_new_tokens is not given."""


class NativeSampling(SamplingFields):
    """SGLang's names where they differ from OpenAI's."""

    unsupported: ClassVar[dict[str, Sequence[Any]]] = {
        "json_schema": (),
        "regex": (),
        "ebnf": (),
        "structural_tag": (),
        "no_stop_trim": (False,),
        "spaces_between_special_tokens": (True,),
        "stop_regex": ([],),
        "custom_params": (),
        "stream_interval": (1,),
    }

    max_new_tokens: int | None = Field(None, ge=1)
    min_new_tokens: int = Field(0, ge=0)
    sampling_seed: int | None = Field(None, ge=-(2**63), lt=2**63)


class GenerateRequest(ApiModel):
    """What is not sampling."""

    unsupported: ClassVar[dict[str, Sequence[Any]]] = {
        "input_embeds": (),
        "image_data": (),
        "audio_data": (),
        "video_data": (),
        "lora_path": (),
        "logprob_start_len": (-1,),
        "token_ids_logprob": (),
        "return_hidden_states": (False,),
        "return_routed_experts": (False,),
        "session_params": (),
        "priority": (0,),
    }

    text: Any = None
    input_ids: Any = None
    sampling_params: Any = Field(default_factory=dict)
    stream: bool = False
    rid: str | None = Field(None, min_length=1, max_length=128)
    """The client's own id for the request, given back in meta_info."""
    return_logprob: bool = False
    top_logprobs_num: int = Field(0, ge=0, le=20)
    return_text_in_logprobs: bool = False


class NativeFormat:
    """Writes SGLang's outputs."""

    def __init__(
        self, work: Work, outputs: Sequence[SequenceOutput], request: GenerateRequest, *, model: ModelText, many: bool
    ) -> None:
        self._outputs = outputs
        self._tokenizer = model.tokenizer
        self._request = request
        self._many = many
        self._id = request.rid or work.response_id
        self._began = time.monotonic()

    def opening(self) -> bytes:
        return b""

    def piece(self, index: int, delta: Delta) -> bytes:
        output = self._output(index)
        if self._many:
            output["index"] = index
        return event(output)

    def closing(self) -> bytes:
        return DONE

    def whole(self) -> bytes:
        outputs = [self._output(index) for index in range(len(self._outputs))]
        return encode(outputs if self._many else outputs[0])

    def _output(self, index: int) -> dict[str, Any]:
        output = self._outputs[index]
        meta: dict[str, Any] = {
            "id": f"{self._id}_{index}" if self._many else self._id,
            "finish_reason": _finish(output),
            "prompt_tokens": len(output.job.prompt),
            "completion_tokens": len(output.tokens),
            "cached_tokens": min(output.cached_tokens, len(output.job.prompt)),
            "e2e_latency": time.monotonic() - self._began,
        }
        if self._request.return_logprob:
            meta["output_token_logprobs"] = [self._logprob(each.logprob, each.token) for each in output.events]
            if self._request.top_logprobs_num:
                meta["output_top_logprobs"] = [
                    [self._logprob(top.logprob, top.token) for top in each.top or ()] for each in output.events
                ]
        return {"text": output.text, "output_ids": output.tokens, "meta_info": meta}

    def _logprob(self, logprob: float | None, token: int) -> tuple[float | None, int, str | None]:
        text = self._tokenizer.token_text(token) if self._request.return_text_in_logprobs else None
        return (logprob, token, text)


async def parse_generate(body: bytes, model: ModelText) -> tuple[Work, list[SequenceOutput], NativeFormat]:
    """The work a request asks for and how to answer it; raises `ApiError`."""
    request, beside = _split(body)
    if (request.text is None) == (request.input_ids is None):
        raise invalid("text", "give either text or input_ids, and not both")
    param = "text" if request.text is not None else "input_ids"
    given = request.text if request.text is not None else request.input_ids
    _check_kind(param, given)
    prompts = await read_prompts(given, model, param=param)
    nested = request.sampling_params
    each = nested if isinstance(nested, list) else [nested] * len(prompts)
    if not all(isinstance(fields, dict) for fields in each):
        raise invalid("sampling_params", f"{shown(nested)} holds no parameters; give an object, or a list of objects")
    if len(each) != len(prompts):
        raise invalid("sampling_params", f"{len(each)} objects for {len(prompts)} prompts; give one for each")
    parsed = [
        read_object(NativeSampling, {**beside, **fields}, within="sampling_params." if fields else "")
        for fields in each
    ]
    choices = {fields.n for fields in parsed}
    if len(choices) > 1:
        raise invalid("sampling_params.n", f"n differs within the batch ({sorted(choices)}); give the same for all")
    sampling = [
        _sampling(fields, request, model, prompt, param=param) for fields, prompt in zip(parsed, prompts, strict=True)
    ]
    response_id = secrets.token_hex(16)
    n = choices.pop()
    work = make_work(
        model, response_id=response_id, prompts=prompts, sampling=sampling, choices=n, stream=request.stream
    )
    outputs = [SequenceOutput(job, model.tokenizer) for job in work.jobs]
    many = n > 1 or (isinstance(given, list) and isinstance(given[0], str | list))
    return work, outputs, NativeFormat(work, outputs, request, model=model, many=many)


def _split(body: bytes) -> tuple[GenerateRequest, Mapping[str, Any]]:
    """The request, and sampling fields found beside `sampling_params` instead of in it."""
    fields = decode_object(body)
    sampling = NativeSampling.model_fields.keys() | NativeSampling.unsupported.keys()
    beside = {name: value for name, value in fields.items() if name in sampling}
    rest = {name: value for name, value in fields.items() if name not in sampling}
    return read_object(GenerateRequest, rest, known=NativeSampling.model_fields), beside


def _check_kind(param: str, given: Any) -> None:
    first = given[0] if isinstance(given, list) and given else given
    if param == "text" and not isinstance(first, str):
        raise invalid(param, f"{first!r} is no text; token ids go into input_ids")
    if param == "input_ids" and isinstance(first, str):
        raise invalid(param, f"{first!r} is no token id; text goes into text")


def _sampling(
    fields: NativeSampling, request: GenerateRequest, model: ModelText, prompt: list[int], *, param: str
) -> SamplingParams:
    limit = model.output_room(
        len(prompt), fields.max_new_tokens, param=param, limit_name="max_new_tokens", default=_DEFAULT_TOKENS
    )
    return fields.params(
        max_tokens=limit,
        min_tokens=fields.min_new_tokens,
        seed=secrets.randbits(63) if fields.sampling_seed is None else fields.sampling_seed,
        logprobs=request.top_logprobs_num if request.return_logprob else None,
        vocab_size=model.tokenizer.vocab_size,
    )


def _finish(output: SequenceOutput) -> dict[str, Any] | None:
    if output.finish is None:
        return None
    if output.finish is FinishReason.LENGTH:
        return {"type": "length", "length": len(output.tokens)}
    return {"type": "stop", "matched": output.tokens[-1] if output.matched is None else output.matched}
