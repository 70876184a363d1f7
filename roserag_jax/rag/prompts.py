"""Prompts: numbered passages, the question, and how to answer, in the model's own chat template.

Passages are data. They are laid on one line each, and every special token and every mark of the chat template inside
them is broken up, so none can close its block, pose as an 'Answer:' line or end the turn. When the prompt is over its
limit, passages are cut; the question never is.
"""

import dataclasses
import datetime
import re
from collections.abc import Mapping

from roserag_jax.errors import UserError

INSTRUCTION = (
    "Say in at most four sentences what the relevant passages say about the question. "
    'Then write "Answer:" and only the short answer.'
)
# Used where there are no passages at all (closed book).
INSTRUCTION_CLOSED = 'Reason in at most four sentences. Then write "Answer:" and only the short answer.'
HINT = "The answer is {answer}. "
# Worked examples for small models, which follow an example better than an instruction. The one that is answered by yes
# or no stands first: the model takes its manner from the last.
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
ANSWER_PREFIX = "\nAnswer:"

# What chat templates are told unless `config.prompt.template_arguments` says otherwise. Some write today's date, which
# would change the prompts overnight, and some let the model think at length before it answers.
TEMPLATE_ARGUMENTS = {"date_string": "26 Jul 2024", "enable_thinking": False}
DATE_FORMAT = "%d %b %Y"
# transformers gives templates a function of the clock and takes only plain data from callers; a macro of its name in
# front of the template takes its place.
_FIXED_CLOCK = (
    "{%- macro strftime_now(format) -%}{%- set text = namespace(value=format) -%}"
    "{%- for directive, value in clock_directives.items() -%}"
    "{%- set text.value = text.value.replace(directive, value) -%}{%- endfor -%}{{- text.value -}}{%- endmacro +%}"
)
_DIRECTIVES = "aAbBcdDeFgGhHIjklmMnpPrRsSTuUVwWxXyYzZ"
THINK_START, THINK_END = "<think>", "</think>"


Span = tuple[int, int]  # characters [start, end) of a text


@dataclasses.dataclass(frozen=True)
class Prompt:
    """A prompt as text and tokens.

    Attributes:
      cut: tokens of the passages that were cut to make the prompt fit.
      passage_spans: where each passage of the question stands in the text, so that it can be cut later.
    """

    text: str
    tokens: list[int]
    cut: int = 0
    passage_spans: tuple[Span, ...] = ()


def render_chat(tokenizer, turns: list[dict], arguments: Mapping | None = None, generation_prompt: bool = True) -> str:
    """The text of a conversation in the tokenizer's chat template; the same on every day.

    Args:
      turns: `{role, content}`.
      arguments: variables of the template, on top of `TEMPLATE_ARGUMENTS`.
      generation_prompt: whether the text ends where the assistant's next turn begins. A block of thoughts that the
        template opens there is closed, unless `enable_thinking` is true.
    """
    arguments = {**TEMPLATE_ARGUMENTS, **(arguments or {})}
    template, clock = tokenizer.get_chat_template(), {}
    if "strftime_now" in template:
        date = datetime.datetime.strptime(arguments["date_string"], DATE_FORMAT)
        clock = {f"%{flag}{letter}": date.strftime(f"%{flag}{letter}") for letter in _DIRECTIVES for flag in ("-", "")}
        template = _FIXED_CLOCK + template
    text = tokenizer.apply_chat_template(
        turns,
        chat_template=template,
        tokenize=False,
        add_generation_prompt=generation_prompt,
        clock_directives=clock,
        **arguments,
    )
    if generation_prompt and opens_thoughts(text) and not arguments["enable_thinking"]:
        text = f"{text.rstrip()}\n\n{THINK_END}\n\n"
    return text


def check_template_arguments(arguments: Mapping) -> None:
    """Check variables for chat templates.

    Raises:
      ValueError: one has the name of something that is always passed, or the date is not written as in '26 Jul 2024'.
    """
    if taken := {"messages", "conversation", "chat_template", "tokenize", "add_generation_prompt"} & {*arguments}:
        raise ValueError(f"{', '.join(sorted(taken))} cannot be set")
    datetime.datetime.strptime(arguments.get("date_string", TEMPLATE_ARGUMENTS["date_string"]), DATE_FORMAT)


def opens_thoughts(prompt: str) -> bool:
    """Whether a prompt ends inside a block of thoughts, so that a response begins with the rest of it."""
    return prompt.rstrip().endswith(THINK_START)


