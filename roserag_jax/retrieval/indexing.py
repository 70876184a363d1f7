"""Build an index on disk, or bring it up to date with its corpus.

A corpus consists of units (documents, or rows), each with a key over its name and content. Units whose key the index
has are left as they are, new ones are added, those that are gone are removed. So a changed corpus costs what changed,
and a build that was stopped resumes: what was committed is in the index.
"""

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import resource
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from etils import epath

from roserag_jax.errors import UserError, first_line
from roserag_jax.hub import model_files
from roserag_jax.hub.tokenizer import read_tokenizer
from roserag_jax.rag.corpora import Chunking, Corpus
from roserag_jax.retrieval import bm25
from roserag_jax.retrieval.bm25 import schema
from roserag_jax.retrieval.index import (
    BUILDING,
    LOCK,
    MANIFEST,
    NUMBERS,
    VERSION,
    Index,
    check_sizes,
    disk_size,
    read_manifest,
)
from roserag_jax.user_cache import user_cache
from roserag_jax.workdir import write_atomic

COMMIT_SECONDS = 30  # of work that a stopped build repeats
WRITER_BYTES = 512 << 20
_SLICE = 200_000  # passages whose numbers are read at once


def open_index(config) -> Index:
    """Open the index that the configuration names, brought up to date with its corpus where that is named too.

    Without `config.index` the index of a corpus is kept in the user's cache, by the corpus' path and chunking.
    """
    if not config.retrieve.corpus:
        return Index(Path(os.path.expanduser(config.index)))
    corpus = open_corpus(config)
    return update(folder_of(config, corpus), corpus)


def open_corpus(config) -> Corpus:
    """The corpus that the configuration names, with its documents cut as it says."""
    options = config.retrieve
    cut = Chunking(options.chunk_size, options.chunk_overlap, options.chunk_title)
    if options.chunk_unit == "words":
        return Corpus(options.corpus, cut)
    name = chunk_tokenizer(config)
    path = model_files.resolve_path(name, weights=False, option="tokenizer")
    tokenizer = read_tokenizer(path)

    def token_starts(text: str) -> list[int]:
        found = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        return [start for start, _ in found["offset_mapping"]]

    unit = f"tokens of {model_files.fingerprint(name, weights=False)}"
    return Corpus(options.corpus, cut._replace(unit=unit), token_starts)


def chunk_tokenizer(config) -> str:
    """The model whose tokens documents are cut by; empty where words are counted."""
    options = config.retrieve
    counted = options.chunk_unit == "tokens"
    return (options.colbert or options.dense or config.tokenizer or config.model) if counted else ""


def folder_of(config, corpus: Corpus) -> Path:
    """The folder that the configuration names for the index of a corpus, or one in the user's cache.

    Raises:
      UserError: neither is there.
    """
    if config.index:
        return Path(os.path.expanduser(config.index))
    name = hashlib.sha256(json.dumps(_recipe(corpus)).encode()).hexdigest()[:16]
    cache = user_cache()
    if cache is None:
        raise UserError("config.index is empty and this user has no home for a cache: name the index's folder.")
    return cache / "indexes" / name


def update(folder: Path, corpus: Corpus, verify: bool = False) -> Index:
    """Bring the index of a folder up to date with a corpus, and open it before another run can change it.

    Args:
      verify: check every file against its digest, and read the corpus even if sizes and times are as they were.

    Raises:
      UserError: the folder is something else or damaged, is the index of another corpus, or cannot be written.
    """
    is_ours = any((folder / name).exists() for name in (MANIFEST, BUILDING, LOCK))
    if folder.is_dir() and not is_ours and any(folder.iterdir()):
        raise UserError(f"{folder} is not empty and not an index: name another folder in config.index.")
    try:
        with writing("index", folder):
            if not verify:
                with locked(folder, shared=True):
                    if _is_up_to_date(folder, corpus):
                        return Index(folder)
            with locked(folder):
                _update(folder, corpus, verify)
                return Index(folder)
    except ValueError as error:  # the library's
        raise UserError(f"The index {folder} cannot be written: {first_line(error)}.") from error


def _is_up_to_date(folder: Path, corpus: Corpus) -> bool:
    """Whether the index of a folder is that of a corpus whose files are as they were."""
    manifest, wanted = read_manifest(folder), _recipe(corpus) | {"signature": corpus.signature()}
    return manifest is not None and all(manifest[name] == value for name, value in wanted.items())


