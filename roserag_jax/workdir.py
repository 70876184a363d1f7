"""The workdir: artifacts that are whole or absent, and manifests that say what each was made from.

An artifact is a file of rows or a folder of files. It is written under another name and moved into place; its manifest
(options, digests of its inputs and of itself, row count) comes last, and without one an artifact does not exist. Long
stages keep finished rows as parts, named by the fingerprint of what they are made from, and go on from them.
"""

import contextlib
import hashlib
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import jax
from etils import epath

from roserag_jax.distributed import processes
from roserag_jax.errors import UserError


class Recipe(NamedTuple):
    """What an artifact is made from: options that change it, and the digests of its inputs by name."""

    options: dict
    inputs: dict[str, str]

    def fingerprint(self, **layout) -> str:
        """Sixteen hex digits over everything, and over what shapes the work but not the result (`layout`)."""
        text = json.dumps([self.options, self.inputs, layout], sort_keys=True, default=list)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def _files_below(folder: epath.Path) -> list[epath.Path]:
    """All files under a folder, in order; epath has no recursive glob."""
    found = []
    for entry in sorted(folder.iterdir()):
        found += _files_below(entry) if entry.is_dir() else [entry]
    return found


def digest(path: epath.Path) -> str:
    """SHA-256 of a file, or of a folder's files and names (manifests excepted)."""
    result = hashlib.sha256()
    files = [path]
    if path.is_dir():
        files = [f for f in _files_below(path) if f.name != "manifest.json"]
    for file in files:
        if path.is_dir():
            result.update(f"{file.relative_to(path)}\0".encode())
        with file.open("rb") as stream:
            while block := stream.read(1 << 20):
                result.update(block)
    return result.hexdigest()


def is_remote(path: epath.Path) -> bool:
    """Whether a path is in a bucket, where files are written whole: nothing is appended or locked."""
    return "://" in str(path)


def write_atomic(path: epath.Path, content: str | bytes) -> None:
    """Write a file so that it is seen whole or not at all."""
    content = content.encode() if isinstance(content, str) else content
    if is_remote(path):  # as a bucket does anyway
        path.write_bytes(content)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.parent / f".{path.name}.tmp"
    temporary.write_bytes(content)
    temporary.replace(path)


def from_jsonl(text: str) -> list[dict]:
    """Rows from JSON lines. Only a line feed ends a line: text may hold other line separators (U+2028) as they are."""
    return [json.loads(line) for line in text.split("\n") if line]


def to_jsonl(rows) -> str:
    """Rows as JSON lines."""
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def resolve_path(path: str) -> epath.Path:
    """A path of the user's, absolute where it is local."""
    found = epath.Path(path)
    if is_remote(found):
        import fsspec

        # gcsfs keeps what a folder held when it looked; of several processes, another may have made something since.
        fsspec.config.conf.setdefault("gcs", {})["use_listings_cache"] = False
        return found
    return found.expanduser().resolve()


