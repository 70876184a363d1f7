"""Search among the vectors of a corpus on disk: exactly, over all devices, or among the nearest centroids' passages.

Axes: Q queries, R rows (passages), W vectors of a passage, T vectors, Z size of a vector, U centroids, X devices.

A passage has a vector for each word piece (ColBERT) or a single one (dense); the score is MaxSim, which for single
vectors is the dot product. `retrieval.vector_indexing` makes the folder: shards of `numbers.npy` (the passages' numbers
in the index that they are from), `lengths.npy` and either `vectors.npy` in float16 or `codes.npy` and `residuals.npy`,
each with a `.json` that is written last; `codec.npz` and the inverted lists where vectors are compressed; a manifest.
"""

import functools
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int, UInt

from roserag_jax.retrieval import codec
from roserag_jax.retrieval.batches import LENGTHS
from roserag_jax.retrieval.bm25 import context
from roserag_jax.retrieval.colbert import maxsim
from roserag_jax.retrieval.index import Index

QUERIES = 16  # compared with a block at once
_BLOCK_VECTORS = {"cpu": 1 << 14}  # of a device
_BLOCK_VECTORS_ELSEWHERE = 1 << 17
_KEPT = 256  # passages whose vectors are decompressed after the comparison of centroids alone


class TextVectors(Protocol):
    """Makes vectors of texts: ColBERT, or a sentence encoder."""

    size: int

    def encode_queries(self, queries: Sequence[str]) -> Float[np.ndarray, "Q W Z"]:
        """The vectors of queries."""

    def encode_passages(self, passages: Sequence[dict]) -> list[Float[np.ndarray, "W Z"]]:
        """The vectors of passages `{title, text}`."""


class Shard(NamedTuple):
    """Vectors of consecutive passages, memory-mapped.

    Attributes:
      numbers: of the passages [R], ascending.
      offsets: where each passage's vectors begin [R + 1].
      stored: the vectors, or their codes and residuals.
    """

    numbers: np.ndarray
    offsets: np.ndarray
    stored: tuple[np.ndarray, ...]


def open_shards(folder: Path) -> list[Shard]:
    """Open the finished shards of a folder, by number."""
    shards = []
    for file in sorted(folder.glob("shard-*.json")):
        read = lambda name, mode="r", file=file: np.load(f"{file.with_suffix('')}.{name}.npy", mmap_mode=mode)
        lengths = read("lengths")
        names = ("codes", "residuals") if (folder / "codec.npz").exists() else ("vectors",)
        offsets = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
        shards.append(Shard(read("numbers"), offsets, tuple(map(read, names))))
    return shards


class _Block(NamedTuple):
    """Passages of similar length, padded; `places` is -1 for rows of padding."""

    places: Int[np.ndarray, "R"]
    lengths: Array
    stored: tuple[Array, ...]


@functools.partial(jax.jit, static_argnames=("k", "mesh", "normalized"))
def _best(queries, lengths, stored, tables, *, k: int, mesh: Mesh, normalized: bool):
    """The k best rows of a block for each query: each device finds those of its rows, then the best of all are taken.

    Returns:
      Scores [Q, k] and rows [Q, k], best first, equal ones by row.
    """
    rows, everywhere = PartitionSpec(mesh.axis_names), PartitionSpec()
    each = lengths.shape[0] // mesh.size

    def best_here(queries, lengths, stored, tables):
        vectors = codec.decompress(*tables, *stored, normalized) if tables else stored[0]
        scores = maxsim(queries, vectors, jnp.arange(vectors.shape[1]) < lengths[:, None])
        scores, found = jax.lax.top_k(jnp.where(lengths > 0, scores, -jnp.inf), min(k, each))
        return scores, found + each * jax.lax.axis_index(mesh.axis_names)

    out = PartitionSpec(None, mesh.axis_names)
    specs = (everywhere, rows, (rows,) * len(stored), (everywhere,) * len(tables))
    scores, found = jax.shard_map(best_here, mesh=mesh, in_specs=specs, out_specs=(out, out), check_vma=False)(
        queries, lengths, stored, tables
    )
    scores, best = jax.lax.top_k(scores, min(k, lengths.shape[0]))
    return scores, jnp.take_along_axis(found, best, axis=1)