def _update(folder: Path, corpus: Corpus, verify: bool) -> None:
    import tantivy

    manifest = _verified(folder, corpus, verify)
    signature = corpus.signature()  # before it is read: what changes meanwhile is noticed next time
    if manifest and manifest["signature"] == signature and not verify:
        return
    first = _begin(folder, corpus, manifest)
    index = tantivy.Index(schema(), path=str(folder))
    changes = _Changes(index, folder, first)
    writer = index.writer(heap_size=WRITER_BYTES, num_threads=1)
    for unit in corpus.units():
        if changes.is_new(unit.key):
            for passage in corpus.read(unit):
                writer.add_document(changes.document(passage))
            if changes.is_time_to_commit():
                writer.commit()
    removed = changes.removed()
    for key in removed:
        # Not `delete_documents_by_term`, which takes the number for a signed one and finds nothing.
        writer.delete_documents_by_query(tantivy.Query.term_query(schema(), "unit", int(key), "basic"))
    if changes.added or len(removed):
        writer.commit()
        changes.report(final=True)
    writer.wait_merging_threads()
    index.reload()
    numbers, units = _fields(index.searcher(), "number", "unit")
    corpus.check(len(numbers))
    if changes.added or len(removed) or corpus.left_out:
        counts = f"{changes.added} passages added, {len(removed)} documents or rows removed"
        print(f"{folder}: {len(numbers)} passages of {corpus.path}; {counts}{corpus.remark()}.")
    np.save(folder / NUMBERS, np.sort(numbers))
    content = hashlib.sha256(np.unique(units).tobytes() + json.dumps(corpus.chunking).encode()).hexdigest()
    _write_manifest(folder, corpus, signature, content, changes.next)


def _verified(folder: Path, corpus: Corpus, verify: bool) -> dict | None:
    """The manifest of an index that can be updated; an index of another version or chunking is deleted first."""
    manifest, recipe = read_manifest(folder), _recipe(corpus)
    before = manifest or _read_building(folder)
    if before is None:
        return None
    if before["corpus"] != recipe["corpus"] and os.path.exists(before["corpus"]):  # not the same, moved
        raise UserError(
            f"{folder} is the index of {before['corpus']}, not of {recipe['corpus']}: name another folder in "
            "config.index, or delete this one."
        )
    if manifest:
        check_sizes(folder, manifest)
        if verify:
            _check_digests(folder, manifest)
    if any(before[name] != recipe[name] for name in ("version", "chunking")):
        print(f"{folder} was built with other options ({before['chunking']}, now {recipe['chunking']}): rebuilding it.")
        for entry in folder.iterdir():
            if entry.name != LOCK:
                shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
        return None
    return manifest


def _read_building(folder: Path) -> dict | None:
    """What an index that is being built is made from; None where none is."""
    return read_manifest(folder, ("version", "chunking", "corpus", "next"), name=BUILDING)


def _recipe(corpus: Corpus) -> dict:
    """What an index is made from, as its manifest has it."""
    path = corpus.path if corpus.local is None else os.path.abspath(corpus.local)
    return {"version": VERSION, "chunking": list(corpus.chunking), "corpus": path}


def _begin(folder: Path, corpus: Corpus, manifest: dict | None) -> int:
    """Mark an index as one that is being built, until its manifest is back.

    Returns:
      The first number that no passage ever had, as far as is known: the vectors of a passage go by its number.
    """
    first = (manifest or _read_building(folder) or {"next": 0})["next"]
    write_atomic(epath.Path(folder / BUILDING), json.dumps(_recipe(corpus) | {"next": first}))
    (folder / MANIFEST).unlink(missing_ok=True)
    return first


def _write_manifest(folder: Path, corpus: Corpus, signature: str, content: str, following: int) -> None:
    for private in folder.glob("*.json"):  # as the library makes them: nobody else could open the index
        private.chmod((folder / LOCK).stat().st_mode)
    # Not the folders of vectors, which have manifests of their own.
    names = [e.name for e in sorted(folder.iterdir()) if e.is_file() and e.name[0] != "." and e.name != MANIFEST]
    manifest = {
        **_recipe(corpus),
        "signature": signature,
        "content": content,
        "next": following,
        "files": {name: [(folder / name).stat().st_size, _digest(folder / name)] for name in names},
    }
    write_atomic(epath.Path(folder / MANIFEST), json.dumps(manifest, indent=1))
    (folder / BUILDING).unlink(missing_ok=True)


