"""Questions that a model writes about passages: the prompts for it, reading what it wrote, and what is wrong with it.

The prompts show worked examples, because small models follow those where they ignore instructions.
"""

import collections
import hashlib
import itertools
import random
import re
from typing import NamedTuple

import regex

from roserag_jax.rag import answers
from roserag_jax.rag.chat import render_chat
from roserag_jax.rag.words import contains, words

KINDS = ("one_hop", "two_hop", "yes_no", "unanswerable")
# The answer to a question that the passages do not answer; the first is what the model is taught to say.
UNANSWERABLE = [
    "not stated in the passages",
    "not stated",
    "not mentioned in the passages",
    "not mentioned",
    "not given",
    "not in the passages",
    "unanswerable",
    "unknown",
    "noanswer",
]

_MUSEUM = "Tern Museum: The Tern Museum stands in Lower Vale. Ada Lund founded it in 1901 with money from her brewery."
_ENGINE = "Hale engine: The Hale engine is a steam engine that Bruno Hale built in Moss Hill. It drove a paper mill."
_OPERA = "The Red Hat: The Red Hat is an opera by Nora Lund in four acts. It was first sung in Castle Ford in 1922."

_WRITE = "Write one short question that this passage answers, naming what it is about, and its short answer."
_WRITE_ABOUT = "Write one short question about {name} that this passage answers, and its short answer."
_WRITE_FOR = "Write one short question about this passage whose answer is: {answer}"
_PHRASE = "Turn the question into a phrase that stands for its answer.\nQuestion: {question}"
_FREE_EXAMPLES = (
    (f"Passage: {_MUSEUM}\n{_WRITE}", "Question: Who founded the Tern Museum?\nAnswer: Ada Lund"),
    (f"Passage: {_ENGINE}\n{_WRITE}", "Question: What did the Hale engine drive?\nAnswer: a paper mill"),
    (f"Passage: {_OPERA}\n{_WRITE}", "Question: In what year was The Red Hat first sung?\nAnswer: 1922"),
)
_ABOUT_EXAMPLES = (
    (f"Passage: {_MUSEUM}\n{_WRITE_ABOUT.format(name='Tern Museum')}", _FREE_EXAMPLES[0][1]),
    (
        f"Passage: {_ENGINE}\n{_WRITE_ABOUT.format(name='Bruno Hale')}",
        "Question: Where did Bruno Hale build his engine?\nAnswer: Moss Hill",
    ),
    (
        f"Passage: {_OPERA}\n{_WRITE_ABOUT.format(name='Nora Lund')}",
        "Question: Which opera is by Nora Lund?\nAnswer: The Red Hat",
    ),
)
_YES_NO_EXAMPLES = (
    (f"Passage: {_MUSEUM}\n{_WRITE_FOR.format(answer='yes')}", "Question: Did Ada Lund found the Tern Museum?"),
    (f"Passage: {_ENGINE}\n{_WRITE_FOR.format(answer='no')}", "Question: Was the Hale engine built in Castle Ford?"),
    (f"Passage: {_OPERA}\n{_WRITE_FOR.format(answer='yes')}", "Question: Does The Red Hat have four acts?"),
    (f"Passage: {_MUSEUM}\n{_WRITE_FOR.format(answer='no')}", "Question: Was the Tern Museum founded in 1950?"),
)
_FOR_EXAMPLES = (
    (f"Passage: {_MUSEUM}\n{_WRITE_FOR.format(answer='Ada Lund')}", "Question: Who founded the Tern Museum?"),
    (f"Passage: {_ENGINE}\n{_WRITE_FOR.format(answer='Moss Hill')}", "Question: Where was the Hale engine built?"),
    (f"Passage: {_OPERA}\n{_WRITE_FOR.format(answer='Nora Lund')}", "Question: Who wrote The Red Hat?"),
)
_READ = "{passages}\nQuestion: {question}\nAnswer the question in a few words."
# A small model answers as the examples do: after "yes" and "no" it says "no" to "Who founded ...?" too.
_READ_EXAMPLES = (
    (_READ.format(passages=f"Passage: {_MUSEUM}", question="Who founded the Tern Museum?"), "Ada Lund"),
    (_READ.format(passages=f"Passage: {_ENGINE}", question="What did the Hale engine drive?"), "a paper mill"),
    (_READ.format(passages=f"Passage: {_OPERA}", question="In what year was The Red Hat first sung?"), "1922"),
)
_READ_YES_NO_EXAMPLES = (
    (_READ.format(passages=f"Passage: {_MUSEUM}", question="Did Ada Lund found the Tern Museum?"), "yes"),
    (_READ.format(passages=f"Passage: {_ENGINE}", question="Was the Hale engine built in Castle Ford?"), "no"),
    (_READ.format(passages=f"Passage: {_OPERA}", question="Does The Red Hat have four acts?"), "yes"),
)
_CLOSED = "Question: {question}\nAnswer the question in a few words."
_CLOSED_EXAMPLES = (
    (_CLOSED.format(question="Who wrote Hamlet?"), "William Shakespeare"),
    (_CLOSED.format(question="What is the capital of France?"), "Paris"),
    (_CLOSED.format(question="In what year did the Second World War end?"), "1945"),
)
_CLOSED_YES_NO_EXAMPLES = (
    (_CLOSED.format(question="Did William Shakespeare write Hamlet?"), "yes"),
    (_CLOSED.format(question="Is Rome the capital of France?"), "no"),
    (_CLOSED.format(question="Is Mars a planet?"), "yes"),
)
_PHRASE_EXAMPLES = (
    (_PHRASE.format(question="Who founded the Tern Museum?"), "Phrase: the founder of the Tern Museum"),
    (_PHRASE.format(question="Where was the Hale engine built?"), "Phrase: the place where the Hale engine was built"),
    (_PHRASE.format(question="Which opera is by Nora Lund?"), "Phrase: the opera by Nora Lund"),
    (_PHRASE.format(question="In which town was Bruno Hale born?"), "Phrase: the town where Bruno Hale was born"),
)


