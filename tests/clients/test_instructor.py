"""instructor: typed answers through tools and through response formats."""

from __future__ import annotations

from enum import StrEnum

import instructor
import pytest
from openai import OpenAI
from pydantic import BaseModel, Field

pytestmark = pytest.mark.clients

MODEL = "SmolLM2-135M-Instruct"


class Size(StrEnum):
    small = "small"
    large = "large"


class City(BaseModel):
    """A city."""

    name: str = Field(max_length=24)
    size: Size
    inhabitants: int = Field(ge=0, le=99_999_999)


@pytest.mark.parametrize("mode", [instructor.Mode.TOOLS, instructor.Mode.JSON_SCHEMA])
def test_answers_are_of_the_class_asked_for(api: str, mode: instructor.Mode) -> None:
    client = instructor.from_openai(OpenAI(base_url=api, api_key="none", timeout=60, max_retries=0), mode=mode)
    city = client.chat.completions.create(
        model=MODEL,
        response_model=City,
        max_retries=0,
        max_tokens=200,
        temperature=0,
        messages=[{"role": "user", "content": "Paris is a large city with 2100000 inhabitants."}],
    )
    assert isinstance(city, City)
