"""Passages to search: files of rows, StrategyQA's paragraphs, or a folder of documents."""

from collections.abc import Iterator
from pathlib import Path

from etils import epath

from roserag_jax.errors import UserError
from roserag_jax.rag.files import read_json, read_rows


def read_corpus(path: str) -> list[dict]:
    """Passages `{id, title, text}` of a file of rows or of a folder of `.txt` and `.md` files.

    Rows are FlashRAG's `{id, contents}`, where `contents` is a title, a newline and the text, or StrategyQA's
    paragraphs, one JSON object of `{id: {title, content}}`. A file in a folder gives one passage per run of
    paragraphs of up to about 120 words, titled with the file's name.

    Raises:
      UserError: there is nothing to read, or a row is not as it should be.
    """
    source = epath.Path(path).expanduser()
    if not path or not source.exists():
        raise UserError(f"config.retrieve.corpus={path!r}: there is no such file or folder.")
    passages = []
    if source.is_dir():
        for file in sorted(f for f in Path(source).rglob("*") if f.suffix in (".txt", ".md") and f.is_file()):
            try:
                text = file.read_text()
            except UnicodeDecodeError as error:
                raise UserError(f"{file} is not UTF-8 text: {error}.") from error
            name = str(file.relative_to(source))
            chunks = enumerate(_chunks(text))
            passages += [{"id": f"{name}#{i}", "title": Path(name).stem, "text": chunk} for i, chunk in chunks]
    elif paragraphs := _paragraphs(source):
        for i, row in paragraphs.items():
            if not isinstance(row, dict) or not isinstance(row.get("content"), str):
                raise UserError(f"{path}, paragraph {i!r}: it must be {{title, content}}.")
            passages.append({"id": i, "title": row.get("title", ""), "text": row["content"].strip()})
    else:
        for number, (where, row) in enumerate(read_rows(source), 1):
            if not isinstance(row.get("contents"), str):
                raise UserError(f"{where}: a corpus row must be {{id, contents}}.")
            title, text = split_contents(row["contents"])
            passages.append({"id": str(row.get("id", number)), "title": title, "text": text})
    if not passages:
        raise UserError(f"config.retrieve.corpus={path!r} holds no passages (.txt and .md files, or rows of contents).")
    return passages


def _paragraphs(file: epath.Path) -> dict:
    """StrategyQA's paragraphs by id; empty where the file is one of rows, which may be named .json too."""
    if ".json" not in file.suffixes:
        return {}
    try:
        found = read_json(file)
    except UserError:  # more than one value; what is wrong with a row is told where rows are read
        return {}
    return found if isinstance(found, dict) and "contents" not in found else {}


def split_contents(contents: str) -> tuple[str, str]:
    """Title and text of FlashRAG's `contents`; the title is empty where there is one line only."""
    title, _, text = contents.partition("\n")
    title, text = (title, text) if text.strip() else ("", title)
    return title.strip().strip('"'), text.strip()


def _chunks(text: str, words: int = 120) -> Iterator[str]:
    chunk = []
    for paragraph in text.split("\n\n"):
        pieces = paragraph.split()
        if chunk and len(chunk) + len(pieces) > words:
            yield " ".join(chunk)
            chunk = []
        while len(pieces) > 2 * words:
            yield " ".join(pieces[:words])
            pieces = pieces[words:]
        chunk += pieces
    if chunk:
        yield " ".join(chunk)
