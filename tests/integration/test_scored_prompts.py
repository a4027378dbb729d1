"""Log-probabilities of prompts, as clients get them, are those of transformers: with PD and without, cold and cached.

The real model in float32, real workers, transfers and router.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from engine.config import EngineConfig
from protocol.membership import ReplicaRole
from tests.integration.worker_cluster import ReplicaSpec, WorkerCluster, worker_cluster
from text.tokenizer import Tokenizer

pytestmark = pytest.mark.integration

SMALL_CHUNKS = EngineConfig(max_total_tokens=8192, chunked_prefill_size=64)
ONE_CHUNK = EngineConfig(max_total_tokens=8192, chunked_prefill_size=2048)
WITHIN = 5e-4
NAMED = [11, 260]
TOP = 5
TEXT = (
    "The lighthouse keeper wrote in his log every evening: the wind, the height of the waves, the ships that passed. "
    "On the ninth of March he wrote that no ship had passed, and that the lamp had burned well. "
)


@pytest.fixture(scope="module")
def prompts(folder: Path) -> list[list[int]]:
    tokenizer = Tokenizer.load(folder)
    long = tokenizer.encode(TEXT * 5)
    return [tokenizer.encode("A short one."), long, [*long[:180], *tokenizer.encode("Then the storm came, and")]]


@pytest.fixture(scope="module")
def expected(folder: Path, prompts: list[list[int]]) -> list[torch.Tensor]:
    """float64 `[tokens, vocab]` log-probabilities of each prompt."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.inference_mode():
        return [
            model(input_ids=torch.tensor([prompt])).logits[0].double().log_softmax(dim=-1).clone() for prompt in prompts
        ]


def specs(engine: EngineConfig, *, apart: bool) -> list[ReplicaSpec]:
    roles = (ReplicaRole.PREFILL, ReplicaRole.DECODE) if apart else (ReplicaRole.AGGREGATED,)
    return [ReplicaSpec(role=role, engine=engine) for role in roles]


async def _scored(cluster: WorkerCluster, prompts: Sequence[list[int]], *, start: int, tokens: int) -> Any:
    return await cluster.generate(
        {
            "input_ids": prompts,
            "return_logprob": True,
            "logprob_start_len": start,
            "top_logprobs_num": TOP,
            "token_ids_logprob": NAMED,
            "sampling_params": {"temperature": 0, "max_new_tokens": tokens},
        }
    )


def _check(answer: Any, prompt: list[int], logprobs: torch.Tensor, *, start: int) -> None:
    meta = answer["meta_info"]
    own = meta["input_token_logprobs"]
    assert [each[1] for each in own] == prompt[start:]
    assert own[0][0] is None
    rows = logprobs[start : len(prompt) - 1]
    wanted = rows.gather(1, torch.tensor(prompt[start + 1 :])[:, None])[:, 0]
    np.testing.assert_allclose([each[0] for each in own[1:]], wanted, rtol=0, atol=WITHIN)
    tops = meta["input_top_logprobs"]
    assert tops[0] is None
    found = [[each[0] for each in position] for position in tops[1:]]
    np.testing.assert_allclose(found, rows.topk(TOP, dim=1).values, rtol=0, atol=WITHIN)
    for position, row in zip(tops[1:], rows, strict=True):  # which of equals comes first is nobody's business
        np.testing.assert_allclose([each[0] for each in position], row[[each[1] for each in position]], atol=WITHIN)
    named = [[each[0] for each in position] for position in meta["input_token_ids_logprobs"][1:]]
    np.testing.assert_allclose(named, rows[:, NAMED], rtol=0, atol=WITHIN)
    if answer["output_ids"]:
        np.testing.assert_allclose(
            [each[0] for each in meta["output_token_ids_logprobs"][0]], logprobs[-1, NAMED], rtol=0, atol=WITHIN
        )


@pytest.mark.parametrize(("engine", "apart"), [(SMALL_CHUNKS, True), (ONE_CHUNK, False)])
async def test_scores_are_those_of_transformers(
    folder: Path, prompts: list[list[int]], expected: list[torch.Tensor], engine: EngineConfig, apart: bool
) -> None:
    async with worker_cluster(folder, specs(engine, apart=apart)) as cluster:
        for tokens in (4, 0):  # the second time, all is in the caches
            answers = await _scored(cluster, prompts, start=0, tokens=tokens)
            for answer, prompt, logprobs in zip(answers, prompts, expected, strict=True):
                _check(answer, prompt, logprobs, start=0)
                assert answer["meta_info"]["cached_tokens"] == 0
                assert len(answer["output_ids"]) == tokens
        long, logprobs = prompts[1], expected[1]
        (answer,) = await _scored(cluster, [long], start=150, tokens=2)
        _check(answer, long, logprobs, start=150)
        assert answer["meta_info"]["cached_tokens"] == 150 // 16 * 16
        flushed = await cluster.client.post("/flush_cache?timeout=10")
        assert flushed.status_code == 200, flushed.text
        (answer,) = await _scored(cluster, [long], start=150, tokens=1)
        _check(answer, long, logprobs, start=150)
        assert answer["meta_info"]["cached_tokens"] == 0
        await cluster.assert_idle()


async def test_completions_say_the_same(folder: Path, prompts: list[list[int]], expected: list[torch.Tensor]) -> None:
    """As lm-eval asks for it."""
    async with worker_cluster(folder, specs(SMALL_CHUNKS, apart=True)) as cluster:
        for max_tokens in (0, 1):
            body = {"prompt": prompts, "max_tokens": max_tokens, "temperature": 0, "echo": True, "logprobs": 1}
            response = await cluster.client.post("/v1/completions", json={**body, "prompt_logprobs": 0})
            assert response.status_code == 200, response.text
            for choice, prompt, rows in zip(response.json()["choices"], prompts, expected, strict=True):
                logprobs = choice["logprobs"]
                assert len(logprobs["tokens"]) == len(prompt) + max_tokens
                wanted = rows[:-1].gather(1, torch.tensor(prompt[1:])[:, None])[:, 0]
                found = logprobs["token_logprobs"]
                assert found[0] is None
                np.testing.assert_allclose(found[1 : len(prompt)], wanted, rtol=0, atol=WITHIN)
                for position, entry in enumerate(choice["prompt_logprobs"][1:], start=1):
                    row, own = rows[position - 1], entry[str(prompt[position])]
                    best, worst = (int((row > row[prompt[position]] + near).sum()) + 1 for near in (WITHIN, -WITHIN))
                    assert best <= own["rank"] <= worst
        await cluster.assert_idle()
