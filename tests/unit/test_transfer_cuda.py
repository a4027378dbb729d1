"""Pages between pools in GPU memory, with a stand-in where CUDA begins; `tests/gpu` has the real one."""

from __future__ import annotations

import ctypes
import logging

import msgspec
import pytest
from fake_cuda import FakeCuda, GpuPool, Machine, view_of
from transfer_pools import LAYOUT, SECRET, WAIT_S, FakeClock, Gate, Receiver, ServedPool, closing
from transfer_schedules import run_schedules, unharmed
from transfer_world import PAGE, SLOTS, SOURCE_PAGES, World

from transfer.choice import ways_of
from transfer.cuda.door import CudaDoor, DoorAddress, read_address
from transfer.cuda.library import CudaDriver, CudaUnavailable
from transfer.cuda.memory import DeviceMemory
from transfer.fetcher import PageFetcher
from transfer.transport import TransferTimings

SOURCE, TARGET = [3, 4, 5, 40, 9, 8, 63], [10, 11, 12, 0, 50, 51, 33]


class GpuReceiver(Receiver):
    """A receiver whose pool is in GPU memory."""

    def __init__(self, machine: Machine, *, page_bytes: int = 4096, num_pages: int = 64, gpu: str = "GPU-0", **options):
        self.cuda = FakeCuda(machine, gpu=gpu)
        super().__init__(
            page_bytes=page_bytes, memory=DeviceMemory(self.cuda, page_bytes * num_pages), transport="cuda", **options
        )

    def page(self, page: int) -> bytes:
        return bytes(self.memory.read(page * self.page_bytes, self.page_bytes))


@pytest.fixture
def machine():
    return Machine()


@pytest.fixture
def pool(machine):
    return GpuPool(machine, boot=7)


@pytest.mark.parametrize("verified", [True, False])
def test_pages_arrive_where_they_were_wanted_and_nowhere_else(machine, pool, verified):
    with closing(GpuReceiver(machine)) as (receiver,):
        receiver.fetcher.attach(pool.address, pool.ticket)
        checksums = pool.checksums(SOURCE) if verified else []
        result = receiver.fetch(pool.address, SOURCE, TARGET, checksums=checksums)
        assert (result.ok, result.transport, result.error) == (True, "cuda", None)
        for page in range(64):
            expected = pool.page(SOURCE[TARGET.index(page)]) if page in TARGET else bytes(4096)
            assert receiver.page(page) == expected


def test_a_copy_longer_than_what_is_under_way_at_a_time(machine):
    pool = GpuPool(machine, boot=7, page_bytes=1 << 20, num_pages=20)
    with closing(GpuReceiver(machine, page_bytes=1 << 20, num_pages=20)) as (receiver,):
        receiver.fetcher.attach(pool.address, pool.ticket)
        pages = list(range(20))
        assert receiver.fetch(pool.address, pages[::-1], pages, checksums=pool.checksums(pages[::-1])).ok
        assert all(receiver.page(page) == pool.page(19 - page) for page in pages)


def test_wrong_pages_are_found(machine, pool):
    with closing(GpuReceiver(machine)) as (receiver,):
        receiver.fetcher.attach(pool.address, pool.ticket)
        sums = pool.checksums([1, 2, 3])
        result = receiver.fetch(pool.address, [1, 2, 3], [1, 2, 3], checksums=[sums[0], sums[1] ^ 1, sums[2]])
        assert result.error.startswith("cuda: page 2 arrived with checksum")
        assert receiver.fetch(pool.address, [1], [1], checksums=sums[:1]).ok


def test_a_detached_peer_is_unmapped_when_its_last_copy_has_ended(machine, pool):
    gate = Gate()
    with closing(GpuReceiver(machine, faults=gate)) as (receiver,):
        receiver.fetcher.attach(pool.address, pool.ticket)
        receiver.start(pool.address, SOURCE, TARGET)
        assert gate.reached.wait(WAIT_S)
        receiver.fetcher.detach(pool.address)
        assert receiver.cuda.mapped == [pool.memory.address]
        gate.open()
        receiver.wait()
        receiver.fetcher.close()
        assert receiver.cuda.mapped == []
        assert receiver.cuda.held == (1, 0, 0), "all but the pool is given back"


