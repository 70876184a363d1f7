"""BM25 over a corpus on disk: opened memory-mapped in a moment, shared by all runs that name it.

The index is one of `tantivy`, which merges, compresses and searches; words are those of `rag.words`, as in
`retrieval.bm25`. `retrieval.indexing` builds it. A folder holds tantivy's files, `numbers.npy` (the passages that there
are, in the order in which they came) and `manifest.json`, which is written last and names the size and digest of every
other file.
"""

import contextlib
import json
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from roserag_jax.errors import UserError, first_line
from roserag_jax.rag import words

VERSION = 1  # of what is indexed and how; an index of another one is built anew
MANIFEST, NUMBERS = "manifest.json", "numbers.npy"
MAX_TERMS = 1000  # of a question
# As the index stores scores of equal passages to a few digits only, these are those that count.
_DIGITS = 4


def schema() -> Any:
    """The fields of a passage: its number, the unit of the corpus that it belongs to, its terms and itself."""
    import tantivy

    made = tantivy.SchemaBuilder()
    made.add_unsigned_field("number", indexed=True, fast=True)
    made.add_unsigned_field("unit", indexed=True, fast=True)
    made.add_text_field("terms", tokenizer_name="whitespace", index_option="freq")
    made.add_bytes_field("passage", stored=True)
    return made.build()


def read_manifest(folder: Path) -> dict | None:
    """The manifest of an index, or None where there is none.

    Raises:
      UserError: it is damaged.
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_bytes())
        return {name: manifest[name] for name in ("version", "corpus", "chunking", "signature", "content", "files")}
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError, RecursionError, OSError) as error:
        raise UserError(
            f"{folder / MANIFEST} is damaged ({first_line(error)}): delete the folder to have the index built anew."
        ) from error


@contextlib.contextmanager
def _damage_named(folder: Path) -> Iterator[None]:
    """Errors of the library as one that names the folder; it says all of them by ValueError and OSError."""
    try:
        yield
    except (ValueError, OSError) as error:
        why = first_line(error)
        raise UserError(f"{folder} is damaged ({why}): delete the folder to have the index built anew.") from error


class Passages(Sequence):
    """The passages of an index by their place in it; each is read from the disk when it is asked for."""

    def __init__(self, index: "Index"):
        self.index, self.numbers = index, np.load(index.folder / NUMBERS, mmap_mode="r")

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, place: int) -> dict:
        import tantivy

        number = int(self.numbers[place])
        query = tantivy.Query.term_query(self.index.schema, "number", number, "basic")
        ((_, address),) = self.index.searcher.search(query, 1, count=False).hits
        return self.index.passage(address)


class Index:
    """Lucene's BM25 over the passages of a folder that `indexing.update` has made.

    Raises:
      UserError: the folder is not an index, or is damaged.
    """

    def __init__(self, folder: Path):
        import tantivy

        self.folder, self.schema = folder, schema()
        manifest = read_manifest(folder)
        if manifest is None:
            raise UserError(f"{folder} is not an index; build it with roserag_jax.index.")
        if manifest["version"] != VERSION:
            raise UserError(f"{folder} is an index of another version; build it anew with roserag_jax.index.")
        check_sizes(folder, manifest)
        self.content = manifest["content"]
        with _damage_named(folder):
            self.searcher = tantivy.Index(self.schema, path=str(folder)).searcher()
            self.passages = Passages(self)

    def __len__(self) -> int:
        return len(self.passages)

    def search(self, queries: list[str], k: int) -> list[list[dict]]:
        """The best passages for each query, at most k, as contexts `{title, text, score, source?}`, best first.

        A passage that has no word of the query is not found, so there may be fewer, or none.
        """
        with _damage_named(self.folder), ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            return list(pool.map(lambda query: self._search(query, k), queries))

    def _search(self, query: str, k: int) -> list[dict]:
        import tantivy

        terms, most = words.terms(query)[:MAX_TERMS], len(self)
        each = [tantivy.Query.term_query(self.schema, "terms", term, "freq") for term in terms]
        query = tantivy.Query.boolean_query([(tantivy.Occur.Should, one) for one in each])
        limit, hits = min(k + 8, most), []
        while True:  # until all that score as the last one are seen: of equals, those that came first are taken
            hits = [(round(s, _DIGITS), address) for s, address in self.searcher.search(query, limit, count=False).hits]
            if len(hits) < limit or limit == most or hits[-1][0] < hits[k - 1][0]:
                break
            limit = min(4 * limit, most)
        numbers = self.searcher.fast_field_values("number", [address for _, address in hits])
        ranked = sorted(zip(hits, numbers, strict=True), key=lambda hit: (-hit[0][0], hit[1]))[:k]
        return [context(self.passage(address)) | {"score": score} for (score, address), _ in ranked]

    def passage(self, address: Any) -> dict:
        """The passage `{id, title, text, source?}` at one of the library's addresses."""
        return json.loads(bytes(self.searcher.doc(address)["passage"][0]))


def context(passage: dict) -> dict:
    """What a question's row keeps of a passage."""
    return {name: passage[name] for name in ("title", "text", "source") if name in passage}


def check_sizes(folder: Path, manifest: dict) -> None:
    """Raise a UserError where a file of an index is missing or has another size."""
    for name, (size, _) in manifest["files"].items():
        try:
            found = (folder / name).stat().st_size
        except OSError:
            found = None
        if found != size:
            what = "is missing" if found is None else f"has {found} bytes instead of {size}"
            raise UserError(f"{folder / name} {what}: delete the folder to have the index built anew.")
