"""The retrievers that are named by options: what each finds, what a run keeps of it, and what is kept on disk."""

import socket
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from conftest import run_command, start_command, write_lines
from support.retrieval import word_pieces

from roserag_jax import inputs, options, retrieve
from roserag_jax.errors import UserError
from roserag_jax.retrieval import indexing
from roserag_jax.retrieval.batches import local_mesh
from roserag_jax.retrieval.colbert import ColBERT
from roserag_jax.retrieval.combined import Fusion, Reranker
from roserag_jax.retrieval.registry import RETRIEVERS
from roserag_jax.workdir import Workdir

WORDS = [piece for piece in word_pieces() if len(piece) == 3]


def passages(count=40):
    rng = np.random.default_rng(0)
    return [{"id": str(i), "title": f"{WORDS[i]}", "text": " ".join(rng.choice(WORDS, 12))} for i in range(count)]


QUERIES = ["ban kon der fan", "mut gis"]


@pytest.fixture(scope="module")
def config(colbert_folder, bert_folder, tmp_path_factory):
    home = tmp_path_factory.mktemp("registry")
    config = options.defaults()
    config.retrieve.corpus = write_lines(home / "c.jsonl", *passages())
    config.retrieve.colbert, config.retrieve.dense = str(colbert_folder[0]), str(bert_folder()[0])
    config.retrieve.k, config.retrieve.candidates, config.prompt.passages = 5, 20, 5
    config.index, config.workdir = str(home / "index"), str(home / "work")
    return config


def texts(found):
    return [[c["text"] for c in contexts] for contexts in found]


def test_colbert_retriever_orders_all_passages_by_maxsim(config):
    found = RETRIEVERS["colbert"].build(config).search(QUERIES, 5)
    colbert = ColBERT(Path(config.retrieve.colbert), local_mesh())
    vectors = colbert.encode_passages(passages())
    for query, contexts in zip(colbert.encode_queries(QUERIES), found, strict=True):
        scores = np.array([(query @ v.T).max(1).sum() for v in vectors])
        assert [c["text"] for c in contexts] == [passages()[i]["text"] for i in np.argsort(-scores)[:5]]
        np.testing.assert_allclose([c["score"] for c in contexts], np.sort(scores)[::-1][:5], rtol=1e-3)


def test_reranker_orders_what_the_first_finds(config):
    first = RETRIEVERS["bm25"].build(config)
    everything = RETRIEVERS["colbert"].build(config).search(QUERIES, 40)
    found = RETRIEVERS["rerank"].build(config).search([*QUERIES, "nothing"], 5)
    for candidates, ranked, contexts in zip(first.search(QUERIES, 20), everything, found, strict=False):
        known = {c["text"] for c in candidates}
        assert [c["text"] for c in contexts] == [c["text"] for c in ranked if c["text"] in known][:5]
    assert found[2] == []
    scored = {c["text"]: c["score"] for c in everything[0]}
    assert found[0][0]["score"] == pytest.approx(scored[found[0][0]["text"]], rel=1e-3)
    config = _without(config, "candidates")
    assert isinstance(reranker := RETRIEVERS["rerank"].build(config), Reranker) and reranker.candidates == 30
    config.retrieve.fused = ("bm25", "rerank")
    assert RETRIEVERS["hybrid"].build(config).candidates == 100


