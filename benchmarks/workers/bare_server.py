"""The least that a streaming chat server can do with aiohttp: what `benchmarks.router` compares the router with.

It reads a request's JSON, makes up as many tokens as were asked for, each an event written by itself, and nothing else:
no tokeniser, no template, no validation, no replica. `/health` says that it is there.
"""

from __future__ import annotations

import argparse
import asyncio
import json

from aiohttp import web


async def _chat(request: web.Request) -> web.StreamResponse:
    body = await request.json()
    count = int(body["max_tokens"])
    if not body.get("stream"):
        message = {"role": "assistant", "content": " word" * count}
        return web.json_response(
            {"id": "x", "object": "chat.completion", "choices": [{"index": 0, "message": message}]}
        )
    response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
    await response.prepare(request)
    for _ in range(count):
        choice = {"index": 0, "delta": {"content": " word"}, "logprobs": None, "finish_reason": None}
        event = {"id": "x", "object": "chat.completion.chunk", "created": 0, "model": "model", "choices": [choice]}
        await response.write(f"data: {json.dumps(event)}\n\n".encode())
        await asyncio.sleep(0)
    await response.write(b"data: [DONE]\n\n")
    return response


async def _health(request: web.Request) -> web.Response:
    del request
    return web.json_response({"status": "ok"})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, required=True)
    app = web.Application()
    app.add_routes([web.post("/v1/chat/completions", _chat), web.get("/health", _health)])
    web.run_app(app, host="127.0.0.1", port=parser.parse_args().port, print=None, access_log=None)


if __name__ == "__main__":
    main()
