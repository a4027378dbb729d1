"""Why output cannot be constrained as a request asks."""

from __future__ import annotations


class GrammarRefused(ValueError):
    """The request's grammar is at fault: it cannot be compiled, is too large, or takes too long."""


class GrammarsUnavailable(RuntimeError):
    """No grammar can be served here: a package is missing, or the model's tokens have no bytes of their own."""
