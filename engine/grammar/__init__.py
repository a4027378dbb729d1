"""Constrained output: grammars are compiled, kept, and followed token by token with masks over the vocabulary."""
