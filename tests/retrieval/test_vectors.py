"""Vectors on disk: exact search equals the formula on any number of devices, compressed search comes near it."""

import json
import zlib

import jax
import numpy as np
import pytest
from conftest import copy_folder, write_lines
from support.retrieval import word_pieces

from roserag_jax import options
from roserag_jax.distributed.mesh import make_mesh
from roserag_jax.errors import UserError
from roserag_jax.rag.corpora import Corpus
from roserag_jax.retrieval import codec, indexing, vector_indexing
from roserag_jax.retrieval.batches import local_mesh
from roserag_jax.retrieval.index import Index
from roserag_jax.retrieval.vectors import VectorRetriever, VectorStore


class Topics:
    """Stands for an encoder: vectors of words near those of their topic, of length 1, any number to a passage."""

    size = 16

    def __init__(self):
        rng, self.encoded = np.random.default_rng(0), 0
        topics = rng.normal(size=(12, self.size))
        self.words = {w: topics[i % 12] + 0.4 * rng.normal(size=self.size) for i, w in enumerate(word_pieces())}

    def vectors(self, text):
        found = np.array([self.words[word] for word in text.split()])
        # By their context too, so that no scores are equal.
        found += 0.1 * np.random.default_rng(zlib.crc32(text.encode())).normal(size=found.shape)
        return (found / np.linalg.norm(found, axis=1, keepdims=True)).astype(np.float32)

    def encode_queries(self, queries):
        return np.stack([self.vectors(query) for query in queries])

    def encode_passages(self, passages):
        self.encoded += len(passages)
        return [self.vectors(passage["text"]) for passage in passages]


WORDS = [piece for piece in word_pieces() if len(piece) == 3]
QUERIES = [" ".join(np.random.default_rng(i).choice(WORDS, 5)) for i in range(24)]


