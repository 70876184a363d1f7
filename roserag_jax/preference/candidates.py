"""Candidates: rationales sampled with and without the golden answer in view, then verified on the plain prompt.

RoseRAG (arXiv 2502.10993), section 3: the model itself writes the rationales, and rejection sampling keeps as chosen
those that lead to the answer. The paper leaves open what "lead to" means; here each rationale is laid as a branch on
the plain prompt, where no golden answer is in sight, and the model decodes its answer from there. That one pass also
gives the log-probability of the whole response under the plain prompt, which is the confidence that selection needs.
"""

import collections
import dataclasses
import os
import re

import numpy as np

from roserag_jax.inference.engine import SharedPrefix, bucket
from roserag_jax.inference.requests import Completion, DecoderCapacity, DecodeRequest, PrefillRequest, Task
from roserag_jax.inference.sampling import SamplingParams
from roserag_jax.rag import answers
from roserag_jax.rag.chat import opens_thoughts
from roserag_jax.rag.prompts import ANSWER_PREFIX, Prompt, PromptBuilder, response_tokens

# First sample index of each source, so that the draws of one do not move when the other's number changes.
_FIRST_SAMPLE = {"plain": 0, "guided": 1 << 16}
_HINT_TOKENS = 20  # of a golden answer that the decoder has room for behind the plain prompt
_SENTENCE_END = re.compile(r"^.*(?:[.!?\u0964\u06d4\u061f](?=\s|$)|[\u3002\uff01\uff1f\uff61])", re.DOTALL)


@dataclasses.dataclass(frozen=True)
class QuestionInputs:
    """What the candidates of one question are made from.

    Args:
      row: the question's row of `retrieved.jsonl`.
      plain: the prompt without the golden answer, on which candidates are verified.
      guided: the prompt with the golden answer in view.
      reused: from `reusable_tokens`.
      outside: responses to the question that were generated elsewhere; empty ones are ignored.
    """

    row: dict
    plain: Prompt
    guided: Prompt
    reused: int | None = None
    outside: list[str] = dataclasses.field(default_factory=list)

    @property
    def longest(self) -> int:
        """Tokens of the longest prompt that is prefilled."""
        return max(len(self.plain.tokens), len(self.guided.tokens) if self.reused is None else 0)


@dataclasses.dataclass(frozen=True)
class Rationale:
    """A rationale to be verified.

    Args:
      answer: the one sampled with it, empty where it is yet to be decoded.
      count: how many samples said it.
    """

    source: str
    text: str
    answer: str
    count: int = 1


def rationale_of(text: str, finished: bool, thinking: bool = False) -> str | None:
    """The rationale of a sampled response: what stands before its answer line.

    One that ran into the token limit is cut after its last whole sentence; None if it has none.
    """
    rationale, _, parsed = answers.parse(text, thinking)
    if parsed or finished:
        return rationale
    whole = _SENTENCE_END.match(rationale)
    return whole.group().strip() if whole else None


def max_forced_prefix(options) -> int:
    """The most tokens of a rationale and the words that ask for its answer, behind the prompt's last token."""
    return bucket(options.max_tokens + 8)


def most_reused(builder: PromptBuilder) -> int:
    """The most tokens of a guided prompt behind what it reuses: those of a hint of some twenty tokens and the rest.

    It is 0 with few-shot demonstrations, where nothing is reused (`reusable_tokens`): each branch's cache has room for
    these tokens, and every step of decoding reads all of it.
    """
    return 0 if builder.examples else bucket(builder.hint_tokens() + _HINT_TOKENS)


def reusable_tokens(plain: Prompt, guided: Prompt, branches: int, shared_prefix: int, most: int) -> int | None:
    """How many tokens of the plain prompt's cache the guided branches reuse; None if the guided prompt is prefilled.

    A guided prompt differs from the plain one only from the hint on, behind the passages and the question. Where it is
    less work that each of the `branches` branches puts the rest of it through the network as a forced prefix, the plain
    prompt's cache serves up to there. Few-shot demonstrations have hints of their own, near the beginning, so with them
    it does not.

    Args:
      shared_prefix: tokens that all guided prompts begin with; they are prefilled once in any case.
      most: the most tokens that may be left, from `most_reused`.
    """
    common = len(os.path.commonprefix([plain.tokens[:-1], guided.tokens[:-1]]))
    rest = len(guided.tokens) - common
    return common if rest <= most and branches * rest < len(guided.tokens) - shared_prefix else None


def decoder_capacity(options, most_reused: int, outside: int = 0) -> DecoderCapacity:
    """What the decoder must have room for to generate candidates.

    Args:
      options: `config.generate`.
      most_reused: the most tokens of a guided prompt behind what it reuses of the plain prompt's cache.
      outside: the most responses to a question that were generated elsewhere.
    """
    branches = max(options.guided_samples, options.plain_samples) or outside
    sampling = (max(1, most_reused) if options.guided_samples else 1, options.max_tokens)
    verifying = (max_forced_prefix(options), options.answer_tokens)
    return DecoderCapacity(options.batch, branches, (sampling, verifying))


