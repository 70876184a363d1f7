"""Rotary positions are transformers', for every scaling that is implemented."""

import jax.numpy as jnp
import numpy as np
import pytest

from roserag_jax.models import rope

torch = pytest.importorskip("torch")
SCALINGS = {
    "default": {},
    "linear": {"rope_type": "linear", "factor": 4.0},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
}


@pytest.mark.parametrize("kind", SCALINGS)
def test_inverse_frequencies_equal_transformers(kind):
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    parameters = {"rope_type": kind, "rope_theta": 500000.0, **SCALINGS[kind]}
    config = LlamaConfig(head_dim=64, max_position_embeddings=131072, rope_parameters=parameters)
    expected = LlamaRotaryEmbedding(config).inv_freq.numpy()
    found = rope.inverse_frequencies(64, 500000.0, tuple(SCALINGS[kind].items()))
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_rotate_equals_transformers():
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    x = np.random.default_rng(0).normal(size=(9, 3, 16)).astype(np.float32)
    cos, sin = rope.tables(jnp.arange(9) * 7, rope.inverse_frequencies(16, 1e4))
    doubled = lambda a: torch.tensor(np.concatenate([a, a], axis=-1))[None]
    heads_first = torch.tensor(x).transpose(0, 1)[None]
    expected, _ = apply_rotary_pos_emb(heads_first, heads_first, doubled(cos), doubled(sin))
    np.testing.assert_allclose(rope.rotate(jnp.asarray(x), cos, sin), expected[0].transpose(0, 1), atol=1e-5)
