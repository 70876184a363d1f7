"""The workdir: artifacts that are whole or absent, and manifests that record what each was made from.

An artifact is a file of rows or a folder of files. It is written under another name and moved into place; its manifest
(options, digests of its inputs and of its own files, row count) comes last, and without one an artifact does not exist.
What else lies in a folder (a README, what an editor or a file manager leaves) plays no part.
"""

import array
import contextlib
import errno
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from etils import epath

from roserag_jax.distributed import processes
from roserag_jax.errors import UserError
from roserag_jax.options.option import not_utf8

# The artifacts by name; those of evaluations are in `eval/`.
RETRIEVED = {"train": "retrieved.jsonl", "eval": "retrieved_eval.jsonl"}
QUESTIONS = {"train": "questions.jsonl", "eval": "questions_eval.jsonl"}
REJECTED = "questions_rejected.jsonl"
VOTES, CANDIDATES, REWARDS = "votes.jsonl", "candidates.jsonl", "rewards.jsonl"
PAIRS = "pairs.jsonl"
ADAPTER = "adapter"
ROUND_MARK = "round.json"  # in the folder of a round, `rounds/1` and so on
# What a round shares with the run that it belongs to: the questions, their passages, and what `watch` reads.
_OF_THE_RUN = (*QUESTIONS.values(), REJECTED, *RETRIEVED.values(), "progress.json", "stages.jsonl")

# What else a run writes, so that what is in its way is found before any work.
_FILES = (*QUESTIONS.values(), REJECTED, *RETRIEVED.values(), VOTES, CANDIDATES, REWARDS, PAIRS)
_FILES += ("metrics.jsonl", "progress.json", "stages.jsonl", "report.html", ".lock")
_FOLDERS = (ADAPTER, "eval", "checkpoints", "tensorboard", "profile", "merged", "rounds", ".parts")


class Recipe(NamedTuple):
    """What an artifact is made from: options that change it, and the digests of its inputs by name.

    The input `config.X` is the content of what option X names. The content decides, not by which path it is named.
    """

    options: dict
    inputs: dict[str, str]

    def fingerprint(self) -> str:
        """Sixteen hex digits over everything."""
        text = json.dumps(_compared(self.options, self.inputs), sort_keys=True, default=list)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def _compared(options: dict, inputs: dict[str, str]) -> dict:
    """What makes one artifact another: its inputs, and the options whose content is not among them."""
    return {f"config.{name}": value for name, value in options.items()} | inputs


def _changes(manifest: dict, recipe: Recipe) -> list[str]:
    """What a recipe has otherwise than an artifact's manifest, a clause each."""
    before, after = manifest["options"], _plain(recipe.options)
    was, now = _compared(before, manifest["inputs"]), _compared(after, recipe.inputs)

    def clause(key: str) -> str:
        option = key.removeprefix("config.") if key.startswith("config.") else None
        if key not in now:
            return f"{key} plays no part any more"
        if before.get(option) != after.get(option):
            return f"{key} was {before.get(option)!r}, now {after[option]!r}"
        return f"{key}{f'={after[option]}' if option in after else ''} has changed"

    return [clause(key) for key in {**now, **was} if key not in now or was.get(key) != now[key]]


def digest(path: epath.Path) -> str:
    """SHA-256 of a file, or of all files below a folder and their names."""
    if not path.is_dir():
        return _file_digest(path)
    found, pending = [], [path]
    while pending:  # epath has no recursive glob
        for entry in pending.pop().iterdir():
            (pending if entry.is_dir() else found).append(entry)
    return digest_of_files({str(file.relative_to(path)): _file_digest(file) for file in found})


def _file_digest(file: epath.Path) -> str:
    result = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(1 << 20):
            result.update(block)
    return result.hexdigest()


def digest_of_files(digests: dict[str, str]) -> str:
    """SHA-256 of several files by name, from that of each."""
    return hashlib.sha256(json.dumps(digests, sort_keys=True).encode()).hexdigest()


def is_remote(path: epath.Path) -> bool:
    """Whether a path is in a bucket, where files are written whole: nothing is appended or locked."""
    return "://" in str(path)


