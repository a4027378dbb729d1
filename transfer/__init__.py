"""Moves KV pages between the memories of two replicas. No ray, no engine."""
