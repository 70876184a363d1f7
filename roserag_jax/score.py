"""Compute the log-probabilities of responses given a prompt.

    python -m roserag_jax.score --config configs/quickstart.py --input rows.jsonl [--output scores.jsonl]

Reads rows of `{prompt, responses: [...]}`, where `prompt` is the whole text as the model sees it (with its chat
template's tokens, as in `pairs.jsonl`; with `plain_text: true` it is text that no template has written, and gets the
tokenizer's BOS), and writes rows of `{logprobs: [sum], tokens: [n]}` in the same order. The end-of-turn token is not
part of a response unless --end is given. Uses the workdir's adapter where there is one.
"""

import numpy as np
from absl import flags
from etils import epath

from roserag_jax import cli
from roserag_jax.errors import UserError
from roserag_jax.inference.engine import bucket
from roserag_jax.progress import Progress
from roserag_jax.rag.files import read_rows
from roserag_jax.rag.prompts import prompt_tokens, response_tokens
from roserag_jax.session import Session, find_adapter
from roserag_jax.workdir import Workdir, to_jsonl, write_atomic

_INPUT = flags.DEFINE_string("input", None, "a .jsonl of {prompt, responses}")
_OUTPUT = flags.DEFINE_string("output", None, "file to write the scores to; standard output without it")
_END = flags.DEFINE_bool("end", False, "count the end-of-turn token as part of each response")


def _read(file: str) -> list[dict]:
    """The rows to score.

    Raises:
      UserError: there are none, or one is not `{prompt, responses}`.
    """
    rows = []
    for where, row in read_rows(epath.Path(file).expanduser()):
        responses = row.get("responses")
        if not isinstance(row.get("prompt"), str) or not isinstance(responses, list) or not responses:
            raise UserError(f"{where}: a row must be {{prompt, responses: [...]}}.")
        if not row["prompt"] or not all(isinstance(r, str) and (r or _END.value) for r in responses):
            raise UserError(f"{where}: the prompt and every response must be non-empty text.")
        if not isinstance(row.get("plain_text", False), bool):
            raise UserError(f"{where}: plain_text must be true or false.")
        rows.append(row)
    if not rows:
        raise UserError(f"{file} holds no rows.")
    return rows


def _score(engine, prompts: list[list[int]], responses: list[list[list[int]]], batch: int) -> list[list[float]]:
    """Summed log-probabilities of each prompt's responses, in order.

    Rows of like shape share a batch, and so a compilation.
    """
    shape = lambda i: (bucket(len(prompts[i]) - 1), len(responses[i]), bucket(max(map(len, responses[i]))))
    order = sorted(range(len(prompts)), key=lambda i: (shape(i), i))
    progress, sums = Progress("score", len(prompts), "rows"), {}
    while order:
        P, N, S = shape(order[0])
        group = [i for i in order[:batch] if shape(i) == (P, N, S)]
        order = order[len(group) :]
        padding = batch - len(group) if len(prompts) > batch else 0
        of_group = [prompts[i] for i in group] + [[engine.pad_id]] * padding
        cache = engine.prefill(of_group, length=P)
        logprobs = engine.score(cache, of_group, [responses[i] for i in group] + [[[]] * N] * padding, S)
        for i, row in zip(group, logprobs, strict=False):
            sums[i] = [round(float(total), 5) for total in np.sum(row, axis=-1, dtype=np.float64)]
        progress.update(len(sums))
    return [sums[i] for i in range(len(prompts))]


def run(config) -> None:
    """The command."""
    if _INPUT.value is None:
        raise UserError("--input FILE is missing: a .jsonl of {prompt, responses}.")
    output = epath.Path(_OUTPUT.value).expanduser() if _OUTPUT.value else None
    if output and not output.parent.is_dir():
        raise UserError(f"--output {output}: there is no folder {output.parent}.")
    if output and output.is_dir():
        raise UserError(f"--output {output} is a folder; name a file.")
    rows = _read(_INPUT.value)
    with cli.messages_on_stderr() as stdout:
        session, workdir = Session(config), Workdir(config.workdir)
        end = [session.turn_end] if _END.value else []
        prompts = [prompt_tokens(session.tokenizer, row["prompt"], row.get("plain_text", False)) for row in rows]
        tokens = [[response_tokens(session.tokenizer, r) + end for r in row["responses"]] for row in rows]
        engine = session.engine(find_adapter(config, workdir))
        sums = _score(engine, prompts, tokens, config.evaluate.batch)
        results = [{"logprobs": s, "tokens": [*map(len, t)]} for s, t in zip(sums, tokens, strict=True)]
    for number, result in enumerate(results, 1):
        if not np.isfinite(result["logprobs"]).all():
            raise UserError(
                f"{_INPUT.value}, row {number}: a log-probability is not finite (NaN or Inf): {result['logprobs']}. "
                "The model's weights or adapter give such numbers; try config.dtype=float32."
            )
    if output:
        write_atomic(output, to_jsonl(results))
        print(f"Wrote {output}: {len(rows)} rows.")
    else:
        stdout.writelines(cli.json_line(result, stdout) for result in results)


if __name__ == "__main__":
    cli.main(run, __doc__, alone=True)
