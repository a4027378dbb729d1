"""The fields of /generate: SGLang's, those of sampling apart from the rest, and how they are given for each prompt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, TypeVar

from pydantic import Field

from router.api.fields import ApiModel, Whole, decode_object, invalid, read_object, shown
from router.api.prompts import Texts, Tokens
from router.api.sampling import SamplingFields

_MAX_TOKENS_DESCRIBED = 1024

Rid = Annotated[str, Field(min_length=1, max_length=128)]
Top = Annotated[Whole, Field(ge=0, le=20)]
StartLen = Annotated[Whole, Field(ge=-1)]
TokenId = Annotated[Whole, Field(ge=0)]
TokenIds = Annotated[list[TokenId], Field(max_length=_MAX_TOKENS_DESCRIBED)]
Parameters = dict[str, Any]

Value = TypeVar("Value")


class NativeSampling(SamplingFields):
    """SGLang's names where they differ from OpenAI's."""

    unsupported: ClassVar[dict[str, Sequence[Any]]] = {
        "spaces_between_special_tokens": (True,),
        "custom_params": (),
        "stream_interval": (1,),
        "beam_width": (1,),
    }

    max_new_tokens: Whole | None = Field(None, ge=0)
    min_new_tokens: Whole = Field(0, ge=0)
    sampling_seed: Whole | None = Field(None, ge=-(2**63), lt=2**63)


class GenerateRequest(ApiModel):
    """What is not sampling. Fields that may be lists then have one value for each prompt."""

    unsupported: ClassVar[dict[str, Sequence[Any]]] = {
        "input_embeds": (),
        "positional_embed_overrides": (),
        "image_data": ([],),
        "audio_data": ([],),
        "video_data": ([],),
        "video_config": (),
        "use_audio_in_video": (False,),
        "mm_hashes": (),
        "mm_content_hashes": (),
        "modalities": ([],),
        "max_dynamic_patch": (),
        "min_dynamic_patch": (),
        "image_max_dynamic_patch": (),
        "video_max_dynamic_patch": (),
        "images_config": (),
        "need_wait_for_mm_inputs": (False,),
        "num_items_assigned": (),
        "encoder_urls": (),
        "lora_path": (),
        "lora_id": (),
        "custom_logit_processor": (),
        "session_params": (),
        "return_hidden_states": (False,),
        "return_routed_experts": (False,),
        "routed_experts_start_len": (0,),
        "return_indexer_topk": (False,),
        "return_sampling_mask": (False,),
        "return_flat_raw_top_logprobs": (False,),
        "return_flat_raw_top_logprobs_b64": (False,),
        "return_bytes": (False,),
        "return_entropy": (False,),
        "multi_item_delimiter_indices": (),
        "background": (False,),
        "require_reasoning": (False,),
        "max_thinking_tokens": (),
        "log_metrics": (True,),
        "external_trace_header": (),
        "received_time": (),
        "http_worker_ipc": (),
        "bootstrap_host": (),
        "bootstrap_port": (),
        "bootstrap_room": (),
        "bootstrap_pair_key": (),
        "decode_tp_size": (),
        "routed_dp_rank": (),
        "data_parallel_rank": (),
        "disagg_prefill_dp_rank": (),
        "kv_router_hint": (),
        "routing_key": (),
    }

    in_bulk: ClassVar[frozenset[str]] = frozenset({"text", "input_ids"})

    text: Texts = None
    input_ids: Tokens = None
    sampling_params: Parameters | list[Parameters] = Field(default_factory=dict)
    stream: bool = False
    rid: Rid | list[Rid] | None = None
    """The client's own id, given back in meta_info; /abort_request knows the request by it."""
    cache_salt: str | None = Field(None, min_length=1, max_length=1024)
    """Requests share cached prefixes with those of the same salt only; `extra_key` is SGLang's name for it."""
    extra_key: str | None = Field(None, min_length=1, max_length=1024)
    return_logprob: bool | list[bool] = False
    logprob_start_len: StartLen | list[StartLen] = -1
    """From which position on the prompt's own tokens are described; -1 describes those generated only."""
    top_logprobs_num: Top | list[Top] = 0
    token_ids_logprob: TokenIds | list[TokenIds] = Field(default_factory=list)
    """Tokens whose logprobs are told at every position."""
    return_text_in_logprobs: bool = False
    return_prompt_token_ids: bool = False
    priority: Whole = Field(0, ge=-(2**31), lt=2**31)
    """Of waiting requests those with the highest go first."""
    return_timeline: bool = False
    """Ours: tell where the time went, in the meta_info of the last event."""
    no_logs: bool = False
    """Nothing of what a request says is ever logged."""
    session_id: str | None = None
    """Like the next two of use to the client only."""
    conversation_id: str | None = None
    custom_labels: dict[str, str] | None = None


