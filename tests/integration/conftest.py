"""What tests with the real model share."""

from __future__ import annotations

from pathlib import Path

import pytest

from engine.model.embedded import default_model_folder, fetch_embedded_model


@pytest.fixture(scope="session")
def folder() -> Path:
    """Of the embedded model."""
    return fetch_embedded_model(default_model_folder())
