"""`retrieve`: whose questions a workdir holds, and where a stopped run resumes."""

import pytest
from conftest import write_lines

from roserag_jax import evaluate, generate, options, retrieve, watch
from roserag_jax.errors import UserError
from roserag_jax.retrieval.registry import RETRIEVERS, RetrieverSpec
from roserag_jax.workdir import Workdir, digest


def test_retrieve_never_replaces_user_data_by_synthetic_questions(finished, config_of):
    """A later command without the options that name the questions is refused, and nothing is made again."""
    work = Workdir(finished.workdir)
    before = [digest(work / name) for name in ("retrieved.jsonl", "retrieved_eval.jsonl")]
    with pytest.raises(UserError, match=r"data.eval='synthetic', but .*/retrieved_eval.jsonl is of .*/eval.jsonl"):
        evaluate.run(config_of(workdir=finished.workdir))
    with pytest.raises(UserError, match=r"data.train='synthetic', but .*/retrieved.jsonl is of .*/train.jsonl"):
        generate.run(config_of(workdir=finished.workdir))
    with pytest.raises(UserError, match="evaluated on synthetic questions"):
        evaluate.run(config_of(finished.data.train, **{"data.eval": "synthetic"}))
    assert before == [digest(work / name) for name in ("retrieved.jsonl", "retrieved_eval.jsonl")]


def test_retrieve_keeps_what_it_made_where_a_row_cannot_be_used(tmp_path):
    config = options.defaults()
    config.workdir, questions = str(tmp_path / "work"), tmp_path / "q.jsonl"
    row = {"question": "q", "golden_answers": ["a"], "contexts": [{"title": "t", "text": "x"}]}
    config.data.train, work = write_lines(questions, *({"id": i, **row} for i in range(3))), Workdir(config.workdir)
    retrieve.make(config, work, ("train",))
    made = work.rows("retrieved.jsonl")
    write_lines(questions, *({"id": i, **row} for i in range(3)), {"id": 3, **row, "question": ""})
    with pytest.raises(UserError, match=r"line 4 \(id '3'\): no question"):
        retrieve.make(config, work, ("train",))
    assert work.rows("retrieved.jsonl") == made and not list(work.path.glob(".retrieved*"))


def test_retrieve_resumes_behind_finished_batches(tmp_path, monkeypatch, capsys):
    asked = []

    class Stopping:
        def search(self, queries, k):
            if len(asked) == stops_after:
                raise KeyboardInterrupt
            asked.append(queries)
            return [
                [{"title": q, "text": "gold" if q == "q7" else "other", "score": 1.0}] if q != "q3" else []
                for q in queries
            ]

    monkeypatch.setattr(retrieve, "_BATCH", 4)
    monkeypatch.setitem(RETRIEVERS, "bm25", RetrieverSpec("", lambda config: Stopping(), ("corpus",)))
    config = options.defaults()
    config.workdir, config.retrieve.retriever = str(tmp_path / "work"), "bm25"
    config.retrieve.corpus = write_lines(tmp_path / "c.jsonl", {"contents": "x"})
    gold = lambda i: [{"title": f"q{i}", "text": "gold", "is_supporting": True}]
    rows = [{"id": i, "question": f"q{i}", "golden_answers": ["a"], "contexts": gold(i)} for i in range(10)]
    config.data.train = write_lines(tmp_path / "q.jsonl", *rows)
    work, stops_after = Workdir(config.workdir), 2
    with pytest.raises(KeyboardInterrupt):
        retrieve.make(config, work, ("train",))
    stops_after = -1
    retrieve.make(config, work, ("train",))
    status = watch.read_status(work)
    assert (status["stage"], status["first"], status["done"]) == ("retrieve train", 8, 10)
    assert asked == [["q0", "q1", "q2", "q3"], ["q4", "q5", "q6", "q7"], ["q8", "q9"]]
    made = work.rows("retrieved.jsonl")
    assert [row["id"] for row in made] == [str(i) for i in range(10)]
    assert made[3]["contexts"] == [] and made[3]["gold_count"] == 1
    assert [c["is_supporting"] for row in made for c in row["contexts"]] == [i == 7 for i in range(10) if i != 3]
    printed = capsys.readouterr().out
    assert "Nothing was found for 1 of 10 questions" in printed and "10 questions, 0.9 passages each" in printed
    assert not list((work / ".parts").iterdir())