def read_fields(body: bytes) -> tuple[GenerateRequest, Mapping[str, Any]]:
    """The request, and sampling fields found beside `sampling_params` instead of in it."""
    fields = decode_object(body)
    sampling = NativeSampling.model_fields.keys() | NativeSampling.unsupported.keys()
    beside = {name: value for name, value in fields.items() if name in sampling}
    rest = {name: value for name, value in fields.items() if name not in sampling}
    request = read_object(GenerateRequest, rest, known=NativeSampling.model_fields)
    if (request.text is None) == (request.input_ids is None):
        raise invalid("text", "give either text or input_ids, and not both")
    if beside:
        read_object(NativeSampling, beside)  # so that what is wrong with them is not said of sampling_params
    return request, beside


def read_sampling(request: GenerateRequest, beside: Mapping[str, Any], *, prompts: int) -> Sequence[NativeSampling]:
    """Each prompt's; raises `ApiError` (400) for a batch whose numbers of choices differ."""
    each = per_prompt("sampling_params", request.sampling_params, prompts)
    parsed = [read_object(NativeSampling, {**beside, **fields}, within="sampling_params.") for fields in each]
    choices = {fields.n for fields in parsed}
    if len(choices) > 1:
        raise invalid("sampling_params.n", f"n differs within the batch ({sorted(choices)}); give the same for all")
    return parsed


def per_prompt(name: str, value: Value | list[Value], prompts: int) -> list[Value]:
    """A field's value for each prompt; raises `ApiError` (400) for a list of another length."""
    if not isinstance(value, list):
        return [value] * prompts
    if len(value) != prompts:
        raise invalid(name, f"{len(value)} values for {prompts} prompts; give one for each")
    return value


def described_tokens(value: list[int] | list[list[int]], prompts: int) -> list[list[int]]:
    """`token_ids_logprob` of each prompt: one list for all, or one for each."""
    lists = [each for each in value if isinstance(each, list)]
    if lists:
        return per_prompt("token_ids_logprob", lists, prompts)
    return [[each for each in value if isinstance(each, int)]] * prompts


def check_kind(param: str, given: Any) -> None:
    """Raises `ApiError` (400) for ids among texts' field and for texts among ids'."""
    first = given[0] if isinstance(given, list) and given else given
    if param == "text" and not isinstance(first, str):
        raise invalid(param, f"{shown(first)} is no text; token ids go into input_ids")
    if param == "input_ids" and isinstance(first, str):
        raise invalid(param, f"{shown(first)} is no token id; text goes into text")


def names(rid: str | list[str], *, prompts: int, choices: int, many: bool) -> list[str]:
    """What each output is called: by its prompt's own id, if there is one, else by the request's and a number."""
    if not isinstance(rid, list):
        return [f"{rid}_{index}" for index in range(prompts * choices)] if many else [rid]
    if len(rid) != prompts:
        raise invalid("rid", f"{len(rid)} ids for {prompts} prompts; give one for each")
    if len(set(rid)) < prompts:
        raise invalid("rid", f"{shown(rid)} names two prompts alike; give each its own id")
    return [f"{name}_{choice}" for name in rid for choice in range(choices)] if choices > 1 else rid
