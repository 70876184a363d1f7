"""Damaged input files: every reader loads them right, or says in one line what is wrong."""

import copy
import gzip
import json
import random
import time

import pytest

from roserag_jax import generate
from roserag_jax.errors import UserError
from roserag_jax.preference import pairs
from roserag_jax.rag import corpora, layouts, questions
from roserag_jax.retrieval.cache import Cache
from roserag_jax.workdir import to_jsonl

FACTS = {
    "supporting_facts": [["It", 0]],
    "context": [["It", ["It is old.", " Ada made it."]], ["Other", ["Not this."]]],
}
HOTPOT = {"_id": "h", "question": "Who?", "answer": "Ada", "type": "bridge", **FACTS}
HUB = {
    "id": "h",
    "question": "Who?",
    "answer": "Ada",
    "supporting_facts": {"title": ["It"], "sent_id": [0]},
    "context": {"title": ["It"], "sentences": [["It is old.", "Ada made it."]]},
}
PASSAGE = {"title": "It", "text": "Ada made it.", "score": "1.5"}
DATE = {"number": "", "date": {"day": "3", "month": "May", "year": "1801"}, "spans": []}
LAYOUTS = {
    "hotpotqa": HOTPOT,
    "2wikimultihopqa": {**HOTPOT, "evidences": [["It", "maker", "Ada"]]},
    "hub": HUB,
    "2wiki hub": {**HOTPOT, "evidences": "[]", **{name: json.dumps(value) for name, value in FACTS.items()}},
    "unified": {"id": 1, "question": "Who?", "golden_answers": ["Ada", 1801, True], "contexts": [PASSAGE]},
    "flashrag": {"id": 1, "question": "Who?", "golden_answers": ["Ada"], "metadata": {"context": HUB["context"]}},
    "dpr": {"question": "Who?", "answers": ["Ada"], "ctxs": [PASSAGE]},
    "strategyqa": {"qid": "s", "question": "Is it?", "answer": True, "evidence": [[[["It-1"]], ["no_evidence"]]]},
    "ircot": {
        "question_id": "i",
        "question_text": "Who?",
        "answers_objects": [DATE],
        "contexts": [{"title": "It", "paragraph_text": "Ada made it.", "is_supporting": True}],
    },
}
TALK = [{"role": "user", "content": "Who?"}]
SEEDS = {
    **LAYOUTS,
    "corpus": {"id": "1", "contents": '"It"\nAda made it.', "source": {"file": "a.pdf", "page": 1}},
    "titled corpus": {"_id": 1, "title": "It", "text": "Ada made it."},
    "paragraphs": {"It-1": {"title": "It", "content": "Ada made it."}, "It-2": {"content": "Not this."}},
    "cache": {"Who?": [PASSAGE, {"contents": "It\nAda made it.", "score": 2.0}], "Why?": []},
    "pairs": {"prompt": "Who?", "chosen": "Ada", "rejected": "Eve"},
    "conversations": {
        "prompt": TALK,
        "chosen": [{"role": "assistant", "content": "Ada"}],
        "rejected": [{"role": "assistant", "content": "Eve"}],
    },
    "spans": {"prompt": "Moss. Who?", "chosen": "Ada", "rejected": "Eve", "passage_spans": [[0, 5]]},
    "samples": {"id": "1", "samples": ["Ada.", ""]},
}
# Values that JSON can hold, and marks that are replaced by what it cannot, or that only a hostile file would.
VALUES = [
    None,
    float("nan"),
    float("inf"),
    True,
    0,
    -1,
    1.5,
    10**400,
    "",
    " ",
    "text",
    "a\nb",
    "\0",
    [],
    {},
    [[]],
    [None],
]
VALUES += [["text"], {"text": "x"}, [["a", "b"]], [{"title": "x"}], "\ud800", ["\udfff"], {"\ud800": 1}, "[1", "[[[]]]"]
RAW = {"@deep": "[" * 100_000, "@deep both": "[" * 5000 + "]" * 5000, "@digits": "7" * 5000, "@exp": "1e99999"}
LONG = "x" * 300_000


def places(value, path=()):
    yield path
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, child in inner:
        yield from places(child, (*path, key))


def mutated(row: dict, rng: random.Random) -> bytes:
    """The row with a few values replaced, removed or repeated, or a few of its bytes changed."""
    row = copy.deepcopy(row)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        *path, last = rng.choice([p for p in places(row) if p] or [("question",)])
        inside = row
        for key in path:
            inside = inside[key]
        action = rng.random()
        if action < 0.1 and isinstance(inside, dict | list):
            inside.pop(last, None) if isinstance(inside, dict) else inside.pop(last)
        elif action < 0.2:
            inside[last] = [inside[last]]
        elif action < 0.3:
            inside[last] = rng.choice([*RAW, LONG, [LONG], [LONG, LONG]])
        else:
            inside[last] = copy.deepcopy(rng.choice(VALUES))
    text = json.dumps(row)
    for mark, raw in RAW.items():
        text = text.replace(json.dumps(mark), raw)
    data = bytearray(rng.choice((text, f"[{text}]", f"\n{text}\n{text}", f"\ufeff{text}")).encode())
    if rng.random() < 0.3:
        for _ in range(rng.randrange(1, 4)):
            at = rng.randrange(len(data) + 1)
            data[at : at + rng.randrange(3)] = rng.randbytes(rng.randrange(3))
    if rng.random() < 0.1:
        data = data[: rng.randrange(len(data) + 1)]
    return gzip.compress(data, 1, mtime=0) if rng.random() < 0.1 else bytes(data)


@pytest.mark.parametrize("name", SEEDS)
def test_readers_of_damaged_files(name, tmp_path, smollm_tokenizer, capsys):
    file, rng = tmp_path / "file.json", random.Random(name)
    corpus = tmp_path / "paragraphs.json"
    corpus.write_text(json.dumps(SEEDS["paragraphs"]))
    read = {
        **dict.fromkeys(LAYOUTS, lambda: questions.read_questions(str(file), corpus=str(corpus))),
        **dict.fromkeys(("corpus", "titled corpus", "paragraphs"), lambda: corpora.read_corpus(str(file))),
        **dict.fromkeys(("pairs", "conversations", "spans"), lambda: pairs.read_pairs(str(file), smollm_tokenizer)),
        "cache": lambda: list(Cache(str(file)).found.items()),
        "samples": lambda: generate.outside_samples(str(file), {"1"}),
    }[name]
    file.write_text(json.dumps(SEEDS[name]))
    assert read()
    slowest = loaded = 0
    for _ in range(60):
        data = mutated(SEEDS[name], rng)
        file.write_bytes(data)
        start = time.process_time()
        try:
            found = read()
        except UserError as error:
            assert len(str(error)) <= 1000 and len(str(error).splitlines()) == 1
            str(error).encode()
        else:
            loaded += 1
            json.loads(f"[{','.join(to_jsonl(found).splitlines())}]".encode(), parse_constant=pytest.fail)
        slowest = max(slowest, time.process_time() - start)
        assert len(capsys.readouterr().out) <= 2000
    assert loaded and slowest < 2


def test_every_layout_has_a_seed():
    assert set(layouts.READERS) <= set(SEEDS)