def _turns(examples: tuple[tuple[str, str], ...], request: str) -> list[dict]:
    turns = []
    for asked, written in examples:
        turns += [{"role": "user", "content": asked}, {"role": "assistant", "content": written}]
    return [*turns, {"role": "user", "content": request}]


# What the model is asked, by kind: functions of a passage, and of a name, an answer or a question where there is one.
TURNS = {
    "free": lambda passage, _: _turns(_FREE_EXAMPLES, f"Passage: {passage}\n{_WRITE}"),
    "about": lambda passage, name: _turns(_ABOUT_EXAMPLES, f"Passage: {passage}\n{_WRITE_ABOUT.format(name=name)}"),
    "for": lambda passage, answer: _turns(_FOR_EXAMPLES, f"Passage: {passage}\n{_WRITE_FOR.format(answer=answer)}"),
    "yes_no": lambda passage, answer: _turns(
        _YES_NO_EXAMPLES, f"Passage: {passage}\n{_WRITE_FOR.format(answer=answer)}"
    ),
    "read": lambda passages, question: _turns(_READ_EXAMPLES, _READ.format(passages=passages, question=question)),
    "read_yes_no": lambda passages, question: _turns(
        _READ_YES_NO_EXAMPLES, _READ.format(passages=passages, question=question)
    ),
    "closed": lambda _, question: _turns(_CLOSED_EXAMPLES, _CLOSED.format(question=question)),
    "closed_yes_no": lambda _, question: _turns(_CLOSED_YES_NO_EXAMPLES, _CLOSED.format(question=question)),
    "phrase": lambda question, _: _turns(_PHRASE_EXAMPLES, _PHRASE.format(question=question)),
}

