"""lm-eval's `local-completions`: log-likelihoods by echo, against transformers; and generation until a stop string."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.models.openai_completions import LocalCompletionsAPI
from transformers import AutoModelForCausalLM, AutoTokenizer

pytestmark = pytest.mark.clients

MODEL = "SmolLM2-135M-Instruct"
CASES = [
    ("The capital of France is", " Paris"),
    ("The capital of France is", " London"),
    ("Two plus two equals", " four, as everybody knows"),
    ("Water freezes at", " zero degrees Celsius"),
]


@pytest.fixture(scope="module")
def model(api: str, folder: Path) -> LocalCompletionsAPI:
    return LocalCompletionsAPI(
        base_url=f"{api}/completions",
        model=MODEL,
        tokenizer=str(folder),
        tokenizer_backend="huggingface",
        num_concurrent=2,
        max_retries=1,
        max_length=2048,
    )


def _reference(folder: Path, prompt: str, continuation: str) -> tuple[float, bool]:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    before, after = tokenizer(prompt)["input_ids"], tokenizer(continuation)["input_ids"]
    with torch.inference_mode():
        logits = reference(torch.tensor([before + after])).logits[0].log_softmax(-1)
    rows = logits[len(before) - 1 : -1]
    scores = rows[torch.arange(len(after)), torch.tensor(after)]
    return float(scores.sum()), rows.argmax(-1).tolist() == after


def test_loglikelihoods_equal_transformers(model: LocalCompletionsAPI, folder: Path) -> None:
    requests = [
        Instance(request_type="loglikelihood", doc={}, arguments=case, idx=number) for number, case in enumerate(CASES)
    ]
    for case, (score, greedy) in zip(CASES, model.loglikelihood(requests), strict=True):
        expected, expected_greedy = _reference(folder, *case)
        assert score == pytest.approx(expected, abs=0.01), case
        assert greedy == expected_greedy, case


def test_generation_stops_where_it_should(model: LocalCompletionsAPI) -> None:
    settings = {"until": ["\n"], "max_gen_toks": 16, "temperature": 0}
    request = Instance(request_type="generate_until", doc={}, arguments=("The capital of France is", settings), idx=0)
    (text,) = model.generate_until([request])
    assert "Paris" in text
    assert "\n" not in text
