"""Candidates: rationales sampled with and without the golden answer in view, then verified on the plain prompt.

RoseRAG (arXiv 2502.10993), section 3: the model itself writes the rationales, and rejection sampling keeps as chosen
those that lead to the answer. The paper leaves open what "lead to" means; here each rationale is laid as a branch on
the plain prompt, where no golden answer is in sight, and the model decodes its answer from there. That one pass also
gives the log-probability of the whole response under the plain prompt, which is the confidence that selection needs.
"""

import os
import re

import numpy as np

from roserag_jax.rag import answers
from roserag_jax.rag.prompts import ANSWER_PREFIX, Prompt, response_tokens
from roserag_jax.runtime.sampler import Engine, Sampling, bucket

_GREEDY = Sampling()
# First sample index of each source, so that the draws of one do not move when the other's number changes.
_FIRST_SAMPLE = {"plain": 0, "guided": 1 << 16}
_SENTENCE_END = re.compile(r"^.*[.!?](?=\s|$)", re.DOTALL)


def rationale_of(text: str, finished: bool) -> str | None:
    """The rationale of a sampled response: what stands before its answer line.

    One that ran into the token limit is cut after its last whole sentence; None if it has none.
    """
    rationale, _, parsed = answers.parse(text)
    if parsed or finished:
        return rationale
    whole = _SENTENCE_END.match(rationale)
    return whole.group().strip() if whole else None


def generate_batch(
    engine: Engine,
    tokenizer,
    options,
    rows: list[dict],
    plain: list[Prompt],
    guided: list[Prompt],
    outside: list[list[str]],
    shared,
    newline_ids,
    say,
) -> list[dict]:
    """Candidates for one batch of questions.

    Args:
      options: `config.generate`.
      plain, guided: the prompts of `rows`; empty prompts past the last row fill the batch.
      outside: responses to each row that were made elsewhere; as many for each, '' where there is none.
      shared: what all plain and what all guided prompts begin with, from `engine.read_shared`.
      newline_ids: tokens that end the decoded answer, besides the end of the turn.
      say: called with a phrase before each long part.

    Returns:
      For each row `{id, prompt, golden_answers, candidates: [{response, rationale, answer, source, correct, logprob,
      tokens}], dropped: {reason: count}}`. `logprob` is the sum over the response's `tokens` tokens under the plain
      prompt, without the end-of-turn token.
    """
    ids = [row["id"] for row in rows] + [""] * (len(plain) - len(rows))
    plain_cache = engine.prefill([p.tokens for p in plain], shared[0])

    rationales = [[] for _ in rows]  # per row: (source, rationale, its sampled answer or '')
    dropped = [{"no whole sentence": 0, "repeated": 0, "too long": 0, "no answer": 0} for _ in rows]

    def keep(i, source, text, finished):
        rationale, answer = rationale_of(text, finished), ""
        if options.answer == "sampled":
            _, answer, parsed = answers.parse(text)
            answer = answer if parsed and finished else ""
            if not answer:
                dropped[i]["no answer"] += 1
                return
        if rationale is None:
            dropped[i]["no whole sentence"] += 1
        elif (rationale, answer) in [found[1:] for found in rationales[i]]:
            dropped[i]["repeated"] += 1
        else:
            rationales[i].append((source, rationale, answer))

    for source, count in (("guided", options.guided_samples), ("plain", options.plain_samples)):
        if not count:
            continue
        say(f"sampling {count} {source} rationales for each of {len(rows)} questions")
        if source == "plain":
            cache, starts = plain_cache, [p.tokens[-1:] for p in plain]
        else:
            cache, starts = _read_guided(engine, plain, guided, plain_cache, shared[1], count)
        sampling = Sampling(options[f"{source}_temperature"], options.top_p, options.top_k, options.min_p)
        openings, width = [[start] * count for start in starts], max(map(len, starts))
        width = 1 if width == 1 else bucket(width)
        out = engine.decode(cache, openings, width, ids, _FIRST_SAMPLE[source], sampling, options.max_tokens)
        for i in range(len(rows)):
            for n in range(count):
                text = tokenizer.decode(out.tokens[i, n, : out.lengths[i, n]])
                keep(i, source, text, bool(out.finished[i, n]))
    for i, texts in enumerate(outside):
        for text in filter(None, texts):
            keep(i, "outside", text, True)

    say(f"verifying {sum(map(len, rationales))} rationales on the plain prompt")
    # Every branch is a rationale and the words that ask for its answer, behind the plain prompt's last token; or the
    # answer too, and then nothing is left to decode (one token is, and is not looked at).
    width, limit = branches(options, outside), bucket(options.max_tokens + 8)
    openings = [[[] for _ in range(width)] for _ in plain]
    for i, found in enumerate(rationales):
        for n, (_, rationale, answer) in enumerate(found):
            tokens = response_tokens(tokenizer, f"{rationale}{ANSWER_PREFIX} {answer}".strip("\n "))
            opening = plain[i].tokens[-1:] + tokens
            if len(opening) > limit:  # only one that was made elsewhere can be
                dropped[i]["too long"] += 1
            else:
                openings[i][n] = opening
    count = 1 if options.answer == "sampled" else options.answer_tokens
    out = engine.decode(plain_cache, openings, limit, ids, 0, _GREEDY, count, newline_ids)

    results = []
    for i, row in enumerate(rows):
        candidates = []
        for n, (source, rationale, answer) in enumerate(rationales[i]):
            if not openings[i][n]:
                continue
            length, said = out.lengths[i, n], len(openings[i][n]) - 1
            if answer:
                length = 0
            else:
                answer = tokenizer.decode(out.tokens[i, n, :length]).strip()
                if not answer or not out.finished[i, n]:
                    dropped[i]["no answer"] += 1
                    continue
            logprob = out.opening_logprobs[i, n, :said].sum() + out.logprobs[i, n, :length].sum()
            candidates.append(
                {
                    "response": f"{rationale}{ANSWER_PREFIX} {answer}".lstrip("\n"),
                    "rationale": rationale,
                    "answer": answer,
                    "source": source,
                    "correct": bool(answers.exact_match(answer, row["golden_answers"])),
                    "logprob": round(float(logprob), 4),
                    "tokens": int(said + length),
                }
            )
        results.append(
            {
                "id": row["id"],
                "prompt": plain[i].text,
                "golden_answers": row["golden_answers"],
                "candidates": candidates,
                "dropped": {k: v for k, v in dropped[i].items() if v},
            }
        )
    return results


