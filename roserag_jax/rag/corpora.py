"""Passages to search: files of rows, StrategyQA's paragraphs, or documents."""

import bisect
import hashlib
import itertools
import os
import re
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from etils import epath

from roserag_jax.errors import UserError, quote
from roserag_jax.rag import documents
from roserag_jax.rag.documents import Paragraph, Unreadable
from roserag_jax.rag.files import HUB, open_rows, read_json
from roserag_jax.rag.layouts import as_text
from roserag_jax.rag.words import pieces as word_pieces

CHUNK_TITLES = ("file", "heading", "none")


class Chunking(NamedTuple):
    """How a document is cut into passages.

    Attributes:
      size: words or tokens of a passage, about.
      overlap: how many of them a passage repeats from the one before.
      title: 'file' titles a passage with its file's name, 'heading' with that and its heading, 'none' not at all.
      unit: 'words', or the tokenizer whose tokens are counted.
    """

    size: int = 120
    overlap: int = 0
    title: str = "file"
    unit: str = "words"


DEFAULT_CHUNKING = Chunking()


class Unit(NamedTuple):
    """What is added to a corpus or removed from it at once: a document, or a row.

    Attributes:
      name: of the document or row.
      digest: returns bytes that change whenever its passages do.
      read: returns its passages.
    """

    name: str
    digest: Callable[[], bytes]
    read: Callable[[], list[dict]]

    @property
    def key(self) -> int:
        """A number of 64 bits over name and content."""
        return int.from_bytes(hashlib.blake2b(self.digest(), digest_size=8, person=b"unit").digest(), "big")


def read_corpus(path: str, chunking: Chunking = DEFAULT_CHUNKING) -> list[dict]:
    """Read all passages `{id, title, text, source?}` of a corpus."""
    return list(Corpus(path, chunking).passages())


class Corpus:
    """Passages `{id, title, text, source?}` of a file of rows, a document or a folder of documents.

    Rows are FlashRAG's `{id, contents}`, where `contents` is a title, a newline and the text; `{id, title, text}`; or
    StrategyQA's paragraphs, one JSON object of `{id: {title, content}}`. A document gives one passage per run of
    paragraphs on one page and under one heading; its `source` is `{file, page?, heading?}`.

    Args:
      token_starts: where tokens begin in a text, if the chunking counts those.

    Raises:
      UserError: there is nothing to read, or, later, a row is not as it should be.
    """

    def __init__(
        self, path: str, chunking: Chunking = DEFAULT_CHUNKING, token_starts: Callable[[str], list[int]] | None = None
    ):
        self.path, self.chunking, self.token_starts, self.left_out = path, chunking, token_starts, {}
        self.local = None if path.startswith(HUB) else epath.Path(path).expanduser()
        if self.local and (not path or not self.local.exists()):
            raise UserError(f"config.retrieve.corpus={path!r}: there is no such file or folder.")
        self.has_documents = self.local and (self.local.is_dir() or documents.is_document(self.local))

    def signature(self) -> str:
        """Names, sizes and times of the files that are read, by which a change is noticed without reading them."""
        if self.local is None:
            return self.path
        if not self.has_documents:
            status = self.local.stat()
            return f"{status.length} {os.stat(self.local).st_mtime_ns if os.path.exists(self.local) else status.mtime}"
        seen = hashlib.sha256()
        for name, file in self._files():
            try:
                status = file.stat()
            except OSError:  # it went since the folder was listed
                continue
            seen.update(f"{name}\0{status.st_size}\0{status.st_mtime_ns}\n".encode())
        return seen.hexdigest()

    def _files(self) -> list[tuple[str, Path]]:
        """The documents that are read, with their names in the corpus."""
        path = Path(self.local)
        files, self.left_out = documents.find(path) if path.is_dir() else ([path], {})
        folder = path if path.is_dir() else path.parent
        return [(documents.name_below(folder, file), file) for file in files]

    def units(self) -> Iterator[Unit]:
        """What the corpus is made of, in order."""
        if self.has_documents:
            for name, file in self._files():
                yield Unit(name, partial(_file_digest, name, file), partial(self._document, name, file))
            return
        paragraphs = self.local and _paragraphs(self.local)
        for passage, id_given in _strategyqa(self.path, paragraphs) if paragraphs else _rows(self.path):
            yield Unit(passage["id"], partial(_row_digest, passage, id_given), lambda passage=passage: [passage])

    def read(self, unit: Unit) -> list[dict]:
        """The passages of a unit; none where its document cannot be read, which is noted."""
        try:
            return unit.read()
        except Unreadable as error:
            self.left_out[unit.name] = str(error)
            return []

    def passages(self) -> Iterator[dict]:
        """All passages, one at a time; what was left out is printed at the end."""
        count = units = 0
        for unit in self.units():
            passages = self.read(unit)
            count, units = count + len(passages), units + bool(passages)
            yield from passages
        self.check(count)
        if self.has_documents:
            print(f"{self.path}: {count} passages of {units} documents{self.remark()}.")

    def remark(self) -> str:
        """What was left out of the corpus, and why."""
        return f"; left out {documents.Found([], self.left_out).summary()}" if self.left_out else ""

    def check(self, count: int) -> None:
        """Raise a UserError if there are no passages."""
        if not count:
            kinds = f"documents {' '.join(documents.SUFFIXES)}, or rows of contents"
            raise UserError(f"config.retrieve.corpus={self.path!r} holds no passages ({kinds}){self.remark()}.")

    def _document(self, name: str, file: Path) -> list[dict]:
        stem, passages = Path(name).stem, []
        cut = chunks(documents.read(file), self.chunking.size, self.chunking.overlap, self.token_starts)
        for i, (text, place) in enumerate(cut):
            titles = {"file": stem, "none": "", "heading": ": ".join(filter(None, (stem, place.get("heading"))))}
            source = {"file": name, **place}
            passages.append({"id": f"{name}#{i}", "title": titles[self.chunking.title], "text": text, "source": source})
        return passages


