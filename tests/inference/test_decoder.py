"""Sampling and scoring: the right distribution, the same draw whatever the batch, honest about limits."""

import copy
import dataclasses
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import decode

from roserag_jax.distributed.mesh import make_mesh
from roserag_jax.hub import loading
from roserag_jax.inference import decoder
from roserag_jax.inference.decoder import Decode
from roserag_jax.inference.engine import Engine
from roserag_jax.inference.sampling import Sampling, draw
from roserag_jax.preference import candidates
from roserag_jax.rag.prompts import Prompt

pytest.importorskip("torch")
RNG = np.random.default_rng(0)
PROMPTS = [RNG.integers(3, 131, n).tolist() for n in (12, 30, 21, 5)]
IDS = ["a", "b", "c", "d"]
WARM = Sampling(1.0, 0.9)


@pytest.fixture(scope="module")
def engine(tiny_llama, one_device):
    opened, base = tiny_llama
    return Engine(loading.assemble(opened.config, base), one_device, (2,), 0)


def sample(engine, rows, N=3, max_new=12, sampling=WARM, first=0, **room):
    wishes = [Decode([PROMPTS[i][-1:]] * N, max_new, sampling, IDS[i], first) for i in rows]
    return decode(engine, [PROMPTS[i] for i in rows], wishes, **room)


def tokens_of(said):
    return [[branch.tokens for branch in row] for row in said]


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


@pytest.mark.parametrize("tasks, branches", [(1, 3), (3, 3), (4, 2)])
def test_a_draw_depends_on_its_question_and_sample_only(engine, tasks, branches):
    """Another order, fewer slots (so that questions wait for one another), fewer branches at a time: the same draws."""
    together = tokens_of(sample(engine, [0, 1, 2, 3]))
    turned = tokens_of(sample(engine, [3, 1, 2, 0], tasks=tasks, branches=branches))
    assert turned == [together[i] for i in (3, 1, 2, 0)]
    fewer = tokens_of(sample(engine, [0, 1], N=1, first=2, tasks=tasks))
    assert fewer == [[row[2]] for row in together[:2]]
    assert together[0][0] != together[0][1]


@pytest.mark.parametrize("apart", [True, False], ids=["layers apart", "layers stacked"])
def test_sharded_sampling_draws_the_same(apart, engine, tiny_folder, tiny_llama):
    """Four devices for questions, each with two slots, and two for heads; fewer questions than slots; one for all."""
    opened, _ = tiny_llama
    mesh = make_mesh(1, 4, 2)
    base = loading.load_base(opened, jnp.dtype("float32"), mesh)
    spread = Engine(loading.assemble(opened.config, base), mesh, (2,), 0)
    if not apart:
        spread.layers = None
    many = [0, 1, 2, 3, 3, 2, 1, 0, 2, 1]
    alone = tokens_of(sample(engine, [0, 1, 2, 3]))
    assert tokens_of(sample(spread, many, tasks=8)) == [alone[i] for i in many]
    assert tokens_of(sample(spread, [1])) == [alone[1]]


def test_stacked_layers_decode_as_those_apart(engine):
    """What accelerators run, a scan over stacked layers and caches, beside what CPUs run: openings, draws, chances."""
    assert engine.layers is not None
    stacked = copy.copy(engine)
    stacked.layers = None
    wishes = [Decode([p[-1:] + [7, 8, 9, 10][: i + 1]] * 2, 8, WARM, IDS[i]) for i, p in enumerate(PROMPTS)]
    for row, other in zip(*(decode(e, PROMPTS, wishes, tasks=2) for e in (stacked, engine)), strict=True):
        for branch, twin in zip(row, other, strict=True):
            assert branch.tokens == twin.tokens
            np.testing.assert_allclose(branch.logprobs, twin.logprobs, atol=1e-4)
            np.testing.assert_allclose(branch.opening_logprobs, twin.opening_logprobs, atol=1e-4)


def test_logprobs_agree_with_scoring(engine, monkeypatch):
    """The decoder's log-probabilities are those of the scorer; an opening of several tokens goes on as if decoded."""
    said = sample(engine, [0, 1], N=2, max_new=10)
    prompts = PROMPTS[:2]
    scored = engine.score(cache := engine.prefill(prompts), prompts, tokens_of(said), 16)
    for row, scores in zip(said, scored, strict=True):
        for branch, score in zip(row, scores, strict=True):
            np.testing.assert_allclose(branch.logprobs, score[: len(branch.tokens)], atol=1e-4)

    monkeypatch.setattr("roserag_jax.inference.engine._SCORED_TOKENS", 64)  # two of five at a time
    many = engine.score(cache, prompts, [row * 2 + row[:1] for row in tokens_of(said)], 16)
    np.testing.assert_allclose(many, scored[:, [0, 1, 0, 1, 0]], atol=1e-4)

    greedy = sample(engine, [0, 1], N=1, max_new=10, sampling=Sampling())
    openings = [[p[-1:] + row[0].tokens[: 3 + i]] for i, (p, row) in enumerate(zip(prompts, greedy, strict=True))]
    rest = decode(engine, prompts, [Decode(o, 6) for o in openings], tasks=1)
    scored = decode(engine, prompts, [Decode(o * 4, 0) for o in openings], tasks=1)  # nothing is decoded
    for i in range(2):
        assert rest[i][0].tokens == greedy[i][0].tokens[3 + i : 9 + i]
        for branch in (rest[i][0], *scored[i]):
            np.testing.assert_allclose(branch.opening_logprobs, greedy[i][0].logprobs[: 3 + i], atol=1e-4)
        assert [branch.tokens for branch in scored[i]] == [[]] * 4


