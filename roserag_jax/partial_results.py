"""Partial results: the finished rows of a stage under way, from which it resumes when it was stopped."""

import functools
import json
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
from etils import epath

from roserag_jax.ahead import in_order
from roserag_jax.distributed import processes
from roserag_jax.workdir import Workdir, append, is_remote, to_json, write_atomic


class PartialResults:
    """Finished rows of a stage under way, so that a stopped stage repeats only what was being worked on.

    They lie in a folder that is named by the fingerprint of what the rows are made from.

    Each of several processes appends to a file of its own; in a bucket a row is a file. A line is a checksum and a row;
    one that is cut off or damaged is left out, and its row is made anew. The rows stay in the files: of each, only
    where it is and a note are kept.

    Args:
      ids: of all rows that the stage makes, in their order.
      note: what to keep of a finished row.

    Attributes:
      done: the notes of the finished rows, by id.
    """

    def __init__(
        self,
        workdir: Workdir,
        stage: str,
        fingerprint: str,
        ids: list[str],
        note: Callable[[dict], Any] = lambda row: None,
    ):
        self.stage, self.folder = stage, workdir.path / ".parts" / f"{stage}-{fingerprint}"
        self.own = self.folder / f"{jax.process_index():04d}.jsonl"
        self.ids, self.note, self.done = ids, note, {}
        self._places: dict[str, tuple[epath.Path, int, int]] = {}  # file, start and stop of each row
        if damaged := self.read():
            print(f"{stage}: {damaged} partial results in {self.folder} are damaged and will be made anew.")
        if not is_remote(self.own) and self.own.exists():
            found, _, rest = _read_rows(self.own, note)
            if rest:  # the next line would join one that is cut off
                write_atomic(self.own, (_line(self._read_place((self.own, *place))) for _, place, _ in found))
                self.read()

    def read(self) -> int:
        """Find the finished rows, those of other processes too; returns how many lines are damaged."""
        damaged = 0
        if self.folder.exists():
            files = sorted(self.folder.glob("*.jsonl"))
            read = functools.partial(_read_rows, note=self.note)
            for file, (found, bad, _) in zip(files, in_order(read, files, threads=16), strict=True):
                damaged += bad
                for name, place, note in found:
                    self.done[name], self._places[name] = note, (file, *place)
        return damaged

    def missing(self) -> list[int]:
        """The rows that are yet to be made, by their place."""
        return [i for i, name in enumerate(self.ids) if name not in self.done]

    def gather(self) -> Iterator[dict]:
        """All rows in their order in process 0, once all processes are here with theirs; each calls this.

        They are read from the files as they are asked for, and are gone when that process, which publishes them, clears
        the folder: the others get none.
        """
        processes.barrier("parts finished")
        if not processes.is_main():
            return iter(())
        self.read()
        return in_order(self._read_place, [self._places[name] for name in self.ids], threads=16)

    def _read_place(self, place: tuple[epath.Path, int, int]) -> dict:
        file, start, stop = place
        with file.open("rb") as stream:
            stream.seek(start)
            return json.loads(stream.read(stop - start).partition(b" ")[2])

    def add(self, row: dict) -> None:
        """Keep a finished row."""
        line, file, start = _line(row), self.own, 0
        if is_remote(self.own):
            file = self.folder / f"{self.own.stem}-{len(self.done):08d}.jsonl"
            file.write_text(line)
        else:
            start = self.own.stat().length if self.own.exists() else 0
            append(self.own, line)
        self.done[row["id"]] = self.note(row)
        self._places[row["id"]] = file, start, start + len(line.encode())

    def clear(self, keep: bool = False) -> None:
        """Drop the stage's partial results, once its artifact is published; those of other options too.

        Args:
          keep: these stay, for the same stage with more to do.
        """
        if self.folder.parent.exists():
            for folder in self.folder.parent.iterdir():
                is_stage = folder.name.rpartition("-")[0] == self.folder.name.rpartition("-")[0]
                if is_stage and not (keep and folder == self.folder):
                    folder.rmtree()


def partial_rows(folder: epath.Path) -> tuple[list[dict], int]:
    """The finished rows of a stage under way, from its folder in `.parts/`, and how many lines are damaged."""
    rows, damaged = [], 0
    for file in sorted(folder.glob("*.jsonl")) if folder.exists() else ():
        found, bad, _ = _read_rows(file, lambda row: row)
        damaged += bad
        rows += [row for *_, row in found]
    return rows, damaged


def _line(row: dict) -> str:
    """A row as a line of partial results."""
    text = to_json(row)
    return f"{_line_check(text.rstrip().encode()).decode()} {text}"


def _line_check(text: bytes) -> bytes:
    return b"%08x" % zlib.crc32(text)


def _read_rows(file: epath.Path, note: Callable[[dict], Any]) -> tuple[list[tuple], int, bool]:
    """The rows of a file of partial results whose checksum is right.

    Returns:
      `(id, (start, stop), note)` of each; how many other lines there are; and whether anything else is in the file. A
      last line without its end does not count: a run was stopped while it wrote it, or is just writing it.
    """
    found, damaged, rest, start = [], 0, False, 0
    with file.open("rb") as stream:
        for line in stream:
            check, _, text = line.rstrip(b"\n").partition(b" ")
            if line.endswith(b"\n") and check == _line_check(text):
                row = json.loads(text)
                found.append((row["id"], (start, start + len(line)), note(row)))
            else:
                rest = True
                damaged += line.endswith(b"\n") and len(line) > 1
            start += len(line)
    return found, damaged, rest
