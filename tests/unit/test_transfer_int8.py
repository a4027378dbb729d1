"""KV in 8 bits: how near it comes back, that it is verified as strictly as any other, and who gets it at all."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_transfer_grains import Asker
from transfer_pools import SECRET, Breaker, Receiver, closing

from protocol.handshake import PoolShape
from protocol.rooms import PeerAddress
from transfer.checksum import page_checksums
from transfer.faults import CopySite
from transfer.grains import PoolGrains
from transfer.int8_codec import Int8Codec, coded_bytes
from transfer.layout import Grid, cut_between
from transfer.memory import SharedMemory
from transfer.server import PageServer
from transfer.wire import Want

# ---- the codec ------------------------------------------------------------------------------------------------

GRID = Grid(layers=2, kv_heads=3, page_size=8, row_bytes=64, tokens=4, first_head=1, heads=2)
BLOCKS = 2 * 2 * 2
EXTREMES = [0.0, -0.0, np.inf, -np.inf, np.nan, 1e-45, 1e-38, 3e38, -3e38, 1.0, -127.0, 0.5]
numbers = st.one_of(st.sampled_from(EXTREMES), st.floats(-10, 10, width=32))


def packed(values: np.ndarray, dtype: str) -> np.ndarray:
    """float32 as it is stored, uint8; bfloat16 by cutting off, so that `floats` gives back what was stored."""
    bits = values.astype(np.float32).view(np.uint32)
    return (bits >> 16).astype(np.uint16).view(np.uint8) if dtype == "bfloat16" else bits.view(np.uint8).copy()


def floats(stored: np.ndarray, dtype: str) -> np.ndarray:
    if dtype == "float32":
        return stored.view(np.float32)
    return (stored.view(np.uint16).astype(np.uint32) << 16).view(np.float32)


def there_and_back(codec: Int8Codec, stored: np.ndarray, grid: Grid = GRID) -> tuple[np.ndarray, np.ndarray]:
    coded, back = np.empty(coded_bytes(grid, codec.dtype), dtype=np.uint8), np.empty_like(stored)
    codec.encode(grid, stored, coded)
    codec.decode(grid, coded, back)
    return coded, back


def bounds(values: np.ndarray, dtype: str) -> np.ndarray:
    """How far each number may be from `values` `[blocks, numbers]`, which are finite."""
    most = np.abs(values).max(axis=1, keepdims=True).astype(np.float64)
    return most / 254 * 1.0001 + (np.abs(values) + most / 254) / 256 * (dtype == "bfloat16") + 4e-37


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(["bfloat16", "float32"]), st.lists(numbers, min_size=1, max_size=80), st.integers(0, 2**32 - 1))
def test_compiled_and_plain_code_agree_and_keep_the_bound(dtype, some, seed):
    count = GRID.grain_bytes // (2 if dtype == "bfloat16" else 4)
    random = np.random.default_rng(seed)
    values = random.choice(np.asarray(some, dtype=np.float32), count)
    stored = packed(values, dtype)
    native, plain = Int8Codec(dtype), Int8Codec(dtype, native=False)
    (coded, back), (same_coded, same_back) = there_and_back(native, stored), there_and_back(plain, stored)
    assert np.array_equal(coded, same_coded)
    assert np.array_equal(back, same_back)
    before, after = floats(stored, dtype).reshape(BLOCKS, -1), floats(back, dtype).reshape(BLOCKS, -1)
    finite = np.isfinite(before)
    assert np.array_equal(np.isnan(after), ~finite)
    assert (np.abs(np.where(finite, after - before, 0)) <= bounds(np.where(finite, before, 0), dtype)).all()
    assert not after[before == 0].any()


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_the_largest_numbers_stay_numbers(dtype, native):
    count = GRID.grain_bytes // (2 if dtype == "bfloat16" else 4)
    largest = np.float32(np.finfo(np.float32).max if dtype == "float32" else 3.3895314e38)
    values = largest * (1 - np.arange(count, dtype=np.float32) // (count // BLOCKS) * np.float32(1e-7))
    values[1::2] *= -1
    stored = packed(values, dtype)
    _, back = there_and_back(Int8Codec(dtype, native=native), stored)
    before, after = (floats(each, dtype).astype(np.float64) for each in (stored, back))
    assert np.isfinite(after).all()
    assert (np.abs(after - before) <= np.abs(before) / 100).all()


def test_the_compiled_code_is_there():
    assert Int8Codec("bfloat16").is_native


def test_half_the_bytes_and_a_little():
    grid = Grid(layers=30, kv_heads=3, page_size=16, row_bytes=128, tokens=16, first_head=0, heads=3)
    assert coded_bytes(grid, "bfloat16") / grid.grain_bytes < 0.503


def test_types_without_an_encoding_are_refused():
    with pytest.raises(ValueError, match=r"stored as float16, which cannot move in 8 bits.*set wire_dtype: auto"):
        Int8Codec("float16")


# ---- on the way -----------------------------------------------------------------------------------------------

SHAPE = PoolShape(model="m", dtype="bfloat16", layers=4, kv_heads=4, page_size=32, head_dim=32, total_kv_heads=4)
SLICE = msgspec.structs.replace(SHAPE, kv_heads=2, page_size=16, tp_rank=1, tp_size=2)
PAGES = 40


def page_bytes(shape: PoolShape) -> int:
    return shape.layers * shape.kv_heads * 2 * shape.page_size * shape.head_dim * 2


class Int8Peer:
    """A peer with numbers in bfloat16, in this process."""

    def __init__(self, *, codec: Int8Codec | None) -> None:
        self.memory = SharedMemory(PAGES * page_bytes(SHAPE))
        values = np.random.default_rng(1).standard_normal(self.memory.nbytes // 2)
        self.bytes = np.frombuffer(self.memory.view, dtype=np.uint8)
        self.bytes[:] = packed(values, "bfloat16")
        self.server = PageServer(
            memory=self.memory,
            page_bytes=page_bytes(SHAPE),
            num_pages=PAGES,
            layout=str(SHAPE),
            shape=SHAPE,
            codec=codec,
            host="127.0.0.1",
            boot=7,
            secret=SECRET,
        )
        self.address = PeerAddress("peer", 7, "127.0.0.1", 1)
        self.ticket = self.server.ticket()

    def checksums(self, pages) -> list[int]:
        return page_checksums(self.memory.view, page_bytes(SHAPE), list(pages))

    def close(self) -> None:
        self.server.close()
        del self.bytes
        self.memory.close()


class Meter:
    """Faults that count the bytes that came, and do no harm."""

    def __init__(self) -> None:
        self.bytes = 0

    def before_copy(self, site: CopySite) -> None:
        pass

    def after_copy(self, site: CopySite, landed: memoryview) -> None:
        self.bytes += landed.nbytes


def receiver(shape: PoolShape = SHAPE, *, codec: bool = True, **options) -> Receiver:
    return Receiver(
        page_bytes=page_bytes(shape),
        num_pages=2 * PAGES,
        layout=str(shape),
        shape=shape,
        codec=Int8Codec("bfloat16") if codec else None,
        **{"transport": "tcp", **options},
    )


@pytest.fixture
def peer():
    with closing(Int8Peer(codec=Int8Codec("bfloat16"))) as (peer,):
        yield peer


def take(taker: Receiver, peer: Int8Peer, source, target, **options):
    taker.fetcher.attach(peer.address, peer.ticket)
    return taker.fetch(peer.address, list(source), list(target), **options)


def page_values(memory: np.ndarray, page: int) -> np.ndarray:
    """float32 `[layer and head and K or V, numbers]`."""
    size = page_bytes(SHAPE)
    return floats(memory[page * size : (page + 1) * size], "bfloat16").reshape(4 * 4 * 2, -1)


def nothing_landed(taker: Receiver) -> bool:
    return not np.frombuffer(taker.memory.view, dtype=np.uint8).any()


def test_whole_pages_come_within_the_bound_for_half_the_bytes(peer):
    meter = Meter()
    order = np.random.default_rng(2).permutation(PAGES).tolist()
    with closing(receiver(faults=meter)) as (taker,):
        result = take(taker, peer, range(PAGES), order, checksums=peer.checksums(range(PAGES)))
        assert result.ok
        assert (result.transport, result.bytes) == ("tcp", PAGES * page_bytes(SHAPE))
        memory = np.frombuffer(taker.memory.view, dtype=np.uint8)
        for source, target in enumerate(order):
            before, after = page_values(peer.bytes, source), page_values(memory, target)
            assert np.abs(after - before).max() > 0
            assert (np.abs(after - before) <= bounds(before, "bfloat16")).all()
        assert meter.bytes < 0.51 * result.bytes
        del memory


def test_parts_of_pages_come_in_8_bits_too(peer):
    cut = cut_between(SHAPE, page_bytes(SHAPE), SLICE, page_bytes(SLICE))
    assert cut is not None
    source, target = [7, 0, 33], [5, 6, 1]
    sums = PoolGrains(peer.bytes, cut.source).checksums(source)
    with closing(receiver(SLICE)) as (taker,):
        assert take(taker, peer, source, target, checksums=sums, grain_tokens=16).ok
        theirs, ours = np.empty((2, 3 * cut.source.grain_bytes), dtype=np.uint8)
        PoolGrains(peer.bytes, cut.source).gather(source, theirs)
        PoolGrains(np.frombuffer(taker.memory.view, dtype=np.uint8), cut.target).gather(target, ours)
        before, after = (floats(part, "bfloat16").reshape(3 * 4 * 2 * 2, -1) for part in (theirs, ours))
        assert (np.abs(after - before) <= bounds(before, "bfloat16")).all()


def test_what_was_changed_on_the_way_never_lands(peer):
    with closing(receiver(faults=Breaker(corrupting={"tcp"}))) as (taker,):
        result = take(taker, peer, [5], [6])
        assert not result.ok
        assert "grain 5 arrived with a wrong seal" in result.error
        assert nothing_landed(taker)


def test_what_is_not_as_offered_is_not_sent(peer):
    sums = peer.checksums([5])
    with closing(receiver()) as (taker,):
        assert not take(taker, peer, [5], [6], checksums=[sums[0] ^ 1]).ok
        peer.bytes[6 * page_bytes(SHAPE) - 1] ^= 1
        assert not take(taker, peer, [5], [6], checksums=sums).ok
        assert nothing_landed(taker)
        assert take(taker, peer, [5], [6], checksums=peer.checksums([5])).ok


@pytest.mark.parametrize("transport", ["auto", "shm"])
def test_within_a_host_kv_moves_as_stored(peer, transport):
    with closing(receiver(transport=transport)) as (taker,):
        assert take(taker, peer, [5], [6], checksums=peer.checksums([5])).transport == "shm"
        memory = np.frombuffer(taker.memory.view, dtype=np.uint8)
        assert np.array_equal(page_values(memory, 6), page_values(peer.bytes, 5))
        del memory


def test_when_shared_memory_fails_it_comes_in_8_bits(peer):
    with closing(receiver(transport="auto", faults=Breaker(broken={"shm"}))) as (taker,):
        assert take(taker, peer, [5], [6], checksums=peer.checksums([5])).transport == "tcp"
        memory = np.frombuffer(taker.memory.view, dtype=np.uint8)
        assert not np.array_equal(page_values(memory, 6), page_values(peer.bytes, 5))
        del memory


@pytest.mark.parametrize(("gives", "takes"), [(False, True), (True, False), (False, False)])
def test_it_takes_two(gives, takes):
    """Where one side has it not configured, KV moves as stored."""
    peer = Int8Peer(codec=Int8Codec("bfloat16") if gives else None)
    with closing(peer, receiver(codec=takes)) as (_, taker):
        assert take(taker, peer, [5], [6], checksums=peer.checksums([5])).ok
        memory = np.frombuffer(taker.memory.view, dtype=np.uint8)
        assert np.array_equal(page_values(memory, 6), page_values(peer.bytes, 5))
        del memory


@pytest.mark.parametrize("runs", [[(0, 2**31)], [(0, 0)], [(0, 0), (1, 0)]])
def test_requests_for_more_or_less_than_the_pool_has_are_not_even_read(peer, runs):
    """Each page asked for costs the giver memory for its checksum, before it can look at the request's tag."""
    with (
        closing(Asker(peer, want=Want.INT8)) as (asker,),
        pytest.raises((AssertionError, ConnectionError), match=r"closed|reset"),
    ):
        asker.ask(1, (32, 0, 4), runs)


def test_a_peer_that_promises_what_it_does_not_serve_fails_the_copy():
    peer = Int8Peer(codec=None)
    promising = msgspec.structs.replace(peer.ticket, int8=True)
    with closing(peer, receiver()) as (_, taker):
        taker.fetcher.attach(peer.address, promising)
        assert not taker.fetch(peer.address, [5], [6]).ok
        assert nothing_landed(taker)
