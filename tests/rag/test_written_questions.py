"""Questions written by a model: what is read of its text, what is wrong with a question, and which are kept."""

import collections

import pytest

from roserag_jax.rag import written_questions
from roserag_jax.rag.words import words
from roserag_jax.rag.written_questions import Split, attempts, compose, fault, is_near_duplicate, is_phrase_of, names

PASSAGE = {
    "title": "Ada Berg",
    "text": "Ada Berg was a botanist, born in New Ashford in 1799, who worked at the Tern Museum. She was tall.",
}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Question: Who founded it?\nAnswer: Ada Lund.", ("Who founded it?", "Ada Lund")),
        ("**Question:** Where is it?\n**Answer:** the U.S.A.", ("Where is it?", "the U.S.A")),
        ("Where is it?\nA: in Bath\nQuestion: What?\nAnswer: no", ("Where is it?", "in Bath")),
        ("Question: Where is it? Answer: in Bath", ("Where is it?", "in Bath")),
        ("I cannot do that.", ("", "")),
        ("Question: Is it so?", ("Is it so?", "")),
    ],
)
def test_question_and_answer_are_read_from_what_was_written(text, expected):
    assert written_questions.read_question(text) == expected


@pytest.mark.parametrize(
    ("question", "answer", "expected"),
    [
        ("In what year was Ada Berg born?", "1799", ""),
        ("Where was Ada Berg born?", "in New Ashford", ""),
        ("Where was she born?", "New Ashford", "names nothing"),
        ("According to the passage, where was Ada Berg born?", "New Ashford", "points at the passage"),
        ("What does the first paragraph say of Ada Berg?", "tall", "points at the passage"),
        ("In what year did Ada Berg die?", "1850", "answer not in the passage"),
        ("Was Ada Berg a botanist?", "yes", "answer is yes or no"),
        ("Was Ada Berg a botanist born in 1799?", "botanist", "answer in the question"),
        ("What did the botanist Ada Berg do?", "a botanist", "answer in the question"),
        ("Ada Berg was born in 1799.", "1799", "no question"),
        ("Where was Ada Berg born?", "...", "no answer"),
        ("What is known of Ada Berg?", PASSAGE["text"], "a long answer"),
        ("Where was Ada Berg " + "ever " * 40 + "born?", "New Ashford", "a long question"),
    ],
)
def test_fault_names_what_is_wrong_with_a_question(question, answer, expected):
    assert fault(question, answer, [PASSAGE]) == expected


def test_fault_takes_the_title_for_a_name():
    """A town that only begins sentences is not known by its capital letter."""
    passage = {"title": "Ferngrove", "text": "Ferngrove is a town. Ferngrove has 22000 inhabitants."}
    assert fault("How many people live in Ferngrove?", "22000", [passage]) == ""
    assert fault("How many people live in the town?", "22000", [passage]) == "names nothing"


@pytest.mark.parametrize(
    ("question", "answer", "expected"),
    [
        ("Was Ada Berg a botanist?", "yes", ""),
        ("War Ada Berg Botanikerin?", "yes", ""),
        ("Was Ada Berg a botanist?", "botanist", "not yes or no"),
        ("What was Ada Berg?", "yes", "not yes or no"),
        ("In which year was Ada Berg born?", "no", "not yes or no"),
        ("How tall was Ada Berg?", "no", "not yes or no"),
    ],
)
def test_fault_of_yes_no_questions(question, answer, expected):
    """Neither answered otherwise, nor asking for something else."""
    assert fault(question, answer, [PASSAGE], "yes_no") == expected


def test_names_are_capitalized_words_that_do_not_only_begin_sentences():
    assert names(f"{PASSAGE['title']}. {PASSAGE['text']}") == ["Ada Berg", "New Ashford", "Tern Museum"]
    assert names("The Silent Lantern of Port Ashford is a novel. Inside it rains.") == [
        "Silent Lantern of Port Ashford"
    ]
    assert names("燕鸥博物馆由伦德女士创办。") == []


@pytest.mark.parametrize(
    ("question", "name", "phrase", "expected"),
    [
        (
            "In which region is Ashford?",
            "Ashford",
            "the town where Ada Berg was born",
            "In which region is the town where Ada Berg was born?",
        ),
        (
            "Who founded the Tern Museum?",
            "Tern Museum",
            "the place where he worked",
            "Who founded the place where he worked?",
        ),
        ("In which region is Ashfordton?", "Ashford", "the town", ""),
        ("In which region is Ashford?", "Ashford", "the town called Ashford", ""),
        ("Is Ashford larger than Ashford Hill?", "Ashford", "the town", ""),
        ("In which region is Ashford?", "Ashford", "", ""),
    ],
)
def test_compose_puts_a_phrase_in_the_place_of_a_name(question, name, phrase, expected):
    assert compose(question, name, phrase) == expected


