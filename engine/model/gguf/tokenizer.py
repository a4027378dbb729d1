"""`tokenizer.json` and `tokenizer_config.json` out of a GGUF file's metadata.

GGUF stores the vocabulary and the merges, but only the *name* of the rule that splits text before merging
(`tokenizer.ggml.pre`). The byte-level vocabularies are rebuilt here with their rule, and one whose rule is not known
is refused, since a wrong split yields plausible but different tokens. SentencePiece vocabularies are
left to transformers, which needs no rule for them.

SmolLM's rule cuts digits off by themselves first, as its own tokenizer.json does. transformers 5.23 reads this rule as
plain GPT-2's, which differs where several blanks precede a digit.
"""

from __future__ import annotations

from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors

from engine.model.gguf.reader import GgufFile, UnsupportedGguf

_CONTROL, _USER_DEFINED = 3, 4

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_SPLITS = {
    "llama-bpe": _CONTRACTIONS
    + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    "qwen2": _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
}
_DIGIT_SPLITS = ("smollm", "starcoder", "refact", "command-r")
"""GPT-2's own pattern, after each digit has been cut off by itself."""
_PLAIN_SPLITS = ("gpt-2", "gpt2")


def build_tokenizer(file: GgufFile) -> Tokenizer:
    """The tokenizer the file describes; raises `UnsupportedGguf` when it cannot be rebuilt faithfully."""
    kind = file.field("tokenizer.ggml.model")
    if kind == "gpt2":
        return _byte_level(file)
    if kind == "llama":
        return _sentencepiece(file)
    raise UnsupportedGguf(f"{file.path} has a tokenizer of kind {kind!r}; known are 'gpt2' and 'llama'")


def tokenizer_config(file: GgufFile) -> dict[str, Any]:
    """Special tokens by role, context length and chat template, as `tokenizer_config.json` names them."""
    tokens = file.field("tokenizer.ggml.tokens")
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "model_max_length": file.field(f"{file.architecture}.context_length"),
        "add_bos_token": _adds_bos(file),
    }
    roles = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
    for role, name in roles.items():
        token = file.field(f"tokenizer.ggml.{name}_token_id")
        if token is not None:
            config[role] = tokens[token]
    template = file.field("tokenizer.chat_template")
    if template is not None:
        config["chat_template"] = template
    return config


def _byte_level(file: GgufFile) -> Tokenizer:
    tokens = file.field("tokenizer.ggml.tokens")
    merges = [tuple(merge.split(" ", 1)) for merge in file.field("tokenizer.ggml.merges", ())]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, fuse_unk=False))
    tokenizer.pre_tokenizer = _splitting(file)
    tokenizer.decoder = decoders.ByteLevel()
    types = file.field("tokenizer.ggml.token_type", [])
    for special, kind in ((True, _CONTROL), (False, _USER_DEFINED)):
        named = [token for token, stored in zip(tokens, types, strict=False) if stored == kind]
        added = [AddedToken(token, special=special, normalized=False) for token in named]
        if special:
            tokenizer.add_special_tokens(added)
        else:
            tokenizer.add_tokens(added)
    if _adds_bos(file):
        bos = file.field("tokenizer.ggml.bos_token_id")
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{tokens[bos]} $A", pair=f"{tokens[bos]} $A $B", special_tokens=[(tokens[bos], bos)]
        )
    return tokenizer


def _splitting(file: GgufFile) -> pre_tokenizers.PreTokenizer:
    rule = file.field("tokenizer.ggml.pre", "gpt-2")
    if rule in _PLAIN_SPLITS:
        return pre_tokenizers.ByteLevel(add_prefix_space=False)
    if rule in _DIGIT_SPLITS:
        steps = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        return pre_tokenizers.Sequence(steps)
    if rule in _SPLITS:
        split = pre_tokenizers.Split(Regex(_SPLITS[rule]), behavior="isolated")
        return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    known = ", ".join((*_PLAIN_SPLITS, *_DIGIT_SPLITS, *_SPLITS))
    raise UnsupportedGguf(
        f"{file.path} splits text by the rule {rule!r}; known are {known}. Use the model's safetensors folder instead"
    )


def _sentencepiece(file: GgufFile) -> Tokenizer:
    from transformers import AutoTokenizer  # only here: its import costs seconds

    loaded = AutoTokenizer.from_pretrained(str(file.path.parent), gguf_file=file.path.name)
    tokenizer: Tokenizer = loaded.backend_tokenizer
    return tokenizer


def _adds_bos(file: GgufFile) -> bool:
    # ggml's own default: SentencePiece vocabularies begin with BOS unless the file says otherwise.
    return bool(file.field("tokenizer.ggml.add_bos_token", file.field("tokenizer.ggml.model") == "llama"))
