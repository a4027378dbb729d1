"""Generation on one engine gives the toy model's own answer, however it is batched, chunked, cached or preempted."""

from __future__ import annotations

import random

import pytest

from engine.kv_spec import KVPool
from engine.limits import RequestTooLong
from engine.request import Request, RequestStatus
from protocol.sampling import FinishReason, SamplingParams
from tests.unit.engine_driver import assert_idle, greedy, request, run, step, tokens_of
from tests.unit.toy_model import GreedySampler, ToyLimits, ToyModel, toy_engine, toy_generate, toy_next


def _prompt(length: int, seed: int = 0) -> list[int]:
    return [random.Random(f"{seed}/{place}").randrange(97) for place in range(length)]


@pytest.mark.parametrize("length", [1, 2, 3, 4, 5, 8, 15, 16, 17, 31, 32, 33, 64, 100])
@pytest.mark.parametrize("chunk", [4, 7, 32, 128])
def test_one_prompt_of_any_length_in_any_chunks(length: int, chunk: int) -> None:
    engine, model = toy_engine(chunked_prefill_size=chunk)
    engine.add(request("r", _prompt(length), 9))
    outputs = run(engine)["r"]
    assert tokens_of(outputs) == toy_generate(_prompt(length), 9)
    assert [output.position for output in outputs] == list(range(9))
    assert [output.finish for output in outputs] == [None] * 8 + [FinishReason.LENGTH]
    assert model.computed_tokens == length + 8
    assert_idle(engine)


@pytest.mark.parametrize("cache", [True, False])
def test_a_batch_gives_what_each_gives_alone(cache: bool) -> None:
    engine, model = toy_engine(pages=256, enable_prefix_cache=cache)
    prompts = {f"r{i}": _prompt(1 + 7 * i, i) for i in range(14)}
    for key, prompt in prompts.items():
        engine.add(request(key, prompt, 5 + len(prompt) % 11))
    outputs = run(engine)
    for key, prompt in prompts.items():
        assert tokens_of(outputs[key]) == toy_generate(prompt, 5 + len(prompt) % 11)
    assert model.widest_batch > 4, "decoding and prompts share batches"
    assert_idle(engine)


def test_a_cached_prefix_is_not_computed_again() -> None:
    engine, model = toy_engine()
    prompt = _prompt(22)
    engine.add(request("first", prompt, 4))
    assert run(engine)["first"][0].cached_tokens == 0
    before = model.computed_tokens
    engine.add(request("again", prompt, 4))
    engine.add(request("longer", [*prompt, *toy_generate(prompt, 4), 5, 6], 4))
    outputs = run(engine)
    assert tokens_of(outputs["again"]) == toy_generate(prompt, 4)
    assert outputs["again"][0].cached_tokens == 20
    assert outputs["longer"][0].cached_tokens == 24, "generated tokens are found too, but for the last, never computed"
    assert tokens_of(outputs["longer"]) == toy_generate([*prompt, *toy_generate(prompt, 4), 5, 6], 4)
    assert model.computed_tokens - before == 2 + 3 + 4 + 3
    assert_idle(engine)


def test_the_last_prompt_token_is_always_computed() -> None:
    engine, model = toy_engine()
    prompt = _prompt(16)
    for key in ("first", "again"):
        engine.add(request(key, prompt, 1))
        assert tokens_of(run(engine)[key]) == [toy_next(prompt)]
    assert engine.num_prefix_tokens(prompt) == 16
    assert model.computed_tokens == 16 + 4


def test_running_requests_share_their_prompt() -> None:
    engine, _ = toy_engine(pages=16)
    prompt = _prompt(32)
    engine.add(request("first", prompt, 6))
    step(engine)
    assert engine.num_prefix_tokens(prompt) == 32, "a computed prompt can be found while its request still runs"
    engine.add(request("second", prompt, 6))
    outputs = run(engine)
    assert outputs["second"][0].cached_tokens == 28
    assert tokens_of(outputs["second"]) == toy_generate(prompt, 6)
    assert_idle(engine)


