"""Sampling and scoring: the right distribution, the same draw whatever the batch, honest about limits."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from roserag_jax.models import weights
from roserag_jax.preference import candidates
from roserag_jax.rag.prompts import Prompt
from roserag_jax.runtime.mesh import make_mesh
from roserag_jax.runtime.sampler import Engine, Sampling, draw

pytest.importorskip("torch")
RNG = np.random.default_rng(0)
PROMPTS = [RNG.integers(3, 131, n).tolist() for n in (12, 30, 21, 5)]
IDS = ["a", "b", "c", "d"]
WARM = Sampling(1.0, 0.9)


@pytest.fixture(scope="module")
def engine(tiny_llama, one_device):
    opened, base = tiny_llama
    return Engine(weights.assemble(opened.config, base), one_device, (2,), 0)


def sample(engine, rows, N=3, bucket=32, max_new=12, sampling=WARM, first=0):
    prompts = [PROMPTS[i] for i in rows]
    cache = engine.prefill(prompts, length=bucket)
    openings = [[p[-1:]] * N for p in prompts]
    return engine.decode(cache, openings, 1, [IDS[i] for i in rows], first, sampling, max_new)


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(1.0),
        Sampling(0.5),
        Sampling(1.0, top_p=0.6),
        Sampling(0.7, top_p=0.8),
        Sampling(1.0, top_k=12),
        Sampling(1.5, min_p=0.1),
        Sampling(1.2, 0.9, 40, 0.02),
    ],
    ids=str,
)
def test_draws_follow_the_distribution(sampling):
    """A chi-square test of 20,000 draws over 600 tokens against what transformers' warpers leave of them."""
    import torch
    from transformers.generation import logits_process as warpers

    logits = RNG.normal(size=600).astype("f") * 2
    chain = [warpers.TemperatureLogitsWarper(sampling.temperature)]
    if sampling.top_k:
        chain.append(warpers.TopKLogitsWarper(sampling.top_k))
    chain += [warpers.TopPLogitsWarper(sampling.top_p), warpers.MinPLogitsWarper(sampling.min_p)]
    scores = torch.tensor(logits[None], dtype=torch.float64)
    for warper in chain:
        scores = warper(None, scores)
    expected = torch.softmax(scores, -1)[0].numpy()

    n = 20_000
    keys = jax.vmap(lambda i: jax.random.fold_in(jax.random.key(3), i))(jnp.arange(n))
    # Every other row is drawn otherwise: the knobs are each row's own.
    mine, others = (jnp.array(dataclasses.astuple(s)) for s in (sampling, Sampling(0.3, 0.5)))
    odd = jnp.arange(2 * n)[:, None] % 2 == 1
    knobs = jnp.where(odd, mine, others)
    keys = jnp.repeat(keys, 2)
    drawn = np.asarray(jax.jit(draw)(jnp.broadcast_to(jnp.asarray(logits), (2 * n, 600)), keys, knobs))[1::2]
    counts = np.bincount(drawn, minlength=600)
    assert counts[expected == 0].sum() == 0
    often = expected * n >= 5  # the others together
    observed = np.append(counts[often], counts[~often].sum())
    wanted = np.append(expected[often], expected[~often].sum()) * n
    observed, wanted = observed[wanted > 0], wanted[wanted > 0]
    freedom = len(wanted) - 1
    assert ((observed - wanted) ** 2 / wanted).sum() < freedom + 4 * np.sqrt(2 * freedom)


def test_a_draw_depends_on_its_question_and_sample_only(engine):
    """Another batch, order, padding, number of branches: the same tokens for a (question, sample)."""
    together = sample(engine, [0, 1, 2, 3])
    turned = sample(engine, [3, 1], bucket=64)
    np.testing.assert_array_equal(together.tokens[[3, 1]], turned.tokens)
    fewer = sample(engine, [0, 1, 2, 3], N=1, first=2)
    np.testing.assert_array_equal(together.tokens[:, 2], fewer.tokens[:, 0])
    assert (together.tokens[:, 0] != together.tokens[:, 1]).any()


