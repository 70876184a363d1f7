"""Passages to search: files of rows, StrategyQA's paragraphs, or documents."""

import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from etils import epath

from roserag_jax.errors import UserError, quote
from roserag_jax.rag import documents
from roserag_jax.rag.documents import Paragraph, Unreadable
from roserag_jax.rag.files import HUB, open_rows, read_json
from roserag_jax.rag.layouts import as_text
from roserag_jax.rag.words import pieces as word_pieces

CHUNK_WORDS = 120


def read_corpus(path: str, words: int = CHUNK_WORDS, overlap: int = 0) -> list[dict]:
    """Read all passages `{id, title, text, source?}` of a corpus; see `passages`."""
    return list(passages(path, words, overlap))


def passages(path: str, words: int = CHUNK_WORDS, overlap: int = 0) -> Iterator[dict]:
    """Passages `{id, title, text, source?}` of a file of rows, a document or a folder of documents, one at a time.

    Rows are FlashRAG's `{id, contents}`, where `contents` is a title, a newline and the text; `{id, title, text}`; or
    StrategyQA's paragraphs, one JSON object of `{id: {title, content}}`. A document gives one passage per run of
    paragraphs of up to about `words` words on one page and under one heading, titled with the file's name; its `source`
    is `{file, page?, heading?}`.

    Args:
      words: of a document's passage.
      overlap: words that such a passage repeats from the one before.

    Raises:
      UserError: there is nothing to read, or a row is not as it should be.
    """
    source, count = epath.Path(path).expanduser(), 0
    if not path.startswith(HUB) and (not path or not source.exists()):
        raise UserError(f"config.retrieve.corpus={path!r}: there is no such file or folder.")
    if path.startswith(HUB):
        found = _rows(path)
    elif source.is_dir() or documents.is_document(source):
        found = _documents(Path(source), words, overlap)
    else:
        found = _strategyqa(path, paragraphs) if (paragraphs := _paragraphs(source)) else _rows(path)
    for passage in found:
        count += 1
        yield passage
    if not count:
        kinds = " ".join(documents.SUFFIXES)
        raise UserError(f"config.retrieve.corpus={path!r} holds no passages (documents {kinds}, or rows of contents).")


def _documents(path: Path, words: int, overlap: int) -> Iterator[dict]:
    """Passages of a folder's documents, or of one; how many were left out, and why, is printed."""
    folder = path if path.is_dir() else path.parent
    files, left_out = documents.find(path) if path.is_dir() else ([path], {})
    unreadable, count = {}, 0
    for file in files:
        name = documents.name_below(folder, file)
        try:
            paragraphs = documents.read(file)
        except Unreadable as error:
            unreadable[name] = str(error)
            continue
        for i, (text, place) in enumerate(chunks(paragraphs, words, overlap)):
            count += 1
            source = {"file": name, **place}
            yield {"id": f"{name}#{i}", "title": Path(name).stem, "text": text, "source": source}
    left_out = documents.Found([], left_out | unreadable)
    read = f"{path}: {count} passages of {len(files) - len(unreadable)} documents"
    print(f"{read}; left out {left_out.summary()}." if left_out.left_out else f"{read}.")


def _rows(path: str) -> Iterator[dict]:
    """Passages of rows with contents, or with title and text."""
    for number, (where, row) in enumerate(open_rows(path), 1):
        if isinstance(row.get("contents"), str):
            title, text = split_contents(row["contents"])
        elif isinstance(row.get("text"), str):
            title, text = row.get("title", ""), row["text"].strip()
        else:
            raise UserError(f"{where}: a corpus row must be {{id, contents}} or {{id, title, text}}.")
        yield _passage(row.get("id", row.get("_id", number)), title, text, row.get("source"), where)


def _strategyqa(path: str, paragraphs: dict) -> Iterator[dict]:
    for name, row in paragraphs.items():
        where = f"{path}, paragraph {quote(name)}"
        if not isinstance(row, dict) or not isinstance(row.get("content"), str):
            raise UserError(f"{where}: it must be {{title, content}}, its content a string.")
        yield _passage(name, row.get("title", ""), row["content"].strip(), None, where)


def _passage(name, title, text: str, source, where: str) -> dict:
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


def chunks(paragraphs: Iterable[Paragraph], words: int, overlap: int = 0) -> Iterator[tuple[str, dict]]:
    """Runs of paragraphs of up to about `words` words, each with the place where it begins: `{page?, heading?}`.

    A new page or heading begins a new run, unless the present one is headings only. A paragraph stays whole up to twice
    the length of a run. A run repeats the last `overlap` words of the one before, where that has the same place.
    """
    chunk, place, only_headings = [], {}, True
    text = lambda: "".join(chunk).strip()
    for paragraph in paragraphs:
        pieces = word_pieces(f"{paragraph.text} ")
        if paragraph.place != place:
            if not only_headings:
                yield text(), place
                chunk, only_headings = [], True
            place = paragraph.place
        elif chunk and len(chunk) + len(pieces) > words:
            yield text(), place
            chunk, only_headings = chunk[max(0, len(chunk) - overlap) :], True
        while len(pieces) > 2 * words:
            room = _until_sentence(pieces, max(1, words - len(chunk)))
            chunk, pieces = chunk + pieces[:room], pieces[room:]
            yield text(), place
            chunk = chunk[max(0, len(chunk) - overlap) :]
        chunk += pieces
        only_headings = only_headings and paragraph.is_heading
    if chunk:
        yield text(), place


def _until_sentence(pieces: list[str], most: int) -> int:
    """How many of the first pieces to take so that a sentence of a script without spaces is not cut, at most `most`."""
    ends = (n for n in range(most, most // 2, -1) if _FULL_STOP.search(pieces[n - 1]))
    return next(ends, most)