@contextlib.contextmanager
def naming(path: epath.Path | str) -> Iterator[None]:
    """Let an error of the disk name the file: that of a write or a flush does not."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


def write_atomic(path: epath.Path, content: str | bytes | Iterable[str | bytes]) -> None:
    """Write a file, of one piece or of many, so that it is seen whole or not at all."""
    pieces = [content] if isinstance(content, str | bytes) else content
    if is_remote(path):  # as a bucket does anyway
        _write(path, pieces)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.parent / f".{path.name}.tmp"
    with naming(path), _given_up_on_failure(temporary):
        _write(temporary, pieces)
        temporary.replace(path)


@contextlib.contextmanager
def _given_up_on_failure(temporary: epath.Path) -> Iterator[None]:
    """Delete a file that could not be finished: it takes space on a disk that may be full."""
    try:
        yield
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _write(path: epath.Path, pieces: Iterable[str | bytes]) -> None:
    with path.open("wb") as file:
        for piece in pieces:
            file.write(piece.encode() if isinstance(piece, str) else piece)


def append(path: epath.Path, content: str) -> None:
    """Append to a local file, made with its folder if it is absent."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with naming(path), path.open("a") as file:
        file.write(content)


def from_jsonl(text: str) -> list[dict]:
    """Rows from JSON lines. Only a line feed ends a line: text may hold other line separators (U+2028) as they are."""
    return [json.loads(line) for line in text.split("\n") if line]


def to_json(value: Any, indent: int | None = None, ascii_only: bool = False) -> str:
    """JSON text and a line feed, as every file of the project is written.

    Raises:
      UserError: a number is NaN or infinite, which JSON cannot hold.
    """
    try:
        return json.dumps(value, indent=indent, ensure_ascii=ascii_only, allow_nan=False) + "\n"
    except ValueError as error:
        where = f"Row {value['id']!r}" if isinstance(value, dict) and "id" in value else "A result"
        raise UserError(
            f"{where} holds a number that is not finite (NaN or Inf): {json.dumps(value)[:300]}. The model's weights "
            "or adapter give such numbers; try config.dtype=float32, or look at what training did to them."
        ) from error


