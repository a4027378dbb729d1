"""Sampling: filters and penalties against a plain reference, the distribution, purity, independence of the batch."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest
import torch

from engine.sampling import LogitsError, Sampler, SampleRow
from engine.sampling.choose import TorchChooser
from engine.sampling.jit import JitChooser
from engine.sampling.kernel import KernelChooser
from engine.sampling.noise import gumbel_noise, position_key, sequence_key
from native.compiler import NativeUnavailable
from protocol.sampling import SamplingParams

VOCAB = 97


@pytest.fixture(scope="module")
def kernel() -> KernelChooser:
    try:
        return KernelChooser(num_threads=2)
    except NativeUnavailable as error:
        pytest.skip(str(error))


@pytest.fixture(params=["torch", "kernel", "numba"])
def sampler(request: pytest.FixtureRequest) -> Sampler:
    if request.param == "kernel":
        return Sampler(chooser=request.getfixturevalue("kernel"))
    return Sampler(chooser=TorchChooser() if request.param == "torch" else JitChooser())


def random_logits(rows: int, *, vocab: int = VOCAB, seed: int = 0, scale: float = 3.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, vocab, generator=generator) * scale


def row(params: SamplingParams, **options: object) -> SampleRow:
    return SampleRow(params=params, **({"prompt": [1, 2, 3]} | options))  # type: ignore[arg-type]


def draw(sampler: Sampler, logits: torch.Tensor, params: SamplingParams, seeds: range) -> Counter[int]:
    """Tokens drawn from one row of logits with each of `seeds`."""
    rows = []
    for seed in seeds:
        fields = {name: getattr(params, name) for name in params.__struct_fields__} | {"seed": seed}
        rows.append(row(SamplingParams(**fields)))
    return Counter(s.token for s in sampler.sample(logits.repeat(len(rows), 1), rows))


def test_greedy_takes_the_first_maximum(sampler: Sampler) -> None:
    logits = random_logits(4)
    logits[1, 5] = logits[1, 60] = 50.0
    expected = logits.argmax(dim=1).tolist()
    assert expected[1] == 5
    rows = [row(SamplingParams(temperature=0.0)) for _ in range(4)]
    assert [s.token for s in sampler.sample(logits, rows)] == expected


def test_draws_follow_the_softmax(sampler: Sampler) -> None:
    logits = random_logits(1, vocab=20, scale=1.0)
    draws = 20_000
    counts = draw(sampler, logits, SamplingParams(temperature=0.7), range(draws))
    expected = torch.softmax(logits[0].double() / 0.7, 0) * draws
    statistic = sum((counts[t] - float(expected[t])) ** 2 / float(expected[t]) for t in range(20))
    assert statistic < 43.8  # 0.1% of chi-square distributions with 19 degrees of freedom lie above


def test_draws_follow_the_softmax_over_positions_and_choices(sampler: Sampler) -> None:
    logits = random_logits(1, vocab=8, scale=1.0, seed=3)
    rows = [row(SamplingParams(seed=7), choice=c, generated=[0] * p) for c in range(20) for p in range(500)]
    counts = Counter(s.token for s in sampler.sample(logits.repeat(len(rows), 1), rows))
    expected = torch.softmax(logits[0].double(), 0) * len(rows)
    statistic = sum((counts[t] - float(expected[t])) ** 2 / float(expected[t]) for t in range(8))
    assert statistic < 24.3  # 0.1%, 7 degrees of freedom


def test_noise_of_neighbouring_keys_is_uncorrelated() -> None:
    keys = torch.tensor([position_key(sequence_key(s, 0), p) for s in range(8) for p in range(8)])
    noise = gumbel_noise(keys, 4096)
    correlation = torch.corrcoef(noise) - torch.eye(64)
    assert float(correlation.abs().max()) < 5 / math.sqrt(4096)
    assert abs(float(noise.mean()) - 0.5772) < 0.01
    assert abs(float(noise.var()) - math.pi**2 / 6) < 0.02


def test_a_row_does_not_depend_on_its_batch(sampler: Sampler) -> None:
    logits = random_logits(6)
    params = [
        SamplingParams(seed=1),
        SamplingParams(temperature=0.0),
        SamplingParams(seed=2, top_k=5, repetition_penalty=1.3),
        SamplingParams(seed=3, top_p=0.8, logprobs=2),
        SamplingParams(seed=4, min_p=0.1, logit_bias={4: 3.0}),
        SamplingParams(seed=5, temperature=1.7, top_k=9, top_p=0.9, min_p=0.01),
    ]
    together = [s.token for s in sampler.sample(logits.clone(), [row(p) for p in params])]
    alone = [sampler.sample(logits[i : i + 1].clone(), [row(p)])[0].token for i, p in enumerate(params)]
    order = [3, 0, 5, 1, 4, 2]
    shuffled = [s.token for s in sampler.sample(logits[order].clone(), [row(params[i]) for i in order])]
    assert together == alone
    assert [together[i] for i in order] == shuffled


def test_position_and_choice_change_the_draw(sampler: Sampler) -> None:
    logits = torch.zeros(1, 4096)
    positions = {
        sampler.sample(logits.clone(), [row(SamplingParams(seed=1), generated=[0] * p)])[0].token for p in range(20)
    }
    choices = {sampler.sample(logits.clone(), [row(SamplingParams(seed=1), choice=c)])[0].token for c in range(20)}
    assert len(positions) == 20
    assert len(choices) == 20


def test_appending_equals_starting_with_the_tokens(sampler: Sampler) -> None:
    params = SamplingParams(seed=9, repetition_penalty=1.2, frequency_penalty=0.7, presence_penalty=0.3, min_tokens=4)
    grown = row(params, eos_token_ids=(0,))
    for token in (5, 6, 5, 90):
        grown.append(token)
    fresh = row(params, generated=[5, 6, 5, 90], eos_token_ids=(0,))
    for seed in range(20):
        logits = random_logits(1, seed=seed)
        assert sampler.sample(logits.clone(), [grown]) == sampler.sample(logits, [fresh])


@pytest.mark.parametrize("top_k", [1, 5, VOCAB - 1, VOCAB, VOCAB + 10])
def test_top_k_keeps_the_k_likeliest(sampler: Sampler, top_k: int) -> None:
    logits = random_logits(1, scale=0.5)
    seen = draw(sampler, logits, SamplingParams(top_k=top_k), range(3000))
    allowed = set(torch.topk(logits[0], min(top_k, VOCAB)).indices.tolist())
    assert set(seen) <= allowed
    if top_k <= 5:
        assert set(seen) == allowed


@pytest.mark.parametrize("top_p", [0.0, 0.3, 0.9, 0.999])
def test_top_p_keeps_the_smallest_set_that_reaches_p(sampler: Sampler, top_p: float) -> None:
    logits = random_logits(1, scale=1.0, seed=5)
    order = torch.argsort(logits[0], descending=True).tolist()
    probabilities = torch.softmax(logits[0].double(), 0)
    allowed, mass = set(), 0.0
    for token in order:
        allowed.add(token)
        mass += float(probabilities[token])
        if mass >= top_p:
            break
    seen = draw(sampler, logits, SamplingParams(top_p=top_p), range(3000))
    assert set(seen) <= allowed
    if top_p <= 0.3:
        assert set(seen) == allowed


def test_top_p_counts_within_top_k(sampler: Sampler) -> None:
    logits = torch.log(torch.tensor([[0.3, 0.25, 0.2, 0.15, 0.1]]))
    # Of the first three, renormalised to .4 .33 .27, two reach 0.7; of all five, three would.
    assert set(draw(sampler, logits, SamplingParams(top_k=3, top_p=0.7), range(500))) == {0, 1}


def test_min_p_keeps_what_is_near_the_best(sampler: Sampler) -> None:
    logits = torch.log(torch.tensor([[0.5, 0.3, 0.11, 0.09]]))
    assert set(draw(sampler, logits, SamplingParams(min_p=0.2), range(500))) == {0, 1, 2}


def test_temperature_comes_before_the_filters(sampler: Sampler) -> None:
    logits = torch.log(torch.tensor([[0.5, 0.3, 0.11, 0.09]]))
    assert set(draw(sampler, logits, SamplingParams(min_p=0.2, temperature=3.0), range(1000))) == {0, 1, 2, 3}


def reference_penalties(logits: list[float], prompt: list[int], generated: list[int], p: SamplingParams) -> list[float]:
    result = list(logits)
    for token in set(prompt) | set(generated):
        value = result[token]
        result[token] = value / p.repetition_penalty if value > 0 else value * p.repetition_penalty
    for token in set(generated):
        result[token] -= p.frequency_penalty * generated.count(token) + p.presence_penalty
    for token, bias in p.logit_bias.items():
        result[token] += bias
    return result


@pytest.mark.parametrize("seed", range(5))
def test_penalties_equal_a_plain_reference(sampler: Sampler, seed: int) -> None:
    rng = np.random.default_rng(seed)
    prompt, generated = rng.integers(0, VOCAB, 40).tolist(), rng.integers(0, VOCAB, 30).tolist()
    params = SamplingParams(
        temperature=0.0,
        repetition_penalty=1.7,
        presence_penalty=0.9,
        frequency_penalty=0.4,
        logit_bias={3: 2.5, 50: -9},
    )
    plain = SamplingParams(temperature=0.0)
    logits = random_logits(3, seed=seed)
    expected = torch.tensor(reference_penalties(logits[1].tolist(), prompt, generated, params))
    neighbours = logits[[0, 2]].clone()
    rows = [row(plain), row(params, prompt=prompt, generated=generated), row(plain)]
    sampled = sampler.sample(logits, rows)
    torch.testing.assert_close(logits[1], expected)  # the scratch that the token was chosen from
    assert torch.equal(logits[[0, 2]], neighbours)
    assert sampled[1].token == int(expected.argmax())


def test_stop_tokens_wait_for_min_tokens(sampler: Sampler) -> None:
    logits = torch.tensor([[9.0, 8.0, 7.0, 1.0]])
    params = SamplingParams(temperature=0.0, min_tokens=2, stop_token_ids=(1,))
    tokens = []
    state = row(params, prompt=[3], eos_token_ids=(0,))
    for _ in range(3):
        tokens.append(sampler.sample(logits.clone(), [state])[0].token)
        state.append(tokens[-1])
    assert tokens == [2, 2, 0]


def test_ignored_eos_is_not_banned(sampler: Sampler) -> None:
    logits = torch.tensor([[9.0, 8.0]])
    params = SamplingParams(temperature=0.0, min_tokens=2, ignore_eos=True)
    assert sampler.sample(logits, [row(params, prompt=[1], eos_token_ids=(0,))])[0].token == 0


def test_logprobs_are_of_the_raw_logits(sampler: Sampler) -> None:
    logits = random_logits(3)
    expected = torch.log_softmax(logits, dim=1)
    params = [
        SamplingParams(temperature=0.0),
        SamplingParams(temperature=0.0, logit_bias={7: 100.0}, logprobs=0),
        SamplingParams(seed=1, temperature=2.0, top_k=1, logprobs=3),
    ]
    sampled = sampler.sample(logits.clone(), [row(p) for p in params])
    assert (sampled[0].logprob, sampled[0].top) == (None, None)
    assert (sampled[1].token, sampled[1].top) == (7, None)
    assert sampled[1].logprob == pytest.approx(float(expected[1, 7]), abs=1e-5)
    best = torch.topk(expected[2], 3)
    assert sampled[2].top is not None
    assert [t for t, _ in sampled[2].top] == best.indices.tolist()
    assert [lp for _, lp in sampled[2].top] == pytest.approx(best.values.tolist(), abs=1e-5)
    assert sampled[2].logprob == pytest.approx(sampled[2].top[0][1])


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_rows_without_a_finite_logit_are_named(sampler: Sampler, temperature: float) -> None:
    logits = random_logits(3)
    logits[1] = math.nan
    logits[2, 4] = math.nan  # one bad entry is no more than a token that is never chosen
    rows = [row(SamplingParams(temperature=temperature)) for _ in range(3)]
    with pytest.raises(LogitsError) as caught:
        sampler.sample(logits, rows)
    assert caught.value.rows == [1]


def test_absurd_parameters_fail_neither_their_row_nor_the_batch(sampler: Sampler) -> None:
    """Routers refuse most of these; the engine must survive them all the same."""
    absurd = [
        SamplingParams(seed=1, top_k=2**31),
        SamplingParams(seed=1, top_k=2**62, top_p=1e-45),
        SamplingParams(seed=1, temperature=1e-4, repetition_penalty=1e-300),
        SamplingParams(seed=1, repetition_penalty=1e300),
        SamplingParams(seed=1, temperature=1e-4, logit_bias={5: 1e300}),
        SamplingParams(seed=1, temperature=1e300, logit_bias={5: -1e300}),
        SamplingParams(seed=2**63 - 1, min_p=5e-324),
        SamplingParams(temperature=0.0, logprobs=10**9),
    ]
    plain = SamplingParams(seed=1)
    logits = random_logits(1)
    batch = [row(params) for params in [*absurd, plain]]
    with np.errstate(over="ignore"):
        sampled = sampler.sample(logits.repeat(len(batch), 1), batch)
    assert all(0 <= each.token < VOCAB for each in sampled)
    alone = sampler.sample(logits.clone(), [row(plain)])[0].token
    assert [sampled[0].token, sampled[-1].token] == [alone, alone]
    assert sampled[4].token == 5


def test_a_temperature_next_to_zero_is_greedy(sampler: Sampler) -> None:
    logits = random_logits(1)
    best = int(logits.argmax())
    for temperature in (1e-46, 1e-30, 1e-6):
        rows = [row(SamplingParams(seed=1, temperature=temperature)), row(SamplingParams(seed=1))]
        assert sampler.sample(logits.repeat(2, 1), rows)[0].token == best
