"""Retrievers: one class each, with `search(queries, k)`."""

from etils import epath

from roserag_jax.errors import UserError
from roserag_jax.rag.datasets import read_json, split_contents


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


class BM25:
    """Lucene's BM25 over passages `{id, title, text}`, by the `bm25s` library.

    Raises:
      UserError: the passages are empty or hold stop words only.
    """

    def __init__(self, passages: list[dict]):
        # bm25s starts JAX's backend when imported, which must wait until processes are set up.
        import bm25s

        self._bm25s, self.passages = bm25s, passages
        self.index = bm25s.BM25(method="lucene")
        try:
            self.index.index(self._tokens([f"{p['title']} {p['text']}" for p in passages]), show_progress=False)
        except ValueError as error:
            raise UserError(f"None of the {len(passages)} passages has a word to search for.") from error

    def _tokens(self, texts: list[str]):
        return self._bm25s.tokenize(texts, stopwords="en", show_progress=False)

    def search(self, queries: list[str], k: int) -> list[list[dict]]:
        """The best k passages for each query, as contexts `{title, text, score}`, best first."""
        k = min(k, len(self.passages))
        found, scores = self.index.retrieve(
            self._tokens(queries),
            k=k,
            show_progress=False,
            backend_selection="numpy",
            corpus=list(range(len(self.passages))),
        )
        context = lambda i, score: {**{n: self.passages[i][n] for n in ("title", "text")}, "score": float(score)}
        return [[context(int(i), s) for i, s in zip(*row, strict=True)] for row in zip(found, scores, strict=True)]
