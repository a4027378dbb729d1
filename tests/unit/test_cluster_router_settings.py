"""The `router` section of a configuration reaches routers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError
from tiny_tokenizers import save_model_folder

from cluster.config import ClusterConfig
from cluster.router import router_config

GIVEN: dict[str, Any] = {
    "send_timeout_s": 2.5,
    "max_request_logprobs": 7,
    "max_request_bytes": 2048,
    "request_timeout_s": 9.0,
    "resume_max_mb": 3,
    "cors_origins": ["https://app.example.com"],
}


def test_what_is_configured_is_what_a_router_goes_by(tmp_path: Path) -> None:
    save_model_folder(tmp_path)
    (tmp_path / "config.json").write_text('{"max_position_embeddings": 512}')
    config = ClusterConfig.model_validate({"model": {"path": str(tmp_path)}, "router": GIVEN})
    made = router_config(config, b"secret", listen_host="10.0.0.7")
    assert (made.send_timeout_s, made.max_logprobs, made.max_body_bytes) == (2.5, 7, 2048)
    assert (made.request_timeout_s, made.resume_max_bytes) == (9.0, 3 << 20)
    assert made.cors_origins == ("https://app.example.com",)
    assert (made.listen_host, made.context_length) == ("10.0.0.7", 512)


@pytest.mark.parametrize("key", ["send_timeout_s", "max_request_logprobs"])
def test_limits_are_positive(key: str) -> None:
    with pytest.raises(ValidationError, match=rf"router\.{key}\n.*greater than"):
        ClusterConfig.model_validate({"router": {key: 0}})
