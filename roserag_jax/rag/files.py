"""Rows of JSON from local files, plain or gzipped, and from data sets of the Hugging Face Hub.

Every JSON file that a user names is read here, and everything that reads it sees the same values: null, NaN and an
absent key are one thing (the key is left out), half of a surrogate pair is U+FFFD, and a byte-order mark is no text.
What a file may make us do is bounded: how deep its values nest, how long a line is, how much it decompresses to.
"""

import codecs
import contextlib
import gzip
import json
import math
import os
import re
import zlib
from collections.abc import Iterator
from typing import Any, BinaryIO

from etils import epath

from roserag_jax.errors import UserError, first_line

HUB = "hf://"

MAX_DEPTH = 100  # brackets within brackets
MAX_LINE = 64 << 20  # bytes of one row
MAX_DOCUMENT = 8 << 30  # bytes of a file that is one JSON value
MAX_EMPTY = 1_000_000  # empty lines in a row
MAX_RATIO, MIN_LIMIT = 200, 256 << 20  # bytes that a byte of gzip may become, and what any file may become

_BLOCK = 1 << 20  # bytes of a list that are read at once
_BOM, _GZIP = b"\xef\xbb\xbf", b"\x1f\x8b"
_SURROGATE = re.compile("[\ud800-\udfff]")
_ESCAPED_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
_SPACE = re.compile(r"[ \t\r\n]*")


def _number(digits: str) -> float | None:
    """A finite number; the JSON of some programs has others."""
    value = float(digits)
    if math.isinf(value):
        raise ValueError(f"{digits[:40]} is not a finite number")
    return None if math.isnan(value) else value


def _without_nulls(row: dict) -> dict:
    return {name: value for name, value in row.items() if value is not None} if None in row.values() else row


_DECODER = json.JSONDecoder(object_hook=_without_nulls, parse_float=_number, parse_constant=_number)


@contextlib.contextmanager
def _opened(path: epath.Path) -> Iterator[tuple[BinaryIO, int]]:
    """The bytes of a file, decompressed where it is gzipped, and how many of them are read at most."""
    if not path.exists():
        raise UserError(f"There is no file {path}.")
    if path.is_dir():
        raise UserError(f"{path} is a folder; a file is expected.")
    if "://" not in str(path) and not os.path.isfile(path):  # epath takes a pipe for a file
        raise UserError(f"{path} is not a regular file; a file is expected.")
    try:
        with path.open("rb") as raw:
            gzipped = raw.read(2) == _GZIP
            raw.seek(0)
            limit = max(MIN_LIMIT, MAX_RATIO * path.stat().length) if gzipped else math.inf
            with gzip.open(raw) if gzipped else raw as stream:
                yield stream, limit
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path} cannot be read: {error}.") from error


def _decoded(data: bytes, where: str) -> str:
    if data[:2] in (b"\xff\xfe", b"\xfe\xff"):
        raise UserError(f"{where}: the file is UTF-16 text; save it as UTF-8.")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: not UTF-8 text ({error.reason}); save it as UTF-8.") from error


def _lines(path: epath.Path) -> Iterator[tuple[int, str]]:
    """Numbered non-empty lines of a text file."""
    name = str(path)  # once: it takes longer than reading a line
    with _opened(path) as (stream, limit):
        number = total = empty = 0
        while line := stream.readline(MAX_LINE + 1):
            number, total = number + 1, total + len(line)
            if number == 1:
                line = line.removeprefix(_BOM)
            empty = 0 if line.strip() else empty + 1
            if len(line) > MAX_LINE:
                raise UserError(f"{name}, line {number}: longer than {MAX_LINE >> 20} MiB.")
            if total > limit or empty > MAX_EMPTY:
                why = f"decompresses to over {limit >> 20} MiB" if total > limit else f"{MAX_EMPTY:,} empty lines"
                raise UserError(f"{name}, line {number}: {why}; this is not a file of rows.")
            if not empty:
                yield number, _decoded(line, f"{name}, line {number}")


def _text(path: epath.Path) -> str:
    """The whole text of a file that is one JSON value."""
    with _opened(path) as (stream, limit):
        data, limit = bytearray(), min(limit, MAX_DOCUMENT)
        while block := stream.read(1 << 24):
            data += block
            if len(data) > limit:
                raise UserError(f"{path}: over {limit >> 20} MiB in one JSON value; write one row a line instead.")
    return _decoded(bytes(data.removeprefix(_BOM)), f"{path}")


