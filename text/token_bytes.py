"""The bytes of each token, for the two families of tokenizers whose tokens have bytes of their own.

Byte-level BPE (GPT-2, Llama 3, Qwen, SmolLM) spells bytes as printable characters; SentencePiece-like BPE (Llama 2,
Mistral, Gemma) spells spaces as U+2581 and bytes it has no token for as `<0xNN>`. For these a text is just the bytes
of its tokens joined, which makes incremental detokenising exact and cheap. Other decoders (WordPiece, Metaspace)
look at neighbouring tokens, and have no such table.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

_SPACE = "\N{LOWER ONE EIGHTH BLOCK}"
_SPACE_RULE = {"type": "Replace", "pattern": {"String": _SPACE}, "content": " "}


class TokenBytes:
    """`table[token_id]` is that token's bytes; ids without a token have none. Filled as tokens are asked for."""

    def __init__(self, spell: Callable[[str], bytes], id_to_token: Callable[[int], str | None]) -> None:
        self._spell = spell
        self._id_to_token = id_to_token
        self._known: dict[int, bytes] = {}

    @classmethod
    def for_decoder(cls, decoder: object, id_to_token: Callable[[int], str | None]) -> TokenBytes | None:
        """The table for a tokenizer.json's `decoder`, or None when its tokens do not map to bytes one by one."""
        steps = _steps(decoder)
        kinds = [step.get("type") for step in steps]
        if kinds == ["ByteLevel"]:
            return cls(_spell_byte_level, id_to_token)
        # A final Strip takes one space off the start of a whole text, which the middle of one never is.
        if (
            kinds[:3] == ["Replace", "ByteFallback", "Fuse"]
            and kinds[3:] in ([], ["Strip"])
            and steps[0] == _SPACE_RULE
        ):
            return cls(_spell_byte_fallback, id_to_token)
        return None

    def __getitem__(self, token: int) -> bytes:
        known = self._known.get(token)
        if known is None:
            name = self._id_to_token(token)
            known = self._known[token] = b"" if name is None else self._spell(name)
        return known


def _steps(decoder: object) -> list[dict[str, Any]]:
    if not isinstance(decoder, dict):
        return []
    if decoder.get("type") == "Sequence":
        return list(decoder["decoders"])
    return [decoder]


def _byte_of_character() -> dict[str, int]:
    """GPT-2's spelling of bytes: printable ones stand for themselves, the rest for U+0100 and up, in order."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    hidden = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(hidden)}


_BYTE_OF_CHARACTER = _byte_of_character()


def _spell_byte_level(token: str) -> bytes:
    try:
        return bytes(_BYTE_OF_CHARACTER[character] for character in token)
    except KeyError:  # an added token, written as plain text
        return token.encode()


def _spell_byte_fallback(token: str) -> bytes:
    if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
        try:
            return bytes([int(token[3:5], 16)])
        except ValueError:
            pass
    return token.replace(_SPACE, " ").encode()
