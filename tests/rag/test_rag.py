"""The readers of questions and corpora."""

import gzip
import json

import pytest
from conftest import write_lines as write

from roserag_jax.errors import UserError
from roserag_jax.rag import corpora, documents, questions, words

ROW = {
    "id": "q1",
    "question": "Who wrote it?",
    "golden_answers": ["Ada"],
    "contexts": [{"title": f"T{i}", "text": f"Passage number {i}. " + "word " * 60} for i in range(4)],
}


def test_readers_name_the_line(tmp_path):
    file = tmp_path / "q.jsonl"
    read = lambda *lines, **kw: questions.read_questions(write(file, *lines), **kw)
    assert [row["id"] for row in read(ROW, "", {**ROW, "id": 7})] == ["q1", "7"]
    for bad, match in [
        ([ROW, "{oops"], r"line 2: not valid JSON"),
        ([ROW, "[1]"], r"line 2: not a JSON object"),
        ([ROW, ROW], r"line 2: duplicate id .q1. \(first on line 1\)"),
        ([{**ROW, "question": " "}], r"line 1 .*no question"),
        ([{**ROW, "golden_answers": []}], r"line 1 .*no answer"),
        ([{**ROW, "contexts": []}], r"line 1 .*no contexts"),
        ([{**ROW, "contexts": ["text"]}], r"line 1 .*a context must be"),
        ([""], r"holds no questions"),
    ]:
        with pytest.raises(UserError, match=match):
            read(*bad)
    with pytest.raises(UserError, match="There is no file"):
        questions.read_questions(str(tmp_path / "none.jsonl"))
    packed = tmp_path / "q.jsonl.gz"
    packed.write_bytes(gzip.compress(json.dumps(ROW).encode()))
    assert questions.read_questions(str(packed))[0]["question"] == "Who wrote it?"
    packed.write_bytes(packed.read_bytes()[:-20])
    with pytest.raises(UserError, match="cannot be read"):
        questions.read_questions(str(packed))


def test_corpora(tmp_path):
    from roserag_jax.retrieval.bm25 import BM25

    titled, bare = {"id": "1", "contents": '"Oslo"\nOslo is in Norway.'}, {"id": "2", "contents": "Bare"}
    flash = write(tmp_path / "c.jsonl", titled, bare)
    assert corpora.read_corpus(flash) == [
        {"id": "1", "title": "Oslo", "text": "Oslo is in Norway."},
        {"id": "2", "title": "", "text": "Bare"},
    ]
    folder = tmp_path / "docs" / "deep"
    folder.mkdir(parents=True)
    (folder / "moss.md").write_text("Moss is green.\n\n" + "filler " * 400)
    (folder / "skip.pdf").write_text("no")
    passages = corpora.read_corpus(str(tmp_path / "docs"))
    assert {p["title"] for p in passages} == {"moss"} and all(len(p["text"].split()) <= 240 for p in passages)
    best = BM25(passages).search(["Which colour is moss?"], 2)[0]
    assert "green" in best[0]["text"] and best[0]["score"] > best[1]["score"]
    with pytest.raises(UserError, match="None of the 1 passages has a word"):
        BM25([{"title": "", "text": "\u2026!"}])
    for bad in ("", str(tmp_path / "none"), write(tmp_path / "x.jsonl", {"id": 1})):
        with pytest.raises(UserError):
            corpora.read_corpus(bad)


def test_chunks_of_text_without_spaces():
    """A book in Chinese is many passages, cut behind sentences, with nothing lost."""
    sentence = "燕鸥博物馆由伦德女士于1901年创办，位于下谷镇。"
    made = [text for text, _ in corpora.chunks([documents.Paragraph(sentence * 60)], 120)]
    assert "".join(made) == sentence * 60
    assert all(text.endswith("。") and 60 <= len(words.words(text)) <= 240 for text in made) and len(made) > 8
    thai = "พิพิธภัณฑ์นกนางนวลก่อตั้งโดยเลดี้ลุนด์" * 60
    made = [text for text, _ in corpora.chunks([documents.Paragraph(thai)], 120)]
    assert "".join(made) == thai and all(len(words.words(text)) <= 240 for text in made)
