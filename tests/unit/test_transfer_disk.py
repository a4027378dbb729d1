"""Pages by way of a shared folder: what is published, what is taken, what is refused, and what is left behind."""

from __future__ import annotations

import errno
import os
import stat
import threading

import msgspec
import numpy as np
import pytest
from disk_peer import SpoolingPool
from peer_processes import PeerProcess
from transfer_pools import LAYOUT, WAIT_S, Breaker, FakeClock, Gate, Receiver, closing, open_fds

from transfer.disk import index, packs
from transfer.disk.folders import is_spool_name, leftovers, spool_name
from transfer.disk.index import IndexReader, Place, Refusal
from transfer.disk.packs import SpoolLimits
from transfer.disk.spool import Spool
from transfer.fetcher import PageFetcher
from transfer.memory import SharedMemory

CONTIGUOUS = (list(range(5, 45)), list(range(20, 60)))
SCATTERED = ([3, 4, 5, 40, 9, 8, 63], [10, 11, 12, 0, 50, 51, 33])


@pytest.fixture
def pool(tmp_path):
    with closing(SpoolingPool(tmp_path, boot=7)) as (pool,):
        yield pool


def receiver_in(folder, **options):
    return Receiver(transport="disk", folder=folder, **options)


def change(pool, page):
    """The page was freed and filled by somebody else."""
    start = page * pool.page_bytes
    pool.memory.view[start] ^= 1


# ---- taking -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("source", "target"), [CONTIGUOUS, SCATTERED])
def test_another_process_pages_arrive_in_their_places_and_nowhere_else(tmp_path, source, target):
    peer = PeerProcess(boot=3, transport="disk", folder=tmp_path, offered=source)
    with closing(peer, receiver_in(tmp_path)) as (_, receiver):
        receiver.fetcher.attach(peer.address, peer.ticket)
        result = receiver.fetch(peer.address, source, target, checksums=peer.checksums(source))
        assert result.ok, result.error
        assert (result.transport, result.bytes) == ("disk", len(source) * 4096)
        for page in range(64):
            expected = peer.page(source[target.index(page)]) if page in target else bytes(4096)
            assert receiver.page(page) == expected


@pytest.mark.parametrize("page_bytes", [1, 1000, 64 << 10, 3 << 20])
def test_any_page_size_works(tmp_path, page_bytes):
    pool = SpoolingPool(tmp_path, boot=2, page_bytes=page_bytes, num_pages=9)
    with closing(pool, receiver_in(tmp_path, page_bytes=page_bytes, num_pages=9)) as (_, receiver):
        receiver.fetcher.attach(pool.address, pool.ticket)
        source, target = [0, 1, 2, 8, 5], [4, 5, 6, 7, 0]
        assert receiver.fetch(pool.address, source, target, checksums=pool.offer(source)).ok
        assert [receiver.page(page) for page in target] == [pool.page(page) for page in source]


def test_what_a_peer_wrote_can_be_taken_when_it_is_dead(tmp_path):
    peer = PeerProcess(boot=3, transport="disk", folder=tmp_path, offered=range(64))
    with closing(peer, receiver_in(tmp_path)) as (_, receiver):
        receiver.fetcher.attach(peer.address, peer.ticket)
        assert receiver.fetch(peer.address, range(64), range(64), checksums=peer.checksums(range(64))).ok
        peer.kill()
        assert receiver.fetch(peer.address, [9, 2], [2, 9], checksums=peer.checksums([9, 2])).ok
        assert receiver.page(2) == peer.page(9)


def test_any_number_of_peers_take_the_same_pages(pool, tmp_path):
    checksums = pool.write(range(64))
    with closing(receiver_in(tmp_path), receiver_in(tmp_path)) as receivers:
        for receiver in receivers:
            receiver.fetcher.attach(pool.address, pool.ticket)
            assert receiver.fetch(pool.address, range(64), range(64), checksums=checksums).ok
            assert bytes(receiver.memory.view) == bytes(pool.memory.view)


