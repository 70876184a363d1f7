"""The training stream: pairs, tokenized by Grain as they are needed, in an order that is a pure function of the step.

Axes: B pairs of a batch, N = 2 branches (chosen, rejected), C shared-prefix tokens, P prompt tokens, S branch tokens.
"""

import collections
import copy
import functools
import itertools
import os
import zlib
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import grain
import numpy as np

from roserag_jax.ahead import in_order
from roserag_jax.errors import UserError
from roserag_jax.inference.engine import bucket, joined_sizes, pad, shared_prefix_length
from roserag_jax.rag.prompts import Prompt, cut_passages, prompt_tokens, response_tokens

_WINDOW = 8  # batches
_BLOCK = 256  # rows whose responses are tokenized at a time
_SAMPLE = 64  # pairs, at least, that the shared prefix and the sizes of batches are taken from
_STEPS_OF_SIZE = 128  # a size that fewer steps need is not worth compiling for
_THREADS = os.cpu_count() or 1


class Pair(NamedTuple):
    """A pair as tokens; the responses end with the end-of-turn token."""

    id: str
    prompt: Sequence[int]
    chosen: Sequence[int]
    rejected: Sequence[int]


class Batch(NamedTuple):
    """Host arrays of one step. Rows that only fill the batch have weight 0; a batch may consist of such rows."""

    prompt: np.ndarray  # [B, P] the prompt after its shared prefix, but for its last token
    prompt_lengths: np.ndarray  # [B]
    branches: np.ndarray  # [B, 2, S] the prompt's last token, then the response but for its last
    targets: np.ndarray  # [B, 2, S] the response
    response_lengths: np.ndarray  # [B, 2]
    weights: np.ndarray  # [B]
    shared_prefix: np.ndarray = np.zeros(0, np.int32)  # [C] tokens that all prompts begin with

    def chosen_only(self) -> "Batch":
        """The batch without its rejected branches."""
        chosen = {name: getattr(self, name)[:, :1] for name in ("branches", "targets", "response_lengths")}
        return self._replace(**chosen)


class Pairs(Sequence[Pair | None]):
    """The pairs of some rows, each read and tokenized when it is asked for, by any thread.

    A pair that does not fit without any passage is None: that is known only when it is tokenized.

    Args:
      rows: `{id, prompt, chosen, rejected, passage_spans?, plain_text?}`; the spans say where passages stand in the
        prompt, and `plain_text` that no chat template has written it.
      stop_id: the end-of-turn token, which ends every response.
      max_response: longest response, end-of-turn token included; rows with a longer one are left out.
      max_length: longest prompt with a response; passages are cut to fit. 0 is no limit.

    Attributes:
      ids: the questions of the pairs.
      left_out: how many rows have a response that is too long.
      cut: places of rows whose passages were cut, of the pairs read so far.
      lost: places of rows that do not fit even so.
    """

    def __init__(self, tokenizer, stop_id: int, rows: Sequence[dict], max_response: int, max_length: int = 0):
        self._tokenizer, self._stop_id, self._rows, self._max_length = tokenizer, stop_id, rows, max_length

        def check(start: int) -> list[tuple[str, bool]]:
            """Of a block of rows the ids, and whether the responses fit."""
            block = [rows[i] for i in range(start, min(start + _BLOCK, len(rows)))]
            responses = [row[side] for row in block for side in ("chosen", "rejected")]
            lengths = [len(tokens) + 1 for tokens in tokenizer(responses, add_special_tokens=False).input_ids]
            longest = map(max, lengths[::2], lengths[1::2])
            return [(row["id"], length <= max_response) for row, length in zip(block, longest, strict=True)]

        checked = itertools.chain.from_iterable(in_order(check, range(0, len(rows), _BLOCK), threads=_THREADS))
        fitting = [(place, name) for place, (name, fits) in enumerate(checked) if fits]
        self._places, self.ids = [place for place, _ in fitting], [name for _, name in fitting]
        self.left_out, self.cut, self.lost = len(rows) - len(fitting), set(), set()

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, i: int) -> Pair | None:
        place, tokenizer = self._places[i], self._tokenizer
        row = self._rows[place]
        prompt = prompt_tokens(tokenizer, row["prompt"], row.get("plain_text", False))
        chosen, rejected = (response_tokens(tokenizer, row[side]) + [self._stop_id] for side in ("chosen", "rejected"))
        longest = max(len(chosen), len(rejected))
        if self._max_length and len(prompt) + longest > self._max_length:
            spans = tuple(map(tuple, row.get("passage_spans", ())))
            whole = Prompt(row["prompt"], prompt, passage_spans=spans)
            cut = cut_passages(tokenizer, whole, self._max_length - longest)
            (self.cut if cut else self.lost).add(place)
            if cut is None:
                return None
            prompt = cut.tokens
        return Pair(row["id"], prompt, chosen, rejected)

    def subset(self, chosen: Sequence[int]) -> "Pairs":
        """Some of the pairs, by their places."""
        result = copy.copy(self)
        result._places, result.ids = [self._places[i] for i in chosen], [self.ids[i] for i in chosen]
        return result