def test_pages_are_not_given_back_while_the_gpu_hangs(machine, pool, caplog):
    clock, gate, timings = FakeClock(), Gate(keys={"stuck"}), TransferTimings(piece_s=5, close_s=0.05)
    with closing(GpuReceiver(machine, clock=clock, timings=timings, faults=gate)) as (receiver,):
        receiver.fetcher.attach(pool.address, pool.ticket)
        assert receiver.fetch(pool.address, [1], [1]).ok
        machine.going.clear()
        receiver.start(pool.address, [2], [2], key="stuck")
        assert gate.reached.wait(WAIT_S)
        receiver.fetcher.cancel("stuck")
        gate.open()
        for _ in range(100):
            receiver.start(pool.address, [3], [3], key="next", deadline=clock() + 2)
            result = receiver.wait_turning(clock, seconds=1, key="next")
            if not result.error.startswith("its deadline passed"):
                break
        assert result.error == "cuda: the GPU has not ended a copy within 5 s"
        assert "stuck" not in receiver.results
        with pytest.raises(TimeoutError, match="1 fetches have not ended"):
            receiver.fetcher.close()
        assert receiver.page(2) == bytes(4096)
        machine.going.set()
        assert receiver.wait("stuck").error is None or receiver.wait("stuck").cancelled
    assert sum("has not ended a copy" in record.getMessage() for record in caplog.records) == 1


def test_a_copy_that_the_gpu_refuses_fails_when_what_it_took_has_landed(machine, pool):
    with closing(GpuReceiver(machine)) as (receiver,):
        receiver.fetcher.attach(pool.address, pool.ticket)
        receiver.cuda.failing_copies = 1
        result = receiver.fetch(pool.address, SOURCE, TARGET)
        assert result.error == "cuda: cuMemcpyAsync: out of memory (2)"
        assert receiver.fetch(pool.address, SOURCE, TARGET).ok


def test_a_broken_gpu_fails_every_copy(machine, pool):
    with closing(GpuReceiver(machine)) as (receiver,):
        receiver.fetcher.attach(pool.address, pool.ticket)
        assert receiver.fetch(pool.address, [1], [1]).ok
        receiver.cuda.broken = "cuEventQuery: an illegal memory access was encountered (700)"
        assert "illegal memory access" in receiver.fetch(pool.address, [2], [2]).error
        assert "illegal memory access" in receiver.fetch(pool.address, [3], [3]).error
        receiver.cuda.broken = ""


def test_memory_that_cannot_be_mapped_is_asked_for_again_later(machine, pool):
    clock = FakeClock()
    with closing(GpuReceiver(machine, clock=clock)) as (receiver,):
        handles, machine.handles = machine.handles, {}
        receiver.fetcher.attach(pool.address, pool.ticket)
        first = receiver.fetch(pool.address, [1], [1]).error
        assert first == "cuda: the peer's memory cannot be mapped: cuIpcOpenMemHandle_v2: invalid argument (1)"
        machine.handles = handles
        assert receiver.fetch(pool.address, [1], [1]).error == first
        clock.advance(3)
        assert receiver.fetch(pool.address, [1], [1]).ok


def test_a_hidden_gpu_is_named_with_the_remedy(machine):
    pool = GpuPool(machine, boot=7, gpu="GPU-1")
    with closing(GpuReceiver(machine)) as (receiver,):
        receiver.fetcher.attach(pool.address, pool.ticket)
        error = receiver.fetch(pool.address, [1], [1]).error
        assert "GPU-1 is hidden" in error
        assert "RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES=1" in error


def test_another_host_and_another_kind_of_pool_are_not_reached(machine, pool):
    elsewhere = msgspec.structs.replace(pool.ticket, host_id="elsewhere")
    with closing(GpuReceiver(machine), ServedPool(boot=8)) as (receiver, plain):
        receiver.fetcher.attach(pool.address, elsewhere)
        receiver.fetcher.attach(plain.address, plain.ticket)
        assert receiver.fetch(pool.address, [1], [1]).error == "replica replica-7 cannot be reached by cuda"
        assert receiver.fetch(plain.address, [1], [1]).error == "replica replica-8 cannot be reached by cuda"