def _digest(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _check_digests(folder: Path, manifest: dict) -> None:
    for name, (_, digest) in manifest["files"].items():
        if _digest(folder / name) != digest:
            raise UserError(f"{folder / name} is damaged: delete the folder to have the index built anew.")


def _fields(searcher: Any, *names: str) -> list[np.ndarray]:
    """Fields of all passages, in one order."""
    import tantivy

    last = searcher.search(tantivy.Query.all_query(), 1, count=False, order_by_field="number").hits
    highest, found = last[0][0] if last else -1, [[] for _ in names]
    for start in range(0, highest + 1, _SLICE):
        query = tantivy.Query.range_query(
            schema(), "number", tantivy.FieldType.Unsigned, start, start + _SLICE, include_upper=False
        )
        addresses = [address for _, address in searcher.search(query, _SLICE, count=False).hits]
        for values, name in zip(found, names, strict=True):
            values.append(np.array(searcher.fast_field_values(name, addresses), np.uint64))
    return [np.concatenate(values) if values else np.zeros(0, np.uint64) for values in found]


class _Changes:
    """Which units of a corpus are new to an index, which of the index's are gone, and how far the update is."""

    def __init__(self, index: Any, folder: Path, first: int):
        numbers, units = _fields(index.searcher(), "number", "unit")
        self.old = np.unique(units)
        self.seen = np.zeros(len(self.old), bool)
        self.next, self.new, self.folder = max(first, int(numbers.max(initial=0)) + bool(len(numbers))), set(), folder
        self.added, self.unit = 0, 0
        self.start = self.committed = self.reported = time.monotonic()
        if len(numbers):
            print(f"{folder}: {len(numbers)} passages are there; adding what is new.", file=sys.stderr)

    def is_new(self, key: int) -> bool:
        """Whether a unit has to be added."""
        self.unit = key
        if len(self.old):
            at = min(int(np.searchsorted(self.old, np.uint64(key))), len(self.old) - 1)
            if self.old[at] == key:
                self.seen[at] = True
                return False
        if key in self.new:
            return False
        self.new.add(key)
        return True

    def document(self, passage: dict) -> Any:
        """A passage of the new unit as the index takes it."""
        made, _ = bm25.document(passage, self.next, self.unit)
        self.next, self.added = self.next + 1, self.added + 1
        return made

    def removed(self) -> np.ndarray:
        """Keys of the units that the corpus no longer has."""
        return self.old[~self.seen]

    def is_time_to_commit(self) -> bool:
        """Whether what was added since the last commit should be kept from being lost; reports progress too."""
        self.report()
        if time.monotonic() - self.committed < COMMIT_SECONDS:
            return False
        self.committed = time.monotonic()
        return True

    def report(self, final: bool = False) -> None:
        """Print passages, passages per second, size and memory, every few seconds."""
        now = time.monotonic()
        if not final and now - self.reported < 5:
            return
        self.reported = now
        size = disk_size(self.folder)
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        rate = self.added / max(now - self.start, 1e-9)
        print(
            f"index: {self.added:,} passages added, {rate:,.0f}/s, {now - self.start:.0f} s elapsed, "
            f"{size / 1e6:,.0f} MB on disk, {memory / 1e9:.2f} GB of memory",
            file=sys.stderr,
            flush=True,
        )


@contextlib.contextmanager
def writing(what: str, folder: Path) -> Iterator[None]:
    """Name what cannot be written in errors of the disk; a full one has a message of its own."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise UserError(f"The {what} {folder} cannot be written: {first_line(error)}.") from error


@contextlib.contextmanager
def locked(folder: Path, shared: bool = False) -> Iterator[None]:
    """Hold an index for one writer, or `shared` among those who want it unchanged for a while.

    An index that is open needs no lock. A file system without locks is not locked.
    """
    kind = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = (folder / LOCK).open("a+")
    except OSError as error:
        if shared and error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):  # nor can anything be changed
            yield
            return
        raise
    with handle:
        try:
            fcntl.flock(handle, kind | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"{folder} is in use by another run that builds it; waiting for it.", file=sys.stderr)
            fcntl.flock(handle, kind)
        except OSError as error:
            if error.errno not in (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP):
                raise
        yield
