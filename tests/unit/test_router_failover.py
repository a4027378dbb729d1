"""Replicas that fail at every stage: the client sees one unbroken stream, or one error."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from router_harness import TEXT, TEXT_IDS, TOKENIZER, Call, FakeReplica, RouterHarness, running_router, until

from protocol.membership import ReplicaRole
from protocol.rooms import AbortReason, Delivered, FailureCode, Load, OpenDecode, OpenGenerate, OpenPrefill, Room
from protocol.sampling import FinishReason

EIGHT = TOKENIZER.decode(TEXT_IDS[:8])


@pytest.fixture
async def router(tmp_path: Path) -> AsyncIterator[RouterHarness]:
    async with running_router(tmp_path, failover_wait_s=0.2) as harness:
        yield harness


async def opened(router: RouterHarness) -> tuple[Call, Room, FakeReplica, FakeReplica]:
    """A streaming request that is open on the only pair."""
    prefill, decode = await router.pair()
    call = router.complete()
    room = (await prefill.opened(OpenPrefill)).room
    await decode.opened(OpenDecode)
    return call, room, prefill, decode


async def finish_whole(replica: FakeReplica, logged: int, epoch: int) -> OpenGenerate:
    """Take the resumed room and generate the rest of eight tokens."""
    resumed = await replica.opened(OpenGenerate)
    assert resumed.job.logged == TEXT_IDS[:logged]
    assert resumed.room.epoch == epoch
    replica.send(resumed.room, logged, *TEXT_IDS[logged:8], finish=FinishReason.LENGTH)
    return resumed


async def completed(router: RouterHarness, call: Call) -> None:
    await call.done()
    assert (call.status, call.streamed_text, call.events[-1]) == (200, EIGHT, "[DONE]")
    await router.idle()


async def test_prefill_lost_before_its_token(router: RouterHarness) -> None:
    call, room, prefill, decode = await opened(router)
    other = await router.add("other", ReplicaRole.PREFILL)
    prefill.die()
    assert (await decode.aborted(room)).reason is AbortReason.PEER_FAILED
    again = await other.opened(OpenPrefill)
    assert again.room == Room(room.request_id, 1)
    assert (await decode.opened(OpenDecode)).prefill == router.members[other].address
    other.send(again.room, 0, TEXT_IDS[0])
    decode.send(again.room, 1, *TEXT_IDS[1:8], finish=FinishReason.LENGTH)
    await completed(router, call)
    assert router.metrics.failovers["link_lost"] == 1


async def test_prefill_lost_with_no_other_is_recomputed_on_decode(router: RouterHarness) -> None:
    call, _, prefill, decode = await opened(router)
    prefill.die()
    await finish_whole(decode, 0, 1)
    await completed(router, call)


async def test_prefill_lost_after_its_token_resumes_from_the_log(router: RouterHarness) -> None:
    call, room, prefill, decode = await opened(router)
    prefill.send(room, 0, TEXT_IDS[0])
    await call.shows("the")
    prefill.die()
    await decode.aborted(room)
    await finish_whole(decode, 1, 1)
    await completed(router, call)


async def test_prefill_lost_while_decode_runs_is_nobodys_business(router: RouterHarness) -> None:
    call, room, prefill, decode = await opened(router)
    prefill.send(room, 0, TEXT_IDS[0])
    decode.send(room, 1, TEXT_IDS[1])
    await call.shows(TOKENIZER.decode(TEXT_IDS[1:2]))
    view = router.view(prefill)
    prefill.die()
    await until(lambda: not view.is_up)
    decode.send(room, 2, *TEXT_IDS[2:8], finish=FinishReason.LENGTH)
    await completed(router, call)
    assert router.metrics.failovers.total == 0


async def test_prefill_failing_while_decode_runs_is_nobodys_business(router: RouterHarness) -> None:
    call, room, prefill, decode = await opened(router)
    prefill.send(room, 0, TEXT_IDS[0])
    decode.send(room, 1, TEXT_IDS[1])
    await call.shows(TOKENIZER.decode(TEXT_IDS[1:2]))
    prefill.fail(room, FailureCode.LEASE_EXPIRED)
    await until(lambda: router.metrics.stale_messages.total == 1)
    decode.send(room, 2, *TEXT_IDS[2:8], finish=FinishReason.LENGTH)
    await completed(router, call)


async def test_decode_lost_after_the_first_token(router: RouterHarness) -> None:
    call, room, prefill, decode = await opened(router)
    prefill.send(room, 0, TEXT_IDS[0])
    await call.shows("the")
    other = await router.add("other", ReplicaRole.DECODE)
    decode.die()
    await prefill.aborted(room)
    await finish_whole(other, 1, 1)
    await completed(router, call)


async def test_decode_lost_mid_stream_resumes_on_prefill_if_need_be(router: RouterHarness) -> None:
    call, room, prefill, decode = await opened(router)
    prefill.send(room, 0, TEXT_IDS[0])
    decode.send(room, 1, *TEXT_IDS[1:4])
    await call.shows(TOKENIZER.decode(TEXT_IDS[3:4]))
    decode.die()
    resumed = await finish_whole(prefill, 4, 1)
    assert resumed.job.prompt == TOKENIZER.encode("a fox")
    await completed(router, call)


async def test_tokens_that_waited_for_a_gap_are_forgotten_with_their_epoch(router: RouterHarness) -> None:
    call, room, prefill, decode = await opened(router)
    decode.send(room, 1, *TEXT_IDS[1:4])
    await until(lambda: router.metrics.stale_messages.total == 0 and decode.link.is_open)
    decode.fail(room, FailureCode.LEASE_EXPIRED)
    again = await prefill.opened(OpenPrefill)
    prefill.send(again.room, 0, TEXT_IDS[0])
    await call.shows("the")
    assert call.streamed_text == "the"
    decode.send(again.room, 1, *TEXT_IDS[1:8], finish=FinishReason.LENGTH)
    await completed(router, call)


async def test_a_replica_that_fails_is_avoided(router: RouterHarness) -> None:
    call, room, prefill, decode = await opened(router)
    other = await router.add("other", ReplicaRole.DECODE)
    decode.fail(room, FailureCode.INTERNAL)
    again = await prefill.opened(OpenPrefill)
    assert again.decode == router.members[other].address
    prefill.send(again.room, 0, TEXT_IDS[0])
    other.send(again.room, 1, *TEXT_IDS[1:8], finish=FinishReason.LENGTH)
    await completed(router, call)


async def test_failed_transfer_is_recomputed_where_it_failed(router: RouterHarness) -> None:
    call, room, prefill, decode = await opened(router)
    await router.add("idle", ReplicaRole.DECODE)
    prefill.send(room, 0, TEXT_IDS[0])
    await call.shows("the")
    decode.fail(room, FailureCode.TRANSFER_FAILED)
    assert (await prefill.aborted(room)).reason is AbortReason.TRANSFER_FAILED
    await finish_whole(decode, 1, 1)
    await completed(router, call)


async def test_failed_transfer_before_the_first_token_too(router: RouterHarness) -> None:
    call, room, _, decode = await opened(router)
    decode.fail(room, FailureCode.TRANSFER_FAILED)
    await finish_whole(decode, 0, 1)
    await completed(router, call)


async def test_decode_reports_prefill_lost(router: RouterHarness) -> None:
    call, room, prefill, decode = await opened(router)
    other = await router.add("other", ReplicaRole.PREFILL)
    decode.fail(room, FailureCode.PEER_LOST)
    await prefill.aborted(room)
    again = await other.opened(OpenPrefill)
    other.send(again.room, 0, TEXT_IDS[0])
    decode.send(again.room, 1, *TEXT_IDS[1:8], finish=FinishReason.LENGTH)
    await completed(router, call)


async def test_what_belongs_to_an_older_epoch_changes_nothing(router: RouterHarness) -> None:
    call, room, prefill, decode = await opened(router)
    decode.fail(room, FailureCode.TRANSFER_FAILED)
    resumed = await decode.opened(OpenGenerate)
    prefill.send(room, 0, TEXT_IDS[5])
    prefill.fail(room, FailureCode.PEER_LOST)
    await until(lambda: router.metrics.stale_messages.total == 2)
    decode.send(resumed.room, 0, *TEXT_IDS[:8], finish=FinishReason.LENGTH)
    await completed(router, call)
    decode.send(resumed.room, 8, TEXT_IDS[8])
    await until(lambda: router.metrics.stale_messages.total == 3)


async def test_a_token_that_contradicts_the_log_reopens_the_room(router: RouterHarness) -> None:
    call, room, prefill, decode = await opened(router)
    prefill.send(room, 0, TEXT_IDS[0])
    decode.send(room, 1, *TEXT_IDS[1:3])
    decode.send(room, 2, TEXT_IDS[9])
    assert (await decode.aborted(room)).reason is AbortReason.SUPERSEDED
    await finish_whole(decode, 3, 1)
    await completed(router, call)
    assert router.metrics.contradictions.total == 1


async def test_a_contradicting_first_token_reopens_too(router: RouterHarness) -> None:
    call, room, prefill, decode = await opened(router)
    prefill.send(room, 0, TEXT_IDS[0])
    await call.shows("the")
    prefill.send(room, 0, TEXT_IDS[4])
    await prefill.aborted(room)
    await finish_whole(decode, 1, 1)
    await completed(router, call)


async def test_retries_are_limited_and_the_error_has_a_status(router: RouterHarness) -> None:
    replica = await router.add("both", ReplicaRole.AGGREGATED)
    call = router.complete()
    for epoch in range(4):
        room = (await replica.opened(OpenGenerate)).room
        assert room.epoch == epoch
        replica.fail(room, FailureCode.OVERLOADED, "no room here")
    await call.done()
    assert call.status == 503
    assert call.headers["retry-after"] == "1"
    assert call.json["error"]["code"] == "overloaded"
    assert "4 attempts" in call.json["error"]["message"]
    assert "no room here" in call.json["error"]["message"]
    await router.idle()


async def test_only_attempts_in_a_row_without_a_token_count(router: RouterHarness) -> None:
    replica = await router.add("both", ReplicaRole.AGGREGATED)
    call = router.complete()
    for epoch in range(7):
        room = (await replica.opened(OpenGenerate)).room
        assert room.epoch == epoch
        replica.send(room, epoch, TEXT_IDS[epoch])
        replica.fail(room, FailureCode.OVERLOADED)
    await finish_whole(replica, 7, 7)
    await completed(router, call)


async def test_attempts_that_a_draining_replica_ends_do_not_count(tmp_path: Path) -> None:
    async with running_router(tmp_path, max_epochs=1) as router:
        draining = [await router.add(f"draining-{number}", ReplicaRole.AGGREGATED) for number in range(2)]
        call = router.complete()
        for epoch in range(2):
            await until(lambda epoch=epoch: sum(len(each.opens) for each in draining) == epoch + 1)
            taker = next(each for each in draining if each.opens and each.opens[-1].room.epoch == epoch)
            if epoch == 0:
                taker.fail(taker.opens[-1].room, FailureCode.DRAINING)
            else:
                taker.send(taker.opens[-1].room, 0, *TEXT_IDS[:8], finish=FinishReason.LENGTH)
        await completed(router, call)


@pytest.mark.parametrize(("code", "status"), [(FailureCode.TOO_LONG, 400), (FailureCode.DEADLINE, 408)])
async def test_some_failures_are_final(router: RouterHarness, code: FailureCode, status: int) -> None:
    call, room, prefill, decode = await opened(router)
    decode.fail(room, code, "for this reason")
    await call.done()
    assert call.status == status
    assert "for this reason" in call.json["error"]["message"]
    await prefill.aborted(room)
    await router.idle()


async def test_failure_mid_stream_is_the_last_event(router: RouterHarness) -> None:
    call, room, prefill, decode = await opened(router)
    prefill.send(room, 0, TEXT_IDS[0])
    await call.shows("the")
    decode.fail(room, FailureCode.TOO_LONG, "for this reason")
    await call.done()
    assert call.status == 200
    assert call.events[-1]["error"]["code"] == "context_length_exceeded"
    assert call.streamed_text == "the"
    await router.idle()


async def test_one_failing_choice_ends_the_others(router: RouterHarness) -> None:
    prefill, decode = await router.pair()
    call = router.complete(n=2, stream=False)
    rooms = [(await prefill.opened(OpenPrefill)).room for _ in range(2)]
    decode.fail(rooms[1], FailureCode.TOO_LONG)
    await call.done()
    assert call.status == 400
    await prefill.aborted(rooms[0])
    await decode.aborted(rooms[0])
    await router.idle()


async def test_all_replicas_gone_waits_for_one_to_come_back(router: RouterHarness) -> None:
    call, room, prefill, decode = await opened(router)
    prefill.send(room, 0, TEXT_IDS[0])
    await call.shows("the")
    prefill.die()
    decode.die()
    for replica in (prefill, decode):
        router.remove(replica)
    fresh = await router.add("fresh", ReplicaRole.DECODE)
    resumed = await fresh.opened(OpenGenerate)
    fresh.send(resumed.room, 1, *TEXT_IDS[1:8], finish=FinishReason.LENGTH)
    await completed(router, call)


async def test_all_replicas_gone_for_good(router: RouterHarness) -> None:
    call, _, prefill, decode = await opened(router)
    prefill.die()
    decode.die()
    await call.done()
    assert call.status == 503
    assert "none came back" in call.json["error"]["message"]
    await router.idle()


async def test_draining_replicas_get_nothing_new(router: RouterHarness) -> None:
    first, _ = await router.pair(automatic=True)
    second = await router.add("second", ReplicaRole.PREFILL, automatic=True)
    first.report(Load(0, 0, 0, 100, 0, 100, draining=True))
    await until(lambda: not router.view(first).usable)
    for _ in range(3):
        assert (await router.complete(max_tokens=100).done()).streamed_text == TEXT
    assert first.opens == []
    assert len(second.opens) == 3


async def test_an_unlisted_replica_finishes_what_it_has(router: RouterHarness) -> None:
    call, room, prefill, decode = await opened(router)
    prefill.send(room, 0, TEXT_IDS[0])
    decode.send(room, 1, TEXT_IDS[1])
    await call.shows(TOKENIZER.decode(TEXT_IDS[1:2]))
    link = decode.link
    router.remove(decode)
    decode.send(room, 2, *TEXT_IDS[2:8], finish=FinishReason.LENGTH)
    await completed(router, call)
    await until(lambda: not link.is_open)


async def test_a_restarted_replica_is_a_new_one(router: RouterHarness) -> None:
    prefill, decode = await router.pair(automatic=True)
    await router.complete().done()
    prefill.die()
    router.remove(prefill)
    again = await router.add("prefill-0", ReplicaRole.PREFILL, automatic=True)
    assert (await router.complete(max_tokens=100).done()).streamed_text == TEXT
    assert len(again.opens) == 1
    assert len(decode.opens) == 2


async def test_a_link_that_breaks_is_made_again(router: RouterHarness) -> None:
    replica = await router.add("both", ReplicaRole.AGGREGATED)
    call = router.complete()
    room = (await replica.opened(OpenGenerate)).room
    replica.send(room, 0, TEXT_IDS[0])
    await call.shows("the")
    replica.link.fail("as scripted")
    await finish_whole(replica, 1, 1)  # the only replica, once it can be reached again
    await completed(router, call)
    assert router.metrics.link_losses["both"] == 1


async def test_a_replica_that_talks_nonsense_is_cut_off(router: RouterHarness) -> None:
    replica = await router.add("both", ReplicaRole.AGGREGATED)
    link = replica.link
    link.send(Delivered(Room("r", 0)))
    await until(lambda: not link.is_open)
    await until(lambda: router.view(replica).usable)


async def test_an_unlisted_replica_that_cannot_be_reached_is_given_up(router: RouterHarness) -> None:
    replica = FakeReplica("unreachable", ReplicaRole.AGGREGATED)
    router.members[replica] = await replica.start()
    replica.die()
    router.update()
    assert not router.view(replica).usable
    router.remove(replica)
    assert router.app.state.members.views == []
    assert (await router.complete().done()).status == 503