_OF_ONE_PASSAGE = ("free", "read", "closed")
# Those of `TURNS` that attempts of a kind use.
PROMPTS_OF = {
    "one_hop": _OF_ONE_PASSAGE,
    "unanswerable": _OF_ONE_PASSAGE,
    "yes_no": ("yes_no", "read_yes_no", "closed_yes_no"),
    "two_hop": ("about", "for", "phrase", "read", "closed"),
}


def render(tokenizer, turns: list[dict], arguments) -> str:
    """Turns in the tokenizer's chat template, or as plain text where it has none."""
    if tokenizer.chat_template is not None:
        return render_chat(tokenizer, turns, arguments)
    return "\n\n".join(turn["content"] for turn in turns) + "\n"


_QUESTION = re.compile(r"(?:question|q)\s*[:\uff1a]\s*(.+)", re.IGNORECASE)
_ANSWER = re.compile(r"(?:short )?(?:answer|a)\s*[:\uff1a]\s*(.+)", re.IGNORECASE)
_SAME_LINE = re.compile(r"[ \t]+(?=\**(?:short )?answer\**\s*[:\uff1a])", re.IGNORECASE)
_PHRASE_LINE = re.compile(r"(?:phrase\s*[:\uff1a])?\s*(.+)", re.IGNORECASE)
_QUESTION_MARK = regex.compile(r"[?\uff1f\u061f\u037e\u2e2e]")


def read_question(text: str) -> tuple[str, str]:
    """The question and the answer that a model wrote, each '' where there is none."""
    question = answer = ""
    for line in _SAME_LINE.sub("\n", text).splitlines():
        line = line.strip().strip("*_ ")
        if not question and (found := _QUESTION.match(line)):
            question = found.group(1).strip(' "*_')
        elif question and not answer and (found := _ANSWER.match(line)):
            answer = found.group(1).strip(' "*_')
            answer = answer[:-1].strip() if answer.endswith(".") and not answer[:-1].endswith(".") else answer
        elif not question and _QUESTION_MARK.search(line[-1:]):
            question = line
    return question, answer


def read_phrase(text: str) -> str:
    """The phrase that a model wrote, '' where there is none."""
    line = next((line.strip() for line in text.splitlines() if line.strip()), "")
    found = _PHRASE_LINE.match(line)
    return found.group(1).strip(' ".?*_') if found else ""


# A phrase for an answer begins so in English.
_DETERMINER = re.compile(r"(?:the|an?|that|those|one)\b", re.IGNORECASE)
_ENGLISH_QUESTION = re.compile(r"\b(?:who|whom|whose|what|which|where|when)\b", re.IGNORECASE)


def is_phrase_of(phrase: str, question: str) -> bool:
    """Whether a phrase can stand for a question's answer; in English it is no sentence and names nothing new."""
    if not _ENGLISH_QUESTION.search(question):
        return bool(phrase)
    return bool(_DETERMINER.match(phrase)) and all(contains(question, name) for name in names(phrase))


# What points at the text instead of naming what it is about; English only.
_POINTS = re.compile(
    r"\b(?:the|this|that|these|those|a|given|above|following|provided|first|second|previous)\s+(?:\w+\s+)?"
    r"(?:passages?|texts?|documents?|articles?|paragraphs?|excerpts?|contexts?|snippets?|sentences?|statements?|"
    r"descriptions?|information)\b|\baccording to\b|\bmentioned\b|\bdescribed (?:above|here|in)\b|\bthe author say",
    re.IGNORECASE,
)
_PRONOUN = re.compile(
    r"\b(?:he|she|it|they|him|her|his|hers|its|their|them|this|these|those|who else)\b", re.IGNORECASE
)
# How a question begins that yes and no do not answer; English only.
_ASKS_FOR = re.compile(
    r"(?:(?:in|on|at|by|to|of|for|from|with|under)\s+)?(?:who|whom|whose|what|which|where|when|why|how)\b",
    re.IGNORECASE,
)
_MOST_WORDS, _MOST_ANSWER_WORDS = 40, 10


