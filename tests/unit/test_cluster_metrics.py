"""What a replica's report and a router's metrics become on their way to Prometheus."""

from __future__ import annotations

from typing import Any

from cluster.metrics_export import Reading, readings_of
from cluster.replica_readings import ReplicaReadings
from cluster.worker_state import grammar_state
from engine.grammar.cache import GrammarCache, Wish
from engine.grammar.constraint import Constraint
from engine.grammar.masks import MaskedRow, MaskFiller
from router.metrics import Counter, Gauge, Histogram
from tests.unit.grammars import COMPILER, VOCAB, regex


class Reporter:
    """A report that stays as it is."""

    def __init__(self, latest: dict[str, Any], observations: list[tuple[str, float]]) -> None:
        self.latest = latest
        self._observations = observations

    def take_observations(self) -> list[tuple[str, float]]:
        taken, self._observations = self._observations, []
        return taken


def find(readings: list[Reading], name: str, **labels: str) -> Reading:
    (found,) = (each for each in readings if each.name == name and labels.items() <= each.labels.items())
    return found


def test_a_counter_is_read_by_label_and_a_gauge_when_asked() -> None:
    counter = Counter("requests", "how many", "status")
    counter.add(2, "200")
    counter.add(1, "429")
    readings = list(readings_of([counter, Gauge("depth", "how deep", lambda: 7.0)]))
    assert find(readings, "requests", status="200").value == 2
    assert find(readings, "requests", status="429").grows
    assert find(readings, "depth").value == 7.0


def test_a_histogram_becomes_cumulative_buckets() -> None:
    histogram = Histogram("ttft", "to first token", bounds=(0.1, 1.0))
    for value in (0.05, 0.5, 0.6, 30.0):
        histogram.observe(value)
    readings = list(readings_of([histogram]))
    buckets = {each.labels["le"]: each.value for each in readings if each.name == "ttft_bucket"}
    assert buckets == {"0.1": 1, "1": 3, "+Inf": 4}
    assert find(readings, "ttft_count").value == 4
    assert find(readings, "ttft_sum").value == 0.05 + 0.5 + 0.6 + 30.0


def test_a_replica_reports_load_rooms_counters_and_stages() -> None:
    latest = {
        "load": {"free_pages": 10, "draining": False},
        "decode": {"rooms": {"running": 3}, "counters": {"admitted": 5, "failures": {"peer_lost": 2}}},
    }
    reporter = Reporter(latest, [("transfer", 0.004), ("transfer", 0.2)])
    replica = ReplicaReadings(reporter)
    readings = list(replica.collect())
    assert find(readings, "replica_free_pages").value == 10.0
    assert find(readings, "replica_draining").value == 0.0
    assert find(readings, "replica_rooms", half="decode", state="running").value == 3.0
    assert find(readings, "replica_admitted", half="decode").value == 5.0
    assert find(readings, "replica_failures", half="decode", kind="peer_lost").value == 2.0
    assert find(readings, "replica_stage_seconds_count", stage="transfer").value == 2

    reporter.latest = latest | {"decode": {"rooms": {}, "counters": {}}}
    readings = list(replica.collect())
    assert find(readings, "replica_rooms", half="decode", state="running").value == 0.0, "not stuck at its last value"
    assert find(readings, "replica_stage_seconds_count", stage="transfer").value == 2, "observations add up"


def test_what_grammars_cost_is_told_by_names_that_a_dashboard_can_keep() -> None:
    cache = GrammarCache(COMPILER)
    masks = MaskFiller(vocab_size=VOCAB)
    known = cache.request(regex("[0-9]+"), (), lambda outcome: None)
    cache.close(timeout_s=60.0)
    assert isinstance(known, Wish)
    constraint = cache.request(regex("[0-9]+"), (), lambda outcome: None)
    assert isinstance(constraint, Constraint)
    masks.begin([MaskedRow(0, constraint)])
    masks.finish()
    masks.close()
    readings = list(ReplicaReadings(Reporter({"grammars": grammar_state(cache, masks)}, [])).collect())
    for name in ("compiles", "hits", "masks"):
        reading = find(readings, f"replica_grammar_{name}")
        assert (reading.value, reading.grows) == (1.0, True)
    assert find(readings, "replica_grammar_compile_seconds").value > 0
    assert find(readings, "replica_grammar_mask_seconds").value > 0
    assert find(readings, "replica_grammar_refused").value == 0
    held = find(readings, "replica_grammar_bytes")
    assert held.value > 0
    assert not held.grows
    assert find(readings, "replica_grammar_waiting").value == 0


def test_transfers_are_told_by_transport_for_ever_and_by_peer_while_it_is_there() -> None:
    traffic = {"copies": 4, "failures": 1, "bytes": 4096, "seconds": 0.5, "queue_seconds": 0.25}
    latest = {
        "transfers": [{"transport": "shm", **traffic}],
        "peer_transfers": [{"transport": "shm", "peer": "prefill-7", **traffic}],
    }
    reporter = Reporter(latest, [])
    replica = ReplicaReadings(reporter)
    readings = list(replica.collect())
    total = find(readings, "replica_transfer_bytes", transport="shm")
    assert (total.value, total.grows, total.labels) == (4096.0, True, {"transport": "shm"})
    assert find(readings, "replica_transfer_queue_seconds").value == 0.25
    peer = find(readings, "replica_peer_transfers", transport="shm", peer="prefill-7")
    assert (peer.value, peer.grows) == (4.0, False), "a counter would stay in Ray for ever"

    reporter.latest = latest | {"peer_transfers": []}
    names = [each.name for each in replica.collect()]
    assert "replica_transfers" in names
    assert not any(name.startswith("replica_peer_") for name in names)