class Workdir:
    """Artifacts under one folder, local or remote (`gs://`)."""

    def __init__(self, path: str):
        self.path = resolve_path(path)  # Orbax wants it absolute

    def __truediv__(self, name: str) -> epath.Path:
        return self.path / name

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the folder for one run; the kernel releases it however the run ends. Remote folders are not locked.

        Of several processes, process 0 holds it for all.

        Raises:
          UserError: another run holds it, or it cannot be written.
        """
        with processes.main_first():
            handle = self._locked() if processes.is_main() else contextlib.nullcontext()
        with handle:
            yield

    def _locked(self):
        """What holds the lock while it is open."""
        local = not is_remote(self.path)
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            handle = (self.path / ".lock").open("a") if local else contextlib.nullcontext()
        except ImportError as error:
            raise UserError(f"config.workdir={self.path}: {error} (pip install gcsfs).") from error
        except OSError as error:
            raise UserError(f"config.workdir={self.path} cannot be written: {error.strerror or error}.") from error
        if local:
            import fcntl

            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UserError(
                    f"config.workdir={self.path} is in use by another run; wait for it, or give this run its own."
                ) from None
        return handle

    def _manifest(self, name: str) -> epath.Path:
        path = self.path / name
        return path / "manifest.json" if "." not in path.name else path.with_name(f"{path.name}.manifest.json")

    def manifest(self, name: str) -> dict | None:
        """The manifest of a finished artifact, or None."""
        path = self._manifest(name)
        return json.loads(path.read_text()) if path.exists() else None

    def is_up_to_date(self, name: str, recipe: Recipe) -> bool:
        """Whether the artifact exists and was made from this recipe; if not, print why it is rebuilt.

        Raises:
          UserError: the artifact is not what its stage wrote.
        """
        manifest = self.manifest(name)
        if manifest is None or not (self.path / name).exists():
            return False
        self.verify(name)  # what was changed by hand is not overwritten, whatever else has changed
        changes = [
            f"config.{key} was {manifest['options'].get(key)!r}, now {value!r}"
            for key, value in _plain(recipe.options).items()
            if manifest["options"].get(key) != value
        ]
        changes += [
            f"{key} has changed" for key, value in recipe.inputs.items() if manifest["inputs"].get(key) != value
        ]
        if changes:
            more = f" and {len(changes) - 3} more" if len(changes) > 3 else ""
            print(f"{name} is out of date ({'; '.join(changes[:3])}{more}): rebuilding.")
            return False
        print(f"{name} is up to date: kept.")
        return True

    def verify(self, name: str) -> str:
        """The digest of a finished artifact.

        Raises:
          UserError: the artifact is absent, or is not what its stage wrote.
        """
        manifest, path = self.manifest(name), self.path / name
        if manifest is None or not path.exists():
            raise UserError(f"{path} is missing; run the stage that makes it (`train` runs them all).")
        if digest(path) != manifest["digest"]:
            raise UserError(
                f"{path} was changed or damaged after it was written. Move it away to have it rebuilt (it is never "
                "overwritten unasked)."
            )
        return manifest["digest"]

    def publish(self, name: str, recipe: Recipe, files: dict[str, str | bytes] | str, rows: int) -> None:
        """Put a finished artifact in place: the text of a file, or the content of each file of a folder."""
        self._manifest(name).unlink(missing_ok=True)
        if isinstance(files, str):
            write_atomic(self.path / name, files)
        else:
            for file, content in files.items():
                write_atomic(self.path / name / file, content)
        manifest = {
            "artifact": name,
            "fingerprint": recipe.fingerprint(),
            "options": _plain(recipe.options),
            "inputs": recipe.inputs,
            "rows": rows,
            "digest": digest(self.path / name),
        }
        write_atomic(self._manifest(name), json.dumps(manifest, indent=2, ensure_ascii=False) + "\n")

    def rows(self, name: str) -> list[dict]:
        """The rows of a finished artifact, after checking it."""
        self.verify(name)
        return from_jsonl((self.path / name).read_text())


def _plain(options: dict) -> dict:
    """Options as JSON gives them back, tuples as lists."""
    return json.loads(json.dumps(options, default=list))


def _whole_lines(file: epath.Path) -> bytes:
    """A file without a last line that was cut off, or is just being written."""
    return b"".join(file.read_bytes().rpartition(b"\n")[:2])


class PartialResults:
    """Finished rows of a stage under way, so that a stopped stage repeats only what was being worked on.

    Several processes take turns at the rows, and each appends to a file of its own; in a bucket a row is a file.

    Args:
      ids: of all rows that the stage makes, in their order.
    """

    def __init__(self, workdir: Workdir, stage: str, fingerprint: str, ids: list[str]):
        self.folder = workdir.path / ".parts" / f"{stage}-{fingerprint}"
        self.own = self.folder / f"{jax.process_index():04d}.jsonl"
        self.ids, self.done = ids, {}
        self.read()
        if not is_remote(self.own) and self.own.exists() and self.own.read_bytes() != (whole := _whole_lines(self.own)):
            write_atomic(self.own, whole)

    def read(self) -> None:
        """Find the finished rows, those of other processes too."""
        if self.folder.exists():
            with ThreadPoolExecutor(16) as pool:  # a bucket takes its time for each
                for lines in pool.map(_whole_lines, sorted(self.folder.glob("*.jsonl"))):
                    self.done |= {row["id"]: row for row in from_jsonl(lines.decode())}

    def missing(self) -> list[int]:
        """The rows that this process has to make, by their place."""
        mine = range(jax.process_index(), len(self.ids), jax.process_count())
        return [i for i in mine if self.ids[i] not in self.done]

    def gather(self) -> list[dict]:
        """All rows in their order, once all processes are here with theirs."""
        processes.barrier("parts finished")
        self.read()
        processes.barrier("parts read")  # before the first of them clears the folder
        return [self.done[i] for i in self.ids]

    def add(self, row: dict) -> None:
        """Keep a finished row."""
        if is_remote(self.own):
            (self.folder / f"{self.own.stem}-{len(self.done):08d}.jsonl").write_text(to_jsonl([row]))
        else:
            self.folder.mkdir(parents=True, exist_ok=True)
            with self.own.open("a") as file:
                file.write(to_jsonl([row]))
        self.done[row["id"]] = row

    def clear(self) -> None:
        """Drop the stage's parts, once its artifact is published; those of other options too."""
        if self.folder.parent.exists():
            for folder in self.folder.parent.iterdir():
                if folder.name.rpartition("-")[0] == self.folder.name.rpartition("-")[0]:
                    folder.rmtree()