def test_sharded_sampling_draws_the_same(engine, tiny_folder, tiny_llama):
    opened, _ = tiny_llama
    mesh = make_mesh(1, 4, 2)
    base = weights.load_base(opened, jnp.dtype("float32"), mesh)
    spread = Engine(weights.assemble(opened.config, base), mesh, (2,), 0)
    np.testing.assert_array_equal(sample(engine, [0, 1, 2, 3]).tokens, sample(spread, [0, 1, 2, 3]).tokens)


def test_logprobs_agree_with_scoring(engine):
    """The sampler's log-probabilities are those of the scorer; an opening of several tokens goes on as if decoded."""
    out = sample(engine, [0, 1], N=2, max_new=10)
    responses = [[out.tokens[i, n, : out.lengths[i, n]].tolist() for n in range(2)] for i in range(2)]
    prompts = PROMPTS[:2]
    cache = engine.prefill(prompts, length=32)
    scored = engine.score(cache, prompts, responses, 16)
    np.testing.assert_allclose(out.logprobs, scored[:, :, :10], atol=1e-4)

    greedy = sample(engine, [0, 1], N=1, max_new=10, sampling=Sampling())
    halves = [[prompts[i][-1:] + greedy.tokens[i, 0, : 3 + i].tolist()] for i in range(2)]
    rest = engine.decode(cache, halves, 6, IDS[:2], 0, Sampling(), 6)
    for i in range(2):
        np.testing.assert_array_equal(rest.tokens[i, 0], greedy.tokens[i, 0, 3 + i : 9 + i])
        np.testing.assert_allclose(rest.opening_logprobs[i, 0, : 3 + i], greedy.logprobs[i, 0, : 3 + i], atol=1e-4)


def test_stops_and_limits(engine):
    """A stop token ends a branch and is not part of it; a branch that hits the limit says so; fillers say nothing."""
    free = sample(engine, [0, 1, 2], N=1, sampling=Sampling())
    stop = int(free.tokens[0, 0, 4])
    first = free.tokens[0, 0].tolist().index(stop)
    prompts = [*PROMPTS[:3], []]
    cache = engine.prefill(prompts, length=32)
    openings = [[p[-1:]] for p in prompts]
    out = engine.decode(cache, openings, 1, [*IDS[:3], ""], 0, Sampling(), 12, (stop,))
    assert out.lengths[0, 0] == first and out.finished[0, 0]
    assert out.tokens[0, 0, :first].tolist() == free.tokens[0, 0, :first].tolist()
    others = [i for i in (1, 2) if stop not in free.tokens[i, 0]]
    assert all(out.lengths[i, 0] == 12 and not out.finished[i, 0] for i in others)
    assert out.lengths[3, 0] == 0


def test_a_guided_prompt_goes_on_from_the_plain_one(engine):
    """Read to where the two part, and then the hint as the branches' opening: as if the guided prompt had been read."""
    plain = [p + [7, 8, 9] for p in PROMPTS[:2]]
    guided = [Prompt("", p + [40, 41] + [7, 8, 9], 0) for p in PROMPTS[:2]]
    cache = engine.prefill(plain, length=48)
    plain = [Prompt("", tokens, 0) for tokens in plain]
    rewound, starts = candidates._read_guided(engine, plain, guided, cache, None, 2)
    assert starts == [[40, 41, 7, 8, 9]] * 2
    apart, ends = candidates._read_guided(engine, plain, guided, cache, None, 99)
    assert ends == [[9]] * 2
    said = [
        engine.decode(c, [[s] * 2 for s in opening], len(opening[0]), IDS[:2], 0, WARM, 12)
        for c, opening in ((rewound, starts), (apart, ends))
    ]
    np.testing.assert_array_equal(said[0].tokens, said[1].tokens)
    np.testing.assert_allclose(said[0].logprobs, said[1].logprobs, atol=1e-4)
