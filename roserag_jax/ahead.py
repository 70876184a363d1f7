"""Results computed ahead of whoever asks for them, a bounded number of them, in threads."""

import collections
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

Item, Result = TypeVar("Item"), TypeVar("Result")


def in_order(
    function: Callable[[Item], Result], items: Iterable[Item], *, threads: int, ahead: int | None = None
) -> Iterator[Result]:
    """Yield `function(item)` for each item in order, computed in threads.

    Items are taken, and results exist, at most `ahead` before they are asked for (by default one per thread), so their
    number limits nothing. An error is raised where its result would be yielded.
    """
    ahead = ahead or threads
    with ThreadPoolExecutor(threads) as pool:
        pending, items = collections.deque(), iter(items)
        try:
            while True:
                while len(pending) <= ahead and (following := next(items, pool)) is not pool:
                    pending.append(pool.submit(function, following))
                if not pending:
                    return
                yield pending.popleft().result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
