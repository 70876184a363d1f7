"""Decode steps on the devices: log-probabilities as the scorer has them, stacked and unstacked layers, on meshes."""

import copy

import numpy as np
import pytest
from conftest import IDS, NUCLEUS, PROMPTS, decode, engine_on, sample, tokens_of

from roserag_jax.distributed.mesh import make_mesh
from roserag_jax.inference.requests import DecodeRequest
from roserag_jax.inference.sampling import SamplingParams

pytest.importorskip("torch")


def test_decode_logprobs_equal_scores(tiny_engine):
    """Of sampled tokens and of forced prefixes, behind which decoding resumes as if they had been sampled."""
    sampled = sample(tiny_engine, [0, 1], samples=2, max_new_tokens=10)
    prompts = PROMPTS[:2]
    scored = tiny_engine.score(tiny_engine.prefill(prompts), prompts, tokens_of(sampled), 16)
    for row, scores in zip(sampled, scored, strict=True):
        for completion, score in zip(row, scores, strict=True):
            np.testing.assert_allclose(completion.logprobs, score[: len(completion.tokens)], atol=1e-4)

    greedy = sample(tiny_engine, [0, 1], samples=1, max_new_tokens=10, sampling=SamplingParams())
    forced = [[p[-1:] + row[0].tokens[: 3 + i]] for i, (p, row) in enumerate(zip(prompts, greedy, strict=True))]
    rest = decode(tiny_engine, prompts, [DecodeRequest(prefixes, 6) for prefixes in forced], slots=1)
    only_scored = decode(tiny_engine, prompts, [DecodeRequest(prefixes * 4, 0) for prefixes in forced], slots=1)
    for i in range(2):
        assert rest[i][0].tokens == greedy[i][0].tokens[3 + i : 9 + i]
        for completion in (rest[i][0], *only_scored[i]):
            np.testing.assert_allclose(completion.forced_logprobs, greedy[i][0].logprobs[: 3 + i], atol=1e-4)
        assert [completion.tokens for completion in only_scored[i]] == [[]] * 4


def test_decode_with_stacked_layers_equals_unstacked(tiny_engine):
    """What accelerators run, a scan over stacked layers and caches, beside what CPUs run: tokens and probabilities."""
    assert tiny_engine.unstacked_layers is not None
    stacked = copy.copy(tiny_engine)
    stacked.unstacked_layers = None
    forced = [p[-1:] + [7, 8, 9, 10][: i + 1] for i, p in enumerate(PROMPTS)]
    requests = [DecodeRequest([prefix] * 2, 8, NUCLEUS, i) for prefix, i in zip(forced, IDS, strict=True)]
    made = [decode(engine, PROMPTS, requests, slots=2) for engine in (stacked, tiny_engine)]
    for row, other in zip(*made, strict=True):
        for completion, twin in zip(row, other, strict=True):
            assert completion.tokens == twin.tokens
            np.testing.assert_allclose(completion.logprobs, twin.logprobs, atol=1e-4)
            np.testing.assert_allclose(completion.forced_logprobs, twin.forced_logprobs, atol=1e-4)


@pytest.mark.parametrize("unstacked", [True, False], ids=["unstacked", "stacked"])
def test_decode_on_several_devices_samples_the_same(unstacked, tiny_engine, tiny_llama):
    """Four devices for slots, each with two, and two for heads; fewer questions than slots; one for all."""
    opened, _ = tiny_llama
    sharded = engine_on(opened, make_mesh(1, 4, 2))
    if not unstacked:
        sharded.unstacked_layers = None
    rows = [0, 1, 2, 3, 3, 2, 1, 0, 2, 1]
    on_one = tokens_of(sample(tiny_engine, [0, 1, 2, 3]))
    assert tokens_of(sample(sharded, rows, slots=8)) == [on_one[i] for i in rows]
    assert tokens_of(sample(sharded, [1])) == [on_one[1]]
