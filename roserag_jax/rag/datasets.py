"""Questions and corpora from local files, row by row, with errors that name the row."""

import gzip
import json
from collections.abc import Iterator
from pathlib import Path

from etils import epath

from roserag_jax.errors import UserError
from roserag_jax.rag import synthetic


def _lines(path: epath.Path) -> Iterator[tuple[int, str]]:
    """Numbered non-empty lines of a plain or gzipped text file."""
    if not path.is_file():
        raise UserError(f"There is no file {path}.")
    try:
        with path.open("rb") as raw, gzip.open(raw) if path.suffix == ".gz" else raw as stream:
            for number, line in enumerate(stream, 1):
                if line.strip():
                    yield number, line.decode("utf-8")
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read: {error}.") from error


def read_json_lines(path: epath.Path) -> Iterator[tuple[int, dict]]:
    """Numbered JSON objects, one a line.

    Raises:
      UserError: a line is no JSON object; it is named.
    """
    for number, line in _lines(path):
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(f"{path}, line {number}: no valid JSON ({error.msg} at column {error.colno}).") from error
        if not isinstance(row, dict):
            raise UserError(f"{path}, line {number}: a JSON object is expected, this is a {type(row).__name__}.")
        yield number, row


def read_questions(path: str, rows: int = 0, answers: bool = True, contexts: bool = True) -> list[dict]:
    """Unified rows `{id, question, golden_answers, contexts: [{title, text, is_supporting?}], metadata?}`.

    Args:
      rows: keep the first so many; 0 is all.
      answers: whether a row must have golden answers.
      contexts: whether a row must have contexts (it need not where a retriever will fetch them).

    Raises:
      UserError: the file has no rows, a row lacks what it needs, or two rows share an id.
    """
    found, seen = [], {}
    for number, row in read_json_lines(epath.Path(path)):
        if rows and len(found) == rows:
            break
        where = f"{path}, line {number}"
        row.setdefault("id", str(number))
        row["id"] = str(row["id"])
        if row["id"] in seen:
            raise UserError(f"{where}: id {row['id']!r} stands on line {seen[row['id']]} already; ids must be unique.")
        seen[row["id"]] = number
        if not isinstance(row.get("question"), str) or not row["question"].strip():
            raise UserError(f"{where} (id {row['id']!r}): no question.")
        golden = row.get("golden_answers", [])
        if answers and not (
            isinstance(golden, list) and golden and all(isinstance(a, str) and a.strip() for a in golden)
        ):
            raise UserError(f"{where} (id {row['id']!r}): no answer; golden_answers must be a list of strings.")
        if contexts and not row.get("contexts"):
            raise UserError(
                f"{where} (id {row['id']!r}): no contexts; add them, or set config.retrieve.retriever=bm25."
            )
        for context in row.get("contexts", []):
            if not isinstance(context, dict) or not isinstance(context.get("text"), str):
                raise UserError(f"{where} (id {row['id']!r}): a context must be {{title, text}}.")
            context.setdefault("title", "")
        found.append(row)
    if not found:
        raise UserError(f"{path} holds no questions.")
    return found


def questions(config, split: str) -> list[dict]:
    """The questions that `config.data.train` or `config.data.eval` names."""
    data, path = config.data, config.data[split]
    rows = data[f"{split}_rows"]
    if path != "synthetic":
        return read_questions(path, rows, contexts=config.retrieve.retriever == "given")
    return list(
        synthetic.generate(
            rows or {"train": 200, "eval": 100}[split],
            split,
            seed=data.synthetic_seed,
            passages=data.synthetic_passages,
            missing_gold=data.synthetic_missing_gold,
            counterfactual=data.synthetic_counterfactual,
        )
    )


def read_corpus(path: str) -> list[dict]:
    """Passages `{id, title, text}` of a `.jsonl[.gz]` of `{id, contents}` or of a folder of `.txt` and `.md` files.

    `contents` is a title, a newline and the text (FlashRAG's layout). A file in a folder gives one passage per run of
    paragraphs of up to about 120 words, titled with the file's name.

    Raises:
      UserError: there is nothing to read, or a line is not as it should be.
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
    else:
        for number, row in read_json_lines(source):
            if not isinstance(row.get("contents"), str):
                raise UserError(f"{path}, line {number}: a corpus row must be {{id, contents}}.")
            title, _, text = row["contents"].partition("\n")
            title, text = (title, text) if text.strip() else ("", title)
            passages.append({"id": str(row.get("id", number)), "title": title.strip().strip('"'), "text": text.strip()})
    if not passages:
        raise UserError(f"config.retrieve.corpus={path!r} holds no passages (.txt and .md files, or rows of contents).")
    return passages


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
