"""GGUF files: their tensors and config against the model they were written from, conversion, and what is refused."""

from __future__ import annotations

import json
import os
import shutil
import threading
from pathlib import Path

import numpy as np
import pytest
import tokenizers
import torch
import transformers
from transformers import LlamaConfig, PretrainedConfig, PreTrainedModel, Qwen2Config, Qwen3Config, Qwen3MoeConfig

from engine.model.gguf.convert import cached_conversion, convert_gguf
from engine.model.gguf.folder import FolderTaken, is_converted
from engine.model.gguf.reader import GgufFile, UnsupportedGguf
from engine.model.loader import load_model
from tests.unit.tiny_gguf import TOKENS, VOCAB, round_as_stored, write_gguf
from tests.unit.tiny_models import SIZES, PagedRun, random_sequences, reference_logits, save_random_model

LLAMA = LlamaConfig(**(SIZES | {"vocab_size": VOCAB, "num_key_value_heads": 2, "tie_word_embeddings": True}))
QWEN2 = Qwen2Config(**(SIZES | {"vocab_size": VOCAB, "num_key_value_heads": 2}))
QWEN3 = Qwen3Config(**(SIZES | {"vocab_size": VOCAB, "num_key_value_heads": 2, "head_dim": 32}))
MOE = Qwen3MoeConfig(
    **(SIZES | {"vocab_size": VOCAB, "num_key_value_heads": 2, "head_dim": 32, "num_experts": 4}),
    num_experts_per_tok=2,
    moe_intermediate_size=32,
    norm_topk_prob=True,
)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> tuple[PreTrainedModel, Path]:
    folder: Path = tmp_path_factory.mktemp("gguf")
    model = save_random_model(LLAMA, folder / "source")
    path = write_gguf(folder / "tiny.gguf", model, "llama")
    round_as_stored(model)
    return model, path


@pytest.mark.parametrize(
    ("config", "architecture"), [(LLAMA, "llama"), (QWEN2, "qwen2"), (QWEN3, "qwen3"), (MOE, "qwen3moe")]
)
def test_a_gguf_file_is_served_as_it_is(config: PretrainedConfig, architecture: str, tmp_path: Path) -> None:
    reference = save_random_model(config, tmp_path / "source")
    path = write_gguf(tmp_path / "tiny.gguf", reference, architecture)
    ours = load_model(path, dtype="float32", num_threads=1)
    sequences = random_sequences([30])
    run = PagedRun(ours, sequences)
    run.finish(1000)
    if architecture != "qwen3moe":
        round_as_stored(reference)
    torch.testing.assert_close(run.logits[0], reference_logits(reference, sequences[0]), atol=1e-4, rtol=1e-4)


def test_tensors_equal_what_transformers_reads(llama: tuple[PreTrainedModel, Path]) -> None:
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    model, path = llama
    theirs = load_gguf_checkpoint(str(path), return_tensors=True, model_to_load=model)["tensors"]
    ours = GgufFile(path)
    assert set(ours) == set(theirs)
    for name, tensor in ours.items():
        assert torch.equal(tensor, theirs[name]), name


def test_conversion_gives_a_folder_that_transformers_loads(llama: tuple[PreTrainedModel, Path], tmp_path: Path) -> None:
    model, path = llama
    folder = convert_gguf(path, tmp_path / "out", dtype="float32")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    expected = model.state_dict()
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, expected[name]), name
    assert loaded.config.eos_token_id == 2
    assert loaded.config.rms_norm_eps == model.config.rms_norm_eps
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    assert tokenizer.eos_token_id == 2
    rendered = tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False)
    assert rendered == "<|im_start|>hi<|im_end|>"
    assert tokenizer(rendered)["input_ids"] == [1, TOKENS.index("hi"), 2]


def test_smollms_rule_cuts_digits_off_first(llama: tuple[PreTrainedModel, Path], tmp_path: Path) -> None:
    folder = convert_gguf(llama[1], tmp_path / "out")
    tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    assert tokenizer.encode("hi   12").tokens == ["hi", "ĠĠĠ", "1", "2"]
    assert tokenizer.decode(tokenizer.encode("hi   12 é🎉").ids) == "hi   12 é🎉"


def test_a_beginning_token_is_added_where_the_file_asks_for_it(tmp_path: Path) -> None:
    model = save_random_model(LLAMA, tmp_path / "source")
    folder = convert_gguf(write_gguf(tmp_path / "a.gguf", model, "llama", add_bos=True), tmp_path / "out")
    tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    assert tokenizer.encode("hi").tokens == ["<|im_start|>", "hi"]
    assert tokenizer.encode("hi", add_special_tokens=False).tokens == ["hi"]


