"""Constrained output: grammars are compiled, kept, and followed token by token with masks over the vocabulary."""

from engine.grammar.cache import GrammarCache
from engine.grammar.compiled import CompiledGrammar
from engine.grammar.compiler import GrammarCompiler
from engine.grammar.constraint import Constraint, GrammarMismatch
from engine.grammar.errors import GrammarRefused, GrammarsUnavailable
from engine.grammar.masks import MaskFiller, RowMasks

__all__ = [
    "CompiledGrammar",
    "Constraint",
    "GrammarCache",
    "GrammarCompiler",
    "GrammarMismatch",
    "GrammarRefused",
    "GrammarsUnavailable",
    "MaskFiller",
    "RowMasks",
]