def _marks(tokenizer, template_arguments: Mapping) -> re.Pattern | None:
    """What ends or begins a turn: special tokens, other added tokens that are no plain words, and what the chat
    template writes around turns, which in some models is text like any other (Mistral's [/INST], Vicuna's ASSISTANT:).
    """
    no_word = re.compile(r"(?=\S*[^\w\s])\S{2,}")
    either = lambda marks: re.compile("|".join(map(re.escape, sorted(marks, key=len, reverse=True))))
    added = {str(t) for t in tokenizer.added_tokens_decoder.values() if t.special or no_word.fullmatch(str(t))}
    marks = {token for token in {*tokenizer.all_special_tokens, *added, THINK_START, THINK_END} if token.strip()}
    if tokenizer.chat_template is not None:
        turns = [{"role": role, "content": "\0"} for role in ("user", "assistant", "user")]
        written = render_chat(tokenizer, turns, template_arguments).split("\0")
        # Without the tokens, which stand right before it (Mistral's </s>[INST]).
        text = " ".join(either(marks).sub(" ", between) if marks else between for between in written[1:])
        marks |= set(no_word.findall(text))
    return either(marks) if marks else None


class PromptBuilder:
    """Builds prompts for one tokenizer.

    Args:
      tokenizer: a `transformers` tokenizer, with or without a chat template.
      max_tokens: limit of a whole prompt.
      passages: how many of a row's contexts are shown (the first K); 0 is closed book.
      examples: how many worked examples come first.
      stop: texts that end a response to these prompts; kept for who decodes them.
      template_arguments: variables of the chat template, on top of `TEMPLATE_ARGUMENTS`.
      order: 'best_first' shows the contexts as they are ranked; 'best_last' puts the first right before the question.
    """

    def __init__(
        self,
        tokenizer,
        max_tokens: int,
        passages: int,
        examples: int = 0,
        stop: tuple[str, ...] = (),
        order: str = "best_first",
        template_arguments: Mapping | None = None,
    ):
        self.tokenizer, self.max_tokens, self.passages, self.stop = tokenizer, max_tokens, passages, tuple(stop)
        self.step = {"best_first": 1, "best_last": -1}[order]
        self.examples = EXAMPLES[len(EXAMPLES) - examples :]
        self.template_arguments = dict(template_arguments or {})
        self._marks = _marks(tokenizer, self.template_arguments)

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

    def guided(self, row: dict) -> Prompt:
        """The prompt that shows the first golden answer; rationales are sampled from it.

        It shows the passages just as the plain prompt does, so the hint's few tokens come on top of the limit; and it
        differs from it only behind the question, so that both can share the prefill up to there.
        """
        plain = self.plain(row)
        passages = [plain.text[start:end] for start, end in plain.passage_spans]
        return dataclasses.replace(self._render(passages, row, guided=True), cut=plain.cut)

    def neutral(self, text: str) -> str:
        """Data on one line, with the marks of turns broken up so that neither tokenizer nor model can see them."""
        text = " ".join(text.split())
        if self._marks:
            # A space after the first character (a mark of one is dropped); repeated, because breaking one mark can join
            # another's pieces.
            while found := self._marks.search(text):
                mark = found.group()
                broken = f"{mark[0]} {mark[1:]}" if len(mark) > 1 else ""
                text = text[: found.start()] + broken + text[found.end() :]
        return text

    def shown(self, row: dict) -> list[dict]:
        """The contexts that a row's prompt shows, in the order of their numbers."""
        return row.get("contexts", [])[: self.passages][:: self.step]

    def _passages(self, contexts: list[dict]) -> list[str]:
        texts = [(self.neutral(c["title"]), self.neutral(c["text"])) for c in contexts]
        return [f"{title}: {text}" if title else text for title, text in texts]

    def _content(self, passages: list[str], row: dict, guided: bool) -> tuple[str, list[Span]]:
        """The text of a user turn, and where its passages stand in it."""
        text, spans = "", []
        for number, passage in enumerate(passages, 1):
            text += f"Passage {number}: "
            spans.append((len(text), len(text) + len(passage)))
            text += f"{passage}\n"
        hint = HINT.format(answer=self.neutral(row["golden_answers"][0])) if guided else ""
        instruction = INSTRUCTION if self.passages else INSTRUCTION_CLOSED
        text += "\n" * bool(passages) + f"Question: {self.neutral(row['question'])}\n{hint}{instruction}"
        return text, spans

    def _render(self, passages: list[str], row: dict, guided: bool) -> Prompt:
        turns = []
        for example, response in self.examples:
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
    """A prompt's text with other passages in the places of its own, and where they stand."""
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
