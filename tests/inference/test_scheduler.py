"""The scheduler: each task's result once and by its number, the same samples whatever is decoded beside them."""

import copy
import dataclasses
import itertools
import threading

import jax
import numpy as np
import pytest
from conftest import NUCLEUS, PROMPTS, decode, engine_on, run, sample, tokens_of

from roserag_jax.distributed.mesh import make_mesh
from roserag_jax.inference.engine import Engine
from roserag_jax.inference.requests import DecoderCapacity, DecodeRequest, PrefillRequest
from roserag_jax.inference.sampling import SamplingParams
from roserag_jax.inference.scheduler import LengthClass, NumberedTask, Scheduler, length_classes, run_tasks
from roserag_jax.models.config import ModelConfig

pytest.importorskip("torch")


_SIZES = {"family": "llama", "norm_eps": 1e-5, "rope_theta": 1e4}
LLAMA = ModelConfig(
    vocab_size=128256,
    embed_dim=2048,
    num_layers=16,
    num_heads=32,
    num_kv_heads=8,
    head_dim=64,
    mlp_dim=8192,
    **_SIZES,
)
GEMMA = ModelConfig(
    vocab_size=256000,
    embed_dim=2304,
    num_layers=26,
    num_heads=8,
    num_kv_heads=4,
    head_dim=256,
    mlp_dim=9216,
    **_SIZES,
)


def with_threads(engine, threads):
    engine = copy.copy(engine)
    engine.decoder_threads = threads
    return engine


@pytest.mark.parametrize("slots, branches", [(1, 3), (3, 3), (4, 2)])
def test_samples_in_any_order_and_batch_are_the_same(tiny_engine, slots, branches):
    """Another order, fewer slots (so that questions wait for one another), fewer branches at a time: the same draws."""
    together = tokens_of(sample(tiny_engine, [0, 1, 2, 3]))
    reordered = tokens_of(sample(tiny_engine, [3, 1, 2, 0], slots=slots, branches=branches))
    assert reordered == [together[i] for i in (3, 1, 2, 0)]
    fewer = tokens_of(sample(tiny_engine, [0, 1], samples=1, first_sample=2, slots=slots))
    assert fewer == [[row[2]] for row in together[:2]]
    assert together[0][0] != together[0][1]


def test_samples_of_many_slots_are_those_of_one(tiny_engine):
    """With 16 slots the devices run ahead of the host, chunks outlast slots and eight prompts are prefilled at once.

    Tasks of several requests, stop tokens and stop functions among them, of different lengths, more of them than slots.
    """
    rng = np.random.default_rng(2)
    limits, lengths = rng.integers(1, 30, 40), rng.integers(2, 17, 40)
    prompts = [rng.integers(3, 131, n).tolist() for n in lengths]

    def task(i):
        yield PrefillRequest(prompts[i])
        first = yield DecodeRequest([prompts[i][-1:]] * (1 + i % 3), int(limits[i]), NUCLEUS, str(i))
        scored = yield DecodeRequest([prompts[i][-1:] + c.tokens[:8] for c in first], 0)
        ends = lambda tokens: 9 in tokens
        last = yield DecodeRequest(
            [prompts[i][-1:] + c.tokens[: i % 5] for c in first], 20, NUCLEUS, str(i), 50, i % 2 == 0, ends
        )
        cut = [c.tokens[: c.tokens.index(9)] if 9 in c.tokens else c.tokens for c in last]
        return (
            [c.tokens for c in first],
            [c.forced_logprobs for c in scored],
            cut,
            [c.finished or 9 in c.tokens for c in last],
        )

    def results(slots):
        capacity = DecoderCapacity(slots, 2, ((1, 30), (9, 0), (5, 20)))
        tasks, engine = dict(enumerate(map(task, range(40)))), with_threads(tiny_engine, 1)
        return dict(run(engine, tasks, lengths.tolist(), capacity, (7, 8)))

    alone = results(1)
    for number, (tokens, logprobs, last, finished) in results(16).items():
        assert (tokens, last, finished) == (alone[number][0], *alone[number][2:])
        for row, expected in zip(logprobs, alone[number][1], strict=True):
            np.testing.assert_allclose(row, expected, atol=1e-4)


