"""Text to token ids and back, over the `tokenizers` library alone.

A `Tokenizer` is read once from a model folder (`tokenizer.json`, with `tokenizer_config.json` and
`generation_config.json` for what the special tokens mean) and never changes afterwards; it may be used from
several threads at once.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tokenizers

from text.token_bytes import TokenBytes


class TokenizerError(ValueError):
    """The model folder holds no tokenizer that this program can read."""


class Tokenizer:
    """Encodes and decodes one model's text."""

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        eos_token: str | None = None,
        eos_token_ids: Sequence[int] = (),
    ) -> None:
        """`eos_token_ids` are ids that end a sequence beside `eos_token` itself."""
        backend.no_truncation()
        backend.no_padding()
        self._backend = backend
        self.eos_token_ids = _eos_ids(backend, eos_token, eos_token_ids)
        added = backend.get_added_tokens_decoder()
        self.special_ids = frozenset(id_ for id_, token in added.items() if token.special)
        vocabulary = backend.get_vocab(with_added_tokens=True)
        self.vocab_size = 1 + max(vocabulary.values(), default=-1)
        """One more than the largest token id."""
        self.longest_token = max(map(len, vocabulary), default=1)
        """Characters of the longest token: bounds the number of tokens in a text from below."""
        self.token_bytes = TokenBytes.for_decoder(_decoder(backend), backend.id_to_token)
        """Each token's bytes, or None when this tokenizer's tokens have no bytes of their own."""

    @classmethod
    def load(cls, folder: str | Path) -> Tokenizer:
        """The tokenizer in a model folder; raises `TokenizerError` when it is missing or malformed."""
        folder = Path(folder)
        path = folder / "tokenizer.json"
        if not path.is_file():
            raise TokenizerError(
                f"{folder} holds no tokenizer.json; save one there, for example with transformers' "
                "AutoTokenizer.from_pretrained(...).save_pretrained(folder)"
            )
        try:
            backend = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare Exception for whatever it cannot parse
            raise TokenizerError(
                f"{path} is not a tokenizer that tokenizers {tokenizers.__version__} reads: {error}"
            ) from error
        config = read_json(folder / "tokenizer_config.json")
        eos = _ids(read_json(folder / "generation_config.json").get("eos_token_id"))
        eos = eos or _ids(read_json(folder / "config.json").get("eos_token_id"))
        return cls(
            backend,
            eos_token=token_content(config.get("eos_token")),
            eos_token_ids=eos,
        )

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of `text`; `add_special_tokens` puts the model's own start (and end) tokens around it."""
        ids: list[int] = self._backend.encode(text, add_special_tokens=add_special_tokens).ids
        return ids

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """The text of `ids`, with U+FFFD where their bytes form no character."""
        text: str = self._backend.decode(list(ids), skip_special_tokens=skip_special_tokens)
        return text

    def token_text(self, token: int) -> str:
        """One token as text on its own, special tokens included; what a list of logprobs shows."""
        return self.decode([token], skip_special_tokens=False)

    def bytes_of(self, token: int) -> bytes:
        """The bytes one token adds to the text, special tokens included."""
        if self.token_bytes is not None:
            return self.token_bytes[token]
        return self.token_text(token).encode()


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file, or an empty one when there is no such file; raises `TokenizerError` if malformed."""
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise TokenizerError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise TokenizerError(f"{path} holds a {type(value).__name__} where an object belongs")
    return value


def token_content(value: object) -> str | None:
    """A special token's text, from either way configurations write it (a string, or an object with `content`)."""
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) else None


def _decoder(backend: tokenizers.Tokenizer) -> dict[str, Any] | None:
    """How tokens become text, as tokenizer.json describes it. `to_str` would write the whole vocabulary to tell."""
    if backend.decoder is None:
        return None
    description: dict[str, Any] = json.loads(backend.decoder.__getstate__())
    return description


def _eos_ids(backend: tokenizers.Tokenizer, eos_token: str | None, more: Sequence[int]) -> tuple[int, ...]:
    ids = set(more)
    if eos_token is not None and (own := backend.token_to_id(eos_token)) is not None:
        ids.add(own)
    return tuple(sorted(ids))


def _ids(value: object) -> tuple[int, ...]:
    if isinstance(value, int):
        return (value,)
    if isinstance(value, list):
        return tuple(id_ for id_ in value if isinstance(id_, int))
    return ()
