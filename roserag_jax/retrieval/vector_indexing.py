"""Build the vectors of an index's passages, or bring them up to date with it.

Passages are encoded in slices of consecutive numbers, and each slice becomes a shard: a build that was stopped resumes
with the slices that are missing, a changed corpus costs the passages that are new, and several processes share the
slices out among them. Vectors of passages that are gone stay until they are the most, and are not found.
"""

import contextlib
import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import numpy as np
from etils import epath

from roserag_jax.distributed import processes
from roserag_jax.errors import UserError
from roserag_jax.progress import Progress
from roserag_jax.retrieval import codec
from roserag_jax.retrieval.index import MANIFEST, Index, check_sizes, read_manifest
from roserag_jax.retrieval.indexing import locked, writing
from roserag_jax.retrieval.vectors import Shard, TextVectors, open_shards
from roserag_jax.workdir import write_atomic

VERSION = 1
SLICE = 4096  # passages of a shard: what a stopped build encodes again, and what is between two lines of progress
_SLICE_ON_CPU = 1024  # half a minute to a minute of work
_FIELDS = ("version", "encoder", "bits", "passages", "files")
_SAMPLE = 16  # ColBERT's: 16 sqrt(120 R) passages are clustered, into about 16 sqrt(T) centroids
_MOST_SAMPLED = 200_000  # passages: 4 GB of float16


def folder_name(kind: str, fingerprint: str, bits: int) -> str:
    """The name of the folder of vectors by one encoder and compression."""
    return f"{kind}-{_sha256(fingerprint.encode())[:12]}-{f'{bits}bit' if bits else 'float16'}"


def update(
    folder: Path,
    index: Index,
    encoder: Callable[[], TextVectors],
    *,
    fingerprint: str,
    bits: int = 0,
    normalized: bool = True,
    share: tuple[int, int] = (0, 1),
    verify: bool = False,
) -> None:
    """Bring the vectors in a folder up to date with an index.

    Args:
      encoder: makes what encodes passages, if any are to be encoded.
      fingerprint: of the encoder.
      bits: of a dimension of the residuals; 0 keeps vectors in float16.
      share: this process' index and the number of processes; all of them call this.
      verify: check every file against its digest.

    Raises:
      UserError: a file is damaged, or another run has changed the index since it was opened.
    """
    numbers = np.asarray(index.passages.numbers)
    wanted = {"version": VERSION, "encoder": fingerprint, "bits": bits, "passages": _sha256(numbers.tobytes())}
    is_first, several, stale = share[0] == 0, share[1] > 1, False
    with writing("vectors", folder):
        if is_first:
            with _held(index, folder, shared=True):
                stale = not _is_up_to_date(folder, wanted, verify)
        if several:
            stale = processes.gather("vectors are stale", stale)[0]
        if stale:
            with _held(index, folder) if is_first else contextlib.nullcontext():
                _update(folder, index, encoder, wanted, numbers, normalized, share)


@contextlib.contextmanager
def _held(index: Index, folder: Path, shared: bool = False) -> Iterator[None]:
    """Hold a folder of vectors, as `locked` does, while nobody changes the index that they are of.

    Raises:
      UserError: somebody has: the numbers of its passages may be those of others by now.
    """
    with locked(index.folder, shared=True), locked(folder, shared):
        if read_manifest(index.folder) != index.manifest:
            raise UserError(f"{index.folder} was changed by another run meanwhile; run this command again.")
        yield


def _is_up_to_date(folder: Path, wanted: dict, verify: bool) -> bool:
    """Whether the vectors of a folder are those that are wanted, after checking its files."""
    manifest = read_manifest(folder, _FIELDS, "vectors")
    if manifest is None:
        return False
    check_sizes(folder, manifest)
    for name, (_, digest) in manifest["files"].items() if verify else ():
        if _digest(folder / name) != digest:
            raise UserError(f"{folder / name} is damaged: delete the folder to have the vectors built anew.")
    return all(manifest[name] == value for name, value in wanted.items())


def _update(
    folder: Path,
    index: Index,
    encoder: Callable[[], TextVectors],
    wanted: dict,
    numbers: np.ndarray,
    normalized: bool,
    share: tuple[int, int],
) -> None:
    together, bits = processes.barrier if share[1] > 1 else lambda name: None, wanted["bits"]
    if share[0] == 0:
        (folder / MANIFEST).unlink(missing_ok=True)
        _drop_stale(folder, numbers)
    together("vectors are being built")
    missing = np.setdiff1d(numbers, _numbers(open_shards(folder)))
    together("missing vectors are known")
    if len(missing):
        makes = encoder()
        if bits and share[0] == 0 and codec.load(folder) is None:
            _train(index, makes, numbers, bits, normalized).save(folder)
        together("centroids are trained")
        _encode(folder, index, makes, numbers, missing, share)
    together("vectors are built")
    if share[0] == 0:
        if bits:
            _write_lists(folder)
        _write_manifest(folder, wanted)
    together("vectors are there")