def to_jsonl(rows: Iterable[dict]) -> str:
    """Rows as JSON lines."""
    return "".join(map(to_json, rows))


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
    """Artifacts under one folder, local or remote (`gs://`).

    That of a round before the last (`rounds`) lies in the folder of its run and uses the run's questions.

    Attributes:
      label: what the names of stages begin with in messages; 'round 2: ', or nothing where there is one round.
      before: the adapter of the round before, which samples candidates and is trained on; None in the first round.

    Raises:
      UserError: its path is not UTF-8, which JSON and other libraries cannot name.
    """

    def __init__(self, path: str):
        self.path = resolve_path(path)  # Orbax wants it absolute
        if why := not_utf8(str(self.path)):
            raise UserError(f"config.workdir={ascii(str(self.path))}: {why}.")
        is_round = self.path.parent.name == "rounds" and (self.path / ROUND_MARK).exists()
        self._run_path = self.path.parent.parent if is_round else self.path
        self.label = f"round {self.path.name}: " if is_round else ""
        self.before: epath.Path | None = None

    def __truediv__(self, name: str) -> epath.Path:
        return (self._run_path if name in _OF_THE_RUN else self.path) / name

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the folder for one run; the kernel releases it however the run ends. Remote folders are not locked.

        Of several processes, process 0 holds it for all.

        Raises:
          UserError: another run holds it, it cannot be written, or something is in the way of a result.
        """
        with processes.main_first():
            handle = self._locked() if processes.is_main() else contextlib.nullcontext()
        with handle:
            yield

    def _locked(self) -> contextlib.AbstractContextManager:
        """What holds the lock while it is open."""
        local = not is_remote(self.path)
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            for name in (*_FILES, *_FOLDERS):
                self._check_free(name, is_file=name in _FILES)
            handle = (self.path / ".lock").open("a") if local else contextlib.nullcontext()
        except ImportError as error:
            raise UserError(f"config.workdir={self.path}: {error} (pip install gcsfs).") from error
        except OSError as error:
            raise UserError(f"config.workdir={self.path} cannot be written: {error.strerror or error}.") from error
        if local:
            self._flock(handle)
        return handle

    def _flock(self, handle) -> None:
        """Lock an open file, where the file system can."""
        import fcntl

        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                handle.close()
                raise UserError(
                    f"config.workdir={self.path} is in use by another run; wait for it, or give this run its own."
                ) from None
            # Lustre without the option 'flock', some NFS and FUSE mounts: ENOSYS, ENOTSUP, ENOLCK.
            print(
                f"Warning: {self.path} is on a file system without locks ({error.strerror}): make sure that no other "
                "run uses it at the same time."
            )

    def _check_free(self, name: str, is_file: bool) -> None:
        """Check that a file is, or can be, where an artifact goes, and that a folder can be written.

        Raises:
          UserError: a folder is in the place of a file, or a file in that of a folder.
        """
        if is_remote(self.path):
            return
        for path in (self / name, self._manifest(name)) if is_file else (self / name,):
            if os.path.lexists(path) and not (os.path.isfile(path) if is_file else os.path.isdir(path)):
                found, expected = ("folder", "file") if is_file and os.path.isdir(path) else ("file", "folder")
                if not os.path.exists(path):
                    found, expected = "broken link", expected if not is_file else "file"
                raise UserError(f"{path} is a {found}, and a {expected} of that name is to be written; move it away.")
            if os.path.lexists(path) and not os.access(path, os.W_OK):
                raise UserError(f"{path} cannot be written; change its permissions, or name another config.workdir.")

    def _manifest(self, name: str) -> epath.Path:
        path = self / name
        return path / "manifest.json" if "." not in path.name else path.with_name(f"{path.name}.manifest.json")

    def manifest(self, name: str) -> dict | None:
        """The manifest of a finished artifact, or None.

        Raises:
          UserError: it is damaged.
        """
        return read_manifest(self._manifest(name))

    def is_up_to_date(self, name: str, recipe: Recipe) -> bool:
        """Whether the artifact exists and was made from this recipe; if not, print why it is rebuilt.

        Raises:
          UserError: the artifact is not what its stage wrote, or something else is in its place.
        """
        self._check_free(name, is_file="." in epath.Path(name).name)
        manifest = self.manifest(name)
        if manifest is None or not (self / name).exists():
            return False
        self.verify(name)  # what was changed by hand is not overwritten, whatever else has changed
        if changes := _changes(manifest, recipe):
            more = f" and {len(changes) - 3} more" if len(changes) > 3 else ""
            print(f"{name} is out of date ({'; '.join(changes[:3])}{more}): rebuilding.")
            return False
        print(f"{name} is up to date: kept.")
        return True

    def verify(self, name: str) -> str:
        """The digest of a finished artifact, after checking its files.

        Raises:
          UserError: the artifact is absent, or is not what its stage wrote.
        """
        manifest, path = self.manifest(name), self / name
        if manifest is None or not path.exists():
            raise UserError(f"{path} is missing; run the stage that makes it (`train` runs them all).")
        verify_files(path, manifest)
        return manifest["digest"]

    def publish(self, name: str, recipe: Recipe, content: dict[str, str | bytes] | str | Iterator[str], rows: int):
        """Put a finished artifact in place: a file's text, also in pieces, or the content of each file of a folder.

        Files of a former version that this one lacks are deleted; others, which are the user's, stay.
        """
        path, manifest_file = self / name, self._manifest(name)
        is_folder = isinstance(content, dict)
        # What the former version held, also where that was half replaced when the run ended.
        former_file = manifest_file.with_name(".former.json")
        former = set(former_file.read_text().split("\n")) if is_folder and former_file.exists() else set()
        if is_folder:
            with contextlib.suppress(UserError):
                former |= set((self.manifest(name) or {"files": {}})["files"])
            former -= {*content, ""}
            if former:
                write_atomic(former_file, "\n".join(sorted(former)))
        manifest_file.unlink(missing_ok=True)
        for file in former:
            (path / epath.Path(file).name).unlink(missing_ok=True)
        for file, text in content.items() if is_folder else [("", content)]:
            write_atomic(path / file if file else path, text)
        self._describe(name, recipe, tuple(content) if is_folder else (), rows)
        if former:
            former_file.unlink(missing_ok=True)

    def publish_rows(self, name: str, recipe: Recipe, rows: Iterable[dict]) -> int:
        """Put a finished file of rows in place, written one row at a time; returns how many they are.

        Where a row cannot be made, the former version stays.
        """
        path, count = self / name, 0
        path.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.ExitStack() as stack:
            folder = path.parent
            if is_remote(path):
                folder = epath.Path(stack.enter_context(tempfile.TemporaryDirectory()))
            temporary = folder / f".{path.name}.tmp"
            stack.enter_context(naming(path))
            stack.enter_context(_given_up_on_failure(temporary))
            with temporary.open("w") as file:
                for row in rows:
                    file.write(to_json(row))
                    count += 1
            self._manifest(name).unlink(missing_ok=True)
            if is_remote(path):  # where a file is seen when it is whole
                with temporary.open("rb") as whole, path.open("wb") as file:
                    shutil.copyfileobj(whole, file)
            else:
                temporary.replace(path)
        self._describe(name, recipe, (), count)
        return count

    def _describe(self, name: str, recipe: Recipe, files: tuple[str, ...], rows: int) -> None:
        """Write the manifest of an artifact, a folder's where it has files."""
        path, is_folder = self / name, bool(files)
        digests = {file: _file_digest(path / file) for file in files} if is_folder else {name: _file_digest(path)}
        manifest = {
            "artifact": name,
            "fingerprint": recipe.fingerprint(),
            "options": _plain(recipe.options),
            "inputs": recipe.inputs,
            "rows": rows,
            "files": digests,
            "digest": digest_of_files(digests) if is_folder else digests[name],
        }
        write_atomic(self._manifest(name), to_json(manifest | {"check": _check(manifest)}, indent=2))

    def rows(self, name: str) -> list[dict]:
        """The rows of a finished artifact, after checking it."""
        self.verify(name)
        return from_jsonl((self / name).read_text())

    def row_file(self, name: str, note: Callable[[dict], Any]) -> "RowFile":
        """The rows of a finished artifact, after checking it, to be read one by one; see `RowFile`."""
        self.verify(name)
        return RowFile(self / name, note)


