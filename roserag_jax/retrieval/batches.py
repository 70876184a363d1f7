"""Batches of texts for an encoder: of similar length, padded to a few sizes, so that few programs are compiled."""

import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Int

from roserag_jax.distributed.mesh import make_mesh
from roserag_jax.models.bert import Bert

LENGTHS = (16, 32, 48, 64, 80, 96, 112, 128, 144, 160, 192, 224, 256, 320, 384, 448, 512)
BATCH_TOKENS = {"cpu": 1 << 10}  # of a device; more do not stay in its caches
_BATCH_TOKENS_ELSEWHERE = 1 << 15


def local_mesh() -> Mesh:
    """A mesh over this process's devices alone: processes share texts out among them, not batches."""
    return make_mesh(-1, 1, 1, jax.local_devices())


class Batch(NamedTuple):
    """Texts that are encoded at once.

    Attributes:
      places: which texts they are.
      tokens: their word pieces, padded; rows beyond the texts are padding alone.
    """

    places: list[int]
    tokens: Int[np.ndarray, "R W"]


def batches(texts: Sequence[Sequence[int]], padding: int, devices: int, batch_tokens: int) -> Iterator[Batch]:
    """Sort tokenized texts by length and yield them in batches of about `batch_tokens`, rows a multiple of `devices`.

    Lengths and numbers of rows are from short lists, whatever the texts.
    """
    order = sorted(range(len(texts)), key=lambda i: -len(texts[i]))
    start = 0
    while start < len(order):
        longest = len(texts[order[start]])
        W = next((length for length in LENGTHS if length >= longest), longest)
        most = devices * max(1, 1 << (max(1, batch_tokens // (W * devices)).bit_length() - 1))
        places = order[start : start + most]
        # A batch that is not full takes the next power of two.
        R = min(most, devices * (1 << (-(-len(places) // devices) - 1).bit_length()))
        tokens = np.full((R, W), padding, np.int32)
        for row, place in zip(tokens, places, strict=False):
            row[: len(texts[place])] = texts[place]
        yield Batch(places, tokens)
        start += len(places)


class WordPieces:
    """Cuts texts into word pieces, at most so many, in any number of threads.

    The tokenizer keeps the length of its last call, which another thread's texts would be cut to.
    """

    def __init__(self, tokenizer: Any):
        self._tokenizer, self._lock = tokenizer, threading.Lock()

    def __call__(self, texts: Sequence[str], length: int) -> list[list[int]]:
        """The ids of each text, special tokens included."""
        if not texts:
            return []
        with self._lock:
            return self._tokenizer(list(texts), truncation=True, max_length=length)["input_ids"]


class BatchEncoder:
    """Runs an encoder, and what follows it, over batches that are split over a mesh.

    Args:
      head: takes hidden states [R, W, D], tokens and mask [R, W] and the array given; returns an array of R rows.
    """

    def __init__(self, bert: Bert, mesh: Mesh, head: Callable, array: jax.Array | None = None):
        self.mesh, self.rows = mesh, NamedSharding(mesh, PartitionSpec(mesh.axis_names))
        platform = mesh.devices.flat[0].platform
        self.batch_tokens = mesh.size * BATCH_TOKENS.get(platform, _BATCH_TOKENS_ELSEWHERE)
        graph, self.state = nnx.split(bert)
        self.array = array

        @jax.jit
        def run(state, array, tokens, mask):
            return head(nnx.merge(graph, state)(tokens, mask), tokens, mask, array)

        self._run = run

    def __call__(self, tokens: Int[np.ndarray, "R W"], mask: np.ndarray) -> jax.Array:
        """Encode one batch."""
        return self._run(self.state, self.array, *jax.device_put((tokens, mask), (self.rows, self.rows)))

    def each(self, texts: Sequence[Sequence[int]], padding: int) -> Iterator[tuple[list[int], np.ndarray]]:
        """Encode texts in batches; yields the places of each batch's texts and its rows on the host.

        The next batch is dispatched before this one's result is waited for.
        """
        pending = None
        for batch in batches(texts, padding, self.mesh.size, self.batch_tokens):
            mask = np.zeros(batch.tokens.shape, bool)
            for row, place in zip(mask, batch.places, strict=False):
                row[: len(texts[place])] = True
            mask[len(batch.places) :, 0] = True  # rows of padding attend to something
            dispatched = batch.places, self(batch.tokens, mask)
            if pending:
                yield pending[0], np.asarray(pending[1])
            pending = dispatched
        if pending:
            yield pending[0], np.asarray(pending[1])
