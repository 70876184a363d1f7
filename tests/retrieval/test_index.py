"""The index on disk: it finds what the one in memory finds, changes with its corpus, resumes, and shows damage."""

import itertools
import json
import math
import os
import random
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from conftest import write_lines
from etils import epath

from roserag_jax import options
from roserag_jax.errors import UserError
from roserag_jax.rag.corpora import Chunking, Corpus, read_corpus
from roserag_jax.rag.files import read_rows
from roserag_jax.retrieval import index as index_module
from roserag_jax.retrieval import indexing
from roserag_jax.retrieval.bm25 import BM25
from roserag_jax.retrieval.index import Index, disk_size

DATA = Path(__file__).parents[3] / "shared/data"
WORDS = [f"{a}{b}{c}" for a in "bdfgklm" for b in "aeiou" for c in "nrst"]


def rows_of(count: int, seed: int = 0) -> list[dict]:
    rng = random.Random(seed)
    draw = lambda n: " ".join(WORDS[int(rng.paretovariate(0.6)) % len(WORDS)] for _ in range(n))
    return [{"id": f"{seed}-{i}", "contents": f'"{draw(2)}"\n{draw(rng.randrange(3, 40))}'} for i in range(count)]


def built(folder: Path, corpus: str, **chunking) -> Index:
    indexing.update(folder, Corpus(corpus, Chunking(**chunking)))
    return Index(folder)


def test_index_ranks_by_bm25(tmp_path):
    """Against the formula itself: Lucene's, whose lengths are kept in one byte."""
    rows = rows_of(300)
    index = built(tmp_path / "index", write_lines(tmp_path / "c.jsonl", *rows))
    passages = [dict(p) for p in index.passages]
    assert [p["id"] for p in passages] == [row["id"] for row in rows] and len(index) == 300
    docs = [f"{p['title']} {p['text']}".split() for p in passages]
    mean = sum(map(len, docs)) / len(docs)

    def score(terms, doc):
        holding = {t: sum(t in d for d in docs) for t in terms}
        idf = lambda t: math.log(1 + (len(docs) - holding[t] + 0.5) / (holding[t] + 0.5))
        tf = lambda t: doc.count(t) * 2.2 / (doc.count(t) + 1.2 * (0.25 + 0.75 * len(doc) / mean))
        return sum(idf(t) * tf(t) for t in terms if t in doc)

    for query in ("ban kon", "mut der fan", "gis"):
        found = index.search([query], 5)[0]
        expected = sorted((score(query.split(), doc) for doc in docs), reverse=True)[: len(found)]
        assert [c["score"] for c in found] == pytest.approx([e for e in expected if e > 0], rel=0.02)
        assert all(set(query.split()) & set(f"{c['title']} {c['text']}".split()) for c in found)


def test_index_finds_what_bm25_in_memory_finds(tmp_path):
    home = DATA / "hotpotqa"
    if not home.exists():
        pytest.skip("no folder of real rows beside the checkout")
    rows = list(read_rows(epath.Path(home / "eval.jsonl.gz")))
    contexts = {(c["title"], c["text"]) for _, row in rows for c in row["contexts"]}
    rows = [row for _, row in rows][:100]
    corpus = write_lines(tmp_path / "c.jsonl", *({"title": a, "text": b} for a, b in sorted(contexts)))
    found = built(tmp_path / "index", corpus).search([row["question"] for row in rows], 10)
    memory = BM25(read_corpus(corpus)).search([row["question"] for row in rows], 10)

    assert found == memory
    gold = [{c["title"] for c in row["contexts"] if c["is_supporting"]} for row in rows]
    held = [len(g & {c["title"] for c in f}) / len(g) for g, f in zip(gold, found, strict=True)]
    assert sum(held) / len(rows) > 0.6
    assert all(len(contexts) == 10 for contexts in found)


def test_index_finds_nothing_where_no_word_is_shared(tmp_path):
    rows = [{"contents": "Moss is green."}, {"contents": "燕鸥博物馆由伦德女士于1901年创办，位于下谷镇。"}]
    index = built(tmp_path / "index", write_lines(tmp_path / "c.jsonl", *rows))
    nothing, empty, museum, moss = index.search(["Peat?", "?!", "燕鸥博物馆由谁创办？", "MOSS " * 5000], 5)
    assert nothing == empty == [] and museum[0]["text"] == rows[1]["contents"] and len(museum) == len(moss) == 1
    assert museum[0]["score"] > 0 and set(museum[0]) == {"title", "text", "score"}


