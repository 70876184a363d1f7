"""ColBERT's vectors, scores and order equal torch's, in both layouts of a checkpoint."""

import json
import string
from concurrent.futures import ThreadPoolExecutor

import jax.numpy as jnp
import numpy as np
import pytest
from conftest import copy_folder
from support.retrieval import word_pieces

from roserag_jax.errors import UserError
from roserag_jax.retrieval.batches import local_mesh
from roserag_jax.retrieval.colbert import ColBERT, maxsim, pad, read_settings

PASSAGES = [
    {"title": "Ban kon", "text": "mut, der fan. gis!"},
    {"title": "", "text": "lon " * 60},
    {"title": "Kit", "text": "bankon derfan mos - gan (lit)"},
    {"title": "Gor", "text": "?!"},
    *({"title": f"den{i}", "text": "fas mir " * i + "kot"} for i in range(1, 9)),
]
QUERIES = ["ban kon?", "who is derfan of the mos " * 4, "kot"]


def torch_vectors(model, projection, ids, attention, kept):
    """The formula on torch: BERT, projection, kept ones, length 1."""
    import torch

    with torch.no_grad():
        hidden = model(torch.tensor([ids]), attention_mask=torch.tensor([attention])).last_hidden_state[0]
        vectors = torch.nn.functional.normalize(hidden @ torch.tensor(projection).T, p=2, dim=-1)
    return vectors.numpy()[np.array(kept, bool)]


@pytest.fixture(scope="module")
def oracle(colbert_folder):
    """Query and passage vectors by the description in the paper, tokenized by a plain BERT tokenizer."""
    import transformers

    folder, model, projection = colbert_folder
    tokenizer = transformers.BertTokenizerFast.from_pretrained(folder)
    id_of = {piece: i for i, piece in enumerate(word_pieces())}

    def query(text):
        ids = tokenizer(text, truncation=True, max_length=15)["input_ids"]
        ids = [ids[0], id_of["[unused0]"], *ids[1:]]
        attention = [1] * len(ids) + [0] * (16 - len(ids))
        return torch_vectors(model, projection, ids + [id_of["[MASK]"]] * (16 - len(ids)), attention, [1] * 16)

    def passage(p):
        text = f"{p['title']} | {p['text']}" if p["title"] else p["text"]
        ids = tokenizer(text, truncation=True, max_length=39)["input_ids"]
        ids = [ids[0], id_of["[unused1]"], *ids[1:]]
        kept = [i not in {id_of[sign] for sign in string.punctuation} for i in ids]
        return torch_vectors(model, projection, ids, [1] * len(ids), kept)

    return np.stack([query(text) for text in QUERIES]), [passage(p) for p in PASSAGES]


def test_colbert_equals_torch(colbert_folder, oracle):
    queries, passages = oracle
    colbert = ColBERT(colbert_folder[0], local_mesh())
    np.testing.assert_allclose(colbert.encode_queries(QUERIES), queries, atol=1e-4)
    found = colbert.encode_passages(PASSAGES)
    assert [len(vectors) for vectors in found] == [len(vectors) for vectors in passages]
    np.testing.assert_allclose(np.concatenate(found), np.concatenate(passages), atol=1e-4)
    expected = np.array([[(q @ p.T).max(1).sum() for p in passages] for q in queries])
    padded, lengths = pad(found)
    scores = maxsim(jnp.asarray(queries), jnp.asarray(padded), jnp.arange(padded.shape[1]) < lengths[:, None])
    np.testing.assert_allclose(scores, expected, atol=1e-4)
    assert (np.argsort(-np.asarray(scores)) == np.argsort(-expected)).all()


def test_colbert_reads_the_layout_without_prefix(colbert_folder, bert_folder, one_device, tmp_path):
    from safetensors.numpy import save_file

    folder = copy_folder(bert_folder()[0], tmp_path / "other")
    (folder / "1_Dense").mkdir()
    save_file({"linear.weight": colbert_folder[2]}, folder / "1_Dense/model.safetensors")
    settings = {"query_prefix": "[unused0]", "document_prefix": "[unused1] ", "query_length": 16, "document_length": 40}
    (folder / "config_sentence_transformers.json").write_text(json.dumps(settings))
    one, other = ColBERT(colbert_folder[0], one_device), ColBERT(folder, one_device)
    np.testing.assert_array_equal(one.encode_queries(QUERIES), other.encode_queries(QUERIES))
    for a, b in zip(one.encode_passages(PASSAGES), other.encode_passages(PASSAGES), strict=True):
        np.testing.assert_array_equal(a, b)


def test_colbert_compiles_few_programs(colbert_folder, one_device):
    colbert = ColBERT(colbert_folder[0], one_device)
    passages = [{"title": "", "text": "ban " * n} for n in range(1, 60)]
    vectors = colbert.encode_passages(passages)
    assert [len(v) for v in vectors] == [min(n + 3, 40) for n in range(1, 60)]
    assert colbert.encoder._run._cache_size() <= 3  # lengths 16, 32 and 48
    assert colbert.encode_queries([]).shape == (0, 16, 24) and colbert.encode_passages([]) == []


def test_colbert_names_what_is_wrong(colbert_folder, bert_folder, one_device, tmp_path):
    with pytest.raises(UserError, match=r"is not a ColBERT checkpoint: it has no linear\.weight"):
        ColBERT(bert_folder()[0], one_device)
    folder = copy_folder(colbert_folder[0], tmp_path / "a")
    for settings, message in (
        ({"query_token_id": "[Q]"}, r"has no token '\[Q\]'"),
        ({"query_maxlen": 200}, "200 word pieces of a query, but 96 positions"),
        ({"similarity": "l2"}, "similarity 'l2' is not implemented"),
        ({"doc_maxlen": "many"}, "doc_maxlen='many' is not a whole number"),
    ):
        (folder / "artifact.metadata").write_text(json.dumps(settings))
        with pytest.raises(UserError, match=message):
            ColBERT(folder, one_device)
    (folder / "artifact.metadata").unlink()
    assert read_settings(folder) == ("[unused0]", "[unused1]", 32, 180, True, False)


def test_queries_and_passages_are_cut_to_their_own_length_in_threads(colbert_folder):
    """As a server's: a tokenizer keeps the length of its last call."""
    colbert, text = ColBERT(colbert_folder[0], local_mesh()), "lon " * 60
    cut = lambda length: len(colbert._tokenize([text] * 20, length, colbert.query_marker)[-1])
    with ThreadPoolExecutor(8) as pool:
        lengths = list(pool.map(cut, [16, 40, 16, 32] * 100))
    assert lengths == [16, 40, 16, 32] * 100