def test_prompts_of_many_lengths_are_prefilled_in_few_shapes(tiny_engine, monkeypatch):
    """What `few_shapes` asks for: each on its own, in 32 or 64 tokens behind what all begin with; the same samples."""
    rng, shapes = np.random.default_rng(3), set()
    prompts = [[*range(3, 43), *rng.integers(3, 131, n).tolist()] for n in (2, 18, 27, 50, 33, 9)]
    prefill = Engine.prefill_rows

    def noting(engine, tokens, lengths, shared=None):
        if shared:
            shapes.add(tokens.shape)
        return prefill(engine, tokens, lengths, shared)

    monkeypatch.setattr(Engine, "prefill_rows", noting)

    def completions(**how):
        shared, engine = tiny_engine.prefill_shared_prefix(prompts[0][:40]), with_threads(tiny_engine, 1)

        def task(prompt):
            yield PrefillRequest(prompt, shared.of(prompt), **how)
            return (yield DecodeRequest([prompt[-1:]] * 2, 6, NUCLEUS, str(len(prompt))))

        tasks, capacity = dict(enumerate(map(task, prompts))), DecoderCapacity(8, 2, ((1, 6),))
        found = dict(run(engine, tasks, [128] * len(prompts), capacity))
        return [[c.tokens for c in found[i]] for i in range(len(prompts))]

    expected = completions()
    assert len(shapes) > 2
    shapes.clear()
    assert completions(few_shapes=True) == expected and shapes == {(1, 32), (1, 64)}


def test_branches_end_at_stop_tokens_limits_and_stop_functions(tiny_engine):
    """A stop token ends a branch and is not part of it; one that hits the limit says so; a function can end one too."""
    free = tokens_of(sample(tiny_engine, [0, 1, 2], samples=1, sampling=SamplingParams(), max_new_tokens=40))
    stop = free[0][0][4]
    requests = [DecodeRequest([PROMPTS[i][-1:]], 40, use_extra_stop_ids=i != 2) for i in range(3)]
    completions = decode(tiny_engine, PROMPTS[:3], requests, extra_stop_ids=(stop,))
    for i, (completion,) in enumerate(completions):
        whole = free[i][0]
        cut = whole.index(stop) if stop in whole and i != 2 else 40
        assert completion.tokens == whole[:cut] and completion.finished == (cut < 40)
    requests = [
        dataclasses.replace(r, use_extra_stop_ids=False, stop_function=lambda tokens: stop in tokens) for r in requests
    ]
    early = decode(tiny_engine, PROMPTS[:3], requests)[0][0]
    assert early.finished and 5 <= len(early.tokens) < 40 and early.tokens == free[0][0][: len(early.tokens)]


def test_an_error_in_one_decoder_thread_ends_both(tiny_engine):
    """What goes wrong in a thread is raised by `run_tasks`, and so is an interruption; no thread is left behind."""
    engine = with_threads(tiny_engine, 2)

    def task(i):
        yield PrefillRequest(PROMPTS[i])
        yield DecodeRequest([PROMPTS[i][-1:]] * 3, 12)
        if i == 3:
            raise ValueError("no answer")

    running, capacity = threading.active_count(), DecoderCapacity(2, 3, ((1, 12),))
    with pytest.raises(ValueError, match="no answer"):
        list(run(engine, dict(enumerate(map(task, range(4)))), list(map(len, PROMPTS)), capacity))
    assert threading.active_count() == running
    results = run(engine, dict(enumerate(map(task, (0, 1, 2, 0)))), list(map(len, PROMPTS)), capacity)
    next(results)
    results.close()
    assert threading.active_count() == running


