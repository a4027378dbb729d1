"""Calls of tools in generated text: a parser for each family of models, and how each family writes its calls."""
