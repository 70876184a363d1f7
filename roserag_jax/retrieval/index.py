"""BM25 over a corpus on disk: opened memory-mapped in a moment, shared by all runs that name it.

It is searched as `retrieval.bm25` searches passages in memory. `retrieval.indexing` builds it. A folder holds tantivy's
files, `numbers.npy` (the passages that there are, in the order in which they came) and `manifest.json`, which is
written last and names the size and digest of every other file. Folders in it hold vectors (`retrieval.vectors`).
"""

import contextlib
import json
import os
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from roserag_jax.errors import UserError, first_line
from roserag_jax.retrieval.bm25 import Searcher, schema

VERSION = 2  # of what is indexed and how; an index of another one is built anew
_FIELDS = ("version", "corpus", "chunking", "signature", "content", "next", "files")
MANIFEST, NUMBERS = "manifest.json", "numbers.npy"
LOCK, BUILDING = ".lock", ".building.json"  # the latter is there from the start of an update to its end


def read_manifest(
    folder: Path, fields: tuple[str, ...] = _FIELDS, what: str = "index", name: str = MANIFEST
) -> dict | None:
    """The manifest of an index, or with their own `fields` that of vectors or of a build; None where there is none.

    Raises:
      UserError: it is damaged.
    """
    try:
        manifest = json.loads((folder / name).read_bytes())
        return {field: manifest[field] for field in fields}
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError, RecursionError, OSError) as error:
        raise UserError(
            f"{folder / name} is damaged ({first_line(error)}): delete the folder to have the {what} built anew."
        ) from error


@contextlib.contextmanager
def _damage_named(folder: Path) -> Iterator[None]:
    """Errors of the library as one that names the folder; it says all of them by ValueError and OSError."""
    try:
        yield
    except (ValueError, OSError) as error:
        why = first_line(error)
        raise UserError(f"{folder} is damaged ({why}): delete the folder to have the index built anew.") from error


@contextlib.contextmanager
def _openable(folder: Path) -> Iterator[Path]:
    """The folder; or, on a read-only disk or as another user, a folder of links to its files while it is opened.

    The library makes a lock file beside an index that it opens.
    """
    try:
        (folder / ".tantivy-meta.lock").open("a").close()
    except OSError:
        with tempfile.TemporaryDirectory() as links:
            for file in folder.iterdir():
                if not file.name.endswith(LOCK):
                    (Path(links) / file.name).symlink_to(file.absolute())
            yield Path(links)
    else:
        yield folder


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


class Index(Searcher):
    """BM25 over the passages of a folder that `indexing.update` has made.

    Raises:
      UserError: the folder is not an index, or is damaged.
    """

    def __init__(self, folder: Path):
        import tantivy

        self.folder = folder
        manifest = read_manifest(folder)
        if manifest is None:
            unfinished = (folder / BUILDING).exists()
            what = "is not finished (a run builds it, or was stopped)" if unfinished else "is not an index"
            raise UserError(f"{folder} {what}; build it with roserag_jax.index.")
        if manifest["version"] != VERSION:
            raise UserError(f"{folder} is an index of another version; build it anew with roserag_jax.index.")
        check_sizes(folder, manifest)
        self.manifest, self.content = manifest, manifest["content"]
        with _damage_named(folder), _openable(folder) as path:
            self.passages = Passages(self)
            super().__init__(tantivy.Index(schema(), path=str(path)), len(self.passages))

    def __len__(self) -> int:
        return self.count

    def search(self, queries: list[str], k: int) -> list[list[dict]]:
        """As `Searcher.search`.

        Raises:
          UserError: the folder is damaged.
        """
        with _damage_named(self.folder):
            return super().search(queries, k)


def disk_size(folder: Path) -> int:
    """Bytes of the files of a folder, also while some come and go, as those of a run that writes an index do."""
    total = 0
    for entry in os.scandir(folder):
        with contextlib.suppress(FileNotFoundError):
            total += entry.stat().st_size if entry.is_file() else 0
    return total


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
        if not os.access(folder / name, os.R_OK):
            raise UserError(f"{folder / name} cannot be read: you have no permission to.")