class RowFile(Sequence[dict]):
    """The rows of a file of JSON lines, each read when it is asked for, by any thread.

    Attributes:
      notes: what `note` made of each row when the file was opened; nothing else of the rows is kept.
    """

    def __init__(self, path: epath.Path, note: Callable[[dict], Any]):
        self._file = path.open("rb")
        if is_remote(path):
            with self._file as remote:
                self._file = tempfile.TemporaryFile()  # noqa: SIM115 (it stays open)
                shutil.copyfileobj(remote, self._file)
            self._file.seek(0)
        self._places, self.notes, start = array.array("Q"), [], 0
        for line in self._file:
            if line.strip():
                self._places.append(start)
                self.notes.append(note(json.loads(line)))
            start += len(line)
        self._places.append(start)

    def __len__(self) -> int:
        return len(self.notes)

    def __getitem__(self, i: int) -> dict:
        if not 0 <= i < len(self):
            raise IndexError(i)
        start, stop = self._places[i : i + 2]
        return json.loads(os.pread(self._file.fileno(), stop - start, start))

    def changed(self, places: Sequence[int], row: Callable[[dict], dict], note: Callable[[Any], Any]) -> "ChangedRows":
        """Some of the rows, each changed by `row` when it is read, and their notes by `note`."""
        return ChangedRows(self, places, row, [note(self.notes[i]) for i in places])


class ChangedRows(Sequence[dict]):
    """Some rows of a `RowFile`, changed as they are read."""

    def __init__(self, rows: RowFile, places: Sequence[int], change: Callable[[dict], dict], notes: list):
        self._rows, self._places, self._change, self.notes = rows, places, change, notes

    def __len__(self) -> int:
        return len(self.notes)

    def __getitem__(self, i: int) -> dict:
        return self._change(self._rows[self._places[i]])


def _plain(options: dict) -> dict:
    """Options as JSON gives them back, tuples as lists."""
    return json.loads(json.dumps(options, default=list))


def _check(manifest: dict) -> str:
    """A checksum of a manifest's other fields."""
    fields = {name: value for name, value in manifest.items() if name != "check"}
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()[:16]


def read_manifest(file: epath.Path) -> dict | None:
    """A manifest, or None where there is none.

    Raises:
      UserError: it is damaged.
    """
    if not file.exists():
        return None
    try:
        manifest = json.loads(file.read_text())
        if manifest["check"] == _check(manifest):
            return manifest
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        pass
    raise UserError(
        f"{file} is damaged. Move it away together with what it describes to have that rebuilt, or restore both."
    )


def verify_files(path: epath.Path, manifest: dict) -> None:
    """Check the files of an artifact against its manifest.

    Raises:
      UserError: one was changed, damaged or deleted.
    """
    for name, expected in manifest["files"].items():
        file = path / name if path.is_dir() else path
        if not file.exists() or _file_digest(file) != expected:
            what = "was changed or damaged" if file.exists() else "was deleted"
            raise UserError(
                f"{file} {what} after it was written. Move {path} away to have it rebuilt (it is never overwritten "
                "unasked)."
            )
