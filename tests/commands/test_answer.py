"""`answer`: one question from a folder, and a file of questions."""

import json
import re

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
