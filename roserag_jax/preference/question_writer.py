"""Writes questions about passages with the model that will answer them, and checks them with it.

A question is kept when the model, shown its passages, answers it right several times out of several, and without any
passage does not: then it can be answered, and only by reading.
"""

import dataclasses
import os
import random

from roserag_jax.inference.engine import Engine, SharedPrefix
from roserag_jax.inference.requests import DecoderCapacity, DecodeRequest, PrefillRequest, Task
from roserag_jax.inference.sampling import SamplingParams
from roserag_jax.rag import answers, written_questions
from roserag_jax.rag.prompts import PromptBuilder, prompt_tokens, response_tokens
from roserag_jax.rag.words import contains
from roserag_jax.rag.written_questions import Attempt, compose, fault, is_phrase_of, read_phrase, read_question

_PASSAGE_SHARE = 4  # a passage may take that part of the longest prompt, so that two fit beside the examples
_MOST_CHECKED = 2  # proposals of an attempt that are answered
_SHARED_STEP = 16  # tokens; the worked examples are shared up to a multiple of it


@dataclasses.dataclass(frozen=True)
class _Limits:
    """Tokens of the longest prompt that a task may prefill, of a written question, and of an answer."""

    prompt: int
    question: int
    answer: int


def _drop(dropped: list[dict], why: str, question: str = "", answer: str = "") -> None:
    """Note a question that is not kept."""
    dropped.append({"why": why, "question": question, "answer": answer})


def _read(text: str) -> tuple[str, str]:
    """The question and the answer that a model wrote; where there is no question, all that it wrote."""
    question, answer = read_question(text)
    return question or text.strip(), answer