def hold_out(
    ids: Sequence[str], fraction: float, seed: int, questions: Sequence[str] | None = None
) -> tuple[list[int], list[int]]:
    """Places of the pairs to train on and of those held out, by question: the lowest by hash, at least one if
    `fraction` > 0.

    Args:
      questions: those to hold a fraction of out, whether they have pairs or not, so that it is the same ones in all
        rounds; None is those of the pairs.
    """
    rank = lambda name: (zlib.crc32(f"{seed}/{name}".encode()), name)
    names = sorted({*(ids if questions is None else questions)}, key=rank)
    held = set(names[: max(1, round(fraction * len(names)))] if fraction else [])
    places = range(len(ids))
    return [i for i in places if ids[i] not in held], [i for i in places if ids[i] in held]


@functools.lru_cache(maxsize=4)
def epoch_windows(count: int, batch: int, seed: int, epoch: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """The order of `count` pairs in an epoch, in windows of a few batches: the places of each window's pairs, and the
    order of its batches.

    Within a window, pairs are batched by length, which keeps padding low without ordering the epoch by length; and no
    more than a window of pairs has to be read before the first step.
    """
    rng, size = np.random.default_rng((seed, epoch)), _WINDOW * batch
    order = rng.permutation(count)
    windows = [order[start : start + size] for start in range(0, count, size)]
    return [(window, rng.permutation(-(-len(window) // batch))) for window in windows]


def batch_window(pairs: list[tuple[int, Pair | None]], order: np.ndarray, batch: int) -> list[list[Pair]]:
    """The batches of a window's pairs, which come with their places, in `order`.

    The last by length may be short. Where pairs are None, the others are spread over all batches, of which there are
    as many as ever: how many steps a run has is known before any pair is read.
    """
    size = lambda pair: len(pair.prompt) + len(pair.chosen) + len(pair.rejected)
    kept = sorted(((size(pair), i, pair) for i, pair in pairs if pair), key=lambda each: each[:2])
    starts = [k * (batch if len(kept) == len(pairs) else len(kept) / len(order)) for k in range(len(order) + 1)]
    batches = [[pair for *_, pair in kept[int(a) : int(b)]] for a, b in itertools.pairwise(starts)]
    return [batches[i] for i in order]


def padded_sizes(lengths: Iterable[int], minimum: float) -> list[int]:
    """The sizes that batches of these lengths are padded to, each of which compiles a training step of its own."""
    return [size for size, _ in joined_sizes(collections.Counter(map(bucket, lengths)), minimum)]


class Stream:
    """Batches of the whole run by step; iteration can begin at any step and gives the same batches from there on.

    Pairs are read shortly before they are used, whatever their number.

    Args:
      batch: pairs of a step; one with fewer is filled with rows of weight 0.

    Attributes:
      places: the pairs that there are, but for those of the first that were read and found None.
      shared_prefix: tokens [C] that the first pairs' prompts begin with; batches leave them out, unless one of their
        prompts begins otherwise.

    Raises:
      UserError: all pairs that were tried are None.
    """

    def __init__(self, pairs: Sequence[Pair | None], *, batch: int, pad_id: int, epochs: int = 1, seed: int = 0):
        self._pairs, self.batch, self.pad_id, self._epochs, self._seed = pairs, batch, pad_id, epochs, seed
        tried = range(0, len(pairs), max(1, len(pairs) // _SAMPLE))
        found = dict(zip(tried, in_order(pairs.__getitem__, tried, threads=_THREADS), strict=True))
        self.places = [i for i in range(len(pairs)) if found.get(i, self) is not None]
        read = [pair for pair in found.values() if pair]
        if not read:
            raise UserError(f"config.train.max_length: none of {len(tried)} pairs fits without any passage; raise it.")
        prompts = [[*pair.prompt] for pair in read]
        self.shared_prefix = np.array(prompts[0][: shared_prefix_length(prompts)], np.int32)
        minimum = len(read) * _STEPS_OF_SIZE / len(self)
        self._prompt_sizes = padded_sizes((len(tokens) - len(self.shared_prefix) - 1 for tokens in prompts), minimum)
        self._response_sizes = padded_sizes((max(len(pair.chosen), len(pair.rejected)) for pair in read), minimum)

    def __len__(self) -> int:
        return self._epochs * self._steps

    @property
    def _steps(self) -> int:
        """Steps of an epoch."""
        return -(-len(self.places) // self.batch)

    def _windows(self, step: int) -> Iterator[tuple[list[int], np.ndarray]]:
        """The windows from that of `step` on, as `epoch_windows` gives them."""
        first_epoch, first = divmod(step, self._steps)
        for epoch in range(first_epoch, self._epochs):
            windows = epoch_windows(len(self.places), self.batch, self._seed, epoch)
            for window, order in windows[first // _WINDOW :]:
                yield [self.places[i] for i in window], order
            first = 0

    def _batches(self, step: int) -> Iterator[list[Pair]]:
        """The pairs of each step from `step` on, read ahead by Grain's workers."""
        places = [i for window, _ in self._windows(step) for i in window]
        workers = grain.ReadOptions(num_threads=_THREADS, prefetch_buffer_size=2 * _WINDOW * self.batch)
        # In tuples, for Grain leaves out what is None.
        read = grain.MapDataset.source(places).map(lambda i: (i, self._pairs[i]))
        pairs = iter(read.to_iter_dataset(workers))
        skipped = step % self._steps % _WINDOW
        for window, order in self._windows(step):
            yield from batch_window(list(itertools.islice(pairs, len(window))), order, self.batch)[skipped:]
            skipped = 0

    def rows(self, step: int) -> list[Pair]:
        """The pairs of a step."""
        window, order = next(self._windows(step))
        read = [(i, self._pairs[i]) for i in window]
        return batch_window(read, order, self.batch)[step % self._steps % _WINDOW]

    def collate(self, step: int) -> Batch:
        """The arrays of a step, padded to its buckets."""
        return self._collate(self.rows(step))

    def start(self, step: int) -> Iterator[Batch]:
        """Iterate over batches from `step` on, made ahead in threads."""
        return in_order(self._collate, self._batches(step), threads=2, ahead=4)

    def _collate(self, rows: list[Pair]) -> Batch:
        """The arrays of some pairs."""
        weights = np.array([1.0] * len(rows) + [0.0] * (self.batch - len(rows)), np.float32)
        prefix = self.shared_prefix.tolist()
        filler = rows[0] if rows else Pair("", [*prefix, self.pad_id], [self.pad_id], [self.pad_id])
        rows = rows + [filler] * (self.batch - len(rows))
        C = len(prefix)
        if any(len(row.prompt) <= C or [*row.prompt[:C]] != prefix for row in rows):
            C = 0
        padded = lambda length, sizes: next((size for size in sizes if length <= size), bucket(length))
        prompt_size = padded(max(len(row.prompt) for row in rows) - C - 1, self._prompt_sizes)
        response_size = padded(max(max(len(row.chosen), len(row.rejected)) for row in rows), self._response_sizes)
        prompt, prompt_lengths = pad([row.prompt[C:-1] for row in rows], prompt_size, self.pad_id)
        responses = [response for row in rows for response in (row.chosen, row.rejected)]
        targets, lengths = pad(responses, response_size, self.pad_id)
        first = np.repeat([row.prompt[-1:] for row in rows], 2, axis=0)
        shape = (self.batch, 2, -1)
        branches = np.concatenate([first, targets[:, :-1]], axis=1).astype(np.int32)
        return Batch(
            prompt,
            prompt_lengths,
            branches.reshape(shape),
            targets.reshape(shape),
            lengths.reshape(shape[:2]),
            weights,
            self.shared_prefix[:C],
        )

    @staticmethod
    def tokens(batch: Batch) -> tuple[int, int]:
        """Real tokens of a batch, rows that only fill it aside, and positions that the device computes for it."""
        real, C = batch.weights > 0, len(batch.shared_prefix)
        count = batch.prompt_lengths[real].sum() + batch.response_lengths[real].sum()
        return int(C + count), C + batch.prompt.size + batch.targets.size