def test_reranker_encodes_each_passage_once_within_its_memory(config, monkeypatch):
    reranker, encoded = RETRIEVERS["rerank"].build(config), []
    fresh = [RETRIEVERS["rerank"].build(config).search([query], 5)[0] for query in QUERIES]
    encode = reranker.colbert.encode_passages
    counting = lambda new: (new := list(new), encoded.extend(p["text"] for p in new), encode(new))[2]
    monkeypatch.setattr(reranker.colbert, "encode_passages", counting)
    first = reranker.search(QUERIES, 5)
    once = len(encoded)
    assert [*texts(first)] == [*texts(fresh)] and once == len(set(encoded)) < 2 * 20
    assert reranker.search(QUERIES, 5) == first and len(encoded) == once
    size = sum(vectors.nbytes for vectors in reranker._vectors.values())
    monkeypatch.setattr("roserag_jax.retrieval.combined._KEPT_BYTES", size // 4)
    for query in QUERIES * 2:
        assert texts(reranker.search([query], 5)) == [texts(first)[QUERIES.index(query)]]
        assert sum(vectors.nbytes for vectors in reranker._vectors.values()) <= size // 4
    assert once < len(encoded) < 4 * once
    with ThreadPoolExecutor(8) as pool:  # as of a server
        found = list(pool.map(lambda i: texts(reranker.search([QUERIES[i % 2]], 5))[0], range(32)))
    assert found == texts(first) * 16


def test_fusion_adds_reciprocal_ranks(config):
    class Fixed:
        def __init__(self, *titles):
            self.found = [{"title": t, "text": t, "score": 9.0} for t in titles]

        def search(self, queries, k):
            return [self.found[:k] for _ in queries]

    found = Fusion([Fixed("a", "b", "c"), Fixed("c", "b", "b", "d")], 10).search(["?"], 3)[0]
    assert [c["title"] for c in found] == ["c", "b", "a"]
    assert [c["score"] for c in found] == pytest.approx([1 / 63 + 1 / 61, 1 / 62 + 1 / 62, 1 / 61])
    config = config.copy_and_resolve_references()
    config.retrieve.retriever, config.retrieve.fused = "hybrid", ("bm25", "dense")
    options.validate(_without(config, "colbert"), model=False)
    both = [RETRIEVERS[name].build(config).search(QUERIES, 20) for name in ("bm25", "dense")]
    fused = RETRIEVERS["hybrid"].build(config).search(QUERIES, 5)
    for words, vectors, contexts in zip(*both, fused, strict=True):
        rank = lambda found, text: next((1 / (61 + i) for i, c in enumerate(found) if c["text"] == text), 0)
        assert [c["score"] for c in contexts] == pytest.approx(
            [rank(words, c["text"]) + rank(vectors, c["text"]) for c in contexts]
        )


def _without(config, *names):
    config = config.copy_and_resolve_references()
    for name in names:
        config.retrieve[name] = options.defaults().retrieve[name]
    return config


def test_retrieve_with_vectors_is_made_again_where_the_encoder_changes(config, bert_folder, capsys):
    config = _without(config, "colbert", "candidates")
    config.retrieve.retriever = "dense"
    config.data.eval = write_lines(
        Path(config.workdir).parent / "q.jsonl",
        *({"id": q, "question": q, "golden_answers": ["x"]} for q in QUERIES),
    )
    work = Workdir(config.workdir)
    options.validate(config, model=False)
    retrieve.make(config, work, ("eval",))
    rows = work.rows("retrieved_eval.jsonl")
    assert texts([row["contexts"] for row in rows]) == texts(RETRIEVERS["dense"].build(config).search(QUERIES, 5))
    retrieve.make(config, work, ("eval",))
    assert "is up to date: kept" in capsys.readouterr().out
    config.retrieve.dense = str(bert_folder(hidden_act="gelu_new")[0])
    retrieve.make(config, work, ("eval",))
    assert "retrieved_eval.jsonl is out of date (config.retrieve.dense was" in capsys.readouterr().out
    assert work.rows("retrieved_eval.jsonl") != rows
    config.retrieve.dense = str(work.path)
    with pytest.raises(UserError, match="has no model.safetensors"):
        retrieve.make(config, work, ("eval",))


def test_retrieve_needs_no_model(config, tmp_path):
    config = _without(config, "colbert", "dense", "candidates")
    config.retrieve.retriever, config.workdir, config.model = "bm25", str(tmp_path), ""
    rows = [{"id": query, "question": query, "golden_answers": ["x"]} for query in QUERIES]
    config.data.train = config.data.eval = write_lines(tmp_path / "q.jsonl", *rows)
    result = run_command("retrieve", config)
    assert result.returncode == 0, result.stderr
    found = [row["contexts"] for row in Workdir(config.workdir).rows("retrieved.jsonl")]
    assert texts(found) == texts(RETRIEVERS["bm25"].build(config).search(QUERIES, 5))


@pytest.mark.slow
def test_index_command_builds_vectors(config):
    config = _without(config, "dense", "candidates")
    config.retrieve.retriever, config.retrieve.bits, config.index = "colbert", 2, f"{config.index}-2"
    config.workdir = config.workdir + "-2"
    result = run_command("index", config)
    assert result.returncode == 0, result.stderr
    assert "40 passages" in result.stdout and "2bit: " in result.stdout and "clustering" in result.stdout
    again = run_command("index", config)
    assert again.returncode == 0 and "clustering" not in again.stdout and "2bit: " in again.stdout
    found = RETRIEVERS["colbert"].build(config).search(QUERIES, 5)
    assert all(len(contexts) == 5 for contexts in found)


def test_documents_are_cut_by_tokens_of_the_encoder(config, tmp_path):
    config = _without(config, "dense", "candidates")
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs/a.txt").write_text("bankon " * 100)  # two word pieces each
    config.retrieve.corpus, config.index = str(tmp_path / "docs"), ""
    count = lambda: sorted(len(p["text"].split()) for p in indexing.open_corpus(config).passages())
    config.retrieve.chunk_size = 20
    assert count() == [20, 20, 20, 40]
    before = inputs.corpus_recipe(config)
    config.retrieve.chunk_unit = "tokens"
    assert count() == [10] * 8 + [20]
    assert inputs.corpus_recipe(config) != before
    config.retrieve.colbert = ""
    with pytest.raises(UserError, match="chunk_unit='tokens': needs a tokenizer"):
        options.validate(config, model=False)


@pytest.mark.processes
def test_two_processes_build_the_vectors_of_one(config, tmp_path):
    """Killed and started again, two processes write the files of a single one, byte for byte."""
    config = _without(config, "dense", "candidates")
    rng = np.random.default_rng(0)
    rows = [{"id": str(i), "title": "", "text": " ".join(rng.choice(WORDS, rng.integers(1, 5)))} for i in range(9000)]
    config.retrieve.corpus = write_lines(tmp_path / "c.jsonl", *rows)
    config.retrieve.retriever, config.retrieve.bits = "colbert", 2

    def two(name):
        config.index = str(tmp_path / name)
        with socket.socket() as free:
            free.bind(("localhost", 0))
            address = f"localhost:{free.getsockname()[1]}"
        return [start_command("index", config, f"--config.distributed={address},2,{i}") for i in range(2)]

    config.index = str(tmp_path / "one")
    result = run_command("index", config)
    assert result.returncode == 0, result.stderr
    runs, deadline = two("two"), time.monotonic() + 200
    while not list((tmp_path / "two").glob("colbert-*/shard-*.json")) and time.monotonic() < deadline:
        time.sleep(0.01)
    for run in runs:
        run.kill()
        run.communicate()
    (made,) = (tmp_path / "two").glob("colbert-*")
    assert 1 <= len(list(made.glob("shard-*.json"))) < 9 and not (made / "manifest.json").exists()
    ends = [(run.communicate(timeout=200)[0], run.returncode) for run in two("two")]
    assert [status for _, status in ends] == [0, 0], ends
    (alone,) = (tmp_path / "one").glob("colbert-*")
    names = sorted(file.name for file in alone.iterdir())
    assert sorted(file.name for file in made.iterdir()) == names and len(names) == 9 * 5 + 5  # of nine slices
    assert [name for name in names if (made / name).read_bytes() != (alone / name).read_bytes()] == []
