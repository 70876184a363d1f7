"""Chat templates: rendering them the same on every day, and keeping data from posing as a turn."""

import datetime
import re
import unicodedata
from collections.abc import Mapping

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

# Characters that look like those of marks; what compatibility forms unify (full-width letters) needs no entry.
_LOOK_ALIKES = str.maketrans(
    "‹〈⟨❮˂ᐸ›〉⟩❯˃ᐳ∣│┃ǀ❘⏐¦【⁅❲〔】⁆❳〕⁄∕⧸╱∶꞉ː׃аеорсухіѕјһԁԛԝАВЕКМНОРСТУХІЅЈΑΒΕΖΗΙΚΜΝΟΡΤΥΧαινορı",
    "<<<<<<>>>>>>|||||||[[[[]]]]////::::aeopcyxisjhdqwABEKMHOPCTYXISJABEZHIKMNOPTYXaivopi",
)


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


class _Folding(dict):
    """For `str.translate`: a character as it looks, nothing for one that is invisible."""

    def __missing__(self, code: int) -> str:
        character = chr(code)
        invisible = unicodedata.category(character) == "Cf" or 0xFE00 <= code <= 0xFE0F
        self[code] = "" if invisible else unicodedata.normalize("NFKC", character).translate(_LOOK_ALIKES)
        return self[code]


_FOLDING = _Folding()


class TurnMarks:
    """What begins or ends a turn in a tokenizer's chat template, and a way to break it up in data.

    These are special tokens, other added tokens that are not plain words, the limits of thoughts, and what the chat
    template writes around turns, which for some models is ordinary text (Mistral's [/INST], Vicuna's ASSISTANT:). Marks
    that only look like them, with full-width letters, invisible characters or letters of other scripts, count too.
    """

    def __init__(self, tokenizer, template_arguments: Mapping | None = None):
        not_a_word = re.compile(r"(?=\S*[^\w\s])\S{2,}")
        added = {str(t) for t in tokenizer.added_tokens_decoder.values() if t.special or not_a_word.fullmatch(str(t))}
        marks = {token for token in {*tokenizer.all_special_tokens, *added, THINK_START, THINK_END} if token.strip()}
        if tokenizer.chat_template is not None:
            turns = [{"role": role, "content": "\0"} for role in ("user", "assistant", "user")]
            written = render_chat(tokenizer, turns, template_arguments).split("\0")
            # Without the tokens, which come right before it (Mistral's </s>[INST]).
            text = " ".join(_any_of(marks).sub(" ", between) for between in written[1:])
            marks |= set(not_a_word.findall(text))
        self._pattern = _any_of({mark.translate(_FOLDING) for mark in marks} - {""})

    def break_up(self, text: str) -> str:
        """Insert a space behind the first character of every mark; a mark of one character is removed."""
        # Again until there is none, because removing one can join another's pieces.
        while self._pattern.search(looks := text if text.isascii() else text.translate(_FOLDING)):
            places = range(len(text)) if looks is text else _places(text)
            broken, behind = "", 0
            for found in self._pattern.finditer(looks):
                begin, end = places[found.start()], places[found.end() - 1] + 1
                if begin >= behind:  # else it begins in a character that another mark ends in
                    kept = f"{text[begin]} {text[begin + 1 : end]}" if end - begin > 1 else ""
                    broken, behind = broken + text[behind:begin] + kept, end
            text = broken + text[behind:]
        return text


def _any_of(texts: set[str]) -> re.Pattern:
    return re.compile("|".join(map(re.escape, sorted(texts, key=len, reverse=True))))


def _places(text: str) -> list[int]:
    """For each character of a text as it looks, the place of the one that it comes from."""
    return [place for place, character in enumerate(text) for _ in character.translate(_FOLDING)]