def test_equal_scores_keep_the_order_of_the_corpus(tmp_path):
    rows = [{"id": i, "contents": f"t{i:03d}\nMoss is green."} for i in range(200)]
    index = built(tmp_path / "index", write_lines(tmp_path / "c.jsonl", *rows))
    assert [c["title"] for c in index.search(["moss"], 7)[0]] == [f"t{i:03d}" for i in range(7)]


def test_update_indexes_what_changed_and_nothing_else(tmp_path, capsys, monkeypatch):
    """Rows added, changed, removed and moved give the passages and the scores of an index built anew."""
    corpus, first = tmp_path / "c.jsonl", rows_of(60)
    built(tmp_path / "index", write_lines(corpus, *first))
    changed = [*first[:20], {**first[20], "contents": "New words: ban kon"}, *first[25:], *rows_of(15, 1)]
    random.Random(0).shuffle(changed)
    indexed = []
    document = indexing._Changes.document
    monkeypatch.setattr(
        indexing._Changes, "document", lambda self, passage: indexed.append(passage["id"]) or document(self, passage)
    )
    index = built(tmp_path / "index", write_lines(corpus, *changed))
    assert sorted(indexed) == sorted(["0-20", *(f"1-{i}" for i in range(15))])
    assert "16 passages added, 5 documents or rows removed" in capsys.readouterr().out
    fresh = built(tmp_path / "fresh", str(corpus))
    assert sorted(p["id"] for p in index.passages) == sorted(p["id"] for p in fresh.passages)
    assert index.content == fresh.content
    for one, other in zip(*(i.search(["ban kon", "mut der"], 100) for i in (index, fresh)), strict=True):
        assert {c["text"] for c in one} == {c["text"] for c in other}
    indexed.clear()
    os.utime(corpus, (0, 0))
    assert built(tmp_path / "index", str(corpus)).content == fresh.content and not indexed


def test_update_of_a_folder_reads_changed_documents_only(tmp_path, monkeypatch):
    from roserag_jax.rag import documents

    docs = tmp_path / "docs"
    docs.mkdir()
    for name in "abc":
        (docs / f"{name}.md").write_text(f"# Part {name}\n\nMoss {name} is green.\n\n" + "peat " * 300)
    index = built(tmp_path / "index", str(docs), size=100, title="heading")
    assert index.search(["moss b"], 1)[0][0]["title"] == "b: Part b"
    assert index.search(["moss b"], 1)[0][0]["source"] == {"file": "b.md", "heading": "Part b"}
    read, original = [], documents.read
    monkeypatch.setattr(documents, "read", lambda file: read.append(file.name) or original(file))
    (docs / "b.md").write_text("Fern is brown.")
    (docs / "c.md").unlink()
    (docs / "d.TXT").write_text("Kelp is brown.")
    index = built(tmp_path / "index", str(docs), size=100, title="heading")
    assert sorted(read) == ["b.md", "d.TXT"]
    assert sorted({p["source"]["file"] for p in index.passages}) == ["a.md", "b.md", "d.TXT"]
    assert not any(c["source"]["file"] == "c.md" for c in index.search(["moss peat"], 99)[0])
    read.clear()
    index = built(tmp_path / "index", str(docs), size=50, title="heading")  # is built anew
    assert sorted(read) == ["a.md", "b.md", "d.TXT"] and len(index) > 5


def test_a_stopped_build_resumes(tmp_path, monkeypatch):
    corpus = write_lines(tmp_path / "c.jsonl", *rows_of(50))
    monkeypatch.setattr(indexing._Changes, "is_time_to_commit", lambda self: self.added % 10 == 0)
    document, indexed = indexing._Changes.document, []

    def stopping(self, passage):
        if len(indexed) == 30:
            raise KeyboardInterrupt
        indexed.append(passage["id"])
        return document(self, passage)

    monkeypatch.setattr(indexing._Changes, "document", stopping)
    with pytest.raises(KeyboardInterrupt):
        built(tmp_path / "index", corpus)
    with pytest.raises(UserError, match="is not finished"):
        Index(tmp_path / "index")
    monkeypatch.setattr(indexing._Changes, "document", lambda s, p: indexed.append(p["id"]) or document(s, p))
    index = built(tmp_path / "index", corpus)
    assert indexed == [f"0-{i}" for i in range(50)] and [p["id"] for p in index.passages] == indexed


