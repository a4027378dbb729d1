"""Errors a checkpoint can cause, for the user who named it."""

from __future__ import annotations


class ConfigError(ValueError):
    """A config.json lacks a field, or a field holds what no model can have."""


class UnsupportedModelError(ValueError):
    """The native decoder does not honour something this checkpoint asks for; the message names it."""


class CheckpointError(ValueError):
    """A model's files are missing, damaged, or do not belong together."""
