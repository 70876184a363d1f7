"""Candidates: rationales sampled with and without the golden answer in view, then verified on the plain prompt.

RoseRAG (arXiv 2502.10993), section 3: the model itself writes the rationales, and rejection sampling keeps as chosen
those that lead to the answer. The paper leaves open what "lead to" means; here each rationale is laid as a branch on
the plain prompt, where no golden answer is in sight, and the model decodes its answer from there. That one pass also
gives the log-probability of the whole response under the plain prompt, which is the confidence that selection needs.
"""

import collections
import os
import re

import numpy as np

from roserag_jax.inference.decoder import Decode, Read, Room, Task
from roserag_jax.inference.engine import bucket
from roserag_jax.inference.sampling import Sampling
from roserag_jax.rag import answers
from roserag_jax.rag.prompts import ANSWER_PREFIX, Prompt, opens_thoughts, response_tokens

# First sample index of each source, so that the draws of one do not move when the other's number changes.
_FIRST_SAMPLE = {"plain": 0, "guided": 1 << 16}
_SENTENCE_END = re.compile(r"^.*[.!?](?=\s|$)", re.DOTALL)


def rationale_of(text: str, finished: bool, thinking: bool = False) -> str | None:
    """The rationale of a sampled response: what stands before its answer line.

    One that ran into the token limit is cut after its last whole sentence; None if it has none.
    """
    rationale, _, parsed = answers.parse(text, thinking)
    if parsed or finished:
        return rationale
    whole = _SENTENCE_END.match(rationale)
    return whole.group().strip() if whole else None


def opening_limit(options) -> int:
    """The most tokens of a rationale and the words that ask for its answer, behind the prompt's last token."""
    return bucket(options.max_tokens + 8)


def hint_behind(plain: Prompt, guided: Prompt, count: int, shared: int) -> int | None:
    """How many tokens of the plain prompt the guided one begins with, if its branches go on from there; else None.

    A guided prompt goes its own way only at the hint, behind the passages and the question. Where it is less work that
    each of the `count` branches reads the rest of it, what was read of the plain prompt serves up to there (worked
    examples have hints of their own, near the beginning, so with them it does not).

    Args:
      shared: tokens that all guided prompts begin with; they are read once in any case.
    """
    common = len(os.path.commonprefix([plain.tokens[:-1], guided.tokens[:-1]]))
    return common if count * (len(guided.tokens) - common) < len(guided.tokens) - shared else None


def room(options, outside: int, guided: list[Prompt], hints: list[int | None]) -> Room:
    """What the decoder of `question` needs room for.

    Args:
      options: `config.generate`.
      outside: responses to a question that were made elsewhere.
      hints: from `hint_behind`, for each guided prompt.
    """
    sampled = max(options.guided_samples, options.plain_samples)
    rests = [len(g.tokens) - hint for g, hint in zip(guided, hints, strict=True) if hint is not None]
    sampling = (max([1, *rests]) if options.guided_samples else 1, options.max_tokens)
    return Room(options.batch, sampled or outside, (sampling, (opening_limit(options), options.answer_tokens)))