def test_pages_that_are_offered_later_than_they_are_asked_for_are_waited_for(pool, tmp_path):
    pages = [1, 2, 3]
    with closing(receiver_in(tmp_path)) as (receiver,):
        receiver.fetcher.attach(pool.address, pool.ticket)
        pool.write(pages[:1])
        receiver.start(pool.address, pages, pages, checksums=pool.checksums(pages))
        receiver.start(pool.address, [9], [9], key="another", checksums=pool.offer([9]))
        assert receiver.wait("another").ok  # which waits behind nobody
        assert "job" not in receiver.results
        pool.offer(pages[1:])
        assert receiver.wait().ok
        assert [receiver.page(page) for page in pages] == [pool.page(page) for page in pages]


def test_a_peer_that_keeps_no_spool_cannot_be_reached(pool, tmp_path):
    with closing(receiver_in(tmp_path)) as (receiver,):
        for door in ({}, {"disk": "../kv-replica-7-0000000000000007"}, {"disk": ""}):
            receiver.fetcher.attach(pool.address, msgspec.structs.replace(pool.ticket, doors=door))
            result = receiver.fetch(pool.address, [1], [1], checksums=pool.checksums([1]))
            assert "cannot be reached by disk" in result.error


def test_pages_without_checksums_are_not_taken(pool, tmp_path):
    with closing(receiver_in(tmp_path)) as (receiver,):
        receiver.fetcher.attach(pool.address, pool.ticket)
        sums = pool.write([1, 2])
        for checksums in ((), [sums[0], 0]):
            result = receiver.fetch(pool.address, [1, 2], [1, 2], checksums=checksums)
            assert "by their checksums; turn them on" in result.error


# ---- what goes wrong ----------------------------------------------------------------------------------------------


def test_a_corrupt_file_is_noticed(pool, tmp_path):
    checksums = pool.write([1, 2, 3])
    (pack,) = pool.packs()
    content = bytearray(pack.read_bytes())
    content[4096 + 17] ^= 1
    pack.write_bytes(content)
    with closing(receiver_in(tmp_path)) as (receiver,):
        receiver.fetcher.attach(pool.address, pool.ticket)
        result = receiver.fetch(pool.address, [1, 2, 3], [1, 2, 3], checksums=checksums)
        assert "disk: page 2 arrived with checksum" in result.error
        assert receiver.fetch(pool.address, [1], [1], checksums=checksums[:1]).ok


def test_a_shortened_file_is_noticed(pool, tmp_path):
    checksums = pool.write([1, 2, 3])
    os.truncate(pool.packs()[0], 5000)
    with closing(receiver_in(tmp_path)) as (receiver,):
        receiver.fetcher.attach(pool.address, pool.ticket)
        result = receiver.fetch(pool.address, [1, 2, 3], [1, 2, 3], checksums=checksums)
        assert "has 5000 bytes where its index promises 8192" in result.error


@pytest.mark.parametrize("content", [b"", b"no index", b"pd-kv-1\n" + bytes(12) + b"\x63" + bytes(11)])
def test_an_index_of_nonsense_fails_the_copy(pool, tmp_path, content):
    checksums = pool.write([1])
    (pool.folder / "index").write_bytes(content)
    with closing(receiver_in(tmp_path)) as (receiver,):
        receiver.fetcher.attach(pool.address, pool.ticket)
        assert "cannot be read" in receiver.fetch(pool.address, [1], [1], checksums=checksums).error


def test_a_missing_page_ends_at_the_deadline(pool, tmp_path):
    clock = FakeClock()
    with closing(receiver_in(tmp_path, clock=clock)) as (receiver,):
        receiver.fetcher.attach(pool.address, pool.ticket)
        receiver.start(pool.address, [5], [5], checksums=pool.checksums([5]), deadline=clock() + 3)
        result = receiver.wait_turning(clock, seconds=0.5)
        assert result.error.startswith("its deadline passed; disk: ")
        assert not result.cancelled
        assert receiver.page(5) == bytes(4096)