def _numbers(shards: list[Shard]) -> np.ndarray:
    return np.concatenate([shard.numbers for shard in shards]) if shards else np.zeros(0, np.uint64)


def _drop_stale(folder: Path, numbers: np.ndarray) -> None:
    """Delete all shards if most of their passages are gone, so that what is left over does not pile up."""
    there = _numbers(open_shards(folder))
    if len(there) and 2 * np.isin(there, numbers).sum() < len(there):
        for file in folder.iterdir():
            if not file.name.startswith("."):  # the lock
                file.unlink()


def _encode(
    folder: Path, index: Index, encoder: TextVectors, numbers: np.ndarray, missing: np.ndarray, share: tuple[int, int]
) -> None:
    """Encode this process' share of the missing passages, slice by slice."""
    size = min(SLICE, _SLICE_ON_CPU) if jax.default_backend() == "cpu" else SLICE
    slices = [missing[start : start + size] for start in range(0, len(missing), size)]
    slices, compressing = slices[share[0] :: share[1]], codec.load(folder)
    progress = Progress(f"vectors in {folder.name}", sum(map(len, slices)), "passages")
    done = 0
    for each in slices:
        vectors = encoder.encode_passages([index.passages[place] for place in np.searchsorted(numbers, each)])
        lengths = np.array([len(v) for v in vectors], np.int32)
        flat = np.concatenate(vectors)
        if compressing:
            codes, residuals = codec.compress(compressing, flat)
            arrays = {"codes": codes, "residuals": residuals}
        else:
            arrays = {"vectors": flat.astype(np.float16)}
        _write_shard(folder, {"numbers": each, "lengths": lengths} | arrays)
        done += len(each)
        progress.update(done)


def _write_shard(folder: Path, arrays: dict[str, np.ndarray]) -> None:
    stem = f"shard-{int(arrays['numbers'][0]):012d}-{int(arrays['numbers'][-1]):012d}"
    files = {}
    for name, array in arrays.items():
        file = folder / f"{stem}.{name}.npy"
        np.save(file, array)
        files[file.name] = [file.stat().st_size, _digest(file)]
    write_atomic(epath.Path(folder / f"{stem}.json"), json.dumps(files))


def _train(index: Index, encoder: TextVectors, numbers: np.ndarray, bits: int, normalized: bool) -> codec.Codec:
    """Learn the compression from a sample of the passages."""
    if encoder.size % (8 // bits):
        raise UserError(f"config.retrieve.bits={bits}: vectors of {encoder.size} dimensions do not fill whole bytes.")
    count = min(len(numbers), 1 + int(_SAMPLE * (120 * len(numbers)) ** 0.5), _MOST_SAMPLED)
    places = np.sort(np.random.default_rng(0).choice(len(numbers), count, replace=False))
    parts = []
    for start in range(0, count, SLICE):
        vectors = encoder.encode_passages([index.passages[place] for place in places[start : start + SLICE]])
        parts.append(np.concatenate(vectors).astype(np.float16))
    flat = np.concatenate(parts)
    total = len(flat) * len(numbers) / count
    centroids = min(1 << int(np.log2(_SAMPLE * total**0.5)), max(1, len(flat) // 4))
    print(f"vectors: clustering {len(flat):,} of {count:,} passages into {centroids:,} centroids.", flush=True)
    return codec.train(flat, centroids, bits, normalized)


def _write_lists(folder: Path) -> None:
    """Write the inverted lists: for each centroid the rows (passages, over all shards) with a vector at it."""
    pairs, start = [], 0
    for shard in open_shards(folder):
        rows = np.repeat(np.arange(start, start + len(shard.numbers), dtype=np.uint64), np.diff(shard.offsets))
        pairs.append(np.unique((np.asarray(shard.stored[0]).astype(np.uint64) << np.uint64(32)) | rows))
        start += len(shard.numbers)
    pairs = np.unique(np.concatenate(pairs))
    count = len(codec.load(folder).centroids)
    bounds = np.searchsorted(pairs, np.arange(count + 1, dtype=np.uint64) << np.uint64(32))
    np.save(folder / "lists.npy", (pairs & np.uint64(0xFFFFFFFF)).astype(np.uint32))
    np.save(folder / "list_starts.npy", bounds.astype(np.int64))


def _write_manifest(folder: Path, wanted: dict) -> None:
    files = {}
    for shard in folder.glob("shard-*.json"):
        files |= json.loads(shard.read_text())
    for name in ("codec.npz", "lists.npy", "list_starts.npy"):
        if (folder / name).exists():
            files[name] = [(folder / name).stat().st_size, _digest(folder / name)]
    write_atomic(epath.Path(folder / MANIFEST), json.dumps(wanted | {"files": files}, indent=1))


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _digest(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
