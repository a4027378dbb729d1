"""From a grammar's text to what matchers are made of, by xgrammar.

A `GrammarCompiler` belongs to one model. xgrammar is imported, and told the vocabulary, when the first grammar comes:
that takes about a second, which replicas that never see one are spared. May be used from several threads.
"""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Sequence
from typing import Any, assert_never

import numpy as np
import torch

from engine.grammar.compiled import CompiledGrammar
from engine.grammar.constraint import MASK_BITS, Constraint, GrammarMismatch
from engine.grammar.errors import GrammarRefused, GrammarsUnavailable
from engine.grammar.nesting import check_patterns
from protocol.sampling import Grammar
from text.tokenizer import Tokenizer

_MAX_WHITESPACE = 20
"""Characters of white space between two parts of JSON at most: without a limit a model can go on with it for ever. Each
takes a mask of its own, so 20 make every grammar of JSON 2.5 MB with 49,000 tokens."""
_NO_TEXT = b"\xff"
_PROBED = 8
"""Tokens for which a grammar is followed before it is let near a batch."""
_POSITION = re.compile(r"^\[[\d:]+\] [^ ]*: ")
"""The time and the line of its own source that xgrammar puts before its messages."""


class GrammarCompiler:
    """Compiles for one model. `max_bytes` limits what one compiled grammar may take, `follow_budget_s` the processor
    time for following one, as in `Constraint`."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        vocab_size: int,
        eos_token_ids: Sequence[int],
        max_bytes: int = 64 << 20,
        follow_budget_s: float = 0.5,
    ) -> None:
        """`vocab_size` is the width of the model's logits, `eos_token_ids` what ends its sequences."""
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._eos_token_ids = tuple(token for token in eos_token_ids if 0 <= token < vocab_size)
        self._max_bytes = max_bytes
        self._follow_budget_s = follow_budget_s
        self._lock = threading.Lock()
        self._backend: Any = None

    def prepare(self) -> None:
        """Load what all grammars need, once: a second or more. Raises `GrammarsUnavailable`."""
        with self._lock:
            if self._backend is None:
                self._backend = self._make_backend()

    def compile(self, grammar: Grammar) -> CompiledGrammar:
        """Takes milliseconds to seconds. Raises `GrammarRefused` or `GrammarsUnavailable`."""
        self.prepare()
        try:
            handle = self._compile(grammar)
        except GrammarRefused:
            raise
        except (RuntimeError, ValueError, KeyError, TypeError, MemoryError) as error:
            raise GrammarRefused(f"it cannot be compiled: {_words(error)}") from error
        num_bytes: int = handle.memory_size_bytes
        if num_bytes > self._max_bytes:
            raise GrammarRefused(
                f"it takes {num_bytes >> 20} MiB when compiled, more than the {self._max_bytes >> 20} MiB that are "
                "allowed; make it smaller"
            )
        compiled = CompiledGrammar(handle, num_bytes)
        self._probe(compiled)
        return compiled

    def _compile(self, grammar: Grammar) -> Any:
        backend, text = self._backend, grammar.text
        if grammar.kind in ("json_schema", "structural_tag"):
            check_patterns(text)
        match grammar.kind:
            case "json_schema":
                return backend.compile_json_schema(text, max_whitespace_cnt=_MAX_WHITESPACE)
            case "json_object":
                return backend.compile_json_schema('{"type":"object"}', max_whitespace_cnt=_MAX_WHITESPACE)
            case "regex":
                return backend.compile_regex(text)
            case "ebnf":
                return backend.compile_grammar(text)
            case "structural_tag":
                return backend.compile_structural_tag(json.dumps(_modern(json.loads(text))))
            case "choice":
                return backend.compile_grammar(_one_of(json.loads(text)))
            case _:
                assert_never(grammar.kind)

    def _probe(self, compiled: CompiledGrammar) -> None:
        """Follow it for a few tokens, any that may come: what is slow from the start would hold up a batch."""
        constraint = Constraint(compiled, budget_s=self._follow_budget_s)
        bits = torch.zeros((1, -(-self._vocab_size // MASK_BITS)), dtype=torch.int32)
        for number in range(_PROBED):
            constraint.fill(bits, 0)
            allowed = np.flatnonzero(np.unpackbits(bits.numpy().view(np.uint8), bitorder="little"))
            if not number and not len(allowed):
                raise GrammarRefused("it matches no text that this model can write")
            more = [token for token in allowed[len(allowed) // 2 :].tolist() if token not in self._eos_token_ids]
            if not more:
                return
            try:
                constraint.accept(more[0])
            except GrammarMismatch as error:
                raise GrammarRefused(str(error)) from error

    def _make_backend(self) -> Any:
        tokenizer = self._tokenizer
        if tokenizer.token_bytes is None:
            raise GrammarsUnavailable("this model's tokens have no bytes of their own, so no grammar can be followed")
        if not self._eos_token_ids:
            raise GrammarsUnavailable("this model names no end-of-sequence token, which the end of a grammar needs")
        xgrammar = _import_xgrammar()
        table = tokenizer.token_bytes
        size = min(tokenizer.vocab_size, self._vocab_size)
        # A special token is no text: spelt as a byte that no text has, it can only be matched by its id.
        vocabulary = [_NO_TEXT if token in tokenizer.special_ids else table[token] for token in range(size)]
        info = xgrammar.TokenizerInfo(
            vocabulary, xgrammar.VocabType.RAW, vocab_size=self._vocab_size, stop_token_ids=list(self._eos_token_ids)
        )
        # One thread: more would take the cores from the model. The cache is ours (cache.py).
        return xgrammar.GrammarCompiler(info, max_threads=1, cache_enabled=False)


def _import_xgrammar() -> Any:
    try:
        import xgrammar
    except ImportError as error:
        raise GrammarsUnavailable(f"constrained output needs xgrammar ({error}); pip install xgrammar") from error
    return xgrammar


def _words(error: Exception) -> str:
    return _POSITION.sub("", str(error)).strip() or type(error).__name__


def _modern(tag: dict[str, Any]) -> dict[str, Any]:
    """SGLang's first form of structural tags in terms of the present one."""
    if "structures" not in tag:
        return tag
    tags = [
        {
            "begin": each["begin"],
            "content": {"type": "json_schema", "json_schema": each["schema"]},
            "end": each["end"],
        }
        for each in tag["structures"]
    ]
    triggered = {"type": "triggered_tags", "triggers": tag.get("triggers", []), "tags": tags}
    return {"type": "structural_tag", "format": triggered}


def _one_of(choices: Sequence[str]) -> str:
    """EBNF of a list of texts; every character is written by its number, so that none means anything."""
    quoted = ('"' + "".join(f"\\U{ord(char):08x}" for char in choice) + '"' for choice in choices)
    return "root ::= " + " | ".join(quoted)
