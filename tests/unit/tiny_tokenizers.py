"""Small tokenizers trained on the spot: real ones of each family, without a model."""

from __future__ import annotations

import json
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from text.tokenizer import Tokenizer

CORPUS = [
    "the quick brown fox jumps over the lazy dog",
    "a stream of tokens goes from prefill to decode, and to the client",
    "grüße aus köln 😀 中文 and some more words, numbers 0123456789 and marks: .,;!?",
]
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{{ message['content'] }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL_TOKENS = ["<s>", "<|im_start|>", "<|im_end|>"]


def byte_level_backend() -> tokenizers.Tokenizer:
    """Byte-level BPE; `<s>` is put before a text, `<|im_end|>` ends a sequence."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(CORPUS, trainer)
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", backend.token_to_id("<s>"))]
    )
    return backend


def byte_level() -> Tokenizer:
    return Tokenizer(byte_level_backend(), eos_token="<|im_end|>")


def one_character_each() -> Tokenizer:
    """97 tokens, as many as the toy model's: `<end>`, `<s>` and the printable ASCII characters."""
    names = ["<end>", "<s>", *("Ġ" if byte == 32 else chr(byte) for byte in range(32, 127))]
    backend = tokenizers.Tokenizer(models.BPE(vocab={name: id_ for id_, name in enumerate(names)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<end>", "<s>"])
    return Tokenizer(backend, eos_token="<end>")


def byte_fallback() -> Tokenizer:
    """SentencePiece-like BPE: bytes without a token of their own are spelt `<0xNN>`."""
    names = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *"▁abcdefghijklmnopqrstuvwxyz"]
    merges = [("▁", "a"), ("t", "h"), ("th", "e"), ("▁", "the")]
    vocabulary = {name: id_ for id_, name in enumerate([*names, *("".join(pair) for pair in merges)])}
    backend = tokenizers.Tokenizer(
        models.BPE(vocab=vocabulary, merges=merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    )
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_special_tokens(["<s>", "</s>"])
    return Tokenizer(backend, eos_token="</s>")


def metaspace() -> Tokenizer:
    """Unigram with a Metaspace decoder, which has no bytes per token."""
    backend = tokenizers.Tokenizer(models.Unigram())
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    backend.train_from_iterator(
        CORPUS,
        trainers.UnigramTrainer(
            vocab_size=120, special_tokens=["<unk>", "</s>"], unk_token="<unk>", show_progress=False
        ),
    )
    return Tokenizer(backend, eos_token="</s>")


def save_model_folder(folder: Path, *, chat_template: str | None = CHAT_TEMPLATE) -> Path:
    """A model folder with what a router reads: tokenizer, chat template, no weights."""
    folder.mkdir(parents=True, exist_ok=True)
    byte_level_backend().save(str(folder / "tokenizer.json"))
    config = {"bos_token": {"content": "<s>"}, "eos_token": "<|im_end|>", "chat_template": chat_template}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder
