"""Short copies: whoever asks for them makes them, within the host, while no thread copies; or asks the peer, over TCP,
while the loop sleeps."""

from __future__ import annotations

import threading
import time

import pytest
from transfer_pools import WAIT_S, Breaker, Gate, Receiver, ServedPool, closing

from transfer.fetcher import FetchJob
from transfer.tcp_connection import PageConnection

SHORT = 4 * 4096


@pytest.fixture
def pool():
    with closing(ServedPool(boot=7)) as (pool,):
        yield pool


@pytest.fixture
def receiver(pool):
    with closing(Receiver(at_once_bytes=SHORT)) as (receiver,):
        receiver.fetcher.attach(pool.address, pool.ticket)
        assert receiver.fetch(pool.address, [0], [0]).ok  # its memory is mapped from now on
        yield receiver


def job(pool, pages, *, key="job", checksums=None):
    sums = pool.checksums(pages) if checksums is None else checksums
    return FetchJob(key=key, peer=pool.address, source_pages=pages, target_pages=pages, checksums=sums)


def threads_of(receiver, *jobs):
    """In which threads the jobs, asked for one after the other, were answered."""
    answers, done = {}, threading.Event()

    def on_done(result):
        assert result.ok, result.error
        answers[result.key] = threading.current_thread()
        if len(answers) == len(jobs):
            done.set()

    for each in jobs:
        receiver.fetcher.fetch(each, on_done)
    assert done.wait(WAIT_S)
    return [answers[each.key] for each in jobs]


def test_a_short_copy_is_there_when_fetch_returns(pool, receiver):
    answers = []
    receiver.fetcher.fetch(job(pool, [3, 9, 4, 5]), answers.append)
    assert [(answer.ok, answer.transport) for answer in answers] == [(True, "shm")]
    assert [receiver.page(page) for page in (3, 9, 4, 5)] == [pool.page(page) for page in (3, 9, 4, 5)]
    assert receiver.page(6) == bytes(4096)
    assert receiver.fetcher.num_jobs == 0


def test_a_longer_copy_is_made_by_a_thread(pool, receiver):
    (thread,) = threads_of(receiver, job(pool, [1, 2, 3, 4, 5]))
    assert thread is not threading.current_thread()


def test_what_an_answer_asks_for_does_not_nest(pool, receiver):
    """Or a chain of fetches would go as deep as it is long."""
    threads, done = [], threading.Event()

    def on_done(result):
        threads.append(threading.current_thread())
        if len(threads) == 50:
            done.set()
        else:
            receiver.fetcher.fetch(job(pool, [len(threads)], key=len(threads)), on_done)

    receiver.fetcher.fetch(job(pool, [0], key=0), on_done)
    assert done.wait(WAIT_S)
    assert threads[0] is threading.current_thread()
    assert threads[1] is not threading.current_thread()


def test_a_short_copy_waits_its_turn_while_a_thread_copies(pool):
    gate = Gate(keys={"held"})
    with closing(Receiver(transport="shm", num_threads=1, faults=gate, at_once_bytes=SHORT)) as (receiver,):
        receiver.fetcher.attach(pool.address, pool.ticket)
        assert receiver.fetch(pool.address, [0], [0], key="first").ok
        receiver.start(pool.address, list(range(20)), list(range(20)), key="held")
        assert gate.reached.wait(WAIT_S)
        receiver.start(pool.address, [30], [30], key="short")
        assert "short" not in receiver.results
        gate.open()
        assert receiver.wait("short").ok
        assert receiver.wait("held").ok


def test_detach_waits_for_a_copy_in_a_caller(pool):
    gate = Gate(keys={"held"})
    with closing(Receiver(transport="shm", faults=gate, at_once_bytes=SHORT)) as (receiver,):
        receiver.fetcher.attach(pool.address, pool.ticket)
        assert receiver.fetch(pool.address, [0], [0], key="first").ok
        caller = threading.Thread(target=lambda: receiver.start(pool.address, [1], [1], key="held"))
        caller.start()
        assert gate.reached.wait(WAIT_S)
        receiver.fetcher.detach(pool.address)  # the memory that is being copied from stays where it is
        assert "held" not in receiver.results
        assert receiver.fetcher.num_jobs == 1
        gate.open()
        caller.join(WAIT_S)
        result = receiver.wait("held")
        assert result.ok or result.error.startswith("its peer was detached")


def test_a_short_copy_that_fails_goes_another_way(pool):
    with closing(Receiver(faults=Breaker(corrupting={"shm"}), at_once_bytes=SHORT)) as (receiver,):
        receiver.fetcher.attach(pool.address, pool.ticket)
        assert receiver.fetch(pool.address, [0], [0]).ok
        result = receiver.fetch(pool.address, [2], [2], checksums=pool.checksums([2]))
        assert (result.ok, result.transport) == (True, "tcp")


def test_pages_without_checksums_are_refused_where_they_are_verified(pool):
    with closing(Receiver(verify=True)) as (receiver,):
        receiver.fetcher.attach(pool.address, pool.ticket)
        one, other = pool.checksums([1, 2])
        assert receiver.fetch(pool.address, [1, 2], [1, 2], checksums=[one, other]).ok
        for sums in ([], [0, other], [one, 0]):
            result = receiver.fetch(pool.address, [1, 2], [3, 4], checksums=sums)
            assert "without checksums" in result.error
        assert receiver.page(3) == bytes(4096)


@pytest.fixture
def asking(monkeypatch):
    """The threads that asked peers for pages over TCP."""
    threads, run = [], PageConnection.run
    monkeypatch.setattr(PageConnection, "run", lambda *told: (threads.append(threading.current_thread()), run(*told)))
    return threads


def test_over_tcp_a_short_copy_is_asked_for_by_the_caller(pool, asking):
    with closing(Receiver(transport="tcp", at_once_bytes=SHORT)) as (receiver,):
        receiver.fetcher.attach(pool.address, pool.ticket)
        give_up = time.monotonic() + WAIT_S
        while threading.current_thread() not in asking:  # the loop may have been awake
            assert time.monotonic() < give_up, "the loop asked each time"
            (thread,) = threads_of(receiver, job(pool, [3, 9, 4, 5]))
            assert thread is not threading.current_thread()
        assert [receiver.page(page) for page in (3, 9, 4, 5)] == [pool.page(page) for page in (3, 9, 4, 5)]


def test_over_tcp_a_longer_copy_is_asked_for_by_the_loop(pool, asking):
    with closing(Receiver(transport="tcp", at_once_bytes=SHORT)) as (receiver,):
        receiver.fetcher.attach(pool.address, pool.ticket)
        for _ in range(10):
            threads_of(receiver, job(pool, [1, 2, 3, 4, 5]))
    assert threading.current_thread() not in asking
    assert len(asking) == 10


def test_over_tcp_a_short_copy_from_a_peer_that_has_gone_fails(pool):
    with closing(Receiver(transport="tcp", at_once_bytes=SHORT)) as (receiver,):
        receiver.fetcher.attach(pool.address, pool.ticket)
        assert receiver.fetch(pool.address, [0], [0]).ok
        pool.server.close()
        result = receiver.fetch(pool.address, [1], [1])
        assert (result.ok, result.transport) == (False, "tcp")
