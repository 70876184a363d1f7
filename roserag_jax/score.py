"""Compute the log-probabilities of responses given a prompt.

    python -m roserag_jax.score --config configs/quickstart.py --input rows.jsonl [--output scores.jsonl]

Reads rows of `{prompt, responses: [...]}`, where `prompt` is the whole text as the model sees it (with its chat
template's tokens, as in `pairs.jsonl`; with `plain_text: true` it is text that no template has written, and gets the
tokenizer's BOS), and writes rows of `{logprobs: [sum], tokens: [n]}` in the same order. The
end-of-turn token is not part of a response unless --end is given. Uses the workdir's adapter where there is one.
"""

import numpy as np
from absl import flags
from etils import epath

from roserag_jax import cli
from roserag_jax.errors import UserError
from roserag_jax.evaluate import adapter_in_use
from roserag_jax.inference.engine import bucket
from roserag_jax.progress import Progress
from roserag_jax.rag.files import read_rows
from roserag_jax.rag.prompts import prompt_tokens, response_tokens
from roserag_jax.session import Session
from roserag_jax.workdir import Workdir, to_jsonl, write_atomic

_INPUT = flags.DEFINE_string("input", None, "a .jsonl of {prompt, responses}")
_OUTPUT = flags.DEFINE_string("output", None, "file to write the scores to; standard output without it")
_END = flags.DEFINE_bool("end", False, "count the end-of-turn token as part of each response")


def run(config) -> None:
    """The command."""
    if _INPUT.value is None:
        raise UserError("--input FILE is missing: a .jsonl of {prompt, responses}.")
    rows = []
    output = epath.Path(_OUTPUT.value).expanduser() if _OUTPUT.value else None
    if output and not output.parent.is_dir():
        raise UserError(f"--output {output}: there is no folder {output.parent}.")
    for where, row in read_rows(epath.Path(_INPUT.value).expanduser()):
        responses = row.get("responses")
        if not isinstance(row.get("prompt"), str) or not isinstance(responses, list) or not responses:
            raise UserError(f"{where}: a row must be {{prompt, responses: [...]}}.")
        if not row["prompt"] or not all(isinstance(r, str) and (r or _END.value) for r in responses):
            raise UserError(f"{where}: the prompt and every response must be non-empty text.")
        if not isinstance(row.get("plain_text", False), bool):
            raise UserError(f"{where}: plain_text must be true or false.")
        rows.append(row)
    if not rows:
        raise UserError(f"{_INPUT.value} holds no rows.")

    session, workdir = Session(config), Workdir(config.workdir)
    end = [session.turn_end] if _END.value else []
    prompts = [prompt_tokens(session.tokenizer, row["prompt"], row.get("plain_text", False)) for row in rows]
    tokens = [[response_tokens(session.tokenizer, r) + end for r in row["responses"]] for row in rows]
    engine = session.engine(adapter_in_use(config, workdir))

    # Rows of like shape share a batch, and so a compilation.
    shape = lambda i: (bucket(len(prompts[i]) - 1), len(tokens[i]), bucket(max(map(len, tokens[i]))))
    order = sorted(range(len(rows)), key=lambda i: (shape(i), i))
    progress, results = Progress("score", len(rows), "rows"), {}
    while order:
        P, N, S = shape(order[0])
        group = [i for i in order[: config.evaluate.batch] if shape(i) == (P, N, S)]
        order = order[len(group) :]
        fill = config.evaluate.batch - len(group) if len(rows) > config.evaluate.batch else 0
        batch = [prompts[i] for i in group] + [[session.pad_id]] * fill
        cache = engine.prefill(batch, length=P)
        logprobs = engine.score(cache, batch, [tokens[i] for i in group] + [[[]] * N] * fill, S)
        for i, row in zip(group, logprobs, strict=False):
            sums = np.sum(row, axis=-1, dtype=np.float64)
            results[i] = {"logprobs": [round(float(s), 5) for s in sums], "tokens": [len(t) for t in tokens[i]]}
        progress.update(len(results))
    lines = to_jsonl(results[i] for i in range(len(rows)))
    if output:
        write_atomic(output, lines)
        print(f"Wrote {output}: {len(rows)} rows.")
    else:
        print(lines, end="")


if __name__ == "__main__":
    cli.main(run, __doc__, alone=True)