def fault(question: str, answer: str, passages: list[dict], kind: str = "one_hop") -> str:
    """What is wrong with a question and its answer, judged by their words alone; '' if nothing is.

    Args:
      passages: what they were written from.
    """
    text = "\n".join(f"{p['title']}.\n{p['text']}" for p in passages)
    asked = words(question)
    if len(asked) < 3 or not _QUESTION_MARK.search(question[-1:]):
        return "no question"
    if len(asked) > _MOST_WORDS:
        return "a long question"
    if not answer.strip() or not words(answer):
        return "no answer"
    if _POINTS.search(question):
        return "points at the passage"
    known = [name for passage in passages for name in subjects(passage)]
    if known and not any(contains(question, name) for name in known) or not known and _PRONOUN.search(question):
        return "names nothing"
    if kind == "yes_no":
        return "" if answers.is_yes_no(answer) and not _ASKS_FOR.match(question) else "not yes or no"
    if answers.is_yes_no(answer):
        return "answer is yes or no"
    if len(words(answer)) > _MOST_ANSWER_WORDS:
        return "a long answer"
    if not contains(text, answer):
        return "answer not in the passage"
    if answers.contains(question, [answer]):  # with any article, as answers are compared
        return "answer in the question"
    return ""


_NAME = regex.compile(
    r"\p{Lu}[\p{L}\p{M}\p{N}'\u2019-]*(?:\s+(?:(?:of|the|de|la|von|van|al)\s+)*\p{Lu}[\p{L}\p{M}\p{N}'\u2019-]*)*"
)
_SENTENCE_START = regex.compile(r"(?:^|[.!?:]\s+|\n\s*)$")
_NO_NAMES = set(
    "the a an it he she they this that these those in on at of for from by with as and but or its his her their who "
    "what when where which there here after before during while if not no yes one two i we you".split()
)


def names(text: str) -> list[str]:
    """The names in a text, in scripts that have capital letters: capitalized words in a row, each once.

    A single word that only begins sentences is not counted, nor are words that any sentence may begin with.
    """
    found: dict[str, bool] = {}
    for match in _NAME.finditer(text):
        parts = match.group().split()
        begins = bool(_SENTENCE_START.search(text[max(0, match.start() - 3) : match.start()]))
        while parts and parts[0].lower() in _NO_NAMES and (begins or len(parts) == 1):
            parts, begins = parts[1:], False
        if parts and parts[0].lower() not in _NO_NAMES and len(" ".join(parts)) > 2:
            name = " ".join(parts)
            found[name] = found.get(name, False) or not begins or len(parts) > 1
    return [name for name, sure in found.items() if sure]


def subjects(passage: dict) -> list[str]:
    """What a passage is about: its title first, then the other names in it."""
    title = passage["title"].strip()
    return [title] * bool(title) + [name for name in names(f"{title}.\n{passage['text']}") if name != title]


def compose(question: str, name: str, phrase: str) -> str:
    """A two-hop question: one that names something, with a phrase that stands for it in the name's place.

    Returns:
      '' where the name is not in the question as complete words, or the phrase would name it again.
    """
    if not phrase or contains(phrase, name):
        return ""
    pattern = regex.compile(
        rf"(?<![\p{{L}}\p{{N}}])(?:the\s+)?{regex.escape(name)}(?![\p{{L}}\p{{N}}])", regex.IGNORECASE
    )
    composed, count = pattern.subn(phrase, question, count=1)
    if not count or contains(composed, name):
        return ""
    return composed[:1].upper() + composed[1:]


def is_near_duplicate(question: str, others: list[set[str]], threshold: float = 0.8) -> bool:
    """Whether a question shares most of its words with another: the fraction of their common words is that high."""
    own = set(words(question))
    return any(len(own & other) >= threshold * len(own | other) for other in others)


