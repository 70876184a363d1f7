"""Retrievers: one class each, with `search(queries, k)`."""


class BM25:
    """Lucene's BM25 over passages `{id, title, text}`, by the `bm25s` library."""

    def __init__(self, passages: list[dict]):
        # bm25s starts JAX's backend when imported, which must wait until processes are set up.
        import bm25s

        self._bm25s, self.passages = bm25s, passages
        self.index = bm25s.BM25(method="lucene")
        self.index.index(self._tokens([f"{p['title']} {p['text']}" for p in passages]), show_progress=False)

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
