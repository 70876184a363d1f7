"""The training stream: pairs, tokenised and batched by Grain, in an order that is a pure function of the step.

Axes: B pairs of a batch, P prompt, S response, N = 2 branches (chosen, rejected).
"""

from typing import NamedTuple

import grain
import numpy as np

from roserag_jax.rag.prompts import prompt_tokens, response_tokens
from roserag_jax.runtime.sampler import bucket, pad, shared_length


class Pair(NamedTuple):
    """A pair as tokens; the responses end with the end-of-turn token."""

    id: str
    prompt: list[int]
    chosen: list[int]
    rejected: list[int]


class Batch(NamedTuple):
    """Host arrays of one step. Rows that only fill the batch have weight 0."""

    prompt: np.ndarray  # [B, P] the prompt after its shared beginning, but for its last token
    prompt_lengths: np.ndarray  # [B]
    branches: np.ndarray  # [B, 2, S] the prompt's last token, then the response but for its last
    targets: np.ndarray  # [B, 2, S] the response
    response_lengths: np.ndarray  # [B, 2]
    weights: np.ndarray  # [B]


def tokenize(tokenizer, stop_id: int, rows: list[dict], max_response: int) -> tuple[list[Pair], int]:
    """Pairs as tokens, and how many were left out because a response is over `max_response` tokens."""
    pairs = [
        Pair(
            row["id"],
            prompt_tokens(tokenizer, row["prompt"]),
            *(response_tokens(tokenizer, row[side]) + [stop_id] for side in ("chosen", "rejected")),
        )
        for row in rows
    ]
    kept = [pair for pair in pairs if max(len(pair.chosen), len(pair.rejected)) <= max_response]
    return kept, len(pairs) - len(kept)


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

    `shared` [C] are the tokens that all prompts begin with; batches leave them out.
    """

    def __init__(self, pairs: list[Pair], batch: int, epochs: int, seed: int, pad_id: int):
        self.pairs, self.batch, self.pad_id = pairs, batch, pad_id
        prompts = [pair.prompt for pair in pairs]
        self.shared = np.array(prompts[0][: shared_length(prompts)], np.int32)
        lengths = [len(pair.prompt) + len(pair.chosen) + len(pair.rejected) for pair in pairs]
        self.order = [b for epoch in range(epochs) for b in epoch_order(lengths, batch, seed, epoch)]

    def __len__(self) -> int:
        return len(self.order)

    def ids(self, step: int) -> list[str]:
        """The rows of a step."""
        return [self.pairs[i].id for i in self.order[step]]

    def collate(self, step: int) -> Batch:
        """The arrays of a step, padded to its buckets."""
        rows = [self.pairs[i] for i in self.order[step]]
        weights = np.array([1.0] * len(rows) + [0.0] * (self.batch - len(rows)), np.float32)
        rows += [rows[0]] * (self.batch - len(rows))
        prompts = [r.prompt[len(self.shared) : -1] for r in rows]
        prompt, prompt_lengths = pad(prompts, bucket(max(map(len, prompts))), self.pad_id)
        responses = [response for r in rows for response in (r.chosen, r.rejected)]
        targets, lengths = pad(responses, bucket(max(map(len, responses))), self.pad_id)
        first = np.repeat([r.prompt[-1:] for r in rows], 2, axis=0)
        shape = (self.batch, 2, -1)
        branches = np.concatenate([first, targets[:, :-1]], axis=1).astype(np.int32)
        return Batch(
            prompt, prompt_lengths, branches.reshape(shape), targets.reshape(shape), lengths.reshape(shape[:2]), weights
        )

    def start(self, step: int):
        """Iterate over batches from `step` on, made ahead in background threads."""
        steps = grain.MapDataset.source(range(step, len(self))).map(self.collate)
        return iter(steps.to_iter_dataset(grain.ReadOptions(num_threads=2, prefetch_buffer_size=4)))
