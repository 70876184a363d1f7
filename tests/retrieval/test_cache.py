"""Passages that another retriever found, read from its files."""

import gzip
import json
import unicodedata

import pytest
from conftest import write_lines as write

from roserag_jax import options, retrieve
from roserag_jax.errors import UserError
from roserag_jax.retrieval.cache import Cache
from roserag_jax.workdir import Workdir


def test_cache_gives_what_another_retriever_found(tmp_path):
    cache = {"Who made it?": [{"id": "1", "contents": '"It"\nAda made it.', "score": 2.0}, {"title": "B", "text": "b"}]}
    config = options.defaults()
    config.workdir = str(tmp_path / "work")
    config.data.eval = write(tmp_path / "q.jsonl", {"id": "1", "question": "Who made it?", "golden_answers": ["Ada"]})
    config.retrieve.retriever, config.retrieve.k = "cache", 1
    config.retrieve.cache = write(tmp_path / "retrieval_cache.json", cache)
    work = Workdir(config.workdir)
    retrieve.make(config, work, ("eval",))
    assert work.rows("retrieved_eval.jsonl")[0]["contexts"] == [{"title": "It", "text": "Ada made it.", "score": 2.0}]
    with pytest.raises(UserError, match=r"nothing for 1 of 2 questions.*'Why\?'"):
        Cache(config.retrieve.cache).search(["Who made it?", "Why?"], 1)
    with pytest.raises(UserError, match="question 'id': not a list of passages, as a retrieval_cache.json"):
        Cache(config.data.eval)
    folder = tmp_path / "caches"
    folder.mkdir()
    with pytest.raises(UserError, match="a folder without .json files"):
        Cache(str(folder))
    (folder / "train.json.gz").write_bytes(gzip.compress(json.dumps(cache).encode()))
    write(folder / "eval.json", {"Why?": [{"title": None, "text": "c"}]})
    assert [[c["text"] for c in found] for found in Cache(str(folder)).search(["Why?", "Who made it?"], 2)] == [
        ["c"],
        ["Ada made it.", "b"],
    ]


@pytest.mark.parametrize(
    "passage",
    [
        {"title": "T", "text": ["a", "list"]},
        {"title": "T", "text": 7},
        {"title": ["T"], "text": "t"},
        {"contents": {"a": 1}},
        {"contents": None},
        {"text": "t", "score": "high"},
        "text",
        None,
        7,
    ],
)
def test_cache_with_other_than_text_names_file_and_question(passage, tmp_path):
    file = write(tmp_path / "cache.json", {"Who?": [{"text": "fine"}], "Why?": [{"text": "fine"}, passage]})
    with pytest.raises(UserError, match=r"cache\.json, question 'Why\?'"):
        Cache(file)


def test_cache_of_decomposed_questions(tmp_path):
    """Questions are the same composed or decomposed, and whatever the white space."""
    stored = unicodedata.normalize("NFD", "Où est  München?")
    cache = Cache(write(tmp_path / "cache.json", {stored: [{"text": "Là."}]}))
    assert cache.search(["Où est München? "], 1)[0][0]["text"] == "Là."