def test_a_missing_page_is_not_waited_for_for_ever(pool, tmp_path):
    clock = FakeClock()
    with closing(receiver_in(tmp_path, clock=clock)) as (receiver,):
        receiver.fetcher.attach(pool.address, pool.ticket)
        receiver.start(pool.address, [5], [5], checksums=pool.checksums([5]))
        assert "page 5 did not come within" in receiver.wait_turning(clock, seconds=2).error
        elsewhere = msgspec.structs.replace(pool.ticket, doors={"disk": spool_name("replica", 1)})
        receiver.fetcher.attach(pool.address, elsewhere)
        receiver.start(pool.address, [5], [5], checksums=pool.checksums([5]))
        assert "is not there: do both replicas have the same folder" in receiver.wait_turning(clock, seconds=2).error


def test_a_folder_that_went_away_is_waited_for_once(pool, tmp_path):
    clock = FakeClock()
    checksums = pool.checksums([1, 2, 3, 4])

    def waits_in_vain(page: int) -> float:
        began = clock()
        receiver.start(pool.address, [page], [page], checksums=checksums[page - 1 : page])
        assert f"page {page} did not come within" in receiver.wait_turning(clock, seconds=0.25).error
        return clock() - began

    with closing(receiver_in(tmp_path, clock=clock)) as (receiver,):
        receiver.fetcher.attach(pool.address, pool.ticket)
        away = tmp_path.rename(tmp_path.with_name("away"))
        assert waits_in_vain(1) >= 10
        assert waits_in_vain(2) < 5
        away.rename(tmp_path)
        pool.write([3])
        assert receiver.fetch(pool.address, [3], [3], checksums=checksums[2:3]).ok
        assert waits_in_vain(4) >= 10, "it has shown that it is back"


def test_a_page_that_was_reused_before_the_writer_came_is_never_published(pool, tmp_path):
    before = pool.checksums([1, 2, 3])
    change(pool, 2)
    pool.spool.offer([1, 2, 3], before)
    assert pool.spool.wait_idle(WAIT_S)
    index = IndexReader(pool.folder)
    index.refresh()
    assert index.find(before) == [Place(1, 0)]
    assert index.find(before[2:]) == [Place(1, 1)]
    assert [index.refusal(checksum) for checksum in before] == [None, Refusal.REUSED, None]
    assert pool.packs()[0].read_bytes() == pool.page(1) + pool.page(3)
    with closing(receiver_in(tmp_path)) as (receiver,):
        receiver.fetcher.attach(pool.address, pool.ticket)
        result = receiver.fetch(pool.address, [1, 2], [1, 2], checksums=before[:2])
        assert result.error == "disk: page 2 was not written: " + Refusal.REUSED.words
        change(pool, 2)  # the same prompt again: the page is what it was
        pool.write([2])
        assert receiver.fetch(pool.address, [1, 2], [1, 2], checksums=before[:2]).ok


def test_a_page_that_is_written_after_its_refusal_is_taken(pool, tmp_path):
    clock = FakeClock()
    before = pool.checksums([2])
    change(pool, 2)
    pool.spool.offer([2], before)
    assert pool.spool.wait_idle(WAIT_S)
    with closing(receiver_in(tmp_path, clock=clock)) as (receiver,):
        receiver.fetcher.attach(pool.address, pool.ticket)
        receiver.start(pool.address, [2], [2], checksums=before)  # sees the old refusal
        change(pool, 2)
        pool.write([2])
        assert receiver.wait_turning(clock, seconds=0.01).ok


def test_more_than_may_wait_is_refused(tmp_path):
    pool = SpoolingPool(tmp_path, boot=7, limits=SpoolLimits(max_waiting_bytes=8 * 4096))
    with closing(pool, receiver_in(tmp_path)) as (_, receiver):
        receiver.fetcher.attach(pool.address, pool.ticket)
        checksums = pool.write(range(12))
        assert receiver.fetch(pool.address, range(8), range(8), checksums=checksums[:8]).ok
        result = receiver.fetch(pool.address, [11], [11], checksums=checksums[11:])
        assert result.error == "disk: page 11 was not written: " + Refusal.BUSY.words