def question(
    tokenizer,
    options,
    row: dict,
    plain: Prompt,
    guided: Prompt,
    hint: int | None,
    outside: list[str],
    shared: tuple,
    stop: tuple[str, ...],
) -> Task:
    """The task of one question: sample, verify, and return its candidates.

    Args:
      options: `config.generate`.
      hint: from `hint_behind`.
      outside: responses to the question that were made elsewhere.
      shared: what all plain and what all guided prompts that are read begin with, from `Engine.read_shared`.
      stop: texts that end a response.

    Returns:
      `{id, prompt, passage_spans, golden_answers, candidates: [{response, rationale, answer, source, correct, logprob,
      tokens}], dropped: {reason: count}}`. `logprob` is the sum over the response's `tokens` tokens under the
      plain prompt, without the end-of-turn token.
    """
    rationales = []  # (source, rationale, its sampled answer or '')
    dropped = {"no whole sentence": 0, "repeated": 0, "too long": 0, "no answer": 0}
    sampled_answer, thinking = options.answer == "sampled", opens_thoughts(plain.text)
    if not sampled_answer:
        stop = (*stop, ANSWER_PREFIX)  # the answer will be decoded on the plain prompt

    def keep(source, text, finished):
        rationale, answer = rationale_of(text, finished, thinking), ""
        if sampled_answer:
            _, answer, parsed = answers.parse(text, thinking)
            answer = answer if parsed and finished else ""
            if not answer:
                dropped["no answer"] += 1
                return
        if rationale is None:
            dropped["no whole sentence"] += 1
        elif (rationale, answer) in [found[1:] for found in rationales]:
            dropped["repeated"] += 1
        else:
            rationales.append((source, rationale, answer))

    def sample(source, opening, count, length=None):
        knobs = (options[f"{source}_temperature"], options.top_p, options.top_k, options.min_p)
        branches = yield Decode(
            [opening] * count,
            options.max_tokens,
            Sampling(*knobs),
            row["id"],
            _FIRST_SAMPLE[source],
            ends=answers.ending(tokenizer, stop),
            length=length,
        )
        for branch in branches:
            text, ended = answers.until(tokenizer.decode(branch.tokens), stop)
            keep(source, text, branch.finished or ended)

    if options.guided_samples and hint is None:
        yield Read(guided.tokens, shared[1])
        yield from sample("guided", guided.tokens[-1:], options.guided_samples)
    yield Read(plain.tokens, shared[0])
    if options.guided_samples and hint is not None:
        yield from sample("guided", guided.tokens[hint:], options.guided_samples, hint)
    yield from sample("plain", plain.tokens[-1:], options.plain_samples)
    for text in filter(None, outside):
        keep("outside", text, True)

    # Every branch is a rationale and the words that ask for its answer, behind the plain prompt's last token; or the
    # answer too, and then nothing is left to decode.
    openings, verified = [], []
    for found in rationales:
        _, rationale, answer = found
        tokens = response_tokens(tokenizer, f"{rationale}{ANSWER_PREFIX} {answer}".strip("\n "))
        if len(tokens) < opening_limit(options):
            openings.append(plain.tokens[-1:] + tokens)
            verified.append(found)
        else:  # only one that was made elsewhere can be
            dropped["too long"] += 1
    limit = 0 if sampled_answer else options.answer_tokens
    branches = yield Decode(openings, limit, also_stop=True)

    candidates = []
    for branch, opening, (source, rationale, answer) in zip(branches, openings, verified, strict=True):
        if not sampled_answer:
            answer = tokenizer.decode(branch.tokens).strip()
            if not answer or not branch.finished:
                dropped["no answer"] += 1
                continue
        candidates.append(
            {
                "response": f"{rationale}{ANSWER_PREFIX} {answer}".lstrip("\n"),
                "rationale": rationale,
                "answer": answer,
                "source": source,
                "correct": bool(answers.exact_match(answer, row["golden_answers"])),
                "logprob": round(float(branch.opening_logprobs.sum() + branch.logprobs.sum()), 4),
                "tokens": len(opening) - 1 + len(branch.tokens),
            }
        )
    return {
        "id": row["id"],
        "prompt": plain.text,
        "passage_spans": plain.passage_spans,
        "golden_answers": row["golden_answers"],
        "candidates": candidates,
        "dropped": {k: v for k, v in dropped.items() if v},
    }


def newline_tokens(tokenizer) -> tuple[int, ...]:
    """Tokens that contain a line break: the end of an answer that stands on one line."""
    ids = np.array(sorted(tokenizer.get_vocab().values()))
    texts = tokenizer.batch_decode(ids[:, None])
    return tuple(int(i) for i, text in zip(ids, texts, strict=True) if "\n" in text)


def correct(row: dict) -> tuple[int, int]:
    """How many candidates of a question are correct, and how many there are."""
    return sum(c["correct"] for c in row["candidates"]), len(row["candidates"])


def summary(rows: list[dict]) -> str:
    """What came out, in a few lines: candidates by source, how many were right, and what was dropped."""
    lines = []
    for source in ("guided", "plain", "outside"):
        found = [c for row in rows for c in row["candidates"] if c["source"] == source]
        if found:
            right = sum(c["correct"] for c in found)
            lines.append(f"  {source}: {len(found)} candidates, {right} correct ({right / len(found):.0%})")
    if reasons := lost(rows):
        lines.append(f"  dropped: {reasons}")
    return "\n".join(lines)


def lost(rows: list[dict]) -> str:
    """How many samples became no candidates, by reason, as a phrase; empty where all did."""
    counts = sum((collections.Counter(row["dropped"]) for row in rows), collections.Counter())
    return ", ".join(f"{n} {reason}" for reason, n in sorted(counts.items()))
