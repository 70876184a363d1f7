"""Candidates: guided branches that reuse the plain prompt's cache, on one device and on several."""

import jax
import numpy as np
import pytest
from conftest import IDS, NUCLEUS, PROMPTS, decode, engine_on, run, tokens_of

from roserag_jax import options
from roserag_jax.distributed.mesh import make_mesh
from roserag_jax.hub import model_files, tokenizer
from roserag_jax.inference.engine import SharedPrefix
from roserag_jax.inference.requests import DecodeRequest
from roserag_jax.preference.candidates import (
    CandidateGenerator,
    QuestionInputs,
    decoder_capacity,
    most_reused,
    newline_tokens,
    reusable_tokens,
)
from roserag_jax.rag import synthetic
from roserag_jax.rag.prompts import Prompt, PromptBuilder

pytest.importorskip("torch")


def test_guided_branches_on_the_plain_cache_equal_those_on_the_guided_prompt(tiny_engine):
    """The hint as a forced prefix behind what the two prompts share gives what prefilling the guided prompt gives."""
    plain = [p + [7, 8, 9] for p in PROMPTS[:2]]
    guided = [p + [40, 41] + [7, 8, 9] for p in PROMPTS[:2]]
    prompt = lambda tokens: Prompt("", tokens, 0)
    reused = [reusable_tokens(prompt(p), prompt(g), 2, 0, 64) for p, g in zip(plain, guided, strict=True)]
    assert reused == [len(p) for p in PROMPTS[:2]]
    assert reusable_tokens(prompt(plain[0]), prompt(guided[0]), 99, 0, 64) is None
    assert reusable_tokens(prompt(plain[0]), prompt(guided[0]), 2, 0, 4) is None
    forced = [
        DecodeRequest([g[n:]] * 2, 12, NUCLEUS, i, prompt_length=n)
        for g, n, i in zip(guided, reused, IDS, strict=False)
    ]
    prefilled = [DecodeRequest([g[-1:]] * 2, 12, NUCLEUS, i) for g, i in zip(guided, IDS, strict=False)]
    on_plain, on_guided = decode(tiny_engine, plain, forced), decode(tiny_engine, guided, prefilled)
    assert tokens_of(on_plain) == tokens_of(on_guided)
    for row, other in zip(on_plain, on_guided, strict=True):
        np.testing.assert_allclose(row[1].logprobs, other[1].logprobs, atol=1e-4)


@pytest.mark.parametrize("max_tokens", [512, 4096])
def test_decoder_has_room_for_hints_only_where_a_prompt_can_reuse(smollm_tokenizer, max_tokens):
    """With demonstrations none can: room for them would be read at every step."""
    generate = options.defaults().generate
    generate.update(guided_samples=3, plain_samples=3, max_tokens=40, answer_tokens=12, batch=20)
    suffix = {}
    for examples in (0, 2):
        builder = PromptBuilder(smollm_tokenizer, max_tokens, 4, examples)
        suffix[examples] = decoder_capacity(generate, most_reused(builder)).suffix_length
    assert suffix[2] == 64  # a rationale of 40, the words that ask for its answer, and the answer of 12
    assert 64 < suffix[0] < 160  # what stands behind the passages in a guided prompt, and a rationale


@pytest.fixture(scope="module")
def generate(model_folder):
    """A function: the candidates of random questions, generated on a number of devices."""
    opened, texts = model_files.open_model(str(model_folder)), tokenizer.read_tokenizer(model_folder)
    rng = np.random.default_rng(3)
    builder = PromptBuilder(texts, 420, 1)
    rows = list(synthetic.generate(9, "train", passages=2))
    for row in rows:  # hints from 2 to 60 tokens, so that forced prefixes lie in several buckets
        row["golden_answers"] = ["".join(rng.choice(list("abcdefgh "), rng.integers(2, 60)))]
    prompts = [(plain, builder.guided(row, plain)) for row, plain in zip(rows, map(builder.plain, rows), strict=True)]
    most = 240
    questions = [
        QuestionInputs(row, plain, guided, reusable_tokens(plain, guided, 2, 0, most))
        for row, (plain, guided) in zip(rows, prompts, strict=True)
    ]
    assert all(question.reused is not None for question in questions)
    generate = options.defaults().generate
    generate.update(guided_samples=2, plain_samples=1, max_tokens=40, answer_tokens=60, batch=8)
    generator = CandidateGenerator(texts, generate, shared_prefixes={"plain": SharedPrefix(), "guided": SharedPrefix()})
    lengths = [len(question.plain.tokens) for question in questions]

    def on(devices):
        mesh = make_mesh(1, devices, 1, jax.devices()[:devices])
        engine = engine_on(opened, mesh, tokenizer.stop_ids(texts, opened.path, opened.config.vocab_size))
        tasks, capacity = dict(enumerate(map(generator.task, questions))), decoder_capacity(generate, most)
        return dict(run(engine, tasks, lengths, capacity, newline_tokens(texts)))

    return on


@pytest.fixture(scope="module")
def on_one_device(generate):
    return generate(1)


@pytest.mark.parametrize(
    "devices", [2, pytest.param(4, marks=pytest.mark.slow), pytest.param(8, marks=pytest.mark.slow)]
)
def test_candidates_on_several_devices_equal_those_on_one(devices, generate, on_one_device):
    rows = generate(devices)
    assert sum(len(row["candidates"]) for row in rows.values()) > 9
    for number, row in rows.items():
        expected = on_one_device[number]
        assert row["dropped"] == expected["dropped"]
        for candidate, other in zip(row["candidates"], expected["candidates"], strict=True):
            assert candidate | {"logprob": None} == other | {"logprob": None}
            assert candidate["logprob"] == pytest.approx(other["logprob"], abs=1e-2)
