"""`questions`: from a folder of documents to two files of checked questions.

No model small enough for a test can write a question. A reader of the synthetic encyclopedia's sentences takes its
place behind the prompts; everything else is real.
"""

import contextlib
import re

import numpy as np
import pytest

from roserag_jax import questions
from roserag_jax.errors import UserError
from roserag_jax.inference.engine import SharedPrefix
from roserag_jax.inference.requests import Completion, PrefillRequest
from roserag_jax.partial_results import partial_rows
from roserag_jax.rag import synthetic, written_questions
from roserag_jax.rag.questions import read_questions
from roserag_jax.rag.words import contains
from roserag_jax.session import Session
from roserag_jax.workdir import Workdir

BORN = re.compile(r"([A-Z]\w+ [A-Z]\w+) was a (\w+), born in ((?:[A-Z]\w+ ?)+) in (\d+)")
LIES = re.compile(r"((?:[A-Z]\w+ ?)+) is a town in ((?:[A-Z]\w+ ?)+) with")


class Reader:
    """Writes and answers questions about people's births and towns' regions; without passages it knows one person."""

    def __init__(self, known=""):
        self.known, self.asked = known, []

    def prefill_shared_prefix(self, tokens):
        return SharedPrefix(tokens, None)

    def write(self, prompt):
        request = prompt.split("\n\n")[-1]
        if request.startswith("Turn the question"):
            if person := re.search(r"which town was (.*) born", request):
                return f"Phrase: the town where {person.group(1)} was born"
            return "Phrase: the place in question"
        if born := BORN.search(request):
            person, job, town, year = born.groups()
            if "whose answer is: yes" in request:
                return f"Question: Was {person} a {job}?"
            if "whose answer is: no" in request:
                return f"Question: Was {person} a pirate?"
            if "about this passage whose answer is:" in request:
                return f"Question: In which town was {person} born?"
            return f"Question: In what year was {person} born?\nAnswer: {year}"
        if lies := LIES.search(request):
            return f"Question: In which region is {lies.group(1).strip()}?\nAnswer: {lies.group(2).strip()}"
        return "I would rather not."

    def answer(self, prompt):
        self.asked.append(prompt)
        passages, _, question = prompt.split("\n\n")[-1].rpartition("Question: ")
        born = [b.groups() for b in BORN.finditer(passages)]
        regions = {town.strip(): region.strip() for town, region in LIES.findall(passages)}
        for person, job, town, year in [*born, (self.known, "", "", "1800")]:
            if person and person in question:
                if "year" in question:
                    return year
                if "In which town" in question:
                    return town.strip()
                if "region" in question:
                    return regions.get(town.strip(), "unknown")
                return "yes" if job in question else "no"
        return next((region for town, region in regions.items() if town in question), "unknown")

    def run(self, session, tasks):
        tokenizer = session.tokenizer
        for number, _, task in tasks:
            prompt, sent = "", None
            try:
                while True:
                    request = task.send(sent)
                    sent = None
                    if isinstance(request, PrefillRequest):
                        prompt = tokenizer.decode(request.tokens)
                        continue
                    answering = prompt.endswith("in a few words.\n")
                    text = self.answer(prompt) if answering else self.write(prompt)
                    tokens = tokenizer(f" {text}" if answering else text, add_special_tokens=False).input_ids
                    completion = Completion(tokens, np.zeros(len(tokens)), True, np.zeros(1))
                    sent = [completion] * len(request.forced_prefixes)
            except StopIteration as end:
                yield number, end.value


@pytest.fixture
def with_reader(config_of, tmp_path, monkeypatch):
    """A function: a configuration over the encyclopedia in a folder, its model replaced by the reader."""
    folder = tmp_path / "world"
    folder.mkdir()
    for name, text in synthetic.documents(60, "train").items():
        (folder / f"{name}.txt").write_text(text)

    def make(reader, workdir=None, **changes):
        changes = {
            "questions.count": 30,
            "questions.held_out": 0.3,
            "retrieve.k": 4,
            "prompt.max_tokens": 3000,
        } | changes
        config = config_of("documents", workdir, **{"retrieve.corpus": str(folder), "data.eval": "documents"} | changes)
        monkeypatch.setattr(Session, "engine", lambda session, adapter=None: reader)
        monkeypatch.setattr(questions, "run_tasks", lambda engine, tasks, *_: engine.run(Session(config), tasks))
        return config

    return make


