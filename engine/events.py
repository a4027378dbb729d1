"""A sampled token as the event that travels to the router."""

from __future__ import annotations

from engine.outputs import TokenOutput
from protocol.rooms import Room, TokenEvent, TopLogprob


def token_event(output: TokenOutput, room: Room) -> TokenEvent:
    """The event of one token of `room`."""
    top = output.top
    return TokenEvent(
        request_id=room.request_id,
        epoch=room.epoch,
        choice=output.request.choice,
        position=output.position,
        token=output.token,
        logprob=output.logprob,
        top=None if top is None else [TopLogprob(token, logprob) for token, logprob in top],
        finish=output.finish,
        matched=output.matched,
        cached_tokens=output.cached_tokens,
        named=output.named,
    )