class CandidateGenerator:
    """Generates candidates: `task` is what the scheduler runs for one question.

    Args:
      options: `config.generate`.
      shared_prefixes: what plain and what guided prompts begin with, by source, from `Engine.prefill_shared_prefix`.
      stop_strings: texts that end a response.
      answer_line: whether prompts ask for an answer line; else a complete response is a candidate, without an answer.
      measure: whose exact match says that a candidate is correct.
    """

    def __init__(
        self,
        tokenizer,
        options,
        *,
        shared_prefixes: dict[str, SharedPrefix],
        stop_strings: tuple[str, ...] = (),
        answer_line: bool = True,
        measure: answers.Measure = answers.HOTPOTQA,
    ):
        self.tokenizer, self.options, self.shared_prefixes = tokenizer, options, shared_prefixes
        self.answer_line, self.measure = answer_line, measure
        self.answer_is_decoded = answer_line and options.answer == "decoded"
        # Then the rationale is all that is wanted of a sample: the answer will be decoded on the plain prompt.
        self.stop_strings = (*stop_strings, ANSWER_PREFIX) if self.answer_is_decoded else stop_strings

    def task(self, question: QuestionInputs) -> Task:
        """Sample rationales, verify them on the plain prompt, and return the question's row of `candidates.jsonl`.

        Returns:
          `{id, prompt, prompt_cut, passage_spans, golden_answers, candidates: [{response, rationale, answer, source,
          count, correct, logprob, tokens}], dropped: {reason: count}}`. `prompt_cut` is how many tokens of the passages
          were cut, `count` how many samples said it, `correct` is None without golden answers, and `logprob` is the sum
          over the response's `tokens` tokens under the plain prompt, without the end-of-turn token.
        """
        dropped = {"no whole sentence": 0, "repeated": 0, "too long": 0, "no answer": 0, "unfinished": 0}
        rationales = yield from self._sample_rationales(question, dropped)
        candidates = yield from self._verify(question, rationales, dropped)
        return {
            "id": question.row["id"],
            "prompt": question.plain.text,
            "prompt_cut": question.plain.cut,
            "passage_spans": question.plain.passage_spans,
            "golden_answers": question.row["golden_answers"],
            "candidates": candidates,
            "dropped": {reason: count for reason, count in dropped.items() if count},
        }

    def _sample_rationales(self, question: QuestionInputs, dropped: dict[str, int]):
        """Sample from the guided and the plain prompt, which is prefilled last; returns the rationales [Rationale]."""
        plain, guided, reused = question.plain.tokens, question.guided.tokens, question.reused
        with_hint = self.options.guided_samples
        texts = []  # (source, text, finished)
        if with_hint and reused is None:
            yield PrefillRequest(guided, self.shared_prefixes["guided"].of(guided))
            texts += yield from self._sample(question, "guided", guided[-1:])
        yield PrefillRequest(plain, self.shared_prefixes["plain"].of(plain))
        if with_hint and reused is not None:
            texts += yield from self._sample(question, "guided", guided[reused:], reused)
        texts += yield from self._sample(question, "plain", plain[-1:])
        texts += [("outside", text, True) for text in question.outside if text]

        rationales: dict[tuple[str, str], Rationale] = {}
        thinking = opens_thoughts(question.plain.text)
        for source, text, finished in texts:
            rationale, answer, fault = self._read(text, finished, thinking)
            if fault:
                dropped[fault] += 1
            elif known := rationales.get((rationale, answer)):
                dropped["repeated"] += 1
                rationales[rationale, answer] = dataclasses.replace(known, count=known.count + 1)
            else:
                rationales[rationale, answer] = Rationale(source, rationale, answer)
        return list(rationales.values())

    def _read(self, text: str, finished: bool, thinking: bool) -> tuple[str, str, str]:
        """The rationale and the answer of a sampled response, or why it can be no candidate."""
        _, answer, parsed = answers.parse(text, thinking, self.answer_line)
        if not self.answer_line:  # the complete text, which a cut would spoil
            return answer, "", "" if parsed and finished else "no answer" if finished else "unfinished"
        rationale = rationale_of(text, finished, thinking)
        if not self.answer_is_decoded and not (answer and parsed and finished):
            return "", "", "no answer"
        if rationale is None:
            return "", "", "no whole sentence"
        return rationale, "" if self.answer_is_decoded else answer, ""

    def _sample(
        self, question: QuestionInputs, source: str, forced_prefix: list[int], prompt_length: int | None = None
    ):
        """Sample responses behind the prompt prefilled last; returns them as `(source, text, finished)`."""
        o = self.options
        completions = yield DecodeRequest(
            [forced_prefix] * o[f"{source}_samples"],
            o.max_tokens,
            sampling=SamplingParams(o[f"{source}_temperature"], o.top_p, o.top_k, o.min_p),
            question_id=question.row["id"],
            first_sample=_FIRST_SAMPLE[source],
            stop_function=answers.ending(self.tokenizer, self.stop_strings),
            prompt_length=prompt_length,
        )
        texts = []
        for completion in completions:
            text, stopped = answers.until(self.tokenizer.decode(completion.tokens), self.stop_strings)
            texts.append((source, text, completion.finished or stopped))
        return texts

    def _verify(self, question: QuestionInputs, rationales: list[Rationale], dropped: dict[str, int]):
        """Lay each rationale on the plain prompt, decode its answer and score the response; returns the candidates.

        Every branch is forced through a rationale and the words that ask for its answer, behind the plain prompt's last
        token; or through the sampled answer too, and then nothing is left to decode.
        """
        forced_prefixes, verified = [], []
        for rationale in rationales:
            text = self._response(rationale, rationale.answer).strip("\n ")
            tokens = response_tokens(self.tokenizer, text)
            if len(tokens) < max_forced_prefix(self.options):
                forced_prefixes.append(question.plain.tokens[-1:] + tokens)
                verified.append(rationale)
            else:  # only one that was generated elsewhere can be
                dropped["too long"] += 1
        limit = self.options.answer_tokens if self.answer_is_decoded else 0
        completions = yield DecodeRequest(forced_prefixes, limit, use_extra_stop_ids=True)

        candidates = []
        for rationale, completion in zip(verified, completions, strict=True):
            answer = rationale.answer
            if self.answer_is_decoded:
                answer = self.tokenizer.decode(completion.tokens).strip()
                if not answer or not completion.finished:
                    dropped["no answer"] += 1
                    continue
            golden = question.row["golden_answers"] if self.answer_line else []
            correct = bool(self.measure.exact_match(answer, golden)) if golden else None
            candidates.append(self._candidate(rationale, answer, completion, correct))
        return candidates

    def _response(self, rationale: Rationale, answer: str) -> str:
        """A rationale with its answer line, where there is one."""
        return f"{rationale.text}{ANSWER_PREFIX} {answer}".lstrip("\n") if self.answer_line else rationale.text

    def _candidate(self, rationale: Rationale, answer: str, completion: Completion, correct: bool | None) -> dict:
        """A candidate as a row of `candidates.jsonl` has it."""
        return {
            "response": self._response(rationale, answer),
            "rationale": rationale.text,
            "answer": answer,
            "source": rationale.source,
            "count": rationale.count,
            "correct": correct,
            "logprob": round(float(completion.forced_logprobs.sum() + completion.logprobs.sum()), 4),
            "tokens": len(completion.forced_logprobs) + len(completion.tokens),
        }