def _is_list(path: epath.Path) -> bool:
    """Whether a file's first character is the bracket of a list."""
    with _opened(path) as (stream, limit):
        total = 0
        while block := stream.read(1 << 16):
            first = block.removeprefix(_BOM).lstrip() if not total else block.lstrip()
            total += len(block)
            if first or total > min(limit, MIN_LIMIT):
                return first.startswith(b"[")
    return False


def _parsed(text: str, start: int, where: str, before: tuple[int, int] = (0, 0)) -> tuple[Any, int]:
    """The JSON value that begins at a place of a text, and where it ends.

    Args:
      before: lines before the text, and columns of its first line, that a message counts too.

    Raises:
      UserError: there is no valid one, or it nests too deeply.
    """
    try:
        value, end = _DECODER.raw_decode(text, start)
    except json.JSONDecodeError as error:
        line, column = before[0] + error.lineno, error.colno + before[1] * (error.lineno == 1)
        at = f"line {line} column {column}" if before[0] or "\n" in text.rstrip() else f"column {column}"
        raise UserError(f"{where}: not valid JSON ({error.msg} at {at}).") from error
    except RecursionError:
        raise UserError(f"{where}: nested more than {MAX_DEPTH} levels deep.") from None
    except ValueError as error:  # a number that is not finite, or of over 4,300 digits
        raise UserError(f"{where}: not valid JSON ({first_line(error).partition(';')[0]}).") from error
    if text.count("[", start, end) + text.count("{", start, end) > MAX_DEPTH:
        _check_depth(value, where)
    if text.find("\\u", start, end) >= 0 and _ESCAPED_SURROGATE.search(text, start, end):
        value = _plain(value, where)
    return value, end


def _check_depth(value: Any, where: str) -> None:
    level = [value]
    for _ in range(MAX_DEPTH + 1):
        inner = (v.values() if isinstance(v, dict) else v for v in level if isinstance(v, dict | list))
        level = [child for children in inner for child in children if isinstance(child, dict | list)]
        if not level:
            return
    raise UserError(f"{where}: nested more than {MAX_DEPTH} levels deep.")


def _plain(value: Any, where: str) -> Any:
    """A value as our JSON can hold it: no NaN, no null in an object, no half characters, dates as text.

    What has no text (images, bytes) is null.
    """
    if isinstance(value, str):
        return _SURROGATE.sub("\ufffd", value)
    if isinstance(value, dict):
        return _without_nulls({_plain(name, where): _plain(v, where) for name, v in value.items()})
    if isinstance(value, list | tuple):
        return [_plain(v, where) for v in value]
    if isinstance(value, float) and math.isinf(value):
        raise UserError(f"{where}: {value} is not a finite number.")
    if isinstance(value, bool | int | float):
        return None if value != value else value
    return value.isoformat() if hasattr(value, "isoformat") else None


def _kind(value: Any) -> str:
    kinds = {bool: "a boolean", int: "a number", float: "a number", str: "a string", list: "a list"}
    return kinds.get(type(value), "null")


def parse_json(text: str, where: str) -> Any:
    """A text that is one JSON value.

    Raises:
      UserError: it is not; `where` names it.
    """
    value, end = _parsed(text, _SPACE.match(text).end(), where)
    if (end := _SPACE.match(text, end).end()) != len(text):
        raise UserError(f"{where}: not valid JSON (text after the value's end, at character {end + 1}).")
    return value


def read_json(path: epath.Path) -> Any:
    """A file, plain or gzipped, that is one JSON value.

    Raises:
      UserError: it is not.
    """
    return parse_json(_text(path), f"{path}")


def read_rows(path: epath.Path) -> Iterator[tuple[str, dict]]:
    """JSON objects, one a line or all in one list, each with its place in the file.

    Raises:
      UserError: a line or a list's entry is not a JSON object; it is named.
    """
    values = _listed(path) if _is_list(path) else _one_a_line(path)
    for where, value in values:
        if not isinstance(value, dict):
            raise UserError(f"{where}: not a JSON object but {_kind(value)}.")
        yield where, value


def _one_a_line(path: epath.Path) -> Iterator[tuple[str, Any]]:
    name = str(path)
    for number, line in _lines(path):
        where = f"{name}, line {number}"
        yield where, parse_json(line, where)