def test_a_disk_that_takes_no_more_fails_the_copies_and_nothing_else(tmp_path):
    """A limit on the size of files stands for it: small packs can be written, large ones cannot."""
    peer = PeerProcess(boot=3, transport="disk", folder=tmp_path, offered=range(20), file_limit=8 * 4096)
    with closing(peer, receiver_in(tmp_path)) as (_, receiver):
        receiver.fetcher.attach(peer.address, peer.ticket)
        result = receiver.fetch(peer.address, range(20), range(20), checksums=peer.checksums(range(20)))
        assert result.error == "disk: page 0 was not written: " + Refusal.FAILED.words
        assert not list(peer.folder.glob("*.pages"))


def test_a_folder_that_somebody_removed_is_made_again(pool, tmp_path):
    pool.write([1, 2])
    for path in pool.folder.iterdir():
        path.unlink()
    pool.folder.rmdir()
    checksums = pool.write([3])
    with closing(receiver_in(tmp_path)) as (receiver,):
        receiver.fetcher.attach(pool.address, pool.ticket)
        assert receiver.fetch(pool.address, [3], [3], checksums=checksums).ok, "nothing was lost but what was there"
        assert receiver.fetch(pool.address, [1, 3], [1, 3], checksums=pool.write([1, 3])).ok


@pytest.mark.parametrize("with_folder", [False, True])
def test_pages_that_somebody_removed_are_written_again(pool, tmp_path, with_folder):
    """Their writer believes for minutes that they are there."""
    pool.write([1, 2])
    for path in pool.folder.iterdir():
        path.unlink()
    if with_folder:
        pool.folder.rmdir()
    with closing(receiver_in(tmp_path)) as (receiver,):
        receiver.fetcher.attach(pool.address, pool.ticket)
        assert receiver.fetch(pool.address, [1], [1], checksums=pool.write([1])).ok
        assert receiver.page(1) == pool.page(1)


def test_on_a_disk_smaller_than_the_limit_the_oldest_make_room(pool, tmp_path, monkeypatch):
    def write_to_a_small_disk(fd: int, content: memoryview) -> None:
        if sum(path.stat().st_size for path in pool.packs()) + len(content) > 20 * pool.page_bytes:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        index.write_all(fd, content)

    monkeypatch.setattr(packs, "write_all", write_to_a_small_disk)
    with closing(receiver_in(tmp_path)) as (receiver,):
        receiver.fetcher.attach(pool.address, pool.ticket)
        for first in range(0, 64, 8):
            pages = range(first, first + 8)
            assert receiver.fetch(pool.address, pages, pages, checksums=pool.write(pages)).ok
        too_many = range(32)
        result = receiver.fetch(pool.address, too_many, too_many, checksums=pool.write(too_many))
        assert "was not written: " + Refusal.FULL.words in result.error


# ---- ending early -------------------------------------------------------------------------------------------------


def test_stop_is_honoured_between_pieces(tmp_path):
    gate = Gate(after_bytes=1 << 20)
    pool = SpoolingPool(tmp_path, boot=8, page_bytes=1 << 20, num_pages=6)
    with closing(pool, receiver_in(tmp_path, faults=gate, page_bytes=1 << 20, num_pages=6)) as (_, receiver):
        receiver.fetcher.attach(pool.address, pool.ticket)
        receiver.start(pool.address, range(6), range(6), checksums=pool.offer(range(6)))
        assert gate.reached.wait(WAIT_S)
        receiver.fetcher.cancel("job")
        assert receiver.answers == 0  # a thread of ours is in the middle of it
        gate.open()
        assert receiver.wait().cancelled
        assert receiver.page(0) == pool.page(0)
        assert receiver.page(5) == bytes(1 << 20)


