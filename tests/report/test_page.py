"""The report's page, without a browser: what it holds, what an incomplete workdir gives, and how large it gets."""

import base64
import functools
import gzip
import json
import operator
import re
import shutil
import sys

import numpy as np
import pytest
from support.runs import write_run

from roserag_jax.errors import UserError
from roserag_jax.report import __main__ as report
from roserag_jax.report import page, runs
from roserag_jax.workdir import from_jsonl, to_jsonl


def data_of(text, name):
    """The JSON that a page holds."""
    encoded, content = re.search(rf'id="data-{name}" data-encoded="(\w*)">(.*?)</script>', text).groups()
    return json.loads(gzip.decompress(base64.b64decode(content)) if encoded else content)


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("run"))


def test_page_says_why_a_question_has_no_pair(workdir):
    """Each question has its outcome, and the funnel counts them with a link to the questions."""
    text = page.write_page([str(workdir)]).read_text()
    questions = data_of(text, "lists")["questions"]
    outcomes = {row["id"]: row["outcome"] for row in questions["rows"]}
    assert outcomes == {f"q{i}": ("pair", "none correct", "all correct")[i % 3] for i in range(6)}
    assert "reaches the golden answer" in questions["outcomes"]["none correct"]
    assert 'href="#pairs/none%20correct"' in text
    (first, *_) = questions["rows"]
    assert [(c["chosen"], c["rejected"], c["correct"]) for c in first["candidates"]] == [
        (True, False, True),
        (False, True, False),
    ]
    assert first["passages"] == [
        {"title": "Museum", "text": "Ada Lund founded it.", "gold": True},
        {"title": "Mill", "text": "It burns.", "gold": False},
    ]
    assert first["candidates"][0]["cites"] == ["museum"] and first["dropped"] == {"repeated": 1}


def test_page_of_a_question_without_golden_answers_shows_its_candidates(workdir, tmp_path):
    """As labels other than golden answers leave it: no majority of its samples, or a text that a reward judges."""
    path = shutil.copytree(workdir, tmp_path / "run") / "candidates.jsonl"
    rows = from_jsonl(path.read_text())
    for row in rows[:2]:
        row["golden_answers"] = []
        row["candidates"] = [candidate | {"correct": None} for candidate in row["candidates"]]
    path.write_text(to_jsonl(rows))
    found = data_of(page.page([runs.read_run(str(tmp_path / "run"))]), "lists")["questions"]["rows"]
    assert [(row["answers"], "held" in row) for row in found[:3]] == [([], False), ([], False), (["Ada Lund"], True)]
    assert all(row["candidates"] for row in found[:3])


def test_page_tells_systems_apart_in_two_sentences(workdir):
    """The verdict follows the paired test; the table of differences has both completions."""
    text = page.write_page([str(workdir)]).read_text()
    verdict = re.search(r'<div class="verdict">(.*?)</div>', text, re.DOTALL).group(1)
    assert (
        "The adapter and the base model cannot be told apart on 6 held-out questions: EM 66.7 against 33.3" in verdict
    )
    assert verdict.count("<p>") == 2
    assert "Training loss falls while EM is flat: the loss goes from 1.000 to 0.700" in verdict
    said = {row["id"]: row["said"] for row in data_of(text, "lists")["differences"]["rows"]}
    assert said["q1"]["base"][0] == 0.0 and said["q1"]["adapter"][0] == 1.0
    assert said["q1"]["adapter"][2].endswith("Answer: Ada Lund")


def test_verdict_names_what_is_better_and_worse(tmp_path):
    for systems, word in ((("base", "adapter"), "better"), (("adapter", "base"), "worse")):
        folder = write_run(tmp_path / word, questions=60, systems=systems)
        text = page.page([runs.read_run(str(folder))])
        assert f"The adapter is {word} than the base model on 60 held-out questions" in text