def test_near_duplicates_share_most_of_their_words():
    known = [set(words("In what year was the Tern Museum of Lower Vale founded?"))]
    assert is_near_duplicate("In which year was the Tern Museum of Lower Vale founded?", known)
    assert not is_near_duplicate("In what year was the Hale Museum of Upper Vale founded?", known)


@pytest.mark.parametrize(("held_out", "documents", "expected"), [(0.25, 40, 10), (0.01, 40, 1), (0.9, 2, 1), (0, 9, 0)])
def test_split_holds_out_whole_documents(held_out, documents, expected):
    passage = lambda i, n: {"title": "t", "text": f"{n}", "source": {"file": f"{i}.txt"}}
    made = Split({f"{i}.txt" for i in range(documents)}, held_out, seed=1)
    parts = [made.part(passage(i, 0)) for i in range(documents)]
    assert collections.Counter(parts)["eval"] == expected
    assert [made.part(passage(i, 1)) for i in range(documents)] == parts
    assert made.part({"title": "another", "text": ""}) in ("train", "eval")


def test_attempts_take_turns_and_join_passages_that_name_the_same():
    passages = [{"title": "", "text": f"Ada Berg lives in House {i} of Tern Street."} for i in range(8)]
    search = lambda name: [p for p in passages if name in p["text"]]
    mills = [{"title": "", "text": f"A mill burned in 190{i}."} for i in range(5)]
    similar = lambda passage: [p for p in passages + mills if p != passage]
    made = attempts(passages, ("one_hop", "two_hop", "yes_no"), 3, search, similar, seed=0)
    assert len({a.id for a in made}) == len(made) == 24
    assert collections.Counter(a.kind for a in made) == {"one_hop": 8, "two_hop": 8, "yes_no": 8}
    for attempt in made:
        if attempt.kind == "two_hop":
            first, second = attempt.passages
            assert first != second and attempt.name in first["text"] and attempt.name in second["text"]
            # What the first is shown among does not name what both do.
            assert attempt.others and not any(attempt.name in other["text"] for other in attempt.others)
    assert {a.answer for a in made if a.kind == "yes_no"} == {"yes", "no"}
    assert made == attempts(passages, ("one_hop", "two_hop", "yes_no"), 3, search, similar, seed=0)


def test_attempts_ask_about_what_an_entry_is_about():
    """A work names its author: the question is about the author's entry, and the work leads to it."""
    work = {"title": "The Red Hat", "text": "It is an opera by Nora Lund."}
    entry = {"title": "Nora Lund", "text": "She was born in Moss Hill."}
    search = lambda name: [p for p in (work, entry) if name in f"{p['title']} {p['text']}"]
    made = attempts([work, entry], ("two_hop",), 1, search, lambda passage: [], seed=0)
    assert [(a.name, a.passages) for a in made] == [("Nora Lund", [entry, work])] * 2


@pytest.mark.parametrize(
    ("phrase", "question", "good"),
    [
        ("the town where Bruno Hale was born", "In which town was Bruno Hale born?", True),
        ("Bruno Hale was born", "In which town was Bruno Hale born?", False),  # a sentence
        ("the town in Finland where Bruno Hale was born", "In which town was Bruno Hale born?", False),
        ("die Stadt, in der Bruno Hale geboren wurde", "In welcher Stadt wurde Bruno Hale geboren?", True),
        ("布鲁诺出生的城市", "布鲁诺出生在哪个城市？", True),
        ("", "Who?", False),
    ],
)
def test_phrase_stands_for_an_answer_and_names_nothing_new(phrase, question, good):
    assert is_phrase_of(phrase, question) == good


def test_keep_gives_each_kind_its_share_and_repeats_no_question():
    no_answer = {"why": "no answer", "question": "Who?", "answer": ""}
    about = {"id": "q", "answer": "Ada", "passages": [{"title": "Tern Museum", "text": ""}]}
    row = lambda kind, question, *dropped: about | {"kind": kind, "question": question, "dropped": dropped}
    rows = [row("one_hop", f"Who founded museum number {i}?", no_answer) for i in "abcd"]
    rows += [
        row("yes_no", "Is it so for museum number x?"),
        row("yes_no", "Is it so for museum number x ?"),
        row("yes_no", ""),
    ]
    known = [set(words("Who founded museum number a?"))]
    found = written_questions.keep(rows, 4, ("one_hop", "yes_no"), known, even=True)
    assert [r["question"][-2] for r in found.rows] == ["b", "c", "x"]
    assert found.reasons == {"no answer": 3, "near-duplicate": 2}  # the fourth was not needed
    assert found.dropped[1] == {
        "id": "q",
        "kind": "one_hop",
        "why": "near-duplicate",
        "question": "Who founded museum number a?",
        "answer": "Ada",
        "written_from": ["Tern Museum"],
    }
    known = known[:1]
    assert len(written_questions.keep(rows, 4, ("one_hop", "yes_no"), known, even=False).rows) == 4