def test_copies_that_wait_are_stopped_at_once_whatever_they_wait_for(pool, tmp_path):
    gate = Gate(keys={"held"})
    with closing(receiver_in(tmp_path, faults=gate, num_threads=1, clock=FakeClock())) as (receiver,):
        receiver.fetcher.attach(pool.address, pool.ticket)
        receiver.start(pool.address, [5], [5], key="for its page", checksums=pool.checksums([5]))
        receiver.start(pool.address, [1], [1], key="held", checksums=pool.write([1]))
        assert gate.reached.wait(WAIT_S)
        receiver.start(pool.address, [2], [2], key="for its turn", checksums=pool.offer([2]))
        receiver.fetcher.cancel("for its turn")
        assert receiver.wait("for its turn").error == "it was cancelled; disk: stopped"
        receiver.fetcher.cancel("for its page")
        error = "it was cancelled; disk: stopped while waiting for page 5 to be written"
        assert receiver.wait("for its page").error == error
        gate.open()
        assert receiver.wait("held").ok


def test_detach_ends_the_sleeping_and_the_running(pool, tmp_path):
    gate = Gate(keys={"held"})
    with closing(receiver_in(tmp_path, faults=gate, num_threads=1)) as (receiver,):
        receiver.fetcher.attach(pool.address, pool.ticket)
        receiver.start(pool.address, [5], [5], key="asleep", checksums=pool.checksums([5]))
        receiver.start(pool.address, [1, 6], [1, 6], key="held", checksums=[pool.write([1])[0], *pool.checksums([6])])
        assert gate.reached.wait(WAIT_S)
        receiver.fetcher.detach(pool.address)
        assert "held" not in receiver.results
        gate.open()
        for key in ("held", "asleep"):
            assert receiver.wait(key).error.startswith("its peer was detached")
        receiver.fetcher.attach(pool.address, pool.ticket)
        assert receiver.fetch(pool.address, [1], [1], checksums=pool.offer([1])).ok


def test_short_copies_go_first(pool, tmp_path):
    gate, order = Gate(keys={"first"}), []
    checksums = pool.write(range(64))
    with closing(receiver_in(tmp_path, faults=gate, num_threads=1)) as (receiver,):
        receiver.fetcher.attach(pool.address, pool.ticket)
        receiver.start(pool.address, [0], [0], key="first", checksums=checksums[:1])
        assert gate.reached.wait(WAIT_S)
        answered = receiver._done
        receiver._done = lambda result: (order.append(result.key), answered(result))
        receiver.start(pool.address, range(50), range(10, 60), key="long", checksums=checksums[:50])
        receiver.start(pool.address, [1], [1], key="short", checksums=checksums[1:2])
        gate.open()
        assert receiver.wait("long").ok
        assert order == ["short", "long"]


def test_a_long_copy_gives_way_to_a_short_one(tmp_path):
    gate, order = Gate(keys={"long"}, after_bytes=1 << 20), []
    pool = SpoolingPool(tmp_path, boot=8, page_bytes=1 << 20, num_pages=6)
    with closing(
        pool, receiver_in(tmp_path, faults=gate, num_threads=1, page_bytes=1 << 20, num_pages=7, clock=FakeClock())
    ) as (_, receiver):
        receiver.fetcher.attach(pool.address, pool.ticket)
        checksums = pool.write(range(6))
        answered = receiver._done
        receiver._done = lambda result: (order.append(result.key), answered(result))
        receiver.start(pool.address, range(6), range(6), key="long", checksums=checksums)
        assert gate.reached.wait(WAIT_S)
        receiver.start(pool.address, [1], [6], key="short", checksums=checksums[1:2])
        gate.open()
        assert receiver.wait("long").ok
        assert receiver.wait("short").ok
        assert order == ["short", "long"]
        assert bytes(receiver.memory.view[: 6 << 20]) == bytes(pool.memory.view)


def test_a_path_that_breaks_fails_the_copy_with_the_reason(pool, tmp_path):
    with closing(receiver_in(tmp_path, faults=Breaker(broken={"disk"}))) as (receiver,):
        receiver.fetcher.attach(pool.address, pool.ticket)
        result = receiver.fetch(pool.address, [1], [1], checksums=pool.offer([1]))
        assert result.error == "disk: disk is broken on purpose"


