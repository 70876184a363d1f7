"""Passages that another retriever found before, looked up by question."""

from etils import epath

from roserag_jax.errors import UserError
from roserag_jax.rag.corpora import split_contents
from roserag_jax.rag.files import read_json


class Cache:
    """Passages that another retriever found before: FlashRAG's `retrieval_cache.json`, lists of passages by question.

    A folder holds several, one for the training questions and one for the held-out ones, say.

    Raises:
      UserError: a file cannot be read as such, or a folder holds none.
    """

    def __init__(self, path: str):
        self.path, self.found, source = path, {}, epath.Path(path).expanduser()
        files = sorted(f for f in source.iterdir() if ".json" in f.suffixes) if source.is_dir() else [source]
        if not files:
            raise UserError(f"config.retrieve.cache={path!r} is a folder without .json files.")
        for file in files:
            try:
                found = read_json(file).items()
                self.found |= {question: [_context(p) for p in passages] for question, passages in found}
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise UserError(f"config.retrieve.cache: {file} is no retrieval_cache.json: {error!r}.") from error

    def search(self, queries: list[str], k: int) -> list[list[dict]]:
        """The first k passages kept for each query, as contexts `{title, text, score?}`."""
        if missing := [query for query in queries if query not in self.found]:
            raise UserError(
                f"config.retrieve.cache={self.path!r} has nothing for {len(missing)} of {len(queries)} questions, the "
                f"first being {missing[0]!r}."
            )
        return [self.found[query][:k] for query in queries]


def _context(passage: dict) -> dict:
    """A FlashRAG document, with title and text or with `contents` alone."""
    title, text = (
        (passage.get("title") or "", passage["text"]) if "text" in passage else split_contents(passage["contents"])
    )
    score = {"score": float(passage["score"])} if passage.get("score") is not None else {}
    return {"title": title, "text": text, **score}
