"""`answer`: one question from a folder, and a file of questions."""

import json
import re

import pytest
from conftest import run_command


def test_answer_from_a_folder_and_from_a_file_of_questions(finished, tmp_path):
    """One question from a folder of text, and a file of questions that bring their own contexts."""
    (tmp_path / "moss.txt").write_text("Moss is green.")
    corpus = f"--config.retrieve.corpus={tmp_path}"
    done = run_command("answer", finished, "--question", "Which colour is moss?", corpus)
    assert done.returncode == 0, done.stderr
    assert (
        done.stdout.startswith("Answer: ")
        and re.search(r"1\. moss .*\(score", done.stdout)
        and "Moss is green." in done.stdout
    )
    (tmp_path / "tin.txt").write_text("Tin has no colour.")
    asked = ("--question", "Which colour is moss?", corpus, "--config.prompt.order=best_last")
    done = run_command("answer", finished, *asked)
    assert re.search(r"2\. moss .*\(score", done.stdout)  # the numbers are the prompt's
    (tmp_path / "tin.txt").unlink()
    rows = [
        {"id": "a", "question": "Why?", "contexts": [{"text": "Because of the caf\u00e9 \u71d5."}]},
        {"id": "b", "question": "How green is it?"},
    ]
    file = tmp_path / "q.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = run_command("answer", finished, "--questions", str(file), corpus, PYTHONIOENCODING="ascii")
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    assert answers[0]["passages"][0]["text"] == "Because of the caf\u00e9 \u71d5."
    assert [a["id"] for a in answers] == ["a", "b"] and answers[1]["passages"][0]["title"] == "moss"
    done = run_command("answer", finished, "--questions", str(file))
    assert done.returncode == 2 and "has no contexts" in done.stderr


@pytest.mark.slow
def test_answer_names_file_and_page_of_a_hundred_documents(config_of, tmp_path):
    """PDF, HTML and Markdown: of each kind one question, whose passage is the only one with its word."""
    fpdf = pytest.importorskip("fpdf")
    pytest.importorskip("lxml")
    docs = tmp_path / "docs"
    (docs / "deep").mkdir(parents=True)
    for i in range(34):
        made = fpdf.FPDF()
        made.set_font("helvetica")
        for page in range(1, 4):
            made.add_page()
            made.multi_cell(0, text=f"Report {i}, page {page}. The kestrel{i}x{page} nests here. " + "It is high. " * 9)
        (docs / f"report{i}.pdf").write_bytes(made.output())
        body = f"<h1>Page {i}</h1><p>The otter{i} swims.</p><h2>Food {i}</h2><p>The otter{i} eats fish{i}.</p>"
        (docs / f"page{i}.html").write_text(f"<html><head><title>P</title></head><body>{body}</body></html>")
        if i < 32:
            text = f"# Notes {i}\n\nA moss{i} grows.\n\n## Water {i}\n\nfern{i} too.\n"
            (docs / "deep" / f"notes{i}.md").write_text(text)
    questions = ["Where is kestrel17x2?", "What about fish9?", "Where is fern30?"]
    file = tmp_path / "questions.jsonl"
    file.write_text("".join(json.dumps({"question": question}) + "\n" for question in questions))
    config = config_of()
    config.retrieve.corpus, config.index, config.prompt.passages = str(docs), str(tmp_path / "index"), 1
    config.evaluate.max_tokens = 2
    done = run_command("answer", config, "--questions", str(file))
    assert done.returncode == 0, done.stderr
    sources = [json.loads(line)["passages"][0]["source"] for line in done.stdout.splitlines()]
    assert sources[0] == {"file": "report17.pdf", "page": 2}
    assert sources[1] == {"file": "page9.html", "heading": "Food 9"}
    assert sources[2] == {"file": "deep/notes30.md", "heading": "Water 30"}
