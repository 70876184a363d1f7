"""Prompts: numbered passages, the question, and how to answer, in the model's own chat template.

Passages are data. Each is one line, and what begins or ends a turn is broken up in it (`rag.chat`), so none can
close its block, pose as an 'Answer:' line or end the turn. When the prompt is over its limit, passages are cut; the
question never is.
"""

import bisect
import dataclasses
import itertools
import os
import re
from collections.abc import Callable, Mapping
from typing import NamedTuple

from roserag_jax.errors import UserError
from roserag_jax.rag.chat import TurnMarks, render_chat

INSTRUCTION = (
    "Say in at most four sentences what the relevant passages say about the question. "
    'Then write "Answer:" and only the short answer.'
)
# Used where there are no passages at all (closed book).
INSTRUCTION_CLOSED = 'Reason in at most four sentences. Then write "Answer:" and only the short answer.'
# Used where the complete response is the answer; how long it should be is for the question to say.
INSTRUCTION_TEXT = "Answer with what the relevant passages say, and nothing else."
INSTRUCTION_TEXT_CLOSED = "Answer with what you know."
HINT = "The answer is {answer}. "
# Few-shot demonstrations for small models, which follow an example better than an instruction. The one with a yes/no
# answer comes first: the model takes its output format from the last.
EXAMPLES = (
    (
        {
            "question": "Is Bruno Hale the author of The Red Hat?",
            "golden_answers": ["no"],
            "contexts": [{"title": "The Red Hat", "text": "The Red Hat is a play by Nora Lund."}],
        },
        "Passage 1 says that The Red Hat is a play by Nora Lund, not by Bruno Hale.\nAnswer: no",
    ),
    (
        {
            "question": "In which region is the town that Bruno Hale was from?",
            "golden_answers": ["Lower Vale"],
            "contexts": [
                {"title": "Bruno Hale", "text": "Bruno Hale was a baker from Moss Hill."},
                {"title": "Moss Hill", "text": "Moss Hill is a town in Lower Vale."},
            ],
        },
        "Passage 1 says that Bruno Hale was from Moss Hill. Passage 2 says that Moss Hill is a town in Lower Vale.\n"
        "Answer: Lower Vale",
    ),
)
_NAMED = re.compile(r"Passage \d+ says that ")
BUILDERS = 2  # threads that build prompts; most of it is tokenization, which holds no lock
_BUILT_TO_ESTIMATE = 16  # prompts
ANSWER_PREFIX = "\nAnswer:"

Span = tuple[int, int]  # characters [start, end) of a text


@dataclasses.dataclass(frozen=True)
class Prompt:
    """A prompt as text and tokens.

    Attributes:
      cut: tokens of the passages that were cut to make the prompt fit.
      passage_spans: where each passage of the question is in the text, so that it can be cut later.
    """

    text: str
    tokens: list[int]
    cut: int = 0
    passage_spans: tuple[Span, ...] = ()


class PromptSize(NamedTuple):
    """Bytes of the question and the passages together, and of the question: known before a prompt is built."""

    all: int
    question: int