# ---- what is kept -------------------------------------------------------------------------------------------------


def test_the_oldest_packs_go_when_there_is_too_much(tmp_path):
    limits = SpoolLimits(max_bytes=8 * 4096)
    pool = SpoolingPool(tmp_path, boot=7, limits=limits)
    clock = FakeClock()
    with closing(pool, receiver_in(tmp_path, clock=clock)) as (_, receiver):
        receiver.fetcher.attach(pool.address, pool.ticket)
        for page in range(0, 12, 2):
            pool.write([page, page + 1])
            assert sum(path.stat().st_size for path in pool.packs()) <= limits.max_bytes
        assert receiver.fetch(pool.address, range(4, 12), range(8), checksums=pool.checksums(range(4, 12))).ok
        receiver.start(pool.address, [0], [9], checksums=pool.checksums([0]))
        assert "did not come within" in receiver.wait_turning(clock, seconds=5).error
        assert receiver.fetch(pool.address, [0], [9], checksums=pool.write([0])).ok  # offered again


def test_what_is_too_old_goes(tmp_path):
    clock = FakeClock()
    pool = SpoolingPool(tmp_path, boot=7, limits=SpoolLimits(max_age_s=100), spool_clock=clock)
    with closing(pool) as (pool,):
        pool.write([1])
        clock.advance(60)
        pool.write([2])
        clock.advance(60)
        pool.write([3])
        assert [path.read_bytes() for path in pool.packs()] == [pool.page(2), pool.page(3)]


def test_a_page_that_is_there_is_not_written_again_until_it_is_about_to_go(tmp_path):
    pool = SpoolingPool(tmp_path, boot=7, limits=SpoolLimits(max_bytes=8 * 4096))
    with closing(pool):
        pool.write([0])
        pool.write([0, 1])
        assert [path.stat().st_size for path in pool.packs()] == [4096, 4096]
        for page in (2, 3, 4):
            pool.write([page])
        pool.write([0])  # the next to be evicted
        assert pool.packs()[-1].read_bytes() == pool.page(0)


def test_an_index_of_outdated_records_is_begun_anew(tmp_path, monkeypatch):
    monkeypatch.setattr("transfer.disk.packs._SLACK_RECORDS", 4)
    pool = SpoolingPool(tmp_path, boot=7, limits=SpoolLimits(max_bytes=4 * 4096))
    with closing(pool, receiver_in(tmp_path)) as (_, receiver):
        receiver.fetcher.attach(pool.address, pool.ticket)
        for page in range(64):
            checksums = pool.write([page])
            assert (pool.folder / "index").stat().st_size <= 16 * (1 + 2 * 4 + 4 + 1)
            assert receiver.fetch(pool.address, [page], [page], checksums=checksums).ok
        assert bytes(receiver.memory.view) == bytes(pool.memory.view)


def test_half_a_record_is_left_for_the_next_look(pool):
    pool.write([1])
    index, (checksum,) = IndexReader(pool.folder), pool.checksums([2])
    record = checksum.to_bytes(8, "little") + (1).to_bytes(4, "little") + (5).to_bytes(4, "little")
    with open(pool.folder / "index", "ab") as file:
        file.write(record[:9])
        file.flush()
        index.refresh()
        assert index.find([checksum]) == []
        file.write(record[9:])
        file.flush()
        index.refresh()
    assert index.find([checksum]) == [Place(1, 5)]


def test_files_are_private(pool):
    pool.write([1])
    assert stat.S_IMODE(pool.folder.stat().st_mode) == 0o700
    assert {stat.S_IMODE(path.stat().st_mode) for path in pool.folder.iterdir()} == {0o600}


# ---- what is left behind ------------------------------------------------------------------------------------------


def test_close_leaves_neither_thread_nor_file(tmp_path):
    threads, fds = set(threading.enumerate()), open_fds()
    pool = SpoolingPool(tmp_path, boot=3)
    receiver = receiver_in(tmp_path)
    receiver.fetcher.attach(pool.address, pool.ticket)
    assert receiver.fetch(pool.address, [1, 5], [1, 2], checksums=pool.offer([1, 5])).ok
    receiver.start(pool.address, [2], [3], checksums=pool.checksums([2]))  # never comes
    receiver.close()
    receiver.wait()
    pool.close()
    assert set(threading.enumerate()) == threads
    assert open_fds() == fds
    assert list(tmp_path.iterdir()) == []