def test_stops_and_limits(engine):
    """A stop token ends a branch and is not part of it; one that hits the limit says so; a text can end one too."""
    free = tokens_of(sample(engine, [0, 1, 2], N=1, sampling=Sampling(), max_new=40))
    stop = free[0][0][4]
    wishes = [Decode([PROMPTS[i][-1:]], 40, also_stop=i != 2) for i in range(3)]
    said = decode(engine, PROMPTS[:3], wishes, also_stop=(stop,))
    for i, row in enumerate(said):
        whole = free[i][0]
        cut = whole.index(stop) if stop in whole and i != 2 else 40
        assert row[0].tokens == whole[:cut] and row[0].finished == (cut < 40)
    wishes = [dataclasses.replace(w, also_stop=False, ends=lambda tokens: stop in tokens) for w in wishes]
    early = decode(engine, PROMPTS[:3], wishes)[0][0]
    assert early.finished and 5 <= len(early.tokens) < 40 and early.tokens == free[0][0][: len(early.tokens)]


def test_a_guided_prompt_goes_on_from_the_plain_one(engine):
    """Read to where the two part, and then the hint as the branches' opening: as if the guided prompt had been read."""
    plain = [p + [7, 8, 9] for p in PROMPTS[:2]]
    guided = [p + [40, 41] + [7, 8, 9] for p in PROMPTS[:2]]
    common = [
        candidates.hint_behind(Prompt("", p, 0), Prompt("", g, 0), 2, 0) for p, g in zip(plain, guided, strict=True)
    ]
    assert common == [len(p) for p in PROMPTS[:2]]
    assert candidates.hint_behind(Prompt("", plain[0], 0), Prompt("", guided[0], 0), 99, 0) is None
    knobs = (12, WARM)
    wishes = [Decode([g[n:]] * 2, *knobs, q, length=n) for g, n, q in zip(guided, common, IDS, strict=False)]
    behind = decode(engine, plain, wishes)
    apart = decode(engine, guided, [Decode([g[-1:]] * 2, *knobs, q) for g, q in zip(guided, IDS, strict=False)])
    assert tokens_of(behind) == tokens_of(apart)
    for row, other in zip(behind, apart, strict=True):
        np.testing.assert_allclose(row[1].logprobs, other[1].logprobs, atol=1e-4)


def test_an_error_in_one_lane_ends_both(engine):
    """What goes wrong in a thread is raised by `run`, and so is an interruption; no thread goes on alone."""
    of_lanes = copy.copy(engine)
    of_lanes.lanes = 2

    def task(i):
        yield decoder.Read(PROMPTS[i])
        yield Decode([PROMPTS[i][-1:]] * 3, 12)
        if i == 3:
            raise ValueError("no answer")

    running, room = threading.active_count(), decoder.Room(2, 3, ((1, 12),))
    with pytest.raises(ValueError, match="no answer"):
        list(decoder.run(of_lanes, dict(enumerate(map(task, range(4)))), list(map(len, PROMPTS)), room))
    assert threading.active_count() == running
    results = decoder.run(of_lanes, dict(enumerate(map(task, (0, 1, 2, 0)))), list(map(len, PROMPTS)), room)
    next(results)
    results.close()
    assert threading.active_count() == running


def test_every_task_comes_back_once(engine):
    """Tasks of several wishes, lengths in three classes, some without any branch: each result once, by its number."""
    rng = np.random.default_rng(1)
    lengths = [5, 300, 30, 700, 290, 12, 600, 40]
    prompts = [rng.integers(3, 131, n).tolist() for n in lengths]

    def task(i):
        yield decoder.Read(prompts[i])
        first = yield Decode([prompts[i][-1:]] * (i % 3), 3 + i)
        yield decoder.Read(prompts[0])
        then = yield Decode([prompts[0][-1:] + branch.tokens for branch in first], 4)
        return i, [len(branch.tokens) for branch in (*first, *then)]

    room = decoder.Room(2, 2, ((1, 10), (11, 4)))
    for lanes in (1, 2):
        of_lanes = copy.copy(engine)
        of_lanes.lanes = lanes
        found = dict(decoder.run(of_lanes, dict(enumerate(map(task, range(8)))), lengths, room))
        assert found == {i: (i, [3 + i] * (i % 3) + [4] * (i % 3)) for i in range(8)}
    assert decoder.length_classes(lengths, 2) == [[0, 2, 5, 7], [1, 4], [3, 6]]
    assert decoder.length_classes(lengths, 3) == [[0, 2, 5, 7], [1, 3, 4, 6]]
