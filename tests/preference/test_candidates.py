"""Candidates: guided branches that reuse the plain prompt's cache."""

import numpy as np
import pytest
from conftest import IDS, NUCLEUS, PROMPTS, decode, tokens_of

from roserag_jax.inference.requests import DecodeRequest
from roserag_jax.preference.candidates import reusable_tokens
from roserag_jax.rag.prompts import Prompt

pytest.importorskip("torch")


def test_guided_branches_on_the_plain_cache_equal_those_on_the_guided_prompt(tiny_engine):
    """The hint as a forced prefix behind what the two prompts share gives what prefilling the guided prompt gives."""
    plain = [p + [7, 8, 9] for p in PROMPTS[:2]]
    guided = [p + [40, 41] + [7, 8, 9] for p in PROMPTS[:2]]
    prompt = lambda tokens: Prompt("", tokens, 0)
    reused = [reusable_tokens(prompt(p), prompt(g), 2, 0) for p, g in zip(plain, guided, strict=True)]
    assert reused == [len(p) for p in PROMPTS[:2]]
    assert reusable_tokens(prompt(plain[0]), prompt(guided[0]), 99, 0) is None
    forced = [
        DecodeRequest([g[n:]] * 2, 12, NUCLEUS, i, prompt_length=n)
        for g, n, i in zip(guided, reused, IDS, strict=False)
    ]
    prefilled = [DecodeRequest([g[-1:]] * 2, 12, NUCLEUS, i) for g, i in zip(guided, IDS, strict=False)]
    on_plain, on_guided = decode(tiny_engine, plain, forced), decode(tiny_engine, guided, prefilled)
    assert tokens_of(on_plain) == tokens_of(on_guided)
    for row, other in zip(on_plain, on_guided, strict=True):
        np.testing.assert_allclose(row[1].logprobs, other[1].logprobs, atol=1e-4)