@pytest.mark.parametrize(
    ("kept", "notes"),
    [
        (["candidates.jsonl", "retrieved.jsonl"], []),
        (["candidates.jsonl"], []),
        (["eval"], []),
        (["metrics.jsonl"], ["Training is under way, or was stopped: 4 steps are done."]),
        (["pairs.jsonl"], []),
        (["retrieved.jsonl"], []),
    ],
)
def test_page_of_an_incomplete_workdir_has_what_is_there(workdir, tmp_path, kept, notes):
    for name in kept:
        for file in (name, f"{name}.manifest.json"):
            if (workdir / file).exists():
                copy = shutil.copytree if (workdir / file).is_dir() else shutil.copy
                copy(workdir / file, tmp_path / file)
    text = page.write_page([str(tmp_path)]).read_text()
    sections = set(re.findall(r'<section id="(\w+)"', text))
    expected = {"candidates.jsonl": {"funnel", "pairs"}, "eval": {"evaluation"}, "metrics.jsonl": {"training"}}
    expected |= {"pairs.jsonl": {"pairs"}, "retrieved.jsonl": {"pairs"}}
    assert sections == {"summary"}.union(*(expected[name] for name in kept))
    for note in notes:
        assert note in text
    if "candidates.jsonl" in kept:
        assert {row["outcome"] for row in data_of(text, "lists")["questions"]["rows"]} == {"not selected"}


def test_page_of_a_stage_under_way_has_the_finished_rows(workdir, tmp_path):
    """Partial results are shown; the last line, which is just being written, is not."""
    from roserag_jax.partial_results import PartialResults
    from roserag_jax.workdir import Workdir

    rows = from_jsonl((workdir / "candidates.jsonl").read_text())
    shutil.copy(workdir / "retrieved.jsonl", tmp_path)
    partial = PartialResults(Workdir(str(tmp_path)), "generate", "0" * 16, [row["id"] for row in rows])
    for row in rows[:2]:
        partial.add(row)
    with open(partial.own, "a") as file:
        file.write('0000 {"id"')
    text = page.write_page([str(tmp_path)]).read_text()
    assert "generate is under way, or was stopped: 2 questions are finished." in text
    assert len(data_of(text, "lists")["questions"]["rows"]) == 2


def test_page_of_damaged_files_names_them(workdir, tmp_path):
    """Lines that are no rows are left out and counted, an artifact changed by hand is named."""
    folder = shutil.copytree(workdir, tmp_path / "run")
    lines = (folder / "candidates.jsonl").read_text().splitlines()
    broken = ["{", "[]", "null", '{"id": 3}', '{"id": "x", "candidates": [{"rationale": null}]}', "\udcff"]
    (folder / "candidates.jsonl").write_bytes("\n".join(lines[:3] + broken).encode("utf-8", "surrogateescape"))
    (folder / "eval/base/metrics.json").write_text("{")
    (folder / "metrics.jsonl").write_text('{"step": 1, "loss": null}\n{"ste')
    text = page.write_page([str(folder)]).read_text()
    assert "candidates.jsonl: 6 of 9 lines are damaged" in text
    assert "was changed or damaged after it was written" in text
    assert "metrics.json is damaged" in text and "metrics.jsonl: 1 lines are damaged" in text
    assert "non-finite loss" in text


@pytest.mark.parametrize(
    ("file", "place", "value"),
    [
        ("retrieved.jsonl", ["metadata"], ["type"]),
        ("retrieved.jsonl", ["contexts", 0, "is_supporting"], "yes"),
        ("retrieved.jsonl", ["contexts"], None),
        ("candidates.jsonl", ["candidates", 0, "logprob"], float("nan")),
        ("candidates.jsonl", ["candidates", 0, "tokens"], -3),
        ("candidates.jsonl", ["candidates", 0, "correct"], [1]),
        ("candidates.jsonl", ["passage_spans"], [[0, "end"]]),
        ("candidates.jsonl", ["dropped"], {"repeated": None}),
        ("pairs.jsonl", ["chosen_logprob"], "-1"),
        ("pairs.jsonl", ["prompt"], 3),
        ("metrics.jsonl", ["loss"], float("inf")),
        ("metrics.jsonl", ["step"], 10**400),
        ("eval/base/examples.jsonl", ["scores", "f1"], None),
        ("eval/base/metrics.json", ["em_interval"], [1.0]),
        ("eval/base/metrics.json", ["by_type"], {"one_hop": {"em": None}}),
    ],
)
def test_page_leaves_out_a_value_that_no_stage_writes(workdir, tmp_path, file, place, value):
    """The row is counted as damaged; the page has the others."""
    path = shutil.copytree(workdir, tmp_path / "run") / file
    first, *others = [path.read_text()] if file.endswith(".json") else path.read_text().splitlines(keepends=True)
    row = json.loads(first)
    functools.reduce(operator.getitem, place[:-1], row)[place[-1]] = value
    path.write_text(json.dumps(row) + "\n" + "".join(others))
    text = page.page([runs.read_run(str(tmp_path / "run"))])
    assert re.search(r"(1 of \d+ lines are|1 lines are|1 lines of examples.jsonl are|metrics.json is) damaged", text)