def test_a_sentencepiece_vocabulary(tmp_path: Path) -> None:
    config = LlamaConfig(**(LLAMA.to_dict() | {"vocab_size": 264}))
    model = save_random_model(config, tmp_path / "source")
    folder = convert_gguf(write_gguf(tmp_path / "a.gguf", model, "llama", sentencepiece=True), tmp_path / "out")
    tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    assert tokenizer.encode("hi hi").tokens == ["<s>", "▁hi", "▁hi"]
    assert tokenizer.encode("hi</s>z").tokens == ["<s>", "▁hi", "</s>", "<0x7A>"]
    assert tokenizer.decode(tokenizer.encode("hi é").ids, skip_special_tokens=True) == "hi é"


def test_a_second_conversion_does_nothing(llama: tuple[PreTrainedModel, Path], tmp_path: Path) -> None:
    said: list[str] = []
    folder = convert_gguf(llama[1], tmp_path / "out", source="here", report=said.append)
    assert is_converted(folder, source="here")
    assert not is_converted(folder, source="elsewhere")
    before = (folder / "model.safetensors").stat().st_mtime_ns
    said.clear()
    convert_gguf(llama[1], tmp_path / "out", source="here", report=said.append)
    assert said == []
    assert (folder / "model.safetensors").stat().st_mtime_ns == before


def test_a_file_is_kept_converted_until_it_changes(
    llama: tuple[PreTrainedModel, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    path = Path(shutil.copy(llama[1], tmp_path / "mine.gguf"))
    said: list[str] = []
    folder = cached_conversion(path, report=said.append)
    assert folder.parent == tmp_path / "cache" / "pd-serve"
    assert cached_conversion(path, report=said.append) == folder
    assert len(said) == 3
    os.utime(path, ns=(1, 1))
    assert cached_conversion(path, report=said.append) == folder
    assert len(said) == 6


def test_racing_conversions_leave_one_complete_folder(llama: tuple[PreTrainedModel, Path], tmp_path: Path) -> None:
    said: list[str] = []
    threads = [
        threading.Thread(target=convert_gguf, args=(llama[1], tmp_path / "out"), kwargs={"report": said.append})
        for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert sum(line.startswith("wrote") for line in said) == 1
    assert load_model(tmp_path / "out", num_threads=1).config.vocab_size == VOCAB
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == ["out"]


def test_a_failed_conversion_leaves_nothing(tmp_path: Path) -> None:
    model = save_random_model(LLAMA, tmp_path / "source")
    path = write_gguf(tmp_path / "a.gguf", model, "llama", pre="nobody-knows")
    with pytest.raises(UnsupportedGguf, match="nobody-knows"):
        convert_gguf(path, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == ["source"]


def test_a_folder_of_others_is_left_alone(llama: tuple[PreTrainedModel, Path], tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "letter.txt").write_text("dear")
    with pytest.raises(FolderTaken, match="out"):
        convert_gguf(llama[1], tmp_path / "out")
    assert (tmp_path / "out" / "letter.txt").read_text() == "dear"


def test_an_unknown_architecture_is_named(llama: tuple[PreTrainedModel, Path], tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "a.gguf", llama[0], "llama", declared="bloom")
    with pytest.raises(UnsupportedGguf, match="bloom"):
        load_model(path, num_threads=1)


def test_an_unknown_tensor_is_named(llama: tuple[PreTrainedModel, Path], tmp_path: Path) -> None:
    extra = {"blk.0.attn_sinks.weight": np.zeros(4, np.float32)}
    path = write_gguf(tmp_path / "a.gguf", llama[0], "llama", tensors=extra)
    with pytest.raises(UnsupportedGguf, match="attn_sinks"):
        load_model(path, num_threads=1)


def test_a_damaged_file_is_named(llama: tuple[PreTrainedModel, Path], tmp_path: Path) -> None:
    path = tmp_path / "half.gguf"
    path.write_bytes(llama[1].read_bytes()[:2000])
    with pytest.raises(UnsupportedGguf, match=r"half\.gguf cannot be read"):
        load_model(path, num_threads=1)


@pytest.mark.parametrize("known", [True, False])
def test_llama3s_rotary_divisors_become_its_rule(known: bool, tmp_path: Path) -> None:
    rope = {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    plain = LlamaConfig(**(LLAMA.to_dict() | {"rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}}))
    scaled = LlamaConfig(**(LLAMA.to_dict() | {"rope_parameters": rope}))
    one, other = (transformers.AutoModelForCausalLM.from_config(c).model.rotary_emb.inv_freq for c in (plain, scaled))
    divisors = (one / other).numpy() * (1.0 if known else np.linspace(1, 1.5, len(one)))
    model = save_random_model(plain, tmp_path / "source")
    tensors = {"rope_freqs.weight": divisors.astype(np.float32)}
    path = write_gguf(tmp_path / "a.gguf", model, "llama", tensors=tensors)
    if known:
        config = json.loads(json.dumps(GgufFile(path).config()))
        assert config["rope_scaling"] == {key: value for key, value in rope.items() if key != "rope_theta"}
    else:
        with pytest.raises(UnsupportedGguf, match="rotary divisors"):
            load_model(path, num_threads=1)
