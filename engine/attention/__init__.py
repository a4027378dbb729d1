"""Attention over paged KV: one backend per device, planned once per batch and run once per layer."""
