"""Lucene's BM25 by `tantivy`, which merges, compresses and searches: over passages in memory, or (`index`) on disk.

Words are those of `rag.words`, in any language. No stop words are left out: they would be those of one language (some
of which are words of weight in others: the Who, vitamin A, Spanish no), and a word that most passages contain hardly
counts in BM25 anyway.
"""

import json
import os
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from roserag_jax.errors import UserError
from roserag_jax.rag import words

MAX_TERMS = 1000  # of a question
# As the index stores scores of equal passages to a few digits only, these are those that count.
_DIGITS = 4
_WRITER_BYTES = 64 << 20


def schema() -> Any:
    """The fields of a passage: its number, the unit of the corpus that it belongs to, its terms and itself."""
    import tantivy

    made = tantivy.SchemaBuilder()
    made.add_unsigned_field("number", indexed=True, fast=True)
    made.add_unsigned_field("unit", indexed=True, fast=True)
    made.add_text_field("terms", tokenizer_name="whitespace", index_option="freq")
    made.add_bytes_field("passage", stored=True)
    return made.build()


def document(passage: dict, number: int, unit: int = 0) -> tuple[Any, bool]:
    """A passage `{title, text}` with its number as the library takes it, and whether it has a word."""
    import tantivy

    terms, made = words.terms(f"{passage['title']} {passage['text']}"), tantivy.Document()
    made.add_unsigned("number", number)
    made.add_unsigned("unit", unit)
    made.add_text("terms", " ".join(terms))
    made.add_bytes("passage", json.dumps(passage, ensure_ascii=False).encode())
    return made, bool(terms)


def context(passage: dict) -> dict:
    """What a question's row keeps of a passage."""
    return {name: passage[name] for name in ("title", "text", "source") if name in passage}


class Searcher:
    """Searches the passages of an open index of the library.

    Args:
      index: the library's, of this module's schema.
      count: how many passages it has.
    """

    def __init__(self, index: Any, count: int):
        self.schema, self.searcher, self.count = schema(), index.searcher(), count

    def search(self, queries: list[str], k: int) -> list[list[dict]]:
        """The best passages for each query, at most k, as contexts `{title, text, score, source?}`, best first.

        A passage that has no word of the query is not found, so there may be fewer, or none.
        """
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            return list(pool.map(lambda query: self._search(query, k), queries))

    def _search(self, query: str, k: int) -> list[dict]:
        import tantivy

        terms, most = words.terms(query)[:MAX_TERMS], self.count
        each = [tantivy.Query.term_query(self.schema, "terms", term, "freq") for term in terms]
        query = tantivy.Query.boolean_query([(tantivy.Occur.Should, one) for one in each])
        limit, hits = min(k + 8, most), []
        while True:  # until all that score as the last one are seen: of equals, those that came first are taken
            hits = [(round(s, _DIGITS), address) for s, address in self.searcher.search(query, limit, count=False).hits]
            if len(hits) < limit or limit == most or hits[-1][0] < hits[k - 1][0]:
                break
            limit = min(4 * limit, most)
        numbers = self.searcher.fast_field_values("number", [address for _, address in hits])
        ranked = sorted(zip(hits, numbers, strict=True), key=lambda hit: (-hit[0][0], hit[1]))[:k]
        return [context(self.passage(address)) | {"score": score} for (score, address), _ in ranked]

    def passage(self, address: Any) -> dict:
        """The passage `{id, title, text, source?}` at one of the library's addresses."""
        return json.loads(bytes(self.searcher.doc(address)["passage"][0]))


class BM25(Searcher):
    """BM25 over passages `{title, text}` in memory.

    Raises:
      UserError: no passage has a word.
    """

    def __init__(self, passages: list[dict]):
        import tantivy

        index, any_words = tantivy.Index(schema()), False
        writer = index.writer(heap_size=_WRITER_BYTES, num_threads=1)
        for number, passage in enumerate(passages):
            made, has_words = document(passage, number)
            writer.add_document(made)
            any_words = any_words or has_words
        if not any_words:
            raise UserError(f"None of the {len(passages)} passages has a word to search for.")
        writer.commit()
        index.reload()
        super().__init__(index, len(passages))
