"""What a client makes of a stream's events, in a form in which a whole answer can stand beside it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def _joined_message(deltas: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What a client makes of the deltas of one choice; ids of calls differ between two requests."""
    message: dict[str, Any] = {"content": "", "reasoning_content": "", "calls": []}
    for delta in deltas:
        for name in ("content", "reasoning_content"):
            message[name] += delta.get(name) or ""
        for call in delta.get("tool_calls", ()):
            if call["index"] == len(message["calls"]):
                assert call["id"]
                message["calls"].append({"name": call["function"]["name"], "arguments": ""})
            message["calls"][call["index"]]["arguments"] += call["function"].get("arguments", "")
    return message


def joined_chat(events: Sequence[Any]) -> list[dict[str, Any]]:
    parts: dict[int, list[Any]] = {}
    for event in events:
        for choice in event["choices"]:
            parts.setdefault(choice["index"], []).append(choice)
    told = []
    for _, pieces in sorted(parts.items()):
        ends = [piece for piece in pieces if piece["finish_reason"] is not None]
        assert ends == pieces[-1:], "it ends once, at the end"
        logprobs = [entry for piece in pieces if piece["logprobs"] for entry in piece["logprobs"]["content"]]
        ids = [token for piece in pieces for token in piece.get("token_ids", ())]
        end = {name: ends[0][name] for name in ("finish_reason", "matched_stop")}
        told.append({**_joined_message([p["delta"] for p in pieces]), "logprobs": logprobs, "token_ids": ids, **end})
    return told


def whole_chat(answer: Any) -> list[dict[str, Any]]:
    told = []
    for choice in answer["choices"]:
        message = choice["message"]
        calls = [
            {name: call["function"][name] for name in ("name", "arguments")} for call in message.get("tool_calls", ())
        ]
        said = {"content": message["content"] or "", "reasoning_content": message.get("reasoning_content", "")}
        logprobs = choice["logprobs"]["content"] if choice["logprobs"] else []
        end = {name: choice[name] for name in ("finish_reason", "matched_stop")}
        told.append({**said, "calls": calls, "logprobs": logprobs, "token_ids": choice.get("token_ids", []), **end})
    return told


def joined_completion(events: Sequence[Any]) -> list[dict[str, Any]]:
    told: dict[int, dict[str, Any]] = {}
    for event in events:
        for piece in event["choices"]:
            choice = told.setdefault(piece["index"], {"text": "", "logprobs": None, "token_ids": []})
            assert "finish_reason" not in choice, "nothing comes after the end"
            choice["text"] += piece["text"]
            choice["token_ids"] += piece.get("token_ids", [])
            if piece["logprobs"] is not None:
                before = choice["logprobs"] or {name: [] for name in piece["logprobs"]}
                choice["logprobs"] = {name: before[name] + piece["logprobs"][name] for name in before}
            if piece["finish_reason"] is not None:
                choice |= {name: piece[name] for name in ("finish_reason", "matched_stop")}
    return [told[index] for index in sorted(told)]


def whole_completion(answer: Any) -> list[dict[str, Any]]:
    names = ("text", "logprobs", "token_ids", "finish_reason", "matched_stop")
    return [{name: choice.get(name, []) for name in names} for choice in answer["choices"]]
