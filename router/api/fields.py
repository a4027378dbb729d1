"""Reading a JSON body into a model, with refusals that name the field, its value and what to do.

Models are strict (a string is no number) and closed: an unknown field is refused with the nearest known name, and a
known one that cannot be honoured is refused by name rather than ignored. A field that is null counts as absent.

Reading happens on the router's event loop, beside everybody's streams: so how many values a body may have is bounded,
before they are looked at one by one.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Annotated, Any, ClassVar, TypeVar

import msgspec
import pydantic

from router.errors import ApiError


def _whole(value: Any) -> Any:
    return int(value) if isinstance(value, float) and value.is_integer() else value


Whole = Annotated[int, pydantic.BeforeValidator(_whole)]
"""A whole number, which some clients write as 16.0."""


class ApiModel(pydantic.BaseModel):
    """Base of all request models."""

    model_config = pydantic.ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, frozen=True)

    unsupported: ClassVar[Mapping[str, Sequence[Any]]] = {}
    """Fields of the API that are refused, each with the values that ask for nothing."""
    replaced: ClassVar[Mapping[str, str]] = {}
    """Fields of the API's past that are refused, each with the one to use instead."""
    in_bulk: ClassVar[frozenset[str]] = frozenset()
    """Fields that may hold any number of values; `read_prompts` bounds them."""


Model = TypeVar("Model", bound=ApiModel)

_MAX_VALUES = 1 << 16
"""Of one field, those within its objects and lists included. To validate so many takes a fifth of a second."""
_SHOWN = 100
"""Characters of a value that an error message quotes."""
_ENCODER = json.JSONEncoder(ensure_ascii=False)

_FIELD = re.compile(r"(?!(?:bool|dict|float|int|list|str)$)[a-z_0-9]+").fullmatch
"""What may be a field's name, and is none of the names of types that tell the members of a union apart."""


def decode_object(body: bytes) -> dict[str, Any]:
    """The JSON object in `body`; raises `ApiError` (400) when there is none."""
    try:
        value = msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ApiError(400, f"the body is not valid JSON: {error}", code="invalid_json") from error
    if not isinstance(value, dict):
        raise ApiError(400, f"the body is {shown(value)}; send a JSON object", code="invalid_json")
    return value


def read_body(model: type[Model], body: bytes) -> Model:
    """The request in `body`; raises `ApiError` (400) naming what is wrong with it."""
    return read_object(model, decode_object(body))


def read_object(
    model: type[Model], value: Mapping[str, Any], *, within: str = "", known: Collection[str] = ()
) -> Model:
    """As `read_body`, for an object already decoded.

    `within` is its path in the body; `known` are names beyond the model's that an unknown one may have meant.
    """
    fields = {name: field for name, field in value.items() if field is not None}
    for name in fields.keys() & model.unsupported.keys():
        if fields.pop(name) not in model.unsupported[name]:
            message = f"{within}{name} is not supported; leave it out"
            raise ApiError(400, message, param=within + name, code="unsupported_parameter")
    for name in fields.keys() & model.replaced.keys():
        message = f"{within}{name} is not supported any more; use {within}{model.replaced[name]}"
        raise ApiError(400, message, param=within + name, code="unsupported_parameter")
    for name in fields.keys() - model.model_fields.keys():
        raise _unknown([*model.model_fields, *known], within, name)
    for name in fields.keys() - model.in_bulk:
        _check_number_of_values(fields[name], within + name)
    try:
        return model.model_validate(fields)
    except pydantic.ValidationError as error:
        raise _refusal(error, fields, within) from error


def _check_number_of_values(value: Any, param: str) -> None:
    left = _MAX_VALUES
    pending = [value]
    while pending:
        one = pending.pop()
        if isinstance(one, dict | list):
            left -= len(one)
            if left < 0:
                message = f"it has more than {_MAX_VALUES} values, those within others included; send fewer"
                raise invalid(param, message)
            pending.extend(one.values() if isinstance(one, dict) else one)


def invalid(param: str, message: str) -> ApiError:
    """A 400 for one field whose value makes no sense."""
    return ApiError(400, f"{param}: {message}", param=param, code="invalid_value")


def _unknown(known: Sequence[str], within: str, name: str) -> ApiError:
    near = difflib.get_close_matches(cut(name), known, n=1)
    remedy = f"did you mean {near[0]}?" if near else "leave it out"
    path = within + cut(name)
    return ApiError(400, f"{path} is not a parameter of this API; {remedy}", param=path, code="unknown_parameter")


def _refusal(error: pydantic.ValidationError, value: object, within: str) -> ApiError:
    found = error.errors(include_url=False)
    places = [_place(each["loc"], value) for each in found]
    # Where a field may be one of several things there is an error for each; the deepest knows what it was meant to be.
    same = [index for index, place in enumerate(places) if place[: len(places[0])] == places[0]]
    deepest = max(same, key=lambda index: len(places[index]))
    first = found[deepest]
    path = within
    for part in places[deepest]:
        path += f"[{part}]" if isinstance(part, int) else f".{part}" if path and not path.endswith(".") else part
    words = first["msg"].removeprefix("Value error, ")
    if first["type"] == "missing":
        return ApiError(400, f"{path} is missing; give it a value", param=path, code="missing_parameter")
    if first["type"] == "extra_forbidden":
        return ApiError(400, f"{path} is not a parameter here; leave it out", param=path, code="unknown_parameter")
    return ApiError(400, f"{path} is {shown(first['input'])}: {words}", param=path, code="invalid_value")


def _place(loc: Sequence[int | str], value: object) -> list[int | str]:
    """The steps of a location that lead through the value; others name what a field might have been."""
    place: list[int | str] = []
    for number, part in enumerate(loc, start=1):
        if isinstance(part, int):
            value = value[part] if isinstance(value, list) and part < len(value) else None
        elif isinstance(value, dict) and part in value:
            value = value[part]
        elif number < len(loc) or not isinstance(value, dict) or not _FIELD(part):
            continue
        place.append(part)
    return place


def shown(value: object) -> str:
    """A value as an error message quotes it: JSON, cut when long, of which no more is written than is shown."""
    text = ""
    try:
        for piece in _ENCODER.iterencode(value[: _SHOWN + 1] if isinstance(value, str) else value):
            text += piece
            if len(text) > _SHOWN:
                break
    except (TypeError, ValueError):
        text = repr(value)
    return cut(text)


def cut(text: str) -> str:
    """The text, or its beginning: an answer must not repeat all that a client sent."""
    return text if len(text) <= _SHOWN else text[: _SHOWN - 3] + "..."
