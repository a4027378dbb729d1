"""JSON schemas that others wrote: of the request and response models of OpenAI's client library, and of Ray Serve's."""

from __future__ import annotations

import importlib
import inspect
import json
import pkgutil
import random
import warnings
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pydantic


def packaged_schemas(count: int, *, max_bytes: int = 1400, seed: int = 1) -> list[tuple[str, dict[str, Any]]]:
    """(name, schema) of `count` models, chosen at random among those that are not larger than `max_bytes`."""
    found: dict[str, tuple[str, dict[str, Any]]] = {}
    for name, model in _models():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                schema = model.model_json_schema()
            except pydantic.errors.PydanticUserError:
                continue  # a type that JSON has not
        text = json.dumps(schema)
        if 150 <= len(text) <= max_bytes:
            found.setdefault(text, (name, schema))
    return random.Random(seed).sample(sorted(found.values(), key=lambda each: each[0]), count)


def _models() -> Iterator[tuple[str, type[pydantic.BaseModel]]]:
    for module in _modules():
        for name, value in vars(module).items():
            if inspect.isclass(value) and issubclass(value, pydantic.BaseModel) and value.__module__ == module.__name__:
                yield f"{module.__name__}.{name}", value


def _modules() -> Iterator[ModuleType]:
    import openai.types

    yield importlib.import_module("ray.serve.schema")
    for found in pkgutil.walk_packages(openai.types.__path__, "openai.types."):
        if found.name.count(".") <= 3:
            yield importlib.import_module(found.name)
