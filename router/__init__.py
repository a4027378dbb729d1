"""The HTTP API, admission, pairing, token logs and failover. No torch, no transformers, no ray."""
