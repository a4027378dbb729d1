"""What tests with the real model share."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path

import pytest

from engine.model.embedded import default_model_folder, fetch_embedded_model


@pytest.fixture(scope="session")
def folder() -> Path:
    """Of the embedded model."""
    return fetch_embedded_model(default_model_folder())


@pytest.fixture(autouse=True)
def memory_of_the_test() -> Iterator[None]:
    """Given back at its end. A replica that was stopped is a circle of objects with half a gigabyte of weights behind
    it, of which Python's cycle collector sees nothing: it may come to it after a dozen more."""
    yield
    gc.collect()


@pytest.fixture(autouse=True, scope="module")
def memory_of_the_module() -> Iterator[None]:
    """As above, of what the tests of a module share."""
    yield
    gc.collect()
