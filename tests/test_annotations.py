"""Annotations are enforced while the tests run."""

import jax.numpy as jnp
import pytest
from jaxtyping import TypeCheckError

from roserag_jax.models.cache import PrefixCache
from roserag_jax.models.logprobs import token_logprobs


def test_annotations_refuse_a_wrong_shape():
    hidden, table = jnp.zeros((2, 5, 8)), jnp.zeros((11, 8))
    assert token_logprobs(hidden, jnp.zeros((2, 5), int), table).shape == (2, 5)
    with pytest.raises(TypeCheckError, match="'targets'"):
        token_logprobs(hidden, jnp.zeros((2, 6), int), table)
    with pytest.raises(TypeCheckError, match="'table'"):
        token_logprobs(hidden, jnp.zeros((2, 5), int), table.T)


def test_annotations_refuse_a_wrong_kind():
    with pytest.raises(TypeCheckError, match="'targets'"):
        token_logprobs(jnp.zeros((3, 8)), jnp.zeros(3), jnp.zeros((11, 8)))


def test_annotations_refuse_fields_that_disagree():
    keys, values = jnp.zeros((3, 2, 1, 4, 7)), jnp.zeros((3, 2, 1, 7, 4))
    PrefixCache(keys, values, jnp.zeros(2, int))
    with pytest.raises(TypeCheckError, match="'v'"):
        PrefixCache(keys, values[:, :, :, 1:], jnp.zeros(2, int))
