"""BM25 over passages in memory."""

from roserag_jax.errors import UserError
from roserag_jax.rag import words


class BM25:
    """Lucene's BM25 over passages `{id, title, text}`, by the `bm25s` library.

    Words are those of `rag.words`, in any language. No stop words are left out: they would be those of one language
    (some of which are words of weight in others: the Who, vitamin A, Spanish no), and a word that most passages contain
    hardly counts in BM25 anyway.

    Raises:
      UserError: no passage has a word.
    """

    def __init__(self, passages: list[dict]):
        # bm25s starts JAX's backend when imported, which must wait until processes are set up.
        import bm25s

        self.passages, self.vocabulary = passages, {}
        number = lambda term: self.vocabulary.setdefault(term, len(self.vocabulary))
        terms = [list(map(number, words.terms(f"{p['title']} {p['text']}"))) for p in passages]
        if not self.vocabulary:
            raise UserError(f"None of the {len(passages)} passages has a word to search for.")
        self.index = bm25s.BM25(method="lucene")
        self.index.index((terms, self.vocabulary), show_progress=False)

    def search(self, queries: list[str], k: int) -> list[list[dict]]:
        """The best passages for each query, at most k, as contexts `{title, text, score, source?}`, best first.

        A passage that has no word of the query is not found, so there may be fewer, or none.
        """
        terms = [[term for term in words.terms(query) if term in self.vocabulary] for query in queries]
        searched = [i for i, known in enumerate(terms) if known]
        found = [[] for _ in queries]
        if searched:
            numbers, scores = self.index.retrieve(
                [terms[i] for i in searched],
                k=min(k, len(self.passages)),
                show_progress=False,
                backend_selection="numpy",
                corpus=list(range(len(self.passages))),
            )
            for i, *best in zip(searched, numbers, scores, strict=True):
                found[i] = [self._context(int(n), float(score)) for n, score in zip(*best, strict=True) if score > 0]
        return found

    def _context(self, number: int, score: float) -> dict:
        passage = self.passages[number]
        return {name: passage[name] for name in ("title", "text", "source") if name in passage} | {"score": score}
