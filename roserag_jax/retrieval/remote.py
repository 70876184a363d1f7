"""What the retrievers have in common that ask a server: queries in batches, several at a time."""

from collections.abc import Callable, Iterator

from roserag_jax.ahead import in_order

BATCH, REQUESTS = 64, 4


def in_batches(ask: Callable[[list[str]], list[list[dict]]], queries: list[str]) -> Iterator[list[dict]]:
    """Yield what `ask` returns for each query, in order; it gets at most `BATCH` queries, in `REQUESTS` threads."""
    batches = (queries[start : start + BATCH] for start in range(0, len(queries), BATCH))
    for found in in_order(ask, batches, threads=REQUESTS):
        yield from found