def test_a_killed_build_resumes(tmp_path):
    corpus = write_lines(tmp_path / "c.jsonl", *rows_of(3000))
    code = (
        "import sys, os\nfrom pathlib import Path\nfrom roserag_jax.retrieval import indexing\n"
        "from roserag_jax.rag.corpora import Corpus\n"
        "indexing._Changes.is_time_to_commit = lambda self: self.added % 500 == 0\n"
        "original = indexing._Changes.document\n"
        "def document(self, passage):\n"
        "    if self.added == 2000: os.kill(os.getpid(), 9)\n"
        "    return original(self, passage)\n"
        "indexing._Changes.document = document\n"
        "indexing.update(Path(sys.argv[1]), Corpus(sys.argv[2]))\n"
    )
    ended = subprocess.run([sys.executable, "-c", code, str(tmp_path / "index"), corpus], timeout=120)
    assert ended.returncode == -9
    index = built(tmp_path / "index", corpus)
    assert sorted(p["id"] for p in index.passages) == sorted(row["id"] for row in rows_of(3000))


def test_damage_is_named(tmp_path):
    corpus = write_lines(tmp_path / "c.jsonl", *rows_of(20))
    folder = tmp_path / "index"
    built(folder, corpus)
    manifest = json.loads((folder / "manifest.json").read_text())
    assert set(manifest["files"]) >= {"numbers.npy", "meta.json"}
    largest = max(manifest["files"], key=lambda name: manifest["files"][name][0])

    def damaged(name, change):
        copy = tmp_path / "copy"
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(folder, copy)
        change(copy / name)
        return copy

    for name in manifest["files"]:
        with pytest.raises(UserError, match="delete the folder"):
            Index(damaged(name, lambda file: file.write_bytes(file.read_bytes()[:-1])))
        with pytest.raises(UserError, match="is missing"):
            Index(damaged(name, lambda file: file.unlink()))
    flip = lambda file: file.write_bytes(bytes([file.read_bytes()[0] ^ 1]) + file.read_bytes()[1:])
    with pytest.raises(UserError, match="is damaged"):
        indexing.update(damaged(largest, flip), Corpus(corpus), verify=True)
    for text in ("", "{", "[]", "{}", "[" * 100_000):
        with pytest.raises(UserError, match=r"manifest\.json is damaged"):
            Index(damaged("manifest.json", lambda file, text=text: file.write_text(text)))


def test_damage_of_an_unfinished_build_is_named(tmp_path):
    """Emptied by a crash, it would else stop every later run without a word of what to do."""
    corpus, folder = Corpus(write_lines(tmp_path / "c.jsonl", {"contents": "moss"})), tmp_path / "index"
    indexing.update(folder, corpus)
    (folder / "manifest.json").rename(folder / ".building.json")
    assert len(indexing.update(folder, corpus)) == 1
    (folder / "manifest.json").unlink()
    (folder / ".building.json").write_text("")
    with pytest.raises(
        UserError, match=r"building\.json is damaged .*: delete the folder to have the index built anew"
    ):
        indexing.update(folder, corpus)


def test_an_index_that_cannot_be_written_is_searched(tmp_path):
    """On a read-only disk, or another user's: all its files are as readable as others, and none is written."""
    folder, corpus = tmp_path / "index", write_lines(tmp_path / "c.jsonl", {"contents": "Moss is green."})
    built(folder, corpus)
    (tmp_path / "other").touch()
    assert {file.stat().st_mode for file in folder.iterdir()} == {(tmp_path / "other").stat().st_mode}
    (folder / ".tantivy-meta.lock").unlink()
    (folder / ".tantivy-meta.lock").mkdir()  # cannot be opened, not by root either
    assert [c["text"] for c in Index(folder).search(["moss"], 3)[0]] == ["Moss is green."]
    assert [dict(p)["text"] for p in Index(folder).passages] == ["Moss is green."]


def test_folders_that_are_something_else_are_left_alone(tmp_path):
    corpus = write_lines(tmp_path / "c.jsonl", *rows_of(5))
    other = write_lines(tmp_path / "other.jsonl", *rows_of(5, 1))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("x")
    with pytest.raises(UserError, match="not empty and not an index"):
        built(tmp_path / "mine", corpus)
    assert [f.name for f in (tmp_path / "mine").iterdir()] == ["thesis.txt"]
    built(tmp_path / "index", corpus)
    with pytest.raises(UserError, match=r"is the index of .*c\.jsonl, not of .*other\.jsonl"):
        built(tmp_path / "index", other)
    shutil.move(corpus, tmp_path / "moved.jsonl")
    assert len(built(tmp_path / "index", str(tmp_path / "moved.jsonl"))) == 5
    with pytest.raises(UserError, match="is not an index"):
        Index(tmp_path / "none")


