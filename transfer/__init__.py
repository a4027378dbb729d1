"""Moves KV pages between the memories of two replicas: receiver-driven, verified, drained before it says done.
 `memory.SharedMemory` holds a pool, `server.PageServer` lets peers read it, `fetcher.PageFetcher` takes pages out of
peers' pools into ours. No ray, no engine; torch only in helper processes (`dist/`).
"""
