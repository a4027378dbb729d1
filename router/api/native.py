"""POST /generate: SGLang's native API, for one prompt or a batch, as text or token ids.

Sampling parameters come nested in `sampling_params` (one object for all prompts, or a list with one for each) or at
top level. A stream repeats the whole text so far in each event; batches and several choices say which `index` it
belongs to.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from pydantic import Field

from protocol.sampling import FinishReason, SamplingParams
from router.api.fields import ApiModel, Whole, decode_object, invalid, read_object, shown
from router.api.growing import GrowingList, GrowingText
from router.api.openai import make_work
from router.api.prompts import ModelText, read_prompts
from router.api.response import DONE, encode, event
from router.api.sampling import SamplingFields
from router.work import Delta, SequenceOutput, Work
from text.tokenizer import Tokenizer

_DEFAULT_TOKENS = 128
"""What SGLang generates when max_new_tokens is not given."""
_MAX_RID_CHARACTERS = 128


class NativeSampling(SamplingFields):
    """SGLang's names where they differ from OpenAI's."""

    unsupported: ClassVar[dict[str, Sequence[Any]]] = {
        "no_stop_trim": (False,),
        "spaces_between_special_tokens": (True,),
        "stop_regex": ([],),
        "custom_params": (),
        "stream_interval": (1,),
    }

    max_new_tokens: Whole | None = Field(None, ge=1)
    min_new_tokens: Whole = Field(0, ge=0)
    sampling_seed: Whole | None = Field(None, ge=-(2**63), lt=2**63)


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
    rid: Any = None
    """The client's own id for the request, or a list with one for each prompt, given back in meta_info."""
    cache_salt: str | None = Field(None, min_length=1, max_length=1024)
    """Requests share cached prefixes with those of the same salt only; `extra_key` is SGLang's name for it."""
    extra_key: str | None = Field(None, min_length=1, max_length=1024)
    return_logprob: bool = False
    top_logprobs_num: Whole = Field(0, ge=0, le=20)
    return_text_in_logprobs: bool = False
    return_timeline: bool = False
    """Ours: tell where the time went, in the meta_info of the last event."""


class NativeFormat:
    """Writes SGLang's outputs."""

    def __init__(
        self,
        outputs: Sequence[SequenceOutput],
        ids: Sequence[str],
        request: GenerateRequest,
        *,
        model: ModelText,
        many: bool,
    ) -> None:
        """`ids` are what each output is called."""
        self._outputs = outputs
        self._written = [_Written(output, request, model.tokenizer) for output in outputs]
        self._ids = ids
        self._many = many
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
            "id": self._ids[index],
            "finish_reason": _finish(output),
            "prompt_tokens": len(output.job.prompt),
            "completion_tokens": len(output.tokens),
            "cached_tokens": min(output.cached_tokens, len(output.job.prompt)),
            "e2e_latency": time.monotonic() - self._began,
        }
        written = self._written[index]
        written.catch_up()
        if written.logprobs is not None:
            meta["output_token_logprobs"] = written.logprobs.json
        if written.tops is not None:
            meta["output_top_logprobs"] = written.tops.json
        if output.timeline is not None and output.finish is not None:
            meta["timeline"] = output.timeline.as_json()
        return {"text": written.text.json, "output_ids": written.ids.json, "meta_info": meta}