class VectorStore:
    """The vectors of a folder.

    Args:
      numbers: of the passages that there are, ascending; others, which the folder may still have, are not found.
      mesh: what the comparison is split over.
    """

    def __init__(self, folder: Path, numbers: UInt[np.ndarray, "R"], mesh: Mesh, normalized: bool = True):
        self.folder, self.mesh, self.codec = folder, mesh, codec.load(folder)
        self.normalized = self.codec.normalized if self.codec else normalized
        self.shards = open_shards(folder)
        self.lists: tuple | None = None  # the inverted lists, opened when needed
        self.rows = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
        platform = mesh.devices.flat[0].platform
        self.block_vectors = mesh.size * _BLOCK_VECTORS.get(platform, _BLOCK_VECTORS_ELSEWHERE)
        everywhere = NamedSharding(mesh, PartitionSpec())
        c = self.codec
        self.tables = jax.device_put((c.centroids, c.table), everywhere) if c else ()
        stored = [shard.numbers for shard in self.shards]
        self.starts = np.cumsum([0, *map(len, stored)])
        self.places = _find(np.asarray(numbers), np.concatenate(stored) if stored else np.zeros(0, np.uint64))
        stored_bytes = sum(part.nbytes for shard in self.shards for part in shard.stored)
        self._resident: list[_Block] | None = [] if 2 * stored_bytes <= _memory(mesh) else None

    def search(
        self, queries: Float[np.ndarray, "Q W Z"], k: int, probe: int = 0
    ) -> list[tuple[np.ndarray, np.ndarray]]:
        """Places and scores of the best passages for each query, at most k, best first, equal ones by place.

        Args:
          probe: compare only passages with a vector at one of this many nearest centroids of a vector of the query
            (PLAID, arXiv 2205.09707); 0 compares all.
        """
        if probe and self.codec:
            return [self._search_near(query[None], k, probe) for query in queries]
        found = []
        for start in range(0, len(queries), QUERIES):
            batch = queries[start : start + QUERIES]
            padded = np.pad(batch, ((0, _rounded(len(batch)) - len(batch)), (0, 0), (0, 0)))
            best = [self._best_of(block, padded, k) for block in self._blocks()]
            places, scores = (np.concatenate(parts, axis=1) for parts in zip(*best, strict=True))
            found += [_first(places[i], scores[i], k) for i in range(len(batch))]
        return found

    def _best_of(self, block: _Block, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        scores, rows = _best(
            queries, block.lengths, block.stored, self.tables, k=k, mesh=self.mesh, normalized=self.normalized
        )
        return block.places[np.asarray(rows)], np.asarray(scores)

    def _blocks(self) -> Iterator[_Block]:
        """All passages in blocks, kept on the devices where they fit."""
        if self._resident:
            yield from self._resident
            return
        made = []
        for shard, start in zip(self.shards, self.starts, strict=False):
            places = self.places[start : start + len(shard.numbers)]
            lengths = np.diff(shard.offsets)
            order = np.argsort(lengths, kind="stable")
            order = order[places[order] >= 0]
            at = 0
            while at < len(order):
                # From the shortest, as long as all fit one padded length.
                W = _padded(int(lengths[order[at]]))
                fitting = int(np.searchsorted(lengths[order[at:]], W, side="right"))
                most = self.mesh.size * max(1, self.block_vectors // (W * self.mesh.size))
                taken = np.sort(order[at : at + min(fitting, most)])
                at += len(taken)
                block = self._block([(shard, taken)], places[taken], W, min(most, self._rows(len(taken))))
                if self._resident is not None:
                    made.append(block)
                yield block
        self._resident = made if self._resident is not None else None

    def _rows(self, count: int) -> int:
        """Rows of a block for so many passages."""
        return self.mesh.size * _rounded(-(-count // self.mesh.size))

    def _block(self, taken: list[tuple[Shard, np.ndarray]], places: np.ndarray, W: int, R: int) -> _Block:
        """Rows of some shards, padded to R passages of W vectors."""
        lengths = np.zeros(R, np.int32)
        parts = [np.zeros((R, W, *part.shape[1:]), part.dtype) for part in taken[0][0].stored]
        at = 0
        for shard, rows in taken:
            here = slice(at, at + len(rows))
            lengths[here] = np.diff(shard.offsets)[rows]
            where = shard.offsets[rows][:, None] + np.arange(W)
            inside = np.arange(W) < lengths[here, None]
            for part, stored in zip(parts, shard.stored, strict=True):
                part[here][inside] = stored[where[inside]]
            at += len(rows)
        return _Block(
            np.concatenate([places, np.full(R - len(places), -1)]),
            jax.device_put(lengths, self.rows),
            tuple(jax.device_put(part, self.rows) for part in parts),
        )

    def _search_near(self, query: Float[np.ndarray, "1 W Z"], k: int, probe: int) -> tuple[np.ndarray, np.ndarray]:
        """Compare the passages near a query's vectors: by their centroids alone, then the best of them exactly."""
        if self.lists is None:
            files = (self.folder / name for name in ("lists.npy", "list_starts.npy"))
            self.lists = tuple(np.load(file, mmap_mode="r") for file in files)
        lists, starts = self.lists
        similar = np.asarray(_similar(query[0], self.tables[0]))  # W U
        near = np.unique(np.argpartition(-similar, min(probe, similar.shape[1]) - 1, axis=1)[:, :probe])
        rows = np.unique(np.concatenate([lists[starts[u] : starts[u + 1]] for u in near]))
        rows = rows[self.places[rows] >= 0]
        if len(rows) > max(_KEPT, 4 * k):
            rough = np.concatenate([_rough(similar, shard, rows) for shard, rows in self._by_shard(rows)])
            rows = np.sort(rows[np.argpartition(-rough, max(_KEPT, 4 * k))[: max(_KEPT, 4 * k)]])
        if not len(rows):
            return np.zeros(0, int), np.zeros(0, np.float32)
        taken = list(self._by_shard(rows))
        longest = max(int(np.diff(shard.offsets)[rows].max()) for shard, rows in taken)
        block = self._block(taken, self.places[rows], _padded(longest), self._rows(len(rows)))
        places, scores = self._best_of(block, query, k)
        return _first(places[0], scores[0], k)

    def _by_shard(self, rows: np.ndarray) -> Iterator[tuple[Shard, np.ndarray]]:
        """Rows of the store, ascending, as rows of each shard."""
        for shard, start in zip(self.shards, self.starts, strict=False):
            low, high = np.searchsorted(rows, [start, start + len(shard.numbers)])
            if high > low:
                yield shard, rows[low:high] - start


@jax.jit
def _similar(query: Float[Array, "W Z"], centroids: Float[Array, "U Z"]) -> Float[Array, "W U"]:
    return query @ centroids.T


def _rough(similar: Float[np.ndarray, "W U"], shard: Shard, rows: np.ndarray) -> Float[np.ndarray, "R"]:
    """MaxSim with each vector of a passage replaced by its centroid."""
    lengths = shard.offsets[rows + 1] - shard.offsets[rows]
    first = np.concatenate([[0], np.cumsum(lengths)[:-1]])
    where = np.repeat(shard.offsets[rows] - first, lengths) + np.arange(lengths.sum())
    return np.maximum.reduceat(similar[:, shard.stored[0][where]], first, axis=1).sum(axis=0)


def _first(places: np.ndarray, scores: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """The k best, equal ones by place."""
    order = np.lexsort((places, -scores))
    order = order[(places[order] >= 0) & np.isfinite(scores[order])][:k]
    return places[order], scores[order]


def _find(numbers: np.ndarray, wanted: np.ndarray) -> Int[np.ndarray, "R"]:
    """Where each of the wanted numbers is among ascending numbers; -1 where it is not."""
    at = np.minimum(np.searchsorted(numbers, wanted), max(len(numbers) - 1, 0))
    return np.where(numbers[at] == wanted, at, -1) if len(numbers) else np.full(len(wanted), -1)


def _rounded(count: int) -> int:
    """The next power of two."""
    return 1 << (count - 1).bit_length()


def _padded(length: int) -> int:
    return next((size for size in (1, *LENGTHS) if size >= length), length)


def _memory(mesh: Mesh) -> int:
    """Bytes that vectors may take on a mesh's devices."""
    stats = mesh.devices.flat[0].memory_stats() if mesh.devices.flat[0].platform != "cpu" else None
    if stats and "bytes_limit" in stats:
        return mesh.size * stats["bytes_limit"] * 6 // 10
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 4


class VectorRetriever:
    """Finds passages of an index by their vectors.

    Args:
      index: whose passages the vectors are of.
    """

    def __init__(self, index: Index, encoder: TextVectors, store: VectorStore, probe: int = 0):
        self.index, self.encoder, self.store, self.probe = index, encoder, store, probe

    def search(self, queries: list[str], k: int) -> list[list[dict]]:
        """The best passages for each query, at most k, as contexts `{title, text, score, source?}`, best first."""
        found = self.store.search(self.encoder.encode_queries(queries), k, self.probe)
        passage = lambda place: context(self.index.passages[int(place)])
        return [
            [passage(place) | {"score": float(score)} for place, score in zip(*best, strict=True)] for best in found
        ]