def document_of(passage: dict) -> str:
    """What tells documents apart: the file of a passage, else its title, else its text."""
    return (passage.get("source") or {}).get("file") or passage["title"] or passage["text"]


class Split:
    """Which documents are held out: about a fraction of those given, by a hash of their names, and at least one.

    Args:
      documents: some or all of the corpus' documents; others fall on one side by their hash too.
    """

    def __init__(self, documents: set[str], held_out: float, seed: int):
        self._seed = seed
        places = sorted(map(self._place, documents))
        count = round(held_out * len(places))
        count = min(max(count, 1), len(places) - 1) if held_out and len(places) > 1 else 0
        self._limit = places[count - 1] if count else -1

    def _place(self, document: str) -> int:
        digest = hashlib.blake2b(f"{self._seed}/{document}".encode("utf-8", "backslashreplace"), digest_size=8).digest()
        return int.from_bytes(digest, "big")

    def part(self, passage: dict) -> str:
        """'eval' if the passage's document is held out, else 'train'."""
        return "eval" if self._place(document_of(passage)) <= self._limit else "train"


_OTHERS = 3  # passages that the first of two hops is shown among


class Attempt(NamedTuple):
    """One attempt at a question.

    Attributes:
      id: names all of the attempt, so that what became of it is known again wherever the same one is made.
      passages: one, or for two hops the one that holds the answer and then the one that leads to it.
      name: what both passages of a two-hop question name.
      answer: the answer that a yes/no question is to have.
      others: passages like the first of two hops that do not name what both name.
    """

    id: str
    kind: str
    passages: list[dict]
    name: str = ""
    answer: str = ""
    others: tuple[dict, ...] = ()