def _file_digest(name: str, file: Path) -> bytes:
    try:
        with file.open("rb") as stream:
            return name.encode() + hashlib.file_digest(stream, "sha256").digest()
    except OSError as error:
        return f"{name}\0{error.strerror}".encode()


def _row_digest(passage: dict, id_given: bool) -> bytes:
    """The id counts where the row has one; otherwise it is the row's number, which others can change."""
    return repr([v for k, v in passage.items() if k != "id" or id_given]).encode("utf-8", "backslashreplace")


def _rows(path: str) -> Iterator[tuple[dict, bool]]:
    """Passages of rows with contents, or with title and text, and whether the row has an id."""
    for number, (where, row) in enumerate(open_rows(path), 1):
        if isinstance(row.get("contents"), str):
            title, text = split_contents(row["contents"])
        elif isinstance(row.get("text"), str):
            title, text = row.get("title", ""), row["text"].strip()
        else:
            raise UserError(f"{where}: a corpus row must be {{id, contents}} or {{id, title, text}}.")
        name = row.get("id", row.get("_id"))
        yield _passage(number if name is None else name, title, text, row.get("source"), where), name is not None


def _strategyqa(path: str, paragraphs: dict) -> Iterator[tuple[dict, bool]]:
    for name, row in paragraphs.items():
        where = f"{path}, paragraph {quote(name)}"
        if not isinstance(row, dict) or not isinstance(row.get("content"), str):
            raise UserError(f"{where}: it must be {{title, content}}, its content a string.")
        yield _passage(name, row.get("title", ""), row["content"].strip(), None, where), True


def _passage(name: Any, title: Any, text: str, source: Any, where: str) -> dict:
    try:
        passage = {"id": as_text(name), "title": as_text(title), "text": text}
    except TypeError as error:
        raise UserError(f"{where}: id and title must be text: {error}.") from error
    if isinstance(source, str):
        source = {"file": source}
    return passage | ({"source": source} if isinstance(source, dict) else {})