@pytest.mark.parametrize("threads", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_every_task_returns_once(tiny_engine, threads):
    """Tasks of several requests, lengths in three classes, some without any branch: each result once, by its number."""
    rng = np.random.default_rng(1)
    lengths = [5, 300, 30, 700, 290, 12, 600, 40]
    prompts = [rng.integers(3, 131, n).tolist() for n in lengths]

    def task(i):
        yield PrefillRequest(prompts[i])
        first = yield DecodeRequest([prompts[i][-1:]] * (i % 3), 3 + i)
        yield PrefillRequest(prompts[0])
        then = yield DecodeRequest([prompts[0][-1:] + completion.tokens for completion in first], 4)
        return i, [len(completion.tokens) for completion in (*first, *then)]

    capacity, tasks = DecoderCapacity(2, 2, ((1, 10), (11, 4))), dict(enumerate(map(task, range(8))))
    found = dict(run(with_threads(tiny_engine, threads), tasks, lengths, capacity))
    assert found == {i: (i, [3 + i] * (i % 3) + [4] * (i % 3)) for i in range(8)}


@pytest.mark.slow
def test_forced_prefixes_of_different_lengths_side_by_side_are_kept(tiny_engine, tiny_llama):
    """Two devices: 128 tokens behind a forced prefix of 60, beside a prefix of 130. Each must keep its own prefix."""
    rng = np.random.default_rng(0)
    prompts = rng.integers(3, 131, (2, 20)).tolist()
    forced = [[prompt[-1], *rng.integers(3, 131, n - 1).tolist()] for prompt, n in zip(prompts, (60, 130), strict=True)]
    requests = [
        DecodeRequest([prefix] * 2, new, SamplingParams(1.0), i)
        for prefix, new, i in zip(forced, (128, 24), "ab", strict=True)
    ]
    on_two = decode(engine_on(tiny_llama[0], make_mesh(1, 2, 1, jax.devices()[:2])), prompts, requests, 2, 2)
    for row, other in zip(on_two, decode(tiny_engine, prompts, requests, 2, 2), strict=True):
        for completion, expected in zip(row, other, strict=True):
            assert completion.tokens == expected.tokens
            np.testing.assert_allclose(completion.logprobs, expected.logprobs, atol=1e-3)
    assert len(on_two[0][0].tokens) > 60


@pytest.mark.parametrize(
    "prompt, request_of_prompt, message",
    [
        (PROMPTS[0] * 9, lambda p: DecodeRequest([p[-1:]], 8), "a prompt of 108 tokens is longer than the 16"),
        (PROMPTS[0], lambda p: DecodeRequest([p], 8), "a forced prefix of 12 tokens and 8 new ones fit none"),
        (PROMPTS[0], lambda p: DecodeRequest([p[-1:]], 17), "a forced prefix of 1 tokens and 17 new ones fit none"),
    ],
)
def test_a_request_beyond_the_capacity_is_refused(tiny_engine, prompt, request_of_prompt, message):
    def task():
        yield PrefillRequest(prompt)
        yield request_of_prompt(prompt)

    with pytest.raises(ValueError, match=message):
        list(run(tiny_engine, {0: task()}, [12], DecoderCapacity(1, 1, ((1, 16), (9, 8)))))


def test_length_classes_with_few_members_join_the_next():
    lengths = [5, 300, 30, 700, 290, 12, 600, 40]
    assert length_classes(lengths, 2) == [LengthClass(256, 4), LengthClass(512, 2), LengthClass(704, 2)]
    assert length_classes(lengths, 3) == [LengthClass(256, 4), LengthClass(704, 4)]
    assert length_classes([30], 8) == [LengthClass(32, 1)]


def test_run_tasks_takes_tasks_when_slots_are_free(tiny_engine):
    """Of a stream without end, of two lengths, no more tasks are taken than slots can hold; and a length that nobody
    expected is decoded too."""
    prompts, taken, done = {n: [3 + n] * n for n in (20, 30)}, 0, {}

    def task(n):
        yield PrefillRequest(prompts[n])
        (completion,) = yield DecodeRequest([prompts[n][-1:]], 12)
        return n, completion.tokens

    def tasks():
        nonlocal taken
        for number in itertools.count():
            taken += 1
            n = (20, 30, 20)[number % 3]
            yield NumberedTask(number, n, task(n))

    classes, capacity = [LengthClass(24, 99)], DecoderCapacity(4, 3, ((1, 12),))
    for _, (n, tokens) in run_tasks(with_threads(tiny_engine, 2), tasks(), classes, capacity):
        done.setdefault(n, tokens)
        if len(done) == 2:
            break
    requests = [DecodeRequest([prompt[-1:]], 12) for prompt in prompts.values()]
    expected = decode(tiny_engine, list(prompts.values()), requests, slots=2)
    assert done == {n: row[0].tokens for n, row in zip(prompts, expected, strict=True)}
    assert taken < 40


def test_cache_bytes_are_those_of_the_buffers(tiny_engine):
    capacity = DecoderCapacity(3, 4, ((129, 32), (1, 128)))
    scheduler = Scheduler(tiny_engine, capacity, 300)
    cache = scheduler.state.cache
    allocated = sum(a.nbytes for a in jax.tree.leaves((scheduler.prompts, cache.k, cache.v)))
    assert allocated == 3 * capacity.cache_bytes(tiny_engine.config, 4, 300)


def test_slot_bytes_are_what_a_compiled_decoder_allocates():
    """Gigabytes beside the weights that the program compiled for a TPU v5e takes with prompts of 1,536 tokens."""
    for config, slots, gigabytes in ((LLAMA, 32, 3.49), (GEMMA, 16, 4.38)):
        capacity = DecoderCapacity(slots, 4, ((129, 32), (1, 128)))
        assert slots * capacity.slot_bytes(config, 2, 1536) / 1e9 == pytest.approx(gigabytes, rel=0.05)
    # Each of Gemma's four key/value heads is on two of eight devices.
    assert 8 * capacity.cache_bytes(GEMMA, 2, 1536, tensor=8) == 2 * capacity.cache_bytes(GEMMA, 2, 1536)