def test_open_index_keeps_one_in_the_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    config = options.defaults()
    config.retrieve.corpus = write_lines(tmp_path / "c.jsonl", *rows_of(5))
    assert len(indexing.open_index(config)) == 5
    (folder,) = (tmp_path / "cache" / "roserag_jax" / "indexes").iterdir()
    monkeypatch.setattr(Corpus, "units", lambda self: pytest.fail("the corpus is read again"))
    assert len(indexing.open_index(config)) == 5
    config.index, config.retrieve.corpus = str(folder), ""  # without its corpus, on another machine say
    assert len(indexing.open_index(config)) == 5
    monkeypatch.setattr(index_module, "VERSION", 0)
    with pytest.raises(UserError, match="another version"):
        indexing.open_index(config)


def test_disk_size_while_files_come_and_go(tmp_path):
    """As the library's temporary files do while another run writes the index."""
    (tmp_path / "kept").write_bytes(b"12345")
    done = threading.Event()

    def write():
        for i in itertools.takewhile(lambda _: not done.is_set(), itertools.count()):
            files = [tmp_path / f".tmp{i}-{j}" for j in range(8)]
            for file in files:
                file.touch()
            for file in files:
                file.unlink()

    writer = threading.Thread(target=write)
    writer.start()
    try:
        sizes = {disk_size(tmp_path) for _ in range(2000)}
    finally:
        done.set()
        writer.join()
    assert sizes == {5}


def test_two_runs_build_one_index_at_once(tmp_path):
    """The second waits for the first and then has nothing to do; both open it."""
    corpus = write_lines(tmp_path / "c.jsonl", *rows_of(4000))
    code = (
        "import sys, time\nfrom pathlib import Path\nfrom roserag_jax.retrieval import indexing\n"
        "from roserag_jax.rag.corpora import Corpus\n"
        "time.sleep(max(0, float(sys.argv[3]) - time.time()))\n"
        "indexing._Changes.is_time_to_commit = lambda self: self.added % 200 == 0 and not self.report(True)\n"
        "print(len(indexing.update(Path(sys.argv[1]), Corpus(sys.argv[2]))))\n"
    )
    line = [sys.executable, "-c", code, str(tmp_path / "index"), corpus, str(time.time() + 4)]
    runs = [subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(3)]
    ends = [(*run.communicate(timeout=120), run.returncode) for run in runs]
    assert [(out.splitlines()[-1], status) for out, _, status in ends] == [("4000", 0)] * 3, ends
    assert sum("passages added" in out for out, _, _ in ends) == 1
    assert sum("is in use by another run" in errors for _, errors, _ in ends) >= 1


def test_an_unfinished_index_is_named_as_such(tmp_path):
    corpus = write_lines(tmp_path / "c.jsonl", *rows_of(5))
    built(tmp_path / "index", corpus)
    indexing._begin(tmp_path / "index", Corpus(corpus), None)
    with pytest.raises(UserError, match="is not finished"):
        Index(tmp_path / "index")
    assert len(built(tmp_path / "index", corpus)) == 5


def test_an_up_to_date_index_is_opened_beside_a_run_that_holds_it(tmp_path):
    """Vectors are encoded for hours: who searches by words meanwhile does not wait."""
    corpus = write_lines(tmp_path / "c.jsonl", *rows_of(5))
    built(tmp_path / "index", corpus)
    with indexing.locked(tmp_path / "index", shared=True):
        assert len(built(tmp_path / "index", corpus)) == 5


def test_a_document_that_goes_while_the_folder_is_read(tmp_path, monkeypatch):
    from roserag_jax.rag import documents

    for name in "ab":
        (tmp_path / f"{name}.md").write_text(f"Moss {name}.")
    found = documents.find
    monkeypatch.setattr(documents, "find", lambda folder: (found(folder), (folder / "b.md").unlink(True))[0])
    index = built(tmp_path.parent / f"{tmp_path.name}-index", str(tmp_path))
    assert [p["text"] for p in index.passages] == ["Moss a."]