class _Window:
    """The text of a stream, a part at a time: `text` from the place `at`, which the reader moves, to what was read.

    Lists of rows may be larger than memory.
    """

    def __init__(self, path: epath.Path, stream: BinaryIO, limit: float):
        self.path, self.stream, self.limit, self.total = path, stream, limit, 0
        self.decode = codecs.getincrementaldecoder("utf-8")().decode
        self.text, self.at, self.is_last = "", 0, False
        self.before = (0, 0)  # lines, and columns of the last one, that were dropped

    def more(self) -> bool:
        """Drop what is behind `at` and read more, as much again as is held; whether there was any."""
        if self.is_last:
            return False
        gone, self.text, self.at = self.text[: self.at], self.text[self.at :], 0
        lines, columns = gone.count("\n"), len(gone) - gone.rfind("\n") - 1
        self.before = (self.before[0] + lines, columns + (0 if lines else self.before[1]))
        block = self.stream.read(max(_BLOCK, len(self.text)))
        if self.total + len(block) > self.limit:
            raise UserError(f"{self.path}: decompresses to over {self.limit >> 20} MiB; this is not a file of rows.")
        try:
            new = self.decode(block if self.total else block.removeprefix(_BOM), not block)
        except UnicodeDecodeError as error:
            raise UserError(f"{self.path}: not UTF-8 text ({error.reason}); save it as UTF-8.") from error
        self.total, self.text, self.is_last = self.total + len(block), self.text + new, not block
        return True

    def next(self) -> str:
        """The next character that is not white space, to which it moves; empty at the end."""
        while (found := _SPACE.match(self.text, self.at).end()) == len(self.text):
            self.at = found
            if not self.more():
                return ""
        self.at = found
        return self.text[found]

    def value(self, where: str) -> Any:
        """The JSON value that begins here; moves behind it."""
        while True:
            try:
                value, end = _parsed(self.text, self.at, where, self.before)
            except UserError as error:  # it may be cut
                if not isinstance(error.__cause__, json.JSONDecodeError) or len(self.text) - self.at > MAX_LINE:
                    raise
                if not self.more():
                    raise
                continue
            if end < len(self.text) or not self.more():  # a number at the end may be cut
                self.at = end
                return value


def _listed(path: epath.Path) -> Iterator[tuple[str, Any]]:
    """The entries of a list, read and decoded one at a time."""
    with _opened(path) as (stream, limit):
        window, number, name = _Window(path, stream, limit), 0, str(path)
        window.next()  # the bracket
        window.at += 1
        while window.next() != "]":
            number += 1
            where = f"{name}, row {number}"
            if number > 1:
                if window.next() != ",":
                    raise UserError(f"{where}: not valid JSON (no comma between rows, or the list does not end).")
                window.at += 1
                window.next()
            yield where, window.value(where)
        window.at += 1
        if window.next():
            raise UserError(f"{path}: not valid JSON (text after the list's end).")


def open_rows(source: str, split: str = "train") -> Iterator[tuple[str, dict]]:
    """Rows of a local file, or of a Hub data set whose name begins with `hf://`, each with its place."""
    return hub_rows(source, split) if source.startswith(HUB) else read_rows(epath.Path(source).expanduser())


def hub_rows(name: str, split: str) -> Iterator[tuple[str, dict]]:
    """Rows of a Hub data set `hf://owner/name[@revision][/configuration][:split]`, through `datasets`."""
    from datasets import load_dataset
    from datasets.exceptions import DatasetsError

    path, _, named_split = name.removeprefix(HUB).partition(":")
    owner, _, rest = path.partition("/")
    dataset, *configuration = rest.split("/")
    dataset, _, revision = dataset.partition("@")
    if not owner or not dataset or len(configuration) > 1:
        raise UserError(f"{name}: a Hub data set is written hf://owner/name[@revision][/configuration][:split].")
    try:
        found = load_dataset(
            f"{owner}/{dataset}", *configuration, split=named_split or split, revision=revision or None
        )
    except (OSError, ValueError, RuntimeError, DatasetsError) as error:  # RuntimeError: it has a loading script
        why = first_line(error)
        raise UserError(f"{name} cannot be downloaded: {why} Download it yourself and name the local file.") from error
    for i, row in enumerate(found, 1):
        yield (where := f"{name}, row {i}"), _plain(row, where)