class PromptBuilder:
    """Builds prompts for one tokenizer.

    Args:
      tokenizer: a `transformers` tokenizer, with or without a chat template.
      max_tokens: limit of a whole prompt.
      passages: how many of a row's contexts are shown (the first K); 0 is closed book.
      examples: how many few-shot demonstrations come first.
      stop: stop strings of responses to these prompts; kept for the caller that decodes them.
      template_arguments: variables of the chat template, on top of `TEMPLATE_ARGUMENTS`.
      answer_line: whether the response ends with a line that has the short answer; else all of it is the answer.
      order: 'best_first' shows the contexts as they are ranked; 'best_last' puts the first right before the question.
    """

    STEPS = {"best_first": 1, "best_last": -1}  # of the slice that puts the contexts in order

    def __init__(
        self,
        tokenizer,
        max_tokens: int,
        passages: int,
        examples: int = 0,
        answer_line: bool = True,
        stop: tuple[str, ...] = (),
        order: str = "best_first",
        template_arguments: Mapping | None = None,
    ):
        self.tokenizer, self.max_tokens, self.passages, self.stop = tokenizer, max_tokens, passages, tuple(stop)
        self.answer_line, self.step = answer_line, self.STEPS[order]
        self.examples = EXAMPLES[len(EXAMPLES) - examples :]
        self.template_arguments = dict(template_arguments or {})
        self._marks = TurnMarks(tokenizer, self.template_arguments)

    def plain(self, row: dict) -> Prompt:
        """The prompt of training and inference: passages, question, instruction.

        Raises:
          UserError: the question and the instruction alone are over the limit.
        """
        prompt = self._render(self._passages(self.shown(row)), row, guided=False)
        if len(prompt.tokens) > self.max_tokens:
            prompt = cut_passages(self.tokenizer, prompt, self.max_tokens)
        if prompt is None:
            raise UserError(
                f"Row {row.get('id')!r}: the question and the instruction alone leave no room for passages in "
                f"config.prompt.max_tokens={self.max_tokens}. Raise it or shorten the question."
            )
        return prompt

    def guided(self, row: dict, plain: Prompt) -> Prompt:
        """The prompt that shows the first golden answer; rationales are sampled from it.

        It shows the passages just as the `plain` prompt does, so the hint's few tokens come on top of the limit; and it
        differs from it only behind the question, so that both can share the prefill up to there.
        """
        passages = [plain.text[start:end] for start, end in plain.passage_spans]
        return dataclasses.replace(self._render(passages, row, guided=True), cut=plain.cut)

    def conversations(self, row: dict, responses: list[str]) -> list[str]:
        """The plain prompt's last turn with each of some responses to it, complete: what a reward model reads.

        Raises:
          UserError: as of `plain`.
        """
        plain = self.plain(row)
        passages = [plain.text[start:end] for start, end in plain.passage_spans]
        content, texts = self._content(passages, row, guided=False)[0], map(self._marks.break_up, responses)
        if self.tokenizer.chat_template is None:
            return [f"{content}\n{text}" for text in texts]
        user = {"role": "user", "content": content}
        turns = [[user, {"role": "assistant", "content": text}] for text in texts]
        return [render_chat(self.tokenizer, both, self.template_arguments, generation_prompt=False) for both in turns]

    def size(self, row: dict) -> PromptSize:
        """The size of what a row's prompt shows."""
        count = lambda text: len(text if text.isascii() else text.encode(errors="replace"))
        question = count(row["question"])
        return PromptSize(question + sum(count(c["title"]) + count(c["text"]) for c in self.shown(row)), question)

    def common_tokens(self, guided: bool = False) -> list[int]:
        """The tokens that all prompts begin with; a prompt whose first passage merges with them may differ.

        They are what prompts begin with whose first passages have nothing in common.
        """
        prompts = []
        for text in ("A", "b", "7", "(", '"', "\u00e9", "\u4e2d"):
            passages = [text] * bool(self.passages)
            row = {"question": text, "golden_answers": [text]}
            prompts.append(self._render(passages, row, guided).tokens)
        return os.path.commonprefix(prompts)

    def hint_tokens(self) -> int:
        """How many tokens a guided prompt has from where it differs from the plain one, with a golden answer of one."""
        row, passages = {"question": "?", "golden_answers": ["a"]}, ["a"] * bool(self.passages)
        plain, guided = (self._render(passages, row, guided).tokens for guided in (False, True))
        return len(guided) - len(os.path.commonprefix([plain[:-1], guided[:-1]]))

    def neutral(self, text: str) -> str:
        """Data on one line, with the marks of turns broken up so that neither tokenizer nor model can see them."""
        return self._marks.break_up(" ".join(text.split()))

    def shown(self, row: dict) -> list[dict]:
        """The contexts that a row's prompt shows, in the order of their numbers."""
        return row.get("contexts", [])[: self.passages][:: self.step]

    def _passages(self, contexts: list[dict]) -> list[str]:
        texts = [(self.neutral(c["title"]), self.neutral(c["text"])) for c in contexts]
        return [f"{title}: {text}" if title else text for title, text in texts]

    def _content(self, passages: list[str], row: dict, guided: bool) -> tuple[str, list[Span]]:
        """The text of a user turn, and where its passages are in it."""
        text, spans = "", []
        for number, passage in enumerate(passages, 1):
            text += f"Passage {number}: "
            spans.append((len(text), len(text) + len(passage)))
            text += f"{passage}\n"
        hint = HINT.format(answer=self.neutral(row["golden_answers"][0])) if guided else ""
        text += "\n" * bool(passages) + f"Question: {self.neutral(row['question'])}\n{hint}{self._instruction()}"
        return text, spans

    def _instruction(self) -> str:
        if self.answer_line:
            return INSTRUCTION if self.passages else INSTRUCTION_CLOSED
        return INSTRUCTION_TEXT if self.passages else INSTRUCTION_TEXT_CLOSED

    def _render(self, passages: list[str], row: dict, guided: bool) -> Prompt:
        turns = []
        for example, response in self.examples:
            response = response if self.answer_line else response.partition(ANSWER_PREFIX)[0]
            # A demonstration shows all of its passages, or none in a closed book, and then does not name any.
            shown = self._passages(example["contexts"] if self.passages else [])
            turns.append({"role": "user", "content": self._content(shown, example, guided)[0]})
            turns.append({"role": "assistant", "content": response if self.passages else _NAMED.sub("", response)})
        content, spans = self._content(passages, row, guided)
        turns.append({"role": "user", "content": content})
        if self.tokenizer.chat_template is None:
            text = "\n\n".join(turn["content"] for turn in turns) + "\n"
        else:
            text = render_chat(self.tokenizer, turns, self.template_arguments)
        start = text.rfind(content)
        if start < 0:
            raise UserError(
                "The tokenizer's chat template changes the text of a turn; name another in config.tokenizer."
            )
        spans = tuple((start + first, start + last) for first, last in spans)
        return Prompt(text, prompt_tokens(self.tokenizer, text), passage_spans=spans)


