"""A session's engines: with an adapter beside or merged into the weights, and with stop strings."""

from pathlib import Path

import numpy as np
from conftest import decode

from roserag_jax import session
from roserag_jax.inference.requests import DecoderCapacity, DecodeRequest
from roserag_jax.inference.respond import respond_to_all
from roserag_jax.inference.sampling import SamplingParams


def test_session_merged_adapter_generates_the_same(finished):
    """Sampled and greedy tokens with the adapter beside the weights and folded into them."""
    run, folder = session.Session(finished), Path(finished.workdir) / "adapter"
    prompts = [list(b"What is red?"), list(b"Who?")]
    said = []
    for merge in (False, True):
        run.config.merge = merge
        engine = run.engine(folder)
        params = [SamplingParams(), SamplingParams(1.0, 0.9)]
        requests = [DecodeRequest([p[-1:]] * 2, 12, s, q) for p, s, q in zip(prompts, params, "ab", strict=True)]
        said.append([branch for row in decode(engine, prompts, requests, branches=2) for branch in row])
    run.config.merge = False
    for beside, merged in zip(*said, strict=True):
        assert beside.tokens == merged.tokens
        np.testing.assert_allclose(beside.logprobs, merged.logprobs, atol=1e-4)
    assert any(branch.tokens for branch in said[0])


def test_session_stop_string_ends_a_response(finished):
    """`prompt.stop`: what stands before the text is the response, and it counts as finished."""
    run = session.Session(finished)
    prompts = [list(f"What is {name}?".encode()) for name in "abcdefgh"]

    def answers(*stop):
        options = {"slots": 3, "max_new_tokens": 24, "stop_strings": stop}
        responses = respond_to_all(run.engine(), run.tokenizer, prompts, **options)
        return {response.number: response for response in responses}

    free = answers()
    longest = max((response.text for response in free.values()), key=len)
    for stop in (longest[len(longest) // 2 :][:2], longest[-2:]):  # in the middle, and where the limit is reached
        assert stop
        for i, response in answers(stop, "never said").items():
            before, found, _ = free[i].text.partition(stop)
            assert response.text == before and response.finished == (bool(found) or free[i].finished)


def test_session_decodes_as_many_questions_as_fit(config_of, monkeypatch):
    """On a CPU the given number; elsewhere what the memory holds beside the weights, from one to 64 on a device."""
    run, capacity = session.Session(config_of()), DecoderCapacity(1, 4, ((129, 32), (1, 128)))
    slots = lambda wanted=0: run.slots(wanted, capacity, 2048, on_cpu=8)
    assert slots() == 8 and slots(5) == 5
    each = capacity.slot_bytes(run.source.config, 4, 2048)
    for memory, expected in ((each * 21.0, 19), (each * 1000.0, 64), (1.0, 1)):
        monkeypatch.setattr("roserag_jax.distributed.hardware.memory_of", lambda device, memory=memory: memory)
        assert slots() == expected and slots(5) == 5
