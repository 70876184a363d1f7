"""The training stream: pairs, tokenised and batched by Grain, in an order that is a pure function of the step.

Axes: B pairs of a batch, N = 2 branches (chosen, rejected), C shared-prefix tokens, P prompt tokens, S branch tokens.
"""

import array
import os
import zlib
from collections.abc import Sequence
from typing import NamedTuple

import grain
import numpy as np

from roserag_jax.inference.engine import bucket, pad, shared_prefix_length
from roserag_jax.rag.prompts import Prompt, cut_passages, prompt_tokens, response_tokens


class Pair(NamedTuple):
    """A pair as tokens; the responses end with the end-of-turn token."""

    id: str
    prompt: Sequence[int]
    chosen: Sequence[int]
    rejected: Sequence[int]

    def compact(self) -> "Pair":
        """The pair in arrays, four bytes a token; as lists, tens of thousands of pairs would take gigabytes."""
        return Pair(self.id, *(array.array("i", tokens) for tokens in self[1:]))


class Batch(NamedTuple):
    """Host arrays of one step. Rows that only fill the batch have weight 0."""

    prompt: np.ndarray  # [B, P] the prompt after its shared prefix, but for its last token
    prompt_lengths: np.ndarray  # [B]
    branches: np.ndarray  # [B, 2, S] the prompt's last token, then the response but for its last
    targets: np.ndarray  # [B, 2, S] the response
    response_lengths: np.ndarray  # [B, 2]
    weights: np.ndarray  # [B]

    def chosen_only(self) -> "Batch":
        """The batch without its rejected branches."""
        chosen = {name: getattr(self, name)[:, :1] for name in ("branches", "targets", "response_lengths")}
        return self._replace(**chosen)


def tokenize(tokenizer, stop_id: int, rows: list[dict], max_response: int, max_length: int = 0):
    """Pairs as tokens, made by Grain's workers, and what happened to those that are too long.

    Args:
      rows: `{id, prompt, chosen, rejected, passage_spans?, plain_text?}`; the spans say where passages stand in the
        prompt, and `plain_text` that no chat template has written it.
      max_response: longest response, end-of-turn token included; pairs with a longer one are left out.
      max_length: longest prompt with a response; passages are cut to fit. 0 is no limit.

    Returns:
      The pairs [Pair], and counts by what was done: 'cut', 'response too long', 'prompt too long'.
    """

    def read(row):
        prompt = prompt_tokens(tokenizer, row["prompt"], row.get("plain_text", False))
        chosen, rejected = (response_tokens(tokenizer, row[side]) + [stop_id] for side in ("chosen", "rejected"))
        longest = max(len(chosen), len(rejected))
        if longest > max_response:
            return None, "response too long"
        if not max_length or len(prompt) + longest <= max_length:
            return Pair(row["id"], prompt, chosen, rejected).compact(), "whole"
        spans = tuple(map(tuple, row.get("passage_spans", ())))
        cut = cut_passages(tokenizer, Prompt(row["prompt"], prompt, passage_spans=spans), max_length - longest)
        return (Pair(row["id"], cut.tokens, chosen, rejected).compact(), "cut") if cut else (None, "prompt too long")

    workers = grain.ReadOptions(num_threads=os.cpu_count() or 1, prefetch_buffer_size=64)
    made = list(grain.MapDataset.source(rows).map(read).to_iter_dataset(workers))
    counts = {what: sum(w == what for _, w in made) for what in ("cut", "response too long", "prompt too long")}
    return [pair for pair, _ in made if pair], counts


def hold_out(pairs: list[Pair], fraction: float, seed: int) -> tuple[list[Pair], list[Pair]]:
    """Pairs to train on and pairs held out, by question: the lowest by hash, at least one if `fraction` > 0."""
    rank = lambda name: (zlib.crc32(f"{seed}/{name}".encode()), name)
    names = sorted({pair.id for pair in pairs}, key=rank)
    held = set(names[: max(1, round(fraction * len(names)))] if fraction else [])
    return [p for p in pairs if p.id not in held], [p for p in pairs if p.id in held]