class _Written:
    """The parts of one output that every event of a stream repeats, each encoded only as it comes."""

    def __init__(self, output: SequenceOutput, request: GenerateRequest, tokenizer: Tokenizer) -> None:
        self.text, self.ids = GrowingText(), GrowingList()
        self.logprobs = GrowingList() if request.return_logprob else None
        self.tops = GrowingList() if request.return_logprob and request.top_logprobs_num else None
        self._output = output
        self._tokenizer = tokenizer
        self._with_text = request.return_text_in_logprobs
        self._texts = 0

    def catch_up(self) -> None:
        """Take what the output has got since last time."""
        output = self._output
        self.text.extend("".join(output.texts[self._texts :]))
        self._texts = len(output.texts)
        self.ids.extend(output.tokens[len(self.ids) :])
        if self.logprobs is not None:
            self.logprobs.extend(
                [self._logprob(each.logprob, each.token) for each in output.events[len(self.logprobs) :]]
            )
        if self.tops is not None:
            self.tops.extend(
                [
                    [self._logprob(top.logprob, top.token) for top in each.top or ()]
                    for each in output.events[len(self.tops) :]
                ]
            )

    def _logprob(self, logprob: float | None, token: int) -> tuple[float | None, int, str | None]:
        return (logprob, token, self._tokenizer.token_text(token) if self._with_text else None)


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
    if beside:
        read_object(NativeSampling, beside)  # so that what is wrong with them is not said of sampling_params
    parsed = [read_object(NativeSampling, {**beside, **fields}, within="sampling_params.") for fields in each]
    choices = {fields.n for fields in parsed}
    if len(choices) > 1:
        raise invalid("sampling_params.n", f"n differs within the batch ({sorted(choices)}); give the same for all")
    sampling = [
        _sampling(fields, request, model, prompt, param=param) for fields, prompt in zip(parsed, prompts, strict=True)
    ]
    response_id = model.stamp.token
    n = choices.pop()
    work = make_work(
        model,
        response_id=response_id,
        cache_salt=request.cache_salt if request.cache_salt is not None else request.extra_key,
        prompts=prompts,
        sampling=sampling,
        choices=n,
        stream=request.stream,
        timeline=request.return_timeline,
        scoring=[None] * len(prompts),
    )
    outputs = [SequenceOutput(job, model.tokenizer) for job in work.jobs]
    many = n > 1 or (isinstance(given, list) and isinstance(given[0], str | list))
    ids = _ids(response_id if request.rid is None else request.rid, prompts=len(prompts), choices=n, many=many)
    return work, outputs, NativeFormat(outputs, ids, request, model=model, many=many)


def _ids(rid: Any, *, prompts: int, choices: int, many: bool) -> list[str]:
    """What each output is called: by its prompt's own id, if there is one, else by the request's and a number."""
    each = rid if isinstance(rid, list) else [rid]
    if not all(isinstance(name, str) and 1 <= len(name) <= _MAX_RID_CHARACTERS for name in each):
        raise invalid("rid", f"{shown(rid)} holds no ids; give texts of 1 to {_MAX_RID_CHARACTERS} characters")
    if not isinstance(rid, list):
        return [f"{rid}_{index}" for index in range(prompts * choices)] if many else each
    if len(rid) != prompts:
        raise invalid("rid", f"{len(rid)} ids for {prompts} prompts; give one for each")
    return [f"{name}_{choice}" for name in rid for choice in range(choices)] if choices > 1 else rid


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
        raise invalid(param, f"{shown(first)} is no text; token ids go into input_ids")
    if param == "input_ids" and isinstance(first, str):
        raise invalid(param, f"{shown(first)} is no token id; text goes into text")


def _sampling(
    fields: NativeSampling, request: GenerateRequest, model: ModelText, prompt: list[int], *, param: str
) -> SamplingParams:
    limit = model.output_room(
        len(prompt), fields.max_new_tokens, param=param, limit_name="max_new_tokens", default=_DEFAULT_TOKENS
    )
    return fields.params(
        max_tokens=limit,
        min_tokens=fields.min_new_tokens,
        names=("min_new_tokens", "max_new_tokens"),
        seed=model.stamp.seed if fields.sampling_seed is None else fields.sampling_seed,
        logprobs=request.top_logprobs_num if request.return_logprob else None,
        vocab_size=model.tokenizer.vocab_size,
    )


def _finish(output: SequenceOutput) -> dict[str, Any] | None:
    if output.finish is None:
        return None
    if output.finish is FinishReason.LENGTH:
        return {"type": "length", "length": len(output.tokens)}
    return {"type": "stop", "matched": output.tokens[-1] if output.matched is None else output.matched}