def _read_guided(engine: Engine, plain: list[Prompt], guided: list[Prompt], plain_cache, shared, count: int):
    """A cache of the guided prompts and what opens their branches.

    A guided prompt goes its own way only at the hint, behind the passages and the question. Where it is less work that
    each of the `count` branches reads the rest of it, the plain prompt's cache serves up to there (worked examples
    have hints of their own, near the beginning, so with them it is not).
    """
    common = [len(os.path.commonprefix([p.tokens[:-1], g.tokens[:-1]])) for p, g in zip(plain, guided, strict=True)]
    rest = [g.tokens[n:] for g, n in zip(guided, common, strict=True)]
    shared_tokens = 0 if shared is None else shared.v.shape[3]
    if count * max(map(len, rest)) < max(len(g.tokens) for g in guided) - shared_tokens:
        return engine.rewind(plain_cache, common), rest
    return engine.prefill([g.tokens for g in guided], shared), [g.tokens[-1:] for g in guided]


def branches(options, outside: list[list[str]]) -> int:
    """How many rationales of a question are verified at once."""
    return options.guided_samples + options.plain_samples + len(outside[0])


def newline_tokens(tokenizer) -> tuple[int, ...]:
    """Tokens that contain a line break: the end of an answer that stands on one line."""
    ids = np.array(sorted(tokenizer.get_vocab().values()))
    texts = tokenizer.batch_decode(ids[:, None])
    return tuple(int(i) for i, text in zip(ids, texts, strict=True) if "\n" in text)


def summary(rows: list[dict]) -> str:
    """What came out, in a few lines: candidates by source, how many were right, and what was dropped."""
    lines = []
    for source in ("guided", "plain", "outside"):
        found = [c for row in rows for c in row["candidates"] if c["source"] == source]
        if found:
            right = sum(c["correct"] for c in found)
            lines.append(f"  {source}: {len(found)} candidates, {right} correct ({right / len(found):.0%})")
    reasons = sorted({reason for row in rows for reason in row["dropped"]})
    counts = {reason: sum(row["dropped"].get(reason, 0) for row in rows) for reason in reasons}
    if counts:
        lines.append("  dropped: " + ", ".join(f"{n} {reason}" for reason, n in counts.items()))
    return "\n".join(lines)
