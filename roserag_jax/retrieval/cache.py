"""Passages that another retriever found before, looked up by question."""

import unicodedata
from typing import Any

from etils import epath

from roserag_jax.errors import UserError, quote
from roserag_jax.rag.corpora import split_contents
from roserag_jax.rag.files import read_json
from roserag_jax.rag.questions import checked_context


class Cache:
    """Passages that another retriever found before: FlashRAG's `retrieval_cache.json`, lists of passages by question.

    A folder has several, one for the training questions and one for the held-out ones, say.

    Raises:
      UserError: a file cannot be read as such, or a folder has none.
    """

    def __init__(self, path: str):
        self.path, self.found = path, {}
        files = cache_files(epath.Path(path).expanduser())
        if not files:
            raise UserError(f"config.retrieve.cache={path!r} is a folder without .json files.")
        for file in files:
            found = read_json(file)
            if not isinstance(found, dict):
                raise UserError(f"{file} is not a retrieval_cache.json: {{question: [passages]}} is expected.")
            for question, passages in found.items():
                where = f"{file}, question {quote(question)}"
                if not isinstance(passages, list):
                    raise UserError(f"{where}: not a list of passages, as a retrieval_cache.json has.")
                self.found[_key(question)] = [context_of(passage, where) for passage in passages]

    def search(self, queries: list[str], k: int) -> list[list[dict]]:
        """The first k passages kept for each query, as contexts `{title, text, score?}`."""
        if missing := [query for query in queries if _key(query) not in self.found]:
            raise UserError(
                f"config.retrieve.cache={self.path!r} has nothing for {len(missing)} of {len(queries)} questions, the "
                f"first being {quote(missing[0])}."
            )
        return [self.found[_key(query)][:k] for query in queries]


def cache_files(path: epath.Path) -> list[epath.Path]:
    """The files that a cache is read from: the one named, or those of a folder."""
    if not path.is_dir():
        return [path]
    return sorted(f for f in path.iterdir() if ".json" in f.suffixes and not f.name.startswith("."))


def _key(question: str) -> str:
    """A question, however its accents and spaces are written."""
    return " ".join(unicodedata.normalize("NFC", question).split())


def context_of(passage: Any, where: str) -> dict:
    """A FlashRAG document, with title and text or with `contents` alone."""
    if isinstance(passage, dict) and "text" not in passage and isinstance(passage.get("contents"), str):
        title, text = split_contents(passage["contents"])
        passage = {**passage, "title": title, "text": text}
    context = checked_context(passage, where)
    return {name: context[name] for name in ("title", "text", "score", "source") if name in context}
