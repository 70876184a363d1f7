"""BM25 over passages in memory."""

from roserag_jax.errors import UserError


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
        """The best k passages for each query, as contexts `{title, text, score, source?}`, best first."""
        k = min(k, len(self.passages))
        found, scores = self.index.retrieve(
            self._tokens(queries),
            k=k,
            show_progress=False,
            backend_selection="numpy",
            corpus=list(range(len(self.passages))),
        )
        shown = lambda passage: {name: passage[name] for name in ("title", "text", "source") if name in passage}
        context = lambda i, score: {**shown(self.passages[i]), "score": float(score)}
        return [[context(int(i), s) for i, s in zip(*row, strict=True)] for row in zip(found, scores, strict=True)]
