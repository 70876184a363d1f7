"""Rewards of candidates: from a reward model, or from a file of scores made elsewhere.

Axes: B prompts, N candidates of each, P prompt tokens, S tokens of a candidate, D model width.
"""

import functools
import os
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from roserag_jax.distributed.sharding import devices
from roserag_jax.errors import UserError, quote
from roserag_jax.hub import loading
from roserag_jax.hub.reward_model import RewardModelFolder
from roserag_jax.inference.engine import Engine, pad
from roserag_jax.models.cache import PrefixCache
from roserag_jax.preference import labels
from roserag_jax.rag.files import read_rows
from roserag_jax.rag.layouts import as_number, as_text
from roserag_jax.rag.prompts import prompt_tokens
from roserag_jax.workdir import REWARDS, Workdir

_TOKENS = 4096  # of prompts and candidates in one program, for each device that prompts are split over


class RewardModel:
    """Scores conversations that begin alike.

    What the candidates of a prompt have in common is prefilled once; the rest of each is a branch, all of them in one
    `extend`.
    """

    def __init__(self, source: RewardModelFolder, tokenizer, dtype, mesh: Mesh):
        self.source, self.tokenizer = source, tokenizer
        model = loading.assemble(source.config, loading.load_base(source, dtype, mesh))
        self._engine = Engine(model, mesh, stop_ids=(), pad_id=0)
        self._head = jnp.asarray(source.head)

    def tokens(self, conversation: str) -> list[int]:
        """Tokens of a conversation, up to the last that is not padding."""
        tokens = prompt_tokens(self.tokenizer, conversation)
        while len(tokens) > 1 and tokens[-1] == self.source.pad_id:  # a template may end in it
            tokens.pop()
        return tokens

    def rewards(self, groups: list[list[list[int]]], batch: int, most: int) -> Iterator[tuple[int, list[float]]]:
        """The rewards of groups of conversations (tokens), a group being the candidates of one prompt.

        Each group has one of few shapes, which is its own whatever is scored beside it, and a program of each shape has
        as many groups as keep a device busy: more of a short shape.

        Args:
          batch: the most prompts scored at a time.
          most: conversations of a group, also of groups that are scored elsewhere, so that shapes are the same.

        Yields:
          A group's number and its rewards, in order.
        """
        split = [self._split(group) for group in groups]
        shape = lambda i: (_length(len(split[i][0]) - 1), _length(max(map(len, split[i][1]))))
        X = devices("batch", self._engine.mesh)
        order = sorted((i for i, group in enumerate(groups) if group), key=lambda i: (shape(i), i))
        yield from ((i, []) for i, group in enumerate(groups) if not group)
        while order:
            P, S = shape(order[0])
            B = X * max(1, min(batch // X, _TOKENS // (P + most * S)))
            members = [i for i in order[:B] if shape(i) == (P, S)]
            order = order[len(members) :]
            rows = [split[i] for i in members] + [([0], [[0]])] * (B - len(members))
            prompts = [prompt for prompt, _ in rows]
            branches, lengths = pad([b for _, bs in rows for b in bs + [[0]] * (most - len(bs))], S, 0)
            cache = self._engine.prefill(prompts, length=P)
            with jax.set_mesh(self._engine.mesh):
                placed = self._engine.place(branches.reshape(-1, most, S), lengths.reshape(-1, most) - 1)
                found = np.asarray(_rewards(self._engine.network, self._engine.weights, self._head, cache, *placed))
            for i, row in zip(members, found, strict=False):
                yield i, [float(reward) for reward in row[: len(groups[i])]]

    @staticmethod
    def _split(group: list[list[int]]) -> tuple[list[int], list[list[int]]]:
        """What all conversations begin with, and the rest of each; its last token begins every branch."""
        common = max(1, min(len(os.path.commonprefix(group)), min(map(len, group), default=1)))
        return (group[0][:common] if group else [0]), [tokens[common - 1 :] for tokens in group] or [[0]]


def _length(tokens: int) -> int:
    """The padded length of a prompt or a candidate: powers of two, so that few shapes are compiled."""
    return max(64, 1 << (tokens - 1).bit_length())


@functools.partial(jax.jit, static_argnums=0)
def _rewards(
    network,
    weights,
    head: Float[Array, "D"],
    cache: PrefixCache,
    branches: Int[Array, "B N S"],
    last: Int[Array, "B N"],
) -> Float[Array, "B N"]:
    hidden = network.model(weights).extend(branches, cache)
    pooled = jnp.take_along_axis(hidden, last[..., None, None], axis=2)[:, :, 0]
    return jnp.einsum("bnd,d->bn", pooled.astype(jnp.float32), head)


def read_scores(path: str, rows: list[dict]) -> list[list[float | None]]:
    """Rewards of candidates from a file of `{id, candidate, score}`, in the order of the candidates; None without one.

    A candidate is named by its response, word for word. Questions that are not among the rows are counted and ignored.

    Raises:
      UserError: a row has other fields, names no candidate of its question, or scores one a second time otherwise; or
        no row belongs to a question.
    """
    places = {row["id"]: {c["response"]: i for i, c in enumerate(row["candidates"])} for row in rows}
    found: dict[str, list[float | None]] = {row["id"]: [None] * len(row["candidates"]) for row in rows}
    matched = unknown = 0
    for where, line in read_rows(epath.Path(path).expanduser()):
        try:
            name, text, score = as_text(line["id"]), line["candidate"], as_number(line["score"])
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            why = f"no {error}" if isinstance(error, KeyError) else error
            raise UserError(f"{where}: a row must be {{id, candidate, score}} ({why}).") from error
        if name not in places:
            unknown += 1
            continue
        if not isinstance(text, str) or text not in places[name]:
            raise UserError(
                f"{where}: question {quote(name)} has no candidate {quote(text)}; scores are of the responses in "
                "candidates.jsonl, word for word."
            )
        place = places[name][text]
        if found[name][place] not in (None, score):
            raise UserError(f"{where}: a second score of the same candidate, {score} after {found[name][place]}.")
        matched, found[name][place] = matched + 1, score
    total = sum(map(len, found.values()))
    if not matched:
        raise UserError(f"config.select.scores={path}: no row is of a question in candidates.jsonl.")
    print(f"{path}: scores of {matched} of {total} candidates; {unknown} rows for other questions.")
    return [found[row["id"]] for row in rows]


def joined(options, workdir: Workdir, rows: list[dict]) -> list[dict]:
    """Rows of candidates with the rewards that they are judged by, where they are.

    Args:
      options: `config.select`.
    """
    if options.labels == "scores":
        return labels.with_rewards(rows, read_scores(options.scores, rows))
    if options.labels == "reward":
        return labels.with_rewards(rows, [row["rewards"] for row in workdir.rows(REWARDS)])
    return rows