def estimate_lengths(sizes: list[PromptSize], length_of: Callable[[int], int], limit: int) -> list[int]:
    """Estimate the lengths of prompts in tokens from their sizes, by building a few; seldom too short.

    One of those that are built has the longest question, so that one which is over the limit is found at once.

    Args:
      length_of: builds a prompt by its place and returns its length.
      limit: the most tokens of a prompt.
    """
    length_of(max(range(len(sizes)), key=lambda i: sizes[i].question))
    order = sorted(range(len(sizes)), key=lambda i: sizes[i].all)
    few = {i * (len(order) - 1) // (_BUILT_TO_ESTIMATE - 1) for i in range(_BUILT_TO_ESTIMATE)}
    built = [(sizes[order[i]].all, length_of(order[i])) for i in sorted(few)]
    # As long as the longest of the built prompts that are not larger and the next one, and a sixteenth.
    longest = [max(n, min(n * 17 // 16, limit)) for n in itertools.accumulate((n for _, n in built), max)]
    steps = [size for size, _ in built]
    return [longest[bisect.bisect_left(steps, size.all)] for size in sizes]


def cut_passages(tokenizer, prompt: Prompt, limit: int) -> Prompt | None:
    """A prompt with its passages cut so that it has at most `limit` tokens; None where no cut is enough.

    The longest passages are cut to one length and short ones stay complete. Everything else stays as it is.
    """
    passages = [prompt.text[start:end] for start, end in prompt.passage_spans]
    pieces = [tokenizer(passage, add_special_tokens=False).input_ids for passage in passages]
    room = limit - len(prompt_tokens(tokenizer, _replaced(prompt, [""] * len(passages))[0]))
    while room > 0:
        length = _water_level([len(piece) for piece in pieces], room)
        # Always a beginning of the passage itself: decoded text could differ from it.
        kept = [
            passage if len(piece) <= length else passage[: len(tokenizer.decode(piece[:length]))]
            for passage, piece in zip(passages, pieces, strict=True)
        ]
        text, spans = _replaced(prompt, kept)
        tokens = prompt_tokens(tokenizer, text)
        if len(tokens) <= limit:
            cut = sum(max(0, len(piece) - length) for piece in pieces)
            return Prompt(text, tokens, prompt.cut + cut, spans)
        room -= len(tokens) - limit  # joined text can take a token or two more than its pieces
    return None


def _replaced(prompt: Prompt, passages: list[str]) -> tuple[str, tuple[Span, ...]]:
    """A prompt's text with other passages in the places of its own, and where they are."""
    text, spans, behind = "", [], 0
    for (start, end), passage in zip(prompt.passage_spans, passages, strict=True):
        text += prompt.text[behind:start]
        spans.append((len(text), len(text) + len(passage)))
        text, behind = text + passage, end
    return text + prompt.text[behind:], tuple(spans)


def prompt_tokens(tokenizer, text: str, plain_text: bool = False) -> list[int]:
    """Tokenize a whole prompt.

    A chat template has written its special tokens already; plain text gets those that the tokenizer puts (BOS) here,
    unless it begins with BOS as it is.

    Args:
      plain_text: whether the prompt is plain text although the tokenizer has a chat template.
    """
    tokens = tokenizer(text, add_special_tokens=False).input_ids
    if tokenizer.chat_template is not None and not plain_text or tokens[:1] == [tokenizer.bos_token_id]:
        return tokens
    return tokenizer(text).input_ids


def response_tokens(tokenizer, response: str) -> list[int]:
    """Tokens of a response, without the end-of-turn token."""
    return tokenizer(response, add_special_tokens=False).input_ids


def _water_level(lengths: list[int], room: int) -> int:
    """The largest limit for which all lengths, each cut to it, sum to at most `room`."""
    level = 0
    remaining = sorted(lengths)
    while remaining:
        level = room // len(remaining)
        if remaining[0] > level:
            return level
        room -= remaining.pop(0)
    return max(lengths, default=0)