@pytest.mark.parametrize("said", ["", "nonsense", "{}", '{"gpu": "GPU-0", "handle": "00"}', '{"gpu": 1, "handle": ""}'])
def test_a_door_whose_address_makes_no_sense_is_not_tried(pool, said):
    assert read_address(msgspec.structs.replace(pool.ticket, doors={"cuda": said})) is None


def test_a_doors_address_names_the_gpu_and_the_handle(machine, pool):
    address = read_address(pool.ticket)
    assert address == DoorAddress(gpu="GPU-0", handle=next(iter(machine.handles)).hex())


def test_memory_that_was_exported_stays_until_the_process_ends(machine):
    cuda = FakeCuda(machine)
    private, shared = DeviceMemory(cuda, 4096), DeviceMemory(cuda, 4096)
    CudaDoor(shared).close(timeout_s=1)
    for memory in (private, shared):
        memory.close()
        memory.close()
    assert list(machine.memories) == [shared.address]
    with pytest.raises(ValueError, match="device memory of 0 bytes"):
        DeviceMemory(cuda, 0)
    for start, nbytes in ((4095, 2), (-1, 1), (0, 0)):
        with pytest.raises(ValueError, match=r"of a device memory of 4096 bytes"):
            shared.read(start, nbytes)


def test_each_kind_of_pool_has_its_ways(machine):
    assert ways_of("auto", on_gpu=True) == ways_of("cuda", on_gpu=True) == ("cuda",)
    with pytest.raises(ValueError, match=r"'cuda' cannot fill a KV pool in the host's memory; set transport to .*auto"):
        ways_of("cuda")
    with pytest.raises(ValueError, match="in GPU memory; set transport to one of auto, cuda"):
        PageFetcher(
            memory=DeviceMemory(FakeCuda(machine), 4096), page_bytes=4096, layout=LAYOUT, secret=SECRET, transport="tcp"
        )


def test_a_machine_without_a_driver_is_told_so():
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        with pytest.raises(CudaUnavailable, match=r"needs NVIDIA's driver, .*; set transport to auto"):
            CudaDriver()
    else:
        pytest.skip("there is a driver here")


class GpuWorld(World):
    """Our pool is in GPU memory."""

    def __init__(self, machine, pools):
        self.cuda = FakeCuda(machine)
        super().__init__(pools, transport="cuda")

    def make_memory(self, nbytes):
        memory = DeviceMemory(self.cuda, nbytes)
        return memory, view_of(memory)

    def close(self):
        super().close()
        assert (self.cuda.mapped, self.cuda.held) == ([], (0, 0, 0))


@pytest.mark.filterwarnings("error")  # also of a thread that died
def test_random_schedules(machine, caplog, monkeypatch):
    monkeypatch.setattr("transfer.cuda.stream._VERIFIED_BLOCK_BYTES", 3 * PAGE)
    monkeypatch.setattr("transfer.cuda.stream._PLAIN_BLOCK_BYTES", 2 * PAGE)
    pools = {slot: GpuPool(machine, boot=slot, page_bytes=PAGE, num_pages=SOURCE_PAGES) for slot in SLOTS}
    with unharmed(caplog, quiet=logging.WARNING):
        run_schedules(lambda choose: GpuWorld(machine, pools), 500)
    assert all(pool.is_unchanged() for pool in pools.values())


def test_an_answer_before_the_last_byte_is_found(machine, monkeypatch):
    def hasty(self, under_way):
        block = under_way.popleft()
        self._free.append(block.slot)
        return block

    monkeypatch.setattr("transfer.cuda.stream.PageStream.landed", hasty)
    pools = {slot: GpuPool(machine, boot=slot, page_bytes=PAGE, num_pages=SOURCE_PAGES) for slot in SLOTS}
    with pytest.raises(AssertionError, match=r"called right|while nobody's|ends with work to do"):
        run_schedules(lambda choose: GpuWorld(machine, pools), 100)