def _paragraphs(file: epath.Path) -> dict:
    """StrategyQA's paragraphs by id; empty where the file is one of rows, which may be named .json too."""
    if ".json" not in file.suffixes:
        return {}
    try:
        found = read_json(file)
    except UserError:  # more than one value; what is wrong with a row is told where rows are read
        return {}
    return found if isinstance(found, dict) and not {"contents", "text"} & found.keys() else {}


def split_contents(contents: str) -> tuple[str, str]:
    """Title and text of FlashRAG's `contents`; the title is empty where there is one line only."""
    title, _, text = contents.partition("\n")
    title, text = (title, text) if text.strip() else ("", title)
    return title.strip().strip('"'), text.strip()


_FULL_STOP = re.compile(r"[\u3002\uff01\uff1f\uff61]")


TokenStarts = Callable[[str], list[int]]  # where each token of a text begins


def chunks(
    paragraphs: Iterable[Paragraph], size: int, overlap: int = 0, token_starts: TokenStarts | None = None
) -> Iterator[tuple[str, dict]]:
    """Runs of paragraphs of up to about `size` words, each with the place where it begins: `{page?, heading?}`.

    A new page or heading begins a new run, unless the present one is headings only. A paragraph stays whole up to twice
    the length of a run. A run repeats the last `overlap` words of the one before, where that has the same place.

    Args:
      token_starts: makes size and overlap those of tokens; words stay whole.
    """
    chunk, place, only_headings = [], {}, True
    text = lambda: "".join(piece for piece, _ in chunk).strip()
    for paragraph in paragraphs:
        pieces = _measured(f"{paragraph.text} ", token_starts)
        if paragraph.place != place:
            if not only_headings:
                yield text(), place
                chunk, only_headings = [], True
            place = paragraph.place
        elif chunk and _length(chunk) + _length(pieces) > size:
            yield text(), place
            chunk, only_headings = _last(chunk, overlap), True
        at, left = 0, _length(pieces)
        while left > 2 * size:
            room = _until_sentence(pieces, at, max(1, _fitting(pieces, size - _length(chunk), at)))
            taken = pieces[at : at + room]
            chunk, at, left = chunk + taken, at + room, left - _length(taken)
            yield text(), place
            chunk = _last(chunk, overlap)
        chunk += pieces[at:]
        only_headings = only_headings and paragraph.is_heading
    if chunk:
        yield text(), place


Pieces = list[tuple[str, int]]  # of one word each, with what follows it, and how much each counts


def _measured(text: str, token_starts: TokenStarts | None) -> Pieces:
    """The words of a text, each counting 1 or its tokens."""
    pieces = word_pieces(text)
    if token_starts is None:
        return [(piece, 1) for piece in pieces]
    starts, end, measured = token_starts(text), 0, []
    for piece in pieces:
        begin, end = end, end + len(piece)
        measured.append((piece, bisect.bisect_left(starts, end) - bisect.bisect_left(starts, begin)))
    return measured


def _length(pieces: Pieces) -> int:
    return sum(length for _, length in pieces)


def _fitting(pieces: Pieces, room: int, start: int = 0) -> int:
    """How many pieces from `start` are no longer than `room` together."""
    totals = itertools.accumulate(pieces[i][1] for i in range(start, len(pieces)))
    return sum(1 for _ in itertools.takewhile(lambda total: total <= room, totals))


def _last(pieces: Pieces, overlap: int) -> Pieces:
    """The last pieces, no longer than `overlap` together."""
    count = _fitting(pieces[::-1], overlap)
    return pieces[len(pieces) - count :]


def _until_sentence(pieces: Pieces, start: int, most: int) -> int:
    """How many pieces to take from `start` so that a sentence of a script without spaces is not cut, at most `most`."""
    ends = (n for n in range(most, most // 2, -1) if _FULL_STOP.search(pieces[start + n - 1][0]))
    return next(ends, most)
