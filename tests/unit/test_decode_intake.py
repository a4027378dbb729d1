"""What decode takes of offers, when its pages and prefill's differ in size."""

from __future__ import annotations

import math

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from cluster.offer_checksums import OfferChecksums
from decode.intake import PageIntake
from protocol.handshake import PoolShape
from protocol.rooms import Offer, Room
from transfer.grains import PoolGrains
from transfer.layout import whole_grid

ROOM = Room("request", 0)
sizes = st.sampled_from([1, 2, 3, 4, 6, 8])


@given(st.integers(1, 40), sizes, sizes, st.data())
def test_every_token_comes_once_from_its_place(num_tokens, ours, theirs, data):
    grain = math.gcd(ours, theirs)
    intake = PageIntake(num_tokens, page_size=ours, source_page_size=theirs)
    assert intake.grain_tokens == (0 if ours == theirs else grain)
    source_pages = data.draw(st.permutations(range(50, 50 + intake.num_pages)))
    target_pages = data.draw(st.permutations(range(-(-num_tokens // ours))))
    held = data.draw(st.integers(0, (num_tokens - 1) // ours))
    intake.begin(held)
    assert intake.held_pages == held * ours // theirs
    found, pages, first = {}, 0, intake.held_pages
    while first < intake.num_pages:
        count = data.draw(st.integers(1, intake.num_pages - first))
        per_page = theirs // grain
        sums = [page * 100 + part for page in source_pages[first : first + count] for part in range(per_page)]
        offer = Offer(ROOM, first, source_pages[first : first + count], sums)
        assert not intake.misfit(offer)
        intake.note(offer)
        taken = intake.take_offered()
        for index, source, checksum in taken:
            assert checksum == source // per_page * 100 + source % per_page
            for token in range(grain):
                there = divmod(source * grain + token, theirs)
                here = divmod(intake.target(index, target_pages) * grain + token, ours)
                assert here not in found
                found[here] = there
        assert not intake.take_offered()
        assert not (taken and intake.is_complete)
        intake.landed(index for index, _, _ in taken)
        pages += intake.count_pages(index for index, _, _ in taken)
        first += count
    assert intake.is_complete
    assert pages == -(-num_tokens // ours) - held
    for token in range(held * ours, num_tokens):
        here = (target_pages[token // ours], token % ours)
        assert found[here] == (source_pages[token // theirs], token % theirs)


def test_offers_that_do_not_fit_are_named():
    intake = PageIntake(100, page_size=16, source_page_size=64)
    assert intake.misfit(Offer(ROOM, 1, [5, 6], [])) == "pages 1 to 3 were offered of a prompt of 2 pages"
    assert intake.misfit(Offer(ROOM, 0, [5], [1])) == "an offer of 1 pages came with 1 checksums"
    assert not intake.misfit(Offer(ROOM, 0, [5], [1, 2, 3, 4]))
    assert not intake.misfit(Offer(ROOM, 0, [5], []))


SHAPE = PoolShape(model="m", dtype="float32", layers=2, kv_heads=3, page_size=8, head_dim=4, total_kv_heads=3)
PAGE_BYTES = 2 * 3 * 2 * 8 * 4 * 4


def offered(pages, grain, *, enabled=True):
    memory = np.random.default_rng(3).integers(0, 256, 5 * PAGE_BYTES, dtype=np.uint8)
    checksums = OfferChecksums(memory.data, SHAPE, page_bytes=PAGE_BYTES, spools=[], enabled=enabled)
    return checksums(pages, grain), memory


def test_what_is_offered_is_hashed_as_it_is_taken():
    sums, memory = offered([4, 1], 2)
    assert sums == PoolGrains(memory, whole_grid(SHAPE, page_bytes=PAGE_BYTES, tokens=2)).checksums(
        [16, 17, 18, 19, 4, 5, 6, 7]
    )
    whole, _ = offered([4, 1], 0)
    assert len(whole) == 2
    assert offered([4, 1], 3)[0] == whole, "what divides no page is not hashed; decode refuses such an offer"
    assert offered([4, 1], 2, enabled=False)[0] == [0] * 8
    assert offered([4, 1], 0, enabled=False)[0] == [0] * 2