def epoch_order(lengths: list[int], batch: int, seed: int, epoch: int) -> list[list[int]]:
    """The batches of one epoch: shuffled, sorted by length within windows of eight batches, and shuffled as batches.

    Windows keep padding low without ordering the epoch by length. The last batch may be short.
    """
    rng = np.random.default_rng((seed, epoch))
    order, window = rng.permutation(len(lengths)), 8 * batch
    batches = []
    for start in range(0, len(order), window):
        part = sorted(order[start : start + window].tolist(), key=lambda i: (lengths[i], i))
        batches += [part[i : i + batch] for i in range(0, len(part), batch)]
    return [batches[i] for i in rng.permutation(len(batches))]


class Stream:
    """Batches of the whole run by step; iteration can begin at any step and gives the same batches from there on.

    `shared_prefix` [C] are the tokens that all prompts begin with; batches leave them out.

    Args:
      batch: pairs of a step; the last batch of an epoch is filled with rows of weight 0.
    """

    def __init__(self, pairs: list[Pair], *, batch: int, pad_id: int, epochs: int = 1, seed: int = 0):
        self.pairs, self.batch, self.pad_id = pairs, batch, pad_id
        prompts = [pair.prompt for pair in pairs]
        self.shared_prefix = np.array(prompts[0][: shared_prefix_length(prompts)], np.int32)
        lengths = [len(pair.prompt) + len(pair.chosen) + len(pair.rejected) for pair in pairs]
        self.order = [rows for epoch in range(epochs) for rows in epoch_order(lengths, batch, seed, epoch)]

    def __len__(self) -> int:
        return len(self.order)

    def rows(self, step: int) -> list[Pair]:
        """The pairs of a step."""
        return [self.pairs[i] for i in self.order[step]]

    def _sizes(self, rows: list[Pair]) -> tuple[int, int]:
        """Padded lengths of what follows the shared prefix and of the responses."""
        longest = max(len(r.prompt) for r in rows) - len(self.shared_prefix) - 1
        return bucket(longest), bucket(max(max(len(r.chosen), len(r.rejected)) for r in rows))

    def padding(self) -> tuple[float, int]:
        """Fraction of all positions of the run that are padding, and how many shapes its batches have."""
        batches = [self.rows(step) for step in range(len(self))]
        sizes = [self._sizes(rows) for rows in batches]
        C = len(self.shared_prefix)
        length = lambda r: len(r.prompt) - C - 1 + len(r.chosen) + len(r.rejected)
        real = sum(C + sum(map(length, rows)) for rows in batches)
        return 1 - real / sum(C + self.batch * (prompt + 2 * response) for prompt, response in sizes), len(set(sizes))

    def collate(self, step: int) -> Batch:
        """The arrays of a step, padded to its buckets."""
        rows, C = self.rows(step), len(self.shared_prefix)
        weights = np.array([1.0] * len(rows) + [0.0] * (self.batch - len(rows)), np.float32)
        rows += [rows[0]] * (self.batch - len(rows))
        prompt_size, response_size = self._sizes(rows)
        prompt, prompt_lengths = pad([r.prompt[C:-1] for r in rows], prompt_size, self.pad_id)
        responses = [response for r in rows for response in (r.chosen, r.rejected)]
        targets, lengths = pad(responses, response_size, self.pad_id)
        first = np.repeat([r.prompt[-1:] for r in rows], 2, axis=0)
        shape = (self.batch, 2, -1)
        branches = np.concatenate([first, targets[:, :-1]], axis=1).astype(np.int32)
        return Batch(
            prompt, prompt_lengths, branches.reshape(shape), targets.reshape(shape), lengths.reshape(shape[:2]), weights
        )

    def tokens(self, batch: Batch) -> tuple[int, int]:
        """Real tokens of a batch, rows that only fill it aside, and positions that the device computes for it."""
        real = batch.weights > 0
        count = batch.prompt_lengths[real].sum() + batch.response_lengths[real].sum()
        C = len(self.shared_prefix)
        return int(C + count), C + batch.prompt.size + batch.targets.size

    def start(self, step: int):
        """Iterate over batches from `step` on, made ahead in background threads."""
        steps = grain.MapDataset.source(range(step, len(self))).map(self.collate)
        return iter(steps.to_iter_dataset(grain.ReadOptions(num_threads=2, prefetch_buffer_size=4)))
