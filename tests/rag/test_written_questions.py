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
    # With fewer passages those about each are the same, where what they are joined with is.
    fewer = attempts(passages[:4], ("one_hop", "two_hop", "yes_no"), 3, search, similar, seed=0)
    assert len(fewer) == 12 and {a.id for a in fewer} <= {a.id for a in made}


def test_attempts_ask_about_what_an_entry_is_about():
    """A work names its author: the question is about the author's entry, and the work leads to it."""
    work = {"title": "The Red Hat", "text": "It is an opera by Nora Lund."}
    entry = {"title": "Nora Lund", "text": "She was born in Moss Hill."}
    search = lambda name: [p for p in (work, entry) if name in f"{p['title']} {p['text']}"]
    made = attempts([work, entry], ("two_hop",), 1, search, lambda passage: [], seed=0)
    assert [(a.name, a.passages) for a in made] == [("Nora Lund", [entry, work])]


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


def tries(kind, count, passes=lambda i: True):
    """Attempts of a kind, and what became of each: a question of its own or a fault."""
    about = [{"title": "Tern Museum", "text": ""}]
    made = [written_questions.Attempt(f"{kind}-{i}", kind, about) for i in range(count)]
    dropped = [{"why": "no answer", "question": "Who?", "answer": ""}]
    question = lambda i: f"Who founded museum number {kind} {i}?" if passes(i) else ""
    done = {
        a.id: {"id": a.id, "kind": kind, "question": question(i), "answer": "Ada", "dropped": dropped}
        for i, a in enumerate(made)
    }
    return made, done


def in_turns(*of_kinds):
    """The attempts of several kinds in turns, and what became of all."""
    longest = max(len(made) for made, _ in of_kinds)
    tried = [made[i] for i in range(longest) for made, _ in of_kinds if i < len(made)]
    return tried, {name: row for _, done in of_kinds for name, row in done.items()}


def test_keep_gives_each_kind_its_share_and_repeats_no_question():
    tried, done = in_turns(tries("one_hop", 4), tries("yes_no", 3))
    done["yes_no-1"] = done["yes_no-1"] | {"question": "Who founded the museum number yes_no 0?"}
    known = [set(words("Who founded museum number one_hop 0?"))]
    kept = lambda target: written_questions.keep(tried, done, target, ("one_hop", "yes_no"), list(known))
    found = kept(4)
    assert [r["id"] for r in found.rows] == ["yes_no-0", "one_hop-1", "one_hop-2", "yes_no-2"] and not found.waiting
    assert found.reasons == {"no answer": 6, "near-duplicate": 2}  # the seventh was not needed
    assert {
        "id": "one_hop-0",
        "kind": "one_hop",
        "why": "near-duplicate",
        "question": "Who founded museum number one_hop 0?",
        "answer": "Ada",
        "written_from": ["Tern Museum"],
    } in found.dropped
    assert [r["id"] for r in kept(9).rows][-1] == "one_hop-3"  # yes_no has no more, so all of the others


@pytest.mark.parametrize("at_a_time", [1, 7, 1000])
def test_keep_has_a_kind_of_which_nothing_passes_make_room_for_the_others(at_a_time):
    """After 24 attempts, not after all; and what is kept does not depend on how many are tried at a time."""
    kinds = ("one_hop", "two_hop", "yes_no")
    tried, results = in_turns(
        tries("one_hop", 200, lambda i: i % 3 == 0), tries("two_hop", 200, lambda i: i > 150), tries("yes_no", 4)
    )
    done = {}
    while (found := written_questions.keep(tried, done, 40, kinds, [])).waiting:
        done |= {a.id: results[a.id] for a in found.waiting[:at_a_time]}
    assert collections.Counter(row["kind"] for row in found.rows) == {"one_hop": 36, "yes_no": 4}
    assert sum(row["kind"] == "two_hop" for row in found.dropped) == 24
    assert sum(name.startswith("two_hop") for name in done) == 24
    assert found == written_questions.keep(tried, results, 40, kinds, [])
    # Where the others do not suffice, it is tried on.
    found = written_questions.keep(tried, results, 80, kinds, [])
    assert collections.Counter(row["kind"] for row in found.rows) == {"one_hop": 67, "yes_no": 4, "two_hop": 9}