def rows_of(count, seed=0):
    rng = np.random.default_rng(seed)
    text = lambda: " ".join(rng.choice(WORDS, rng.integers(10, 32)))
    return [{"id": f"{seed}-{i}", "title": "", "text": text()} for i in range(count)]


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A function: the index of some rows and the folder of their vectors, of so many bits."""
    monkeypatch = pytest.MonkeyPatch()
    monkeypatch.setattr(vector_indexing, "SLICE", 150)
    home = tmp_path_factory.mktemp("vectors")
    corpus = write_lines(home / "c.jsonl", *rows_of(300))
    indexing.update(home / "index", Corpus(corpus))
    index, made = Index(home / "index"), {}

    def make(bits=0):
        if bits not in made:
            made[bits] = home / "index" / f"topics-{bits}"
            vector_indexing.update(made[bits], index, Topics, fingerprint="topics", bits=bits)
        return index, made[bits]

    yield make
    monkeypatch.undo()


def exact(index, queries, k):
    """Scores by the formula, in numpy, over vectors rounded to float16."""
    topics = Topics()
    passages = [topics.vectors(p["text"]).astype(np.float16).astype(np.float32) for p in index.passages]
    scores = np.array([[(q @ p.T).max(1).sum() for p in passages] for q in topics.encode_queries(queries)])
    order = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    return order, np.take_along_axis(scores, order, axis=1)


@pytest.mark.parametrize("devices", [pytest.param(1, marks=pytest.mark.slow), 8])
def test_exact_search_equals_the_formula(built, devices):
    index, folder = built()
    store = VectorStore(folder, index.passages.numbers, make_mesh(devices=jax.devices()[:devices]))
    order, scores = exact(index, QUERIES, 10)
    for _ in range(2):  # read from the disk, then from the devices
        found = store.search(Topics().encode_queries(QUERIES), 10)
        np.testing.assert_allclose([s for _, s in found], scores, atol=1e-4)
        assert [p.tolist() for p, _ in found] == order.tolist()
    assert store._resident
    store._resident = None  # as of vectors that do not fit
    again = store.search(Topics().encode_queries(QUERIES), 10)
    assert [p.tolist() for p, _ in again] == order.tolist() and store._resident is None
    more = store.search(Topics().encode_queries(QUERIES[:1]), 1000)[0]
    assert sorted(more[0]) == list(range(300))  # each once, none of the padding


@pytest.mark.slow
@pytest.mark.parametrize("bits", [1, 4])
def test_compressed_search_comes_near_the_exact_one(built, bits):
    index, folder = built(bits)
    store = VectorStore(folder, index.passages.numbers, local_mesh())
    vectors = Topics().encode_passages(index.passages)
    codes, residuals = codec.compress(store.codec, np.concatenate(vectors))
    again = np.asarray(codec.decompress(store.codec.centroids, store.codec.table, codes, residuals, True))
    error = np.linalg.norm(again - np.concatenate(vectors), axis=1).mean()
    assert error < {1: 0.4, 4: 0.1}[bits]
    assert store.codec.bits == bits and residuals.shape[1] == 16 * bits // 8
    order, _ = exact(index, QUERIES, 10)
    for probe in (0, 8, 10_000):
        found = store.search(Topics().encode_queries(QUERIES), 10, probe)
        kept = np.mean([len(set(places) & set(best)) / 10 for (places, _), best in zip(found, order, strict=True)])
        assert kept > {1: 0.6, 4: 0.9}[bits]
    everything = store.search(Topics().encode_queries(QUERIES), 10)
    for (places, scores), (others, same) in zip(everything, found, strict=True):  # all centroids are all passages
        np.testing.assert_allclose(scores, same, atol=1e-4)
        assert places.tolist() == others.tolist()


def test_update_encodes_what_is_new_and_resumes(tmp_path, monkeypatch):
    monkeypatch.setattr(vector_indexing, "SLICE", 8)
    first, corpus = rows_of(40), tmp_path / "c.jsonl"
    topics = Topics()

    def updated(rows, makes=topics, bits=0):
        indexing.update(tmp_path / "index", Corpus(write_lines(corpus, *rows)))
        index = Index(tmp_path / "index")
        folder = index.folder / f"v{bits}"
        vector_indexing.update(folder, index, lambda: makes, fingerprint="t", bits=bits)
        return index, VectorStore(folder, index.passages.numbers, local_mesh())

    class Stopping(Topics):
        def encode_passages(self, passages):
            if self.encoded >= 16:
                raise KeyboardInterrupt
            return super().encode_passages(passages)

    with pytest.raises(KeyboardInterrupt):
        updated(first, Stopping())
    updated(first)
    assert topics.encoded == 24
    updated(first)
    assert topics.encoded == 24
    rows = [*first[5:], *rows_of(7, seed=1)]
    index, store = updated(rows)
    assert topics.encoded == 31
    order, scores = exact(index, QUERIES[:3], 5)
    found = store.search(topics.encode_queries(QUERIES[:3]), 5)
    assert [p.tolist() for p, _ in found] == order.tolist()
    index, store = updated(rows_of(3, seed=2))  # most passages are gone
    assert sum(len(shard.numbers) for shard in store.shards) == 3
    retriever = VectorRetriever(index, topics, store)
    assert {c["text"] for c in retriever.search(QUERIES[:1], 9)[0]} == {p["text"] for p in index.passages}
    indexing.update(tmp_path / "index", Corpus(str(corpus)), verify=True)  # knows its own files among these


def test_a_passage_never_gets_the_vectors_of_one_that_is_gone(tmp_path):
    """The last row goes, another comes, and the first comes back: each is found by its own vectors."""
    corpus, topics = tmp_path / "c.jsonl", Topics()
    rows, other = rows_of(6), rows_of(1, seed=3)
    for step in (rows, rows[:5], [*rows[:5], *other], rows[:5], rows):
        indexing.update(tmp_path / "index", Corpus(write_lines(corpus, *step)))
        index = Index(tmp_path / "index")
        if step != rows[:5]:  # the vectors miss some updates of the index
            vector_indexing.update(index.folder / "v", index, lambda: topics, fingerprint="t")
    store = VectorStore(index.folder / "v", index.passages.numbers, local_mesh())
    order, _ = exact(index, QUERIES[:4], 6)
    assert [places.tolist() for places, _ in store.search(topics.encode_queries(QUERIES[:4]), 6)] == order.tolist()


def test_processes_share_the_passages_out(built, tmp_path):
    index, whole = built()
    for process in (1, 0):
        numbers = np.asarray(index.passages.numbers)
        vector_indexing._encode(tmp_path, index, Topics(), numbers, numbers, (process, 2))
    names = sorted(file.name for file in whole.glob("shard-*"))
    assert sorted(file.name for file in tmp_path.glob("shard-*")) == names and len(names) == 8
    assert all((tmp_path / name).read_bytes() == (whole / name).read_bytes() for name in names)


def test_vectors_of_an_index_that_changed_meanwhile_are_refused(tmp_path):
    """Its numbers may be those of other passages by now."""
    corpus, topics = tmp_path / "c.jsonl", Topics()
    before = indexing.update(tmp_path / "index", Corpus(write_lines(corpus, *rows_of(6))))
    indexing.update(tmp_path / "index", Corpus(write_lines(corpus, *rows_of(6, seed=1))))
    with pytest.raises(UserError, match="was changed by another run meanwhile"):
        vector_indexing.update(before.folder / "v", before, lambda: topics, fingerprint="t")
    assert not topics.encoded


def test_damaged_vectors_are_named(built, tmp_path):
    index, whole = built()
    folder = copy_folder(whole, tmp_path / "copy")
    update = lambda **how: vector_indexing.update(folder, index, Topics, fingerprint="topics", **how)
    file = next(folder.glob("*.vectors.npy"))
    data = file.read_bytes()
    file.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    update()
    with pytest.raises(UserError, match="vectors.npy is damaged: delete the folder"):
        update(verify=True)
    file.write_bytes(data[:-1])
    with pytest.raises(UserError, match=r"vectors.npy has \d+ bytes instead of \d+"):
        update()
    (folder / "manifest.json").write_text(json.dumps({"version": 1}))
    with pytest.raises(UserError, match="manifest.json is damaged"):
        update()


def test_options_that_a_retriever_does_not_read_are_refused():
    config = options.defaults()

    def fault(**values):
        changed = config.copy_and_resolve_references()
        changed.update_from_flattened_dict({f"retrieve.{name}": value for name, value in values.items()})
        with pytest.raises(UserError) as error:
            options.validate(changed, workdir=False, model=False)
        return str(error.value)

    assert "colbert needs it" in fault(retriever="colbert", corpus="c")
    assert "hybrid needs it" in fault(retriever="hybrid", fused=("bm25", "dense"), corpus="c")
    assert "a tuple of two or more of bm25" in fault(retriever="hybrid", fused=("bm25",))
    assert "is read with config.retrieve.retriever=colbert, dense only" in fault(retriever="bm25", corpus="c", bits=2)
    assert "needs compressed vectors" in fault(retriever="dense", corpus="c", dense="m", probe=2)
    assert "choose one of 0, 1, 2, 4" in fault(bits=3)


def test_fewer_passages_than_a_prompt_shows_are_refused_where_there_is_one():
    config = options.defaults()
    config.retrieve.retriever, config.retrieve.corpus, config.retrieve.k = "bm25", "c", 3
    options.validate(config, workdir=False, model=False)  # as the command index
    with pytest.raises(UserError, match=r"config.retrieve.k=3: is less than config.prompt.passages=10"):
        options.validate(config, model=False)
