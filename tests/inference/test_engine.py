"""The engine: scores of responses, whatever the chunks they are scored in."""

import numpy as np
import pytest
from conftest import PROMPTS, sample, tokens_of

pytest.importorskip("torch")


def test_score_in_chunks_gives_the_same_log_probabilities(tiny_engine, monkeypatch):
    """Two of five branches at a time, one of which only fills the last chunk."""
    prompts, responses = PROMPTS[:2], tokens_of(sample(tiny_engine, [0, 1], samples=2, max_new_tokens=10))
    cache = tiny_engine.prefill(prompts)
    scored = tiny_engine.score(cache, prompts, responses, 16)
    monkeypatch.setattr("roserag_jax.inference.engine._SCORED_TOKENS", 64)
    many = tiny_engine.score(cache, prompts, [row * 2 + row[:1] for row in responses], 16)
    np.testing.assert_allclose(many, scored[:, [0, 1, 0, 1, 0]], atol=1e-4)