def test_equal_prompts_computed_together_end_up_on_the_same_pages() -> None:
    engine, _ = toy_engine(chunked_prefill_size=128)
    prompt = _prompt(32)
    for key in ("a", "b", "c"):
        engine.add(request(key, prompt, 6))
    step(engine)
    report = engine.audit()
    assert report.cached == 8
    assert sum(map(len, report.owners.values())) == 0
    outputs = run(engine)
    assert all(tokens_of(outputs[key]) == toy_generate(prompt, 6)[1:] for key in ("a", "b", "c"))
    assert_idle(engine)


def test_namespaces_do_not_share_prefixes() -> None:
    engine, _ = toy_engine()
    prompt = _prompt(20)
    for name in ("", "tenant"):
        engine.add(request(name, prompt, 2, namespace=name))
        assert run(engine)[name][0].cached_tokens == 0
    assert engine.num_prefix_tokens(prompt, namespace="other") == 0


def test_preempted_requests_lose_nothing() -> None:
    engine, model = toy_engine(pages=20, decode_headroom_tokens=0)
    prompts = {f"r{i}": _prompt(9, i) for i in range(6)}
    for key, prompt in prompts.items():
        engine.add(request(key, prompt, 40))
    outputs = run(engine)
    for key, prompt in prompts.items():
        assert tokens_of(outputs[key]) == toy_generate(prompt, 40)
        assert sum(output.cached_tokens is not None for output in outputs[key]) == 1
    assert model.computed_tokens > sum(9 + 39 for _ in prompts), "pages ran out, so something was computed twice"
    assert_idle(engine)


def test_what_a_preempted_request_left_in_the_cache_is_no_prefix_hit() -> None:
    engine, _ = toy_engine(pages=12, decode_headroom_tokens=0, chunked_prefill_size=16)
    engine.add(request("old", _prompt(16, 1), 20))
    engine.add(request("young", _prompt(18, 2), 8))
    outputs = run(engine)
    assert engine.counters.preemptions > 0
    assert [outputs[key][0].cached_tokens for key in ("old", "young")] == [0, 0]
    assert (engine.counters.prompt_tokens, engine.counters.cached_tokens) == (34, 0)
    assert engine.counters.generated_tokens == 28
    engine.add(request("again", _prompt(16, 1), 2))
    assert run(engine)["again"][0].cached_tokens == engine.counters.cached_tokens > 0


def test_logged_tokens_are_gone_on_from() -> None:
    engine, _ = toy_engine()
    prompt = _prompt(10)
    whole = toy_generate(prompt, 12)
    engine.add(request("r", prompt, 12, logged=whole[:5]))
    outputs = run(engine)["r"]
    assert tokens_of(outputs) == whole[5:]
    assert outputs[0].position == 5
    assert outputs[-1].finish is FinishReason.LENGTH


def test_end_of_sequence_ends_and_can_be_ignored() -> None:
    prompt = _prompt(10)
    whole = toy_generate(prompt, 12)
    eos = whole[4]
    engine, _ = toy_engine(limits=ToyLimits(eos_token_ids=(eos,)))
    engine.add(request("ends", prompt, 12))
    engine.add(Request(key="goes on", prompt=prompt, sampling=greedy(12, ignore_eos=True)))
    engine.add(Request(key="stops", prompt=prompt, sampling=greedy(12, ignore_eos=True, stop_token_ids=(whole[2],))))
    outputs = run(engine)
    assert tokens_of(outputs["ends"]) == whole[: whole.index(eos) + 1]
    assert (outputs["ends"][-1].finish, outputs["ends"][-1].matched) == (FinishReason.STOP_TOKEN, eos)
    assert tokens_of(outputs["goes on"]) == whole
    assert tokens_of(outputs["stops"]) == whole[: whole.index(whole[2]) + 1]
    assert outputs["stops"][-1].matched == whole[2]


def test_a_sequence_is_clipped_at_the_context() -> None:
    engine, _ = toy_engine(limits=ToyLimits(max_position_embeddings=20))
    engine.add(request("r", _prompt(12), 100))
    outputs = run(engine)["r"]
    assert tokens_of(outputs) == toy_generate(_prompt(12), 8)
    assert outputs[-1].finish is FinishReason.LENGTH


