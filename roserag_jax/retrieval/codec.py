"""Compression of vectors to a centroid and a residual of 1, 2 or 4 bits a dimension (ColBERTv2, section 3.3).

Axes: T vectors, Z size of a vector, U centroids.
"""

import functools
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, UInt8

from roserag_jax.retrieval.colbert import normalize

_ITERATIONS = 8
_CHUNK = 1 << 13  # vectors compared with all centroids at once


class Codec(NamedTuple):
    """What vectors are compressed with.

    Attributes:
      centroids: [U, Z].
      cutoffs: bounds [2^bits - 1] between the values that a residual's dimension is rounded to.
      levels: these values [2^bits].
      normalized: whether vectors have length 1; they do again when they are decompressed.
    """

    centroids: Float[np.ndarray, "U Z"]
    cutoffs: np.ndarray
    levels: np.ndarray
    normalized: bool

    @property
    def bits(self) -> int:
        """Bits of a dimension."""
        return len(self.levels).bit_length() - 1

    @property
    def table(self) -> Float[np.ndarray, "256 each"]:
        """The values of the dimensions that each byte holds."""
        each, byte = 8 // self.bits, np.arange(256)[:, None]
        return self.levels[byte >> (np.arange(each) * self.bits) & (len(self.levels) - 1)].astype(np.float32)

    def save(self, folder: Path) -> None:
        """Write it to a folder, whole or not at all."""
        temporary = folder / ".codec.npz"
        np.savez(temporary, **self._asdict())
        temporary.replace(folder / "codec.npz")


def load(folder: Path) -> Codec | None:
    """The codec of a folder, or None where there is none yet."""
    if not (folder / "codec.npz").exists():
        return None
    with np.load(folder / "codec.npz", allow_pickle=False) as saved:
        return Codec(saved["centroids"], saved["cutoffs"], saved["levels"], bool(saved["normalized"]))


@jax.jit
def nearest(centroids: Float[Array, "U Z"], vectors: Float[Array, "T Z"]) -> Int[Array, "T"]:
    """The nearest centroid of each vector."""
    return jnp.argmax(vectors @ centroids.T - 0.5 * (centroids**2).sum(axis=1), axis=1)


@jax.jit
def _sums(centroids: Float[Array, "U Z"], vectors: Float[Array, "T Z"], weights: Float[Array, "T"]):
    """Sum of the vectors nearest to each centroid, and how many they are; `weights` is 0 for padding."""
    codes, U = nearest(centroids, vectors), centroids.shape[0]
    totals = jax.ops.segment_sum(vectors * weights[:, None], codes, U)
    return totals, jax.ops.segment_sum(weights, codes, U)


@functools.partial(jax.jit, static_argnums=3)
def _moved(centroids: Float[Array, "U Z"], totals: Float[Array, "U Z"], counts: Float[Array, "U"], normalized: bool):
    """Centroids moved to the mean of the vectors nearest to them."""
    means = totals / jnp.maximum(counts, 1)[:, None]
    return jnp.where(counts[:, None] > 0, normalize(means) if normalized else means, centroids)


def _chunks(vectors: np.ndarray):
    """Vectors in chunks of one size, the last padded with zeros, and how many of each are real."""
    for start in range(0, len(vectors), _CHUNK):
        chunk = vectors[start : start + _CHUNK].astype(np.float32)
        padding = min(_CHUNK, 1 << max(0, len(vectors) - 1).bit_length()) - len(chunk)
        yield np.pad(chunk, ((0, padding), (0, 0))), len(chunk)


def kmeans(vectors: Float[np.ndarray, "T Z"], count: int, normalized: bool, seed: int = 0) -> Float[np.ndarray, "U Z"]:
    """Cluster vectors by Lloyd's algorithm from drawn ones; a centroid that nothing is nearest to stays."""
    drawn = np.random.default_rng(seed).choice(len(vectors), count, replace=False)
    centroids = jnp.asarray(vectors[np.sort(drawn)], jnp.float32)
    for _ in range(_ITERATIONS):
        totals, counts = jnp.zeros_like(centroids), jnp.zeros(count)
        for chunk, real in _chunks(vectors):
            more, counted = _sums(centroids, chunk, (np.arange(len(chunk)) < real).astype(np.float32))
            totals, counts = totals + more, counts + counted
        centroids = _moved(centroids, totals, counts, normalized)
    return np.asarray(centroids)


def train(vectors: Float[np.ndarray, "T Z"], centroids: int, bits: int, normalized: bool) -> Codec:
    """Learn centroids, and the values that residuals are rounded to: quantiles, so that each is as frequent."""
    rng = np.random.default_rng(0)
    held_out = rng.choice(len(vectors), max(1, min(len(vectors) // 20, 50_000)), replace=False)
    clustered = np.delete(vectors, held_out, axis=0) if len(vectors) > centroids + len(held_out) else vectors
    found = kmeans(clustered, centroids, normalized)
    sample = vectors[held_out].astype(np.float32)
    residuals = sample - found[_codes(found, sample)]
    steps = np.arange(1 << bits) / (1 << bits)
    quantiles = lambda fractions: np.quantile(residuals, fractions).astype(np.float32)
    return Codec(found, quantiles(steps[1:]), quantiles(steps + steps[1] / 2), normalized)


def _codes(centroids: np.ndarray, vectors: np.ndarray) -> Int[np.ndarray, "T"]:
    found = [np.asarray(nearest(centroids, chunk))[:real] for chunk, real in _chunks(vectors)]
    return np.concatenate(found) if found else np.zeros(0, np.int32)


def compress(codec: Codec, vectors: Float[np.ndarray, "T Z"]) -> tuple[np.ndarray, UInt8[np.ndarray, "T bytes"]]:
    """Compress vectors to the number of their centroid and their residual."""
    codes = _codes(codec.centroids, vectors)
    levels = np.searchsorted(codec.cutoffs, vectors.astype(np.float32) - codec.centroids[codes], side="right")
    each = 8 // codec.bits
    packed = levels.reshape(len(vectors), -1, each) << (np.arange(each) * codec.bits)
    return codes.astype(np.uint32), packed.sum(axis=-1).astype(np.uint8)


@functools.partial(jax.jit, static_argnames="normalized")
def decompress(
    centroids: Float[Array, "U Z"],
    table: Float[Array, "256 each"],
    codes: Array,
    residuals: UInt8[Array, "*rows bytes"],
    normalized: bool,
) -> Float[Array, "*rows Z"]:
    """Vectors again, of length 1 where they had it."""
    found = centroids[codes] + table[residuals].reshape(*codes.shape, -1)
    return normalize(found) if normalized else found