def test_questions_are_written_checked_and_split_by_document(with_reader, capsys):
    reader = Reader()
    config = with_reader(reader)
    questions.run(config)
    for prompt in reader.asked:  # a small model answers as the worked examples do
        *examples, question = prompt.split("Question: ")
        shown = {re.search(r"few words.\n\n(.*)\n", example).group(1) in ("yes", "no") for example in examples[1:]}
        assert shown == {question.startswith("Was ")}
    work = Workdir(config.workdir)
    parts = {
        part: read_questions(str(work / f"questions{end}.jsonl")) for part, end in (("train", ""), ("eval", "_eval"))
    }
    assert [len(rows) for rows in parts.values()] == [21, 9]
    files = {part: {c["source"]["file"] for row in rows for c in row["contexts"]} for part, rows in parts.items()}
    assert files["train"] and files["eval"] and not files["train"] & files["eval"]
    asked = [row["question"] for rows in parts.values() for row in rows]
    assert len(set(asked)) == 30
    kinds = [row["metadata"]["type"] for row in parts["train"]]
    assert set(kinds) == set(written_questions.KINDS)
    for row in parts["train"] + parts["eval"]:
        gold = [c for c in row["contexts"] if c["is_supporting"]]
        kind, answer = row["metadata"]["type"], row["golden_answers"][0]
        assert len(row["contexts"]) <= 4 and len(gold) == {"unanswerable": 0, "two_hop": 2}.get(kind, 1)
        if kind in ("one_hop", "two_hop"):
            assert any(contains(c["text"], answer) for c in gold)
        if kind == "two_hop":
            assert re.fullmatch(r"In which region is the town where .* was born\?", row["question"])
        if kind == "unanswerable":
            assert answer == "not stated in the passages"
    rejected = work.rows("questions_rejected.jsonl")
    said = {(row["why"], row["question"], row["answer"]) for row in rejected if row["written_from"]}
    assert ("no question", "I would rather not.", "") in said
    out = capsys.readouterr().out
    assert "21 questions" in out and "not kept:" in out and "no question" in out and "Next: roserag_jax.train" in out
    questions.run(config)
    assert capsys.readouterr().out.count("up to date") == 2


def test_questions_resume_with_the_attempts_that_are_left(with_reader, tmp_path):
    """Stopped in the middle, the same command makes the same files and repeats no attempt."""
    whole = with_reader(Reader())
    questions.run(whole)

    class Stopping(Reader):
        def run(self, session, tasks):
            for done, result in enumerate(super().run(session, tasks)):
                if done == 10:
                    raise KeyboardInterrupt
                yield result

    resumed = with_reader(Stopping())
    with pytest.raises(KeyboardInterrupt):
        questions.run(resumed)
    counted = []

    class Counting(Reader):
        def run(self, session, tasks):
            for task in tasks:
                counted.append(task.number)
                yield from super().run(session, [task])

    again = with_reader(Counting(), workdir=resumed.workdir)
    questions.run(again)
    for name in ("questions.jsonl", "questions_eval.jsonl", "questions_rejected.jsonl"):
        assert (Workdir(again.workdir) / name).read_text() == (Workdir(whole.workdir) / name).read_text()
    assert counted


@pytest.mark.parametrize("stopped", [False, True])
def test_more_questions_go_on_from_the_attempts_that_were_made(with_reader, stopped):
    """Whether the run of fewer questions was finished or stopped, no attempt is made twice."""
    whole = with_reader(Reader())
    questions.run(whole)

    class Stopping(Reader):
        def run(self, session, tasks):
            for done, result in enumerate(super().run(session, tasks)):
                yield result
                if stopped and done == 10:
                    raise KeyboardInterrupt

    few = with_reader(Stopping(), **{"questions.count": 4, "questions.held_out": 0.5, "questions.rounds": 2})
    with pytest.raises(KeyboardInterrupt) if stopped else contextlib.nullcontext():
        questions.run(few)

    def tried():
        rows, damaged = partial_rows(next((Workdir(few.workdir).path / ".parts").glob("questions-*")))
        assert not damaged
        return [row["id"] for row in rows]

    before = tried()
    questions.run(with_reader(Reader(), workdir=few.workdir))
    assert len(before) > 8 and tried()[: len(before)] == before and len(set(tried())) == len(tried())
    for name in ("questions.jsonl", "questions_eval.jsonl", "questions_rejected.jsonl"):
        assert (Workdir(few.workdir) / name).read_text() == (Workdir(whole.workdir) / name).read_text()


def test_two_hop_questions_are_checked_among_other_passages(with_reader):
    """A reader that takes the only region in view, as any model does, has to tell towns apart and cannot."""

    class Guesser(Reader):
        def answer(self, prompt):
            said = super().answer(prompt)
            regions = sorted({region.strip() for _, region in LIES.findall(prompt.split("\n\n")[-1])})
            return regions[0] if said == "unknown" and len(regions) == 1 else said

    config = with_reader(Guesser(), **{"questions.kinds": ("two_hop",), "questions.count": 4, "questions.held_out": 0})
    questions.run(config)
    rows = read_questions(str(Workdir(config.workdir) / "questions.jsonl"))
    assert rows and all("the town where" in row["question"] for row in rows)


def test_questions_that_need_no_passage_are_dropped(with_reader, capsys):
    """What is known without passages is not asked, and nothing that passes is an error that says why."""
    reader = Reader()
    reader.answer = lambda prompt: "yes"  # right half of the time without reading
    knowing = with_reader(reader, **{"questions.kinds": ("yes_no",), "questions.count": 10, "questions.rounds": 1})
    with pytest.raises(UserError, match=r"none of the questions .* answered without the passage"):
        questions.run(knowing)
    assert {row["why"] for row in Workdir(knowing.workdir).rows("questions_rejected.jsonl")} >= {
        "answered without the passage"
    }