def test_a_sequence_may_fill_the_whole_pool() -> None:
    engine, _ = toy_engine(pages=4, page_size=4)
    engine.add(request("r", _prompt(3), 100))
    assert tokens_of(run(engine)["r"]) == toy_generate(_prompt(3), 13)
    assert_idle(engine)


@pytest.mark.parametrize(("pages", "positions", "longest"), [(4, 4096, 15), (64, 12, 11)])
def test_a_prompt_that_never_fits_is_refused_with_both_lengths(pages: int, positions: int, longest: int) -> None:
    engine, _ = toy_engine(pages=pages, limits=ToyLimits(max_position_embeddings=positions))
    with pytest.raises(RequestTooLong, match=f"{longest + 1} tokens.* at most {longest} tokens") as caught:
        engine.add(request("r", _prompt(longest + 1), 4))
    assert (caught.value.num_tokens, caught.value.max_tokens) == (longest + 1, longest)
    engine.add(request("r", _prompt(longest), 4))
    assert len(run(engine)["r"]) == 1


def test_what_cannot_be_served_is_refused_by_name() -> None:
    engine, _ = toy_engine()
    with pytest.raises(ValueError, match="prompt is empty"):
        request("r", [], 4)
    with pytest.raises(ValueError, match="no tokenizer"):
        engine.add(Request(key="r", prompt=[1], sampling=greedy(4, stop=("x",))))
    with pytest.raises(ValueError, match="nothing left to generate"):
        engine.add(request("r", [1], 2, logged=[1, 2]))
    engine.add(request("r", [1], 2))
    with pytest.raises(ValueError, match="already"):
        engine.add(request("r", [1], 2))
    run(engine)
    assert_idle(engine)


def test_a_failing_forward_ends_only_the_requests_of_its_batch() -> None:
    engine, model = toy_engine(max_running_requests=2)
    for key in ("a", "b", "c"):
        engine.add(request(key, _prompt(9, ord(key)), 6))
    step(engine)
    model.fail_at = {model.passes + 1}
    output = step(engine)
    assert {(each.request.key, each.request.status) for each in output.failed} == {
        ("a", RequestStatus.FINISHED),
        ("b", RequestStatus.FINISHED),
    }
    assert all("told to fail" in each.why and not each.by_grammar for each in output.failed)
    assert tokens_of(run(engine)["c"]) == toy_generate(_prompt(9, ord("c")), 6)
    engine.add(request("a", _prompt(9, ord("a")), 6))
    assert tokens_of(run(engine)["a"]) == toy_generate(_prompt(9, ord("a")), 6), "no half-written page was kept"
    assert_idle(engine)


def test_a_pool_of_another_size_is_refused() -> None:
    engine, model = toy_engine(pages=8)
    pool = KVPool(spec=model.kv_spec(4), num_pages=9)
    with pytest.raises(ValueError, match=r"9 pages of 4 tokens.*8 pages of 4"):
        type(engine)(model=ToyModel(), pool=pool, config=engine.config, sampler=GreedySampler())


def test_flushing_the_cache_frees_what_nobody_holds() -> None:
    engine, _ = toy_engine()
    engine.add(request("r", _prompt(16), 3))
    run(engine)
    assert engine.flush_cache() == 4
    assert engine.audit().free == engine.config.num_pages
    assert engine.num_prefix_tokens(_prompt(16)) == 0


def test_load_counts_what_is_not_computed_yet() -> None:
    engine, _ = toy_engine(max_running_requests=1, chunked_prefill_size=8)
    engine.add(request("a", _prompt(20), 3))
    engine.add(request("b", _prompt(5), 3))
    assert engine.load().waiting_tokens == 25
    step(engine)
    load = engine.load()
    assert (load.waiting_requests, load.waiting_tokens, load.running_requests) == (1, 12 + 5, 1)
    assert load.total_pages == 64
    run(engine)


def test_sampling_parameters_default_to_something_the_engine_runs() -> None:
    engine, _ = toy_engine()
    engine.add(Request(key="r", prompt=[1, 2, 3], sampling=SamplingParams(max_tokens=3)))
    assert len(run(engine)["r"]) == 3