def write_candidates(folder, questions, passages, words):
    """Questions of so many passages of so many words, each with eight candidates that quote them."""
    rng = np.random.default_rng(0)
    letters = np.array(list("abcdefghijklmnopqrstuvwxyz"))
    vocabulary = ["".join(rng.choice(letters, size)) for size in rng.integers(2, 9, 8000)]
    drawn = iter(np.minimum(rng.zipf(1.3, questions * passages * (words + 3)), 8000) - 1)
    text = lambda n: " ".join(vocabulary[next(drawn)] for _ in range(n))
    retrieved, rows = [], []
    for i in range(questions):
        contexts = [{"title": text(3), "text": text(words), "is_supporting": False} for _ in range(passages)]
        candidate = {"answer": "a", "source": "plain", "correct": False, "logprob": -9.0, "tokens": 90}
        quoted = [" ".join(contexts[j % passages]["text"].split()[: words // 3]) for j in range(8)]
        said = [candidate | {"rationale": q, "response": f"{q}\nAnswer: a"} for q in quoted]
        prompt, spans = "", []
        for c in contexts:
            spans.append([len(prompt), len(prompt) + len(f"{c['title']}: {c['text']}")])
            prompt += f"{c['title']}: {c['text']}\n"
        own = {"id": f"q{i}", "golden_answers": ["b"]}
        retrieved.append({**own, "question": f"What is {i}?", "contexts": contexts})
        rows.append({**own, "prompt": prompt, "passage_spans": spans, "candidates": said, "dropped": {}})
    (folder / "retrieved.jsonl").write_text(to_jsonl(retrieved))
    (folder / "candidates.jsonl").write_text(to_jsonl(rows))
    return folder


def test_page_of_a_thousand_long_questions_is_small(tmp_path):
    """1,000 questions of ten passages, as HotPotQA has them, are in the page and take less than 5 MB."""
    folder = write_candidates(tmp_path, 1000, 10, 90)
    assert (folder / "candidates.jsonl").stat().st_size > 7e6
    written = page.write_page([str(folder)]).read_text()
    assert len(written.encode()) <= page.LARGEST
    assert len(data_of(written, "lists")["questions"]["rows"]) == 1000 and "are shown here" not in written


def test_page_of_a_larger_run_is_sampled_and_says_so(tmp_path, monkeypatch):
    folder = write_candidates(tmp_path, 1200, 1, 6)
    written = page.write_page([str(folder)]).read_text()
    rows = data_of(written, "lists")["questions"]["rows"]
    assert "Of 1,200 questions, 1,000 are shown here" in written and len(rows) == 1000
    assert "with candidates <small>sampled and verified</small></th><td>1200</td>" in written
    monkeypatch.setattr(page, "LARGEST", 150_000)
    written = page.write_page([str(folder)]).read_text()
    assert len(written.encode()) <= 150_000 and "Of 1,200 questions, " in written


def test_page_compares_runs_on_the_same_questions(workdir, tmp_path):
    other = write_run(tmp_path / "other", systems=("adapter", "base"))
    text = page.write_page([str(workdir), str(other)], str(tmp_path / "both.html")).read_text()
    assert 'id="comparison"' in text and "adapter: other - " in text
    charts = data_of(text, "charts")["comparison"]
    assert [series["name"] for series in charts["charts"][0]["series"]] == [workdir.name, "other"]
    assert len(charts["intervals"][0]["rows"]) == 4


def test_report_command_says_where_the_page_is_and_what_it_lacks(workdir, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["report", str(workdir), "--output", str(tmp_path / "new/page.html")])
    report.main()
    assert (tmp_path / "new/page.html").exists() and f"Wrote {tmp_path}/new/page.html (0." in capsys.readouterr().out
    (tmp_path / "file").write_text("")
    for arguments, why in (
        ([tmp_path / "new"], "holds nothing of a run"),
        ([tmp_path / "absent"], "there is no such folder"),
        ([workdir, "--output", tmp_path / "new"], "is a folder; move it away, or name a file"),
        ([workdir, "--output", tmp_path / "file/page.html"], "file"),
    ):
        monkeypatch.setattr(sys, "argv", ["report", *map(str, arguments)])
        with pytest.raises(UserError, match=re.escape(why)):
            report.main()
