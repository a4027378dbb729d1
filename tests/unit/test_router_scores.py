"""Scores of prompts on their way through the router: in order, once, over failures, and before the first token."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from protocol.membership import ReplicaRole
from protocol.rooms import FailureCode, OpenDecode, OpenGenerate, OpenPrefill, PromptScores, Room
from protocol.sampling import FinishReason
from protocol.scoring import PositionScores, Scoring
from router.score_log import ScoreLog
from router.token_log import ContradictionError
from tests.unit.router_harness import TEXT_IDS, FakeReplica, RouterHarness, running_router, until

PROMPT = [40, 41, 42, 43, 44, 45]


@pytest.fixture
async def harness(tmp_path: Path) -> AsyncIterator[RouterHarness]:
    async with running_router(tmp_path) as router:
        yield router


def _scores(first: int, count: int, *, top: int = 1) -> PositionScores:
    """Values that tell their position."""
    positions = range(first, first + count)
    return PositionScores(
        first=first,
        logprobs=[-float(position) for position in positions],
        ranks=[],
        top_tokens=[position + 10 for position in positions for _ in range(top)],
        top_logprobs=[-position / 2 for position in positions for _ in range(top)],
        tokens=[],
    )


def _tell(replica: FakeReplica, room: Room, first: int, count: int) -> None:
    replica.link.send(PromptScores(room, _scores(first, count)))


def test_scores_are_taken_in_order_and_once() -> None:
    log = ScoreLog(Scoring(2, 1), prompt_tokens=6)
    assert (log.is_complete, log.rest) == (False, Scoring(2, 1))
    log.offer(_scores(2, 3))
    assert log.rest == Scoring(5, 1)
    log.offer(_scores(3, 1))  # known
    for wrong in (_scores(1, 2), _scores(4, 2), _scores(6, 1), _scores(5, 2), _scores(5, 1, top=2)):
        with pytest.raises(ContradictionError):
            log.offer(wrong)
    log.offer(_scores(5, 1))
    assert (log.is_complete, log.rest) == (True, None)
    assert [(each.position, each.logprob, each.top, each.rank, each.named) for each in log] == [
        (position, -float(position), [(position + 10, -position / 2)], None, []) for position in range(2, 6)
    ]


def test_a_prompt_shorter_than_its_first_score_has_none() -> None:
    log = ScoreLog(Scoring(9), prompt_tokens=6)
    assert (log.is_complete, list(log)) == (True, [])


async def test_what_an_epoch_has_scored_is_not_scored_again(harness: RouterHarness) -> None:
    prefill, decode = await harness.pair()
    call = harness.post("/generate", _request())
    first = await prefill.opened(OpenPrefill)
    assert first.job.scoring == Scoring(1, 1)
    assert (await decode.opened(OpenDecode)).job.scoring == Scoring(1, 1)
    _tell(prefill, first.room, 1, 2)
    prefill.fail(first.room, FailureCode.LEASE_EXPIRED)
    second = await prefill.opened(OpenPrefill)
    assert second.job.scoring == Scoring(3, 1)
    room = (await decode.opened(OpenDecode)).room
    _tell(prefill, first.room, 3, 3)  # of the epoch that failed
    _tell(prefill, second.room, 3, 3)
    prefill.send(second.room, 0, TEXT_IDS[0], cached=0, logprob=-1.0)
    await until(lambda: bool(harness.dispatcher.generations[room.request_id].log.tokens))
    decode.fail(room, FailureCode.PEER_LOST)
    third = await decode.opened(OpenGenerate)
    assert (third.job.scoring, third.job.logged) == (None, [TEXT_IDS[0]])
    decode.send(third.room, 1, TEXT_IDS[1], finish=FinishReason.LENGTH, logprob=-1.0)
    meta = (await call.done()).json["meta_info"]
    assert [each[0] for each in meta["input_token_logprobs"]] == [None, -1.0, -2.0, -3.0, -4.0, -5.0]
    await harness.idle()


async def test_a_token_before_the_scores_reopens_the_room(harness: RouterHarness) -> None:
    replica = await harness.add("one", ReplicaRole.AGGREGATED)
    call = harness.post("/generate", _request())
    early = await replica.opened(OpenGenerate)
    _tell(replica, early.room, 1, 4)
    replica.send(early.room, 0, TEXT_IDS[0], logprob=-1.0)
    again = await replica.opened(OpenGenerate)
    assert (again.job.scoring, again.job.logged) == (Scoring(5, 1), [])
    _tell(replica, again.room, 5, 1)
    replica.send(again.room, 0, *TEXT_IDS[:2], finish=FinishReason.LENGTH, logprob=-1.0)
    assert (await call.done()).status == 200
    await harness.idle()


def _request() -> dict[str, object]:
    return {
        "input_ids": PROMPT,
        "return_logprob": True,
        "logprob_start_len": 0,
        "top_logprobs_num": 1,
        "sampling_params": {"max_new_tokens": 2},
    }