def attempts(passages: list[dict], kinds: tuple[str, ...], rounds: int, search, similar, seed: int) -> list[Attempt]:
    """Attempts over passages of one part in their order; a passage's kinds take turns, beginning with a drawn one.

    What is attempted about a passage does not depend on how many others there are.

    Args:
      rounds: how often each passage is used at most.
      search: finds other passages of the part that hold a name as complete words, best first.
      similar: finds other passages of the part like one, best first.
    """
    made: dict[str, Attempt] = {}
    for turn in range(rounds):
        for passage in passages:
            first = random.Random(f"{seed}/{_digest(passage)}").randrange(2 * len(kinds))
            kind = kinds[(first + turn) % len(kinds)]
            attempt = Attempt("", kind, [passage])
            if kind == "yes_no":
                attempt = attempt._replace(answer=("yes", "no")[(first + turn) // len(kinds) % 2])
            if kind == "two_hop":
                attempt = _bridge(attempt, search, similar, random.Random(f"{seed}/{_digest(passage)}/{turn}"))
            if attempt:
                shown = _digest(*attempt.passages, *attempt.others, name=f"{attempt.name}\0{attempt.answer}")
                attempt = attempt._replace(id=f"{kind}-{shown}-{turn}")
                made[attempt.id] = attempt
    return list(made.values())


def _digest(*passages: dict, name: str = "") -> str:
    text = "\0".join([name, *(f"{passage['title']}\0{passage['text']}" for passage in passages)])
    return hashlib.blake2b(text.encode("utf-8", "backslashreplace"), digest_size=8).hexdigest()


def _bridge(attempt: Attempt, search, similar, rng: random.Random) -> Attempt | None:
    """An attempt with a second passage that shares a name with the first; None where there is none."""
    (passage,) = attempt.passages
    title, *found = subjects(passage) or [""]
    # About what the passage is about a question is easily written; another name may be mentioned in passing.
    for name in [title, *rng.sample(found, min(len(found), 6))]:
        others = [p for p in search(name) if p["text"] != passage["text"]] if name else []
        if others:
            other = rng.choice(others[:4])
            if name != title and name == other["title"].strip():
                # That is where something is said about it; where it is only mentioned, a question leads to it.
                passage, other = other, passage
            like = [p for p in similar(passage) if not contains(f"{p['title']} {p['text']}", name)]
            return attempt._replace(passages=[passage, other], name=name, others=tuple(like[:_OTHERS]))
    return None


class Written(NamedTuple):
    """What became of attempts.

    Attributes:
      rows: of the attempts whose question was kept.
      dropped: questions that were not: `{id, kind, why, question, answer, written_from}`.
      waiting: the attempts to work on next, in their order; none where enough questions are kept, or no attempts left.
    """

    rows: list[dict]
    dropped: list[dict]
    waiting: list[Attempt]

    @property
    def reasons(self) -> collections.Counter:
        """How many were not kept, by reason."""
        return collections.Counter(row["why"] for row in self.dropped)


_TRIED, _ONE_OF = 24, 32  # a kind makes room for others once so many were tried and fewer than one of so many was kept


def keep(
    tried: list[Attempt], done: dict[str, dict], target: int, kinds: tuple[str, ...], known: list[set[str]]
) -> Written:
    """The questions to keep of attempts in their order, each kind its share, as far as attempts are done.

    A kind that has no attempts left, or of which hardly any is kept, makes room for the others; where these have none
    left either, it is tried on. What is kept does not depend on how many attempts are done at a time.

    Args:
      done: by the attempts' ids, `{id, kind, question, answer, dropped: [{why, question, answer}]}`; those with a
        `question` passed.
      target: how many are wanted.
      known: the words of questions that these must not repeat; those kept are added.
    """
    queues = {kind: collections.deque(a for a in enumerate(tried) if a[1].kind == kind) for kind in kinds}
    counts, of_kind, patient = collections.Counter(), collections.Counter(), False
    found = Written([], [], [])
    while len(found.rows) < target and any(queues.values()):
        left = [kind for kind in kinds if queues[kind]]
        open_kinds = [kind for kind in left if patient or not _hardly_any(of_kind[kind], counts[kind])]
        if not open_kinds:
            patient = True
            continue
        others = sum(of_kind[kind] for kind in kinds if kind not in open_kinds)
        share = -(-(target - others) // len(open_kinds))
        following = sorted(queues[kind][0] for kind in open_kinds if of_kind[kind] < share)
        attempt = following[0][1]
        if attempt.id not in done:
            waiting = []
            for _, head in following:
                most = None if patient else _more_tries(of_kind[head.kind], counts[head.kind])
                waiting += itertools.islice(queues[head.kind], most)
            waiting.sort()
            return found._replace(waiting=[a for _, a in waiting if a.id not in done])
        queues[attempt.kind].popleft()
        counts[attempt.kind] += 1
        of_kind[attempt.kind] += _take(found, attempt, done[attempt.id], known)
    return found


def _hardly_any(kept: int, tries: int) -> bool:
    """Whether a kind is to make room for others."""
    return tries >= _TRIED and kept * _ONE_OF < tries


def _more_tries(kept: int, tries: int) -> int:
    """How many more attempts a kind has for certain, whatever becomes of them, before it makes room for others."""
    return max(_TRIED, kept * _ONE_OF + 1) - tries


def _take(found: Written, attempt: Attempt, row: dict, known: list[set[str]]) -> bool:
    """Put what became of an attempt with what is kept or dropped; returns whether its question was kept."""
    dropped, is_kept = list(row["dropped"]), bool(row["question"]) and not is_near_duplicate(row["question"], known)
    if is_kept:
        found.rows.append(row | {"passages": attempt.passages})
        known.append(set(words(row["question"])))
    elif row["question"]:
        dropped.append({"why": "near-duplicate", "question": row["question"], "answer": row["answer"]})
    titles = [passage["title"] for passage in attempt.passages]
    found.dropped.extend({"id": row["id"], "kind": row["kind"], **each, "written_from": titles} for each in dropped)
    return is_kept