def test_a_dead_peers_folder_is_removed_by_its_age(pool, tmp_path):
    peer = PeerProcess(boot=3, transport="disk", folder=tmp_path, offered=[1, 2])
    with closing(peer, receiver_in(tmp_path)) as (_, receiver):
        receiver.fetcher.attach(peer.address, peer.ticket)
        assert receiver.fetch(peer.address, [1, 2], [1, 2], checksums=peer.checksums([1, 2])).ok
    assert peer.folder.is_dir()  # it was killed
    assert receiver.answers == 1
    life = (pool.folder / "index").stat().st_mtime
    os.utime(peer.folder / "index", (life - 601, life - 601))
    for name in ("kv-letters", "other", spool_name("with a friend's file", 5)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "mine").touch()
        os.utime(tmp_path / name, (life - 9999, life - 9999))
    os.symlink(peer.folder, tmp_path / spool_name("link", 6))
    assert leftovers(tmp_path, own=pool.spool.address(), silent_s=602) == [
        tmp_path / spool_name("with a friend's file", 5)
    ]
    with closing(SpoolingPool(tmp_path, boot=5)) as (young,):
        young.write([1])  # so it has tidied
        assert not peer.folder.exists()
        assert pool.folder.is_dir()
        assert all((tmp_path / name / "mine").exists() for name in ("kv-letters", "other"))
        assert (tmp_path / spool_name("with a friend's file", 5) / "mine").exists()


def test_the_living_show_it(tmp_path):
    clock = FakeClock()
    pool = SpoolingPool(tmp_path, boot=7, spool_clock=clock)
    with closing(pool):
        pool.write([1])
        os.utime(pool.folder / "index", (1000, 1000))
        clock.advance(150)
        pool.write([1])  # is there already; before it waits for more, the spool shows life
        pool.write([1])
        assert (pool.folder / "index").stat().st_mtime > 1000


# ---- what cannot work ---------------------------------------------------------------------------------------------


def test_names_lead_nowhere_else():
    assert is_spool_name(spool_name("SERVE_REPLICA::app#Prefill#x/../y", 2**64 - 1))
    assert is_spool_name(spool_name("", 0)) is False
    for name in ("..", "kv-a-0000000000000001/x", "kv-../a-0000000000000001", "kv-a-1", "index"):
        assert not is_spool_name(name)


@pytest.mark.parametrize(
    ("folder", "message"), [(None, "needs a folder that all replicas can reach"), ("nowhere", "is not a folder")]
)
def test_a_fetcher_without_a_folder_is_refused(tmp_path, folder, message):
    threads = set(threading.enumerate())
    with SharedMemory(4096) as memory, pytest.raises(ValueError, match=message):
        PageFetcher(
            memory=memory,
            page_bytes=4096,
            layout=LAYOUT,
            secret=b"x",
            transport="disk",
            folder=folder and tmp_path / folder,
        )
    assert set(threading.enumerate()) == threads


def test_a_spool_that_cannot_work_is_refused(tmp_path):
    view = memoryview(np.zeros(8192, dtype=np.uint8))
    settings = {"folder": tmp_path, "view": view, "page_bytes": 4096, "replica_id": "a", "boot": 1}
    with pytest.raises(ValueError, match="is not a folder; make or mount it"):
        Spool(**{**settings, "folder": tmp_path / "nowhere"})
    with pytest.raises(ValueError, match=r"a spool of 8192 bytes is too small.*raise transfer\.folder_max_mb to 1"):
        Spool(**settings, limits=SpoolLimits(max_bytes=8192))
    (tmp_path / spool_name("a", 1)).mkdir()
    with pytest.raises(ValueError, match="cannot be written to"):
        Spool(**settings)