class QuestionWriter:
    """Writes questions: `task` is what the scheduler runs for one attempt.

    Args:
      options: the configuration's `questions`, `prompt` and `generate.answer_tokens` are used.
      measure: how answers are compared.
    """

    def __init__(self, tokenizer, options, measure: answers.Measure):
        self.tokenizer, self.options, self.measure = tokenizer, options.questions, measure
        self._neutral = PromptBuilder(tokenizer, **options.prompt).neutral
        self._arguments = options.prompt.template_arguments
        self._limits = _Limits(options.prompt.max_tokens, self.options.max_tokens, options.generate.answer_tokens)
        self._sampling = SamplingParams(self.options.temperature, options.generate.top_p)
        self._shared: dict[str, SharedPrefix] = {}

    def prefill_examples(self, engine: Engine) -> None:
        """Prefill the worked examples, which all prompts of a sort begin with, once.

        Lengths are rounded down: those of several sorts are then the same, and each would be compiled.
        """
        for name in dict.fromkeys(name for kind in self.options.kinds for name in written_questions.PROMPTS_OF[kind]):
            turns = written_questions.TURNS[name]
            both = [self._tokens(turns("A", "B")), self._tokens(turns("1", "2"))]
            common = os.path.commonprefix(both)
            self._shared[name] = engine.prefill_shared_prefix(common[: len(common) // _SHARED_STEP * _SHARED_STEP])

    @property
    def prompt_length(self) -> int:
        """The most tokens of a prompt; what is longer is not used."""
        return self._limits.prompt

    def capacity(self, slots: int) -> DecoderCapacity:
        """What the decoder must have room for."""
        shapes = ((1, max(self._limits.question, self._limits.answer)),)
        return DecoderCapacity(slots, max(self.options.samples, self.options.answers), shapes)

    def task(self, attempt: Attempt) -> Task:
        """Write questions for one attempt, and check them until one passes.

        Returns:
          `{id, kind, question, answer, passages, dropped: [{why, question, answer}]}`, with an empty `question` where
          none passes.
        """
        dropped: list[dict] = []
        row = {"id": attempt.id, "kind": attempt.kind, "question": "", "answer": "", "passages": attempt.passages}
        propose = self._two_hop if attempt.kind == "two_hop" else self._one_hop
        proposals, checked = (yield from propose(attempt, dropped)), 0
        for question, answer in proposals:
            if checked == _MOST_CHECKED:
                _drop(dropped, "not tried", question, answer)
                continue
            checked += 1
            if why := (yield from self._check(attempt, question, answer, dropped)):
                _drop(dropped, why, question, answer)
                continue
            row |= {"question": question, "answer": answer}
            break
        return row | {"dropped": dropped}

    def _one_hop(self, attempt: Attempt, dropped: list[dict]):
        """Propose questions about a passage; returns those without a fault as (question, answer), each once."""
        (passage,) = attempt.passages
        kind = "yes_no" if attempt.kind == "yes_no" else "free"
        texts = yield from self._sample(kind, (self._text(passage), attempt.answer), attempt.id, 0, dropped)
        found = [(question, attempt.answer or answer) for question, answer in map(_read, texts)]
        return self._without_fault(found, attempt.passages, attempt.kind, dropped)

    def _two_hop(self, attempt: Attempt, dropped: list[dict]):
        """Propose questions that need both passages.

        One question is written about the name in the passage with the answer, one on the other passage whose answer is
        the name; the second becomes a phrase that takes the name's place in the first.
        """
        passage, other = attempt.passages
        texts = yield from self._sample("about", (self._text(passage), attempt.name), attempt.id, 0, dropped)
        asked = self._without_fault(map(_read, texts), [passage], "one_hop", dropped)
        about = [(question, answer) for question, answer in asked if contains(question, attempt.name)]
        for question, answer in asked:
            if (question, answer) not in about:
                _drop(dropped, "no two hops", question, answer)
        if not about:
            return []
        texts = yield from self._sample("for", (self._text(other), attempt.name), attempt.id, 1, dropped)
        leading = [(_read(text)[0], attempt.name) for text in texts]
        leading = self._without_fault(leading, [other], "one_hop", dropped)
        lead = yield from self._first_answered(attempt, leading, other, dropped)
        if not lead:
            return []
        texts = yield from self._sample("phrase", (lead, ""), attempt.id, 2, dropped)
        composed = []
        for phrase in dict.fromkeys(map(read_phrase, texts)):
            if not is_phrase_of(phrase, lead):
                _drop(dropped, "no two hops", phrase, attempt.name)
                continue
            for question, answer in about:
                answered = answers.is_answered_by(other, [answer])
                if both := "" if answered else compose(question, attempt.name, phrase):
                    composed.append((both, answer))
                else:
                    _drop(dropped, "no two hops", f"{question} ({attempt.name}: {phrase})", answer)
        return self._without_fault(composed, attempt.passages, "two_hop", dropped)

    def _first_answered(self, attempt: Attempt, proposals, passage: dict, dropped: list[dict]):
        """The first question that is answered right from its passage; '' if none of the first few is."""
        for question, answer in proposals[:_MOST_CHECKED]:
            right = yield from self._count_right(attempt, question, answer, [passage], 1, dropped)
            if right >= self.options.right:
                return question
            _drop(dropped, "not answered from the passage", question, answer)
        return ""

    def _without_fault(self, proposals, passages, kind: str, dropped: list[dict]):
        """Proposals that nothing is wrong with, each once; the others are counted by reason."""
        kept: dict[str, str] = {}
        for question, answer in proposals:
            if why := fault(question, answer, passages, kind):
                _drop(dropped, why, question, answer)
            elif question in kept:
                _drop(dropped, "written twice", question, answer)
            else:
                kept[question] = answer
        return list(kept.items())

    def _check(self, attempt: Attempt, question: str, answer: str, dropped: list[dict]):
        """Answer a question from its passages, from one of two alone, and from none; returns what is wrong, or ''."""
        need, count = self.options.right, len(attempt.passages)
        closed = yield from self._count_right(attempt, question, answer, [], 0, dropped)
        if closed >= need:
            return "answered without the passage"
        if count == 2:
            alone = self._among_others(attempt, question, answer)
            if (yield from self._count_right(attempt, question, answer, alone, 1, dropped)) >= need:
                return "answered from one passage"
        right = yield from self._count_right(attempt, question, answer, attempt.passages, count, dropped)
        return "" if right >= need else "not answered from the passage"

    def _among_others(self, attempt: Attempt, question: str, answer: str) -> list[dict]:
        """The first passage of two among others like it, as many as fit, in a drawn order.

        Shown alone it would give the answer away: there is one town in it, whatever town is asked about.
        """
        others = [p for p in attempt.others if not answers.is_answered_by(p, [answer])]
        for count in range(len(others), -1, -1):
            shown = [attempt.passages[0], *others[:count]]
            random.Random(f"{attempt.id}/{question}").shuffle(shown)
            if len(self._tokens(written_questions.TURNS["read"](self._shown(shown), question))) <= self._limits.prompt:
                break
        return shown

    def _shown(self, passages: list[dict]) -> str:
        return "\n".join(f"Passage: {self._text(passage)}" for passage in passages)

    def _count_right(self, attempt: Attempt, question: str, answer: str, passages: list[dict], step: int, dropped):
        """How many of some sampled answers are right, with these passages in view."""
        kind = ("read" if passages else "closed") + "_yes_no" * answers.is_yes_no(answer)
        name = f"{attempt.id}/{question}"
        texts = yield from self._sample(kind, (self._shown(passages), question), name, step, dropped)
        return sum(self._is_right(text, answer) for text in texts)

    def _is_right(self, said: str, answer: str) -> bool:
        """Whether an answer is the right one, or names it within a few words."""
        first = next((line for line in said.splitlines() if line.strip()), "")
        said = answers.parse(first if first.lower().startswith("answer") else f"Answer: {first}")[1]
        if answers.is_yes_no(answer):
            return answers.yes_no(said) == answers.yes_no(answer)
        return bool(self.measure.exact_match(said, [answer]) or answers.contains(said, [answer]))

    def _tokens(self, turns: list[dict]) -> list[int]:
        return prompt_tokens(self.tokenizer, written_questions.render(self.tokenizer, turns, self._arguments))

    def _sample(self, kind: str, arguments: tuple[str, str], name: str, step: int, dropped: list[dict]):
        """Sample texts behind a prompt of `written_questions.TURNS`; none, which is counted, where it is too long."""
        prompt = self._tokens(written_questions.TURNS[kind](*arguments))
        if len(prompt) > self._limits.prompt:
            _drop(dropped, "prompt over config.prompt.max_tokens")
            return []
        yield PrefillRequest(prompt, self._shared[kind].of(prompt), few_shapes=True)
        is_answer = kind.startswith(("read", "closed"))
        completions = yield DecodeRequest(
            [prompt[-1:]] * (self.options.answers if is_answer else self.options.samples),
            self._limits.answer if is_answer else self._limits.question,
            sampling=self._sampling,
            question_id=name,
            first_sample=step << 8,
            use_extra_stop_ids=is_answer,
        )
        return [self.tokenizer.decode(completion.tokens) for completion in completions]

    def _text(self, passage: dict) -> str:
        """A passage as prompts show it, in one line, cut where it is very long."""
        title, text = self._neutral(passage["title"]), self._neutral(passage["text"])
        text = f"{title}: {text}" if title else text
        most = self._limits.prompt // _PASSAGE_SHARE
        tokens = response_tokens(self.tokenizer, text)
        return text if len(tokens) <= most else text[: len(self.tokenizer.decode(tokens[:most]))]
