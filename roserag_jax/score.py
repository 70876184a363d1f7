"""Compute the log-probabilities of responses given a prompt.

    python -m roserag_jax.score --config configs/quickstart.py --input rows.jsonl [--output scores.jsonl]

Reads rows of `{prompt, responses: [...]}`, where `prompt` is the whole text as the model sees it (with its chat
template's tokens, as in `pairs.jsonl`; with `plain_text: true` it is text that no template has written, and gets the
tokenizer's BOS), and writes rows of `{logprobs: [sum], tokens: [n]}` in the same order. The end-of-turn token is not
part of a response unless --end is given. Uses the workdir's adapter where there is one.
"""

import itertools
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from absl import flags
from etils import epath

from roserag_jax import cli
from roserag_jax.ahead import in_order
from roserag_jax.errors import UserError
from roserag_jax.inference.engine import Engine, bucket
from roserag_jax.progress import Progress
from roserag_jax.rag.files import read_rows
from roserag_jax.rag.prompts import BUILDERS, prompt_tokens, response_tokens
from roserag_jax.session import Session, find_adapter
from roserag_jax.workdir import Workdir, to_json, write_atomic

_WINDOW = 64  # batches of rows that are in memory at a time, and sorted by shape
_ARGUMENTS = flags.FlagValues()  # of this command alone
_INPUT = flags.DEFINE_string("input", None, "a .jsonl of {prompt, responses}", flag_values=_ARGUMENTS)
_OUTPUT = flags.DEFINE_string(
    "output", None, "file to write the scores to; standard output without it", flag_values=_ARGUMENTS
)
_END = flags.DEFINE_bool("end", False, "count the end-of-turn token as part of each response", flag_values=_ARGUMENTS)


def _read(file: str) -> Iterator[dict]:
    """The rows to score, one by one.

    Raises:
      UserError: there are none, or one is not `{prompt, responses}`.
    """
    row = None
    for where, row in read_rows(epath.Path(file).expanduser()):
        responses = row.get("responses")
        if not isinstance(row.get("prompt"), str) or not isinstance(responses, list) or not responses:
            raise UserError(f"{where}: a row must be {{prompt, responses: [...]}}.")
        if not row["prompt"] or not all(isinstance(r, str) and (r or _END.value) for r in responses):
            raise UserError(f"{where}: the prompt and every response must be non-empty text.")
        if not isinstance(row.get("plain_text", False), bool):
            raise UserError(f"{where}: plain_text must be true or false.")
        yield row
    if row is None:
        raise UserError(f"{file} holds no rows.")


class _Tokens(NamedTuple):
    """A row to score as tokens."""

    prompt: list[int]
    responses: list[list[int]]

    @property
    def shape(self) -> tuple[int, int, int]:
        """P, N and S of the batch that the row fits."""
        return (
            bucket(len(self.prompt) - 1),
            len(self.responses),
            bucket(max(map(len, self.responses))),
        )


def _score(engine: Engine, rows: list[_Tokens], batch: int, pad: bool) -> list[list[float]]:
    """Summed log-probabilities of each prompt's responses, in order.

    Rows of like shape share a batch, and so a compilation.

    Args:
      pad: fill batches up, because there are enough rows for the whole ones.
    """
    order, sums = sorted(range(len(rows)), key=lambda i: (rows[i].shape, i)), {}
    while order:
        P, N, S = rows[order[0]].shape
        group = [i for i in order[:batch] if rows[i].shape == (P, N, S)]
        order = order[len(group) :]
        padding = batch - len(group) if pad else 0
        prompts = [rows[i].prompt for i in group] + [[engine.pad_id]] * padding
        cache = engine.prefill(prompts, length=P)
        logprobs = engine.score(cache, prompts, [rows[i].responses for i in group] + [[[]] * N] * padding, S)
        for i, row in zip(group, logprobs, strict=False):
            sums[i] = [round(float(total), 5) for total in np.sum(row, axis=-1, dtype=np.float64)]
    return [sums[i] for i in range(len(rows))]


def _results(session: Session, engine: Engine, file: str, count: int) -> Iterator[dict]:
    """The scores of `count` rows, in their order; so many rows are in memory at a time that batches fill well.

    Raises:
      UserError: a log-probability is not finite.
    """
    end = [session.turn_end] if _END.value else []
    batch, progress, number = session.config.evaluate.batch or 16, Progress("score", count, "rows"), 0

    def tokenize(row: dict) -> _Tokens:
        prompt = prompt_tokens(session.tokenizer, row["prompt"], row.get("plain_text", False))
        return _Tokens(prompt, [response_tokens(session.tokenizer, r) + end for r in row["responses"]])

    rows = in_order(tokenize, _read(file), threads=BUILDERS, ahead=batch)
    while window := list(itertools.islice(rows, _WINDOW * batch)):
        for row, sums in zip(window, _score(engine, window, batch, count > batch), strict=True):
            number += 1
            if not np.isfinite(sums).all():
                raise UserError(
                    f"{file}, row {number}: a log-probability is not finite (NaN or Inf): {sums}. The model's weights "
                    "or adapter give such numbers; try config.dtype=float32."
                )
            yield {"logprobs": sums, "tokens": [*map(len, row.responses)]}
        progress.update(number)


def run(config) -> None:
    """The command."""
    if _INPUT.value is None:
        raise UserError("--input FILE is missing: a .jsonl of {prompt, responses}.")
    output = epath.Path(_OUTPUT.value).expanduser() if _OUTPUT.value else None
    if output and not output.parent.is_dir():
        raise UserError(f"--output {output}: there is no folder {output.parent}.")
    if output and output.is_dir():
        raise UserError(f"--output {output} is a folder; name a file.")
    count = sum(1 for _ in _read(_INPUT.value))  # each row is looked at before the model is loaded
    with cli.messages_on_stderr() as stdout:
        session = Session(config)
        engine = session.engine(find_adapter(config, Workdir(config.workdir)))
        results = _results(session, engine, _INPUT.value, count)
        if output:
            write_atomic(output, map(to_json, results))
            print(f"Wrote {output}: {count} rows.", file=stdout)
        else:
            stdout.writelines(cli.json_line(result, stdout) for result in results)


if __name__ == "__main__":
    cli.main(run, __doc__, _ARGUMENTS, alone=True, resumes=False)