def newline_tokens(tokenizer) -> tuple[int, ...]:
    """Tokens that contain a line break: the end of an answer that stands on one line."""
    ids = np.array(sorted(tokenizer.get_vocab().values()))
    texts = tokenizer.batch_decode(ids[:, None])
    return tuple(int(i) for i, text in zip(ids, texts, strict=True) if "\n" in text)


def tally(row: dict) -> collections.Counter:
    """What `summary` counts of a question: candidates by source, those that are judged and correct, dropped samples."""
    counts = collections.Counter({("dropped", reason): count for reason, count in row["dropped"].items()})
    counts["cut", ""] = int(row["prompt_cut"] > 0)
    for candidate in row["candidates"]:
        counts["candidates", candidate["source"]] += 1
        counts["judged", candidate["source"]] += candidate["correct"] is not None
        counts["correct", candidate["source"]] += bool(candidate["correct"])
    return counts


def total(counts: collections.Counter, what: str) -> int:
    """The sum of one of the things that `tally` counts, over the sources."""
    return sum(count for name, count in counts.items() if name[0] == what)


def summary(counts: collections.Counter) -> str:
    """A summary in a few lines: candidates by source, how many are correct, and how many samples were dropped."""
    lines = []
    for source in ("guided", "plain", "outside"):
        found, judged, correct = (counts[what, source] for what in ("candidates", "judged", "correct"))
        share = f", {correct} of {judged} correct ({correct / judged:.0%})" if judged else ""
        lines += [f"  {source}: {found} candidates{share}"] if found else []
    if reasons := sorted((name[1], count) for name, count in counts.items() if name[0] == "dropped" and count):
        lines.append("  dropped: " + ", ".join(f"{count} {reason}" for reason, count in reasons))
    return "\n".join(lines)
