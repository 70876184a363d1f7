"""Public layouts of questions, corpora and pairs, read into our rows."""

import copy
import gzip
import json
from pathlib import Path

import pytest
from conftest import write_lines as write

from roserag_jax import options, retrieve
from roserag_jax.errors import UserError
from roserag_jax.preference import pairs
from roserag_jax.rag import layouts, questions
from roserag_jax.workdir import Workdir, to_jsonl

DATA = Path(__file__).parents[3] / "shared/data"
HOTPOT = {
    "_id": "h1",
    "question": "Who made it?",
    "answer": "Ada",
    "type": "bridge",
    "level": "easy",
    "supporting_facts": [["It", 0]],
    "context": [["It", ["It is old.", " Ada made it."]], ["Other", ["Not this."]]],
}
CONTEXTS = [
    {"title": "It", "text": "It is old. Ada made it.", "is_supporting": True},
    {"title": "Other", "text": "Not this.", "is_supporting": False},
]
HUB = {
    **{k: v for k, v in HOTPOT.items() if k != "_id"},
    "id": "h1",
    "supporting_facts": {"title": ["It"], "sent_id": [0]},
    "context": {"title": ["It", "Other"], "sentences": [["It is old.", " Ada made it."], ["Not this."]]},
}
TWO_WIKI = {**HOTPOT, "context": [["It", ["It is old.", "Ada made it."]], HOTPOT["context"][1]], "evidences": []}
FLASHRAG = {
    "id": "h1",
    "question": "Who made it?",
    "golden_answers": ["Ada"],
    "metadata": {k: HUB[k] for k in ("type", "level", "context", "supporting_facts")},
}
DPR = {
    "question": "Who made it?",
    "answers": ["Ada", "Ada L."],
    "ctxs": [{"id": "9", "title": "It", "text": "Ada made it.", "score": "1.5", "has_answer": True}],
}
IRCOT = {
    "question_id": "h1",
    "question_text": "Who made it?",
    "answers_objects": [{"number": "", "date": {"day": "", "month": "", "year": ""}, "spans": ["Ada", "Ada L."]}],
    "contexts": [
        {"idx": i, "title": c["title"], "paragraph_text": c["text"], "is_supporting": c["is_supporting"]}
        for i, c in enumerate(CONTEXTS)
    ],
}


FLASHRAG_2WIKI = {  # its sentences go by another name and have no spaces at their ends
    **FLASHRAG,
    "metadata": {
        **FLASHRAG["metadata"],
        "context": {"title": ["It", "Other"], "content": [["It is old.", "Ada made it."], ["Not this."]]},
    },
}


@pytest.mark.parametrize("row", [HOTPOT, HUB, TWO_WIKI, FLASHRAG, FLASHRAG_2WIKI, IRCOT])
@pytest.mark.parametrize("lines", [True, False])
def test_layouts_are_told_by_their_keys(row, lines, tmp_path):
    file = write(tmp_path / "q.json", *([row] if lines else [[row]]))
    (found,) = questions.read_questions(file)
    assert found["id"] == "h1" and found["question"] == "Who made it?" and found["golden_answers"][0] == "Ada"
    assert found["contexts"] == CONTEXTS
    assert found.get("metadata", {}).get("type") == (None if row is IRCOT else "bridge")
    assert "context" not in found.get("metadata", {})


def test_2wikimultihopqa_as_the_hub_holds_it(tmp_path):
    """Its table holds lists as JSON text, and null where a row has nothing."""
    row = {**TWO_WIKI, **{name: json.dumps(TWO_WIKI[name]) for name in ("context", "supporting_facts", "evidences")}}
    (found,) = questions.read_questions(write(tmp_path / "q.json", row))
    assert found["contexts"] == CONTEXTS
    (hidden,) = questions.read_questions(write(tmp_path / "q.json", {**row, "supporting_facts": "null"}))
    assert hidden["contexts"] == [{name: c[name] for name in ("title", "text")} for c in CONTEXTS]
    with pytest.raises(UserError, match=r"row of 2wikimultihopqa \(JSON within the row: not valid JSON"):
        questions.read_questions(write(tmp_path / "q.json", {**row, "context": "[["}))


@pytest.mark.parametrize("row", [HOTPOT, HUB, TWO_WIKI, FLASHRAG, DPR, IRCOT])
def test_null_columns_are_absent_columns(row, tmp_path):
    """A table has every column in every row; those of other layouts are null there."""
    others = {key for other in (HOTPOT, HUB, TWO_WIKI, FLASHRAG, DPR, IRCOT) for key in other} - set(row)
    plain = questions.read_questions(write(tmp_path / "q.json", row))
    assert questions.read_questions(write(tmp_path / "q.json", {**row, **dict.fromkeys(others)})) == plain
    gaps = {**row, **dict.fromkeys(others, float("nan"))}
    assert questions.read_questions(write(tmp_path / "q.json", gaps)) == plain


@pytest.mark.parametrize(
    ("given", "golden"),
    [
        ([["Paris", "City of Paris"]], ["Paris", "City of Paris"]),
        ([[["Paris"], "City of Paris"], None, float("nan"), [], "Paris"], ["Paris", "City of Paris"]),
        ("Paris", ["Paris"]),
        ([1801, 1801.0, 3.5, True, False, 0, -7], ["1801", "3.5", "yes", "no", "0", "-7"]),
        (["nan", "None", "['Paris']", " "], ["nan", "None", "['Paris']"]),
        ([10**20, 1e15], [str(10**20), "1000000000000000.0"]),
    ],
)
@pytest.mark.parametrize("layout", ["unified", "hotpotqa", "dpr", "flashrag"])
def test_golden_answers_stay_the_texts_that_they_are(layout, given, golden, tmp_path):
    rows = {"unified": FLASHRAG | {"metadata": None, "contexts": CONTEXTS}, "flashrag": FLASHRAG}
    rows |= {"hotpotqa": HOTPOT, "dpr": DPR}
    name = {"hotpotqa": "answer", "dpr": "answers"}.get(layout, "golden_answers")
    (found,) = questions.read_questions(write(tmp_path / "q.json", {**rows[layout], name: given}))
    assert found["golden_answers"] == golden


@pytest.mark.parametrize("given", [{"text": "Paris"}, [{"text": "Paris"}], [["Paris", {}]]])
def test_golden_answers_that_are_objects_are_refused_by_row(given, tmp_path):
    with pytest.raises(UserError, match=r"line 2: not a row of unified \(text or a number is expected"):
        questions.read_questions(write(tmp_path / "q.json", FLASHRAG, {**FLASHRAG, "id": 2, "golden_answers": given}))


@pytest.mark.parametrize("none", [None, float("nan")])
def test_titles_and_scores_that_are_nan_are_absent(none, tmp_path):
    row = {"question": "Who?", "golden_answers": ["Ada", none], "id": none, "metadata": none}
    row["contexts"] = [{"title": none, "text": "Ada.", "score": none, "is_supporting": none}]
    row["contexts"] += [{"title": 1984, "text": "A novel.", "score": "2.5", "is_supporting": 1.0}]
    (found,) = questions.read_questions(write(tmp_path / "q.json", row))
    assert found["id"] == "1" and found["golden_answers"] == ["Ada"] and found["metadata"] == {}
    assert found["contexts"] == [
        {"title": "", "text": "Ada."},
        {"title": "1984", "text": "A novel.", "score": 2.5, "is_supporting": True},
    ]
    assert "NaN" not in to_jsonl([found])


@pytest.mark.parametrize(
    "context",
    ["text", {"text": 5}, {"text": ["a"]}, {"text": "a", "title": ["t"]}, {"text": "a", "score": "high"}]
    + [{"text": "a", "score": True}, {"text": "a", "score": 10**400}, {"text": "a", "is_supporting": "yes"}],
)
def test_contexts_of_other_types_are_refused_by_row(context, tmp_path):
    with pytest.raises(UserError, match=r"line 1 \(id '1'\): a context"):
        questions.read_questions(write(tmp_path / "q.json", {**FLASHRAG, "id": 1, "contexts": [context]}))


def test_a_text_in_place_of_sentences_is_the_text(tmp_path):
    """Also a long one, which is not joined letter by letter."""
    text = "Ada made it. " * 30_000
    row = {**HOTPOT, "context": [["It", text], ["Other", ["Not", "this."]]]}
    (found,) = questions.read_questions(write(tmp_path / "q.json", row))
    assert [c["text"] for c in found["contexts"]] == [text, "Not this."]
    with pytest.raises(UserError, match="a list of titles"):
        questions.read_questions(write(tmp_path / "q.json", {**HUB, "context": {"title": "It", "sentences": "It is"}}))


def test_dpr_keeps_scores_and_every_answer(tmp_path):
    row = {**DPR, "qid": "7", "answers": ["", *DPR["answers"]]}
    (found,) = questions.read_questions(write(tmp_path / "q.jsonl", row))
    assert found["id"] == "1" and found["golden_answers"] == ["Ada", "Ada L."]
    assert found["contexts"] == [{"title": "It", "text": "Ada made it.", "score": 1.5}]


def test_ircot_dates_and_numbers():
    golden = lambda *answers: layouts.convert("ircot", {**IRCOT, "answers_objects": answers}, {}, "")["golden_answers"]
    date = {"number": "", "date": {"day": "3", "month": "May", "year": "1801"}, "spans": []}
    assert golden(date, {"number": "7", "spans": []}) == ["3 May 1801", "7"]
    assert golden({"number": "", "date": {}, "spans": []}) == []
    assert golden({"number": 0, "date": {}, "spans": []}) == ["0"]


def test_truth_values_are_yes_and_no_and_null_is_nothing(tmp_path):
    row = {"question": "Is it?", "golden_answers": [True, None]} | dict.fromkeys(("id", "contexts", "metadata"))
    rows = [row, {**row, "golden_answers": [1801], "contexts": [{"title": None, "text": "It is."}]}]
    yes, year = questions.read_questions(write(tmp_path / "q.jsonl", *rows), contexts=False)
    assert yes == {"id": "1", "question": "Is it?", "golden_answers": ["yes"], "contexts": [], "metadata": {}}
    assert year["id"] == "2" and year["golden_answers"] == ["1801"] and year["contexts"][0]["title"] == ""


def test_every_layout_is_an_option():
    assert set(options.DATA["format"].choices) == {"auto", *layouts.READERS}


def test_strategyqa_takes_its_evidence_from_the_paragraphs(tmp_path, capsys):
    row = {"qid": "s", "question": "Is it?", "answer": False, "term": "It", "facts": ["f"]}
    row["evidence"] = [[[["It-2", "It-1"], "no_evidence"], ["operation"]], [[["It-2"]]]]
    rows = [row, {**row, "qid": "t", "evidence": [[["no_evidence"]]]}, {**row, "qid": "u", "evidence": [[[["It-9"]]]]}]
    rows.append({k: v for k, v in {**row, "qid": "v"}.items() if k != "answer"})
    paragraphs = {f"It-{i}": {"title": "It", "section": "", "content": f"Part {i}."} for i in (1, 2)}
    corpus = write(tmp_path / "paragraphs.json", json.dumps(paragraphs, indent=1))
    file = write(tmp_path / "q.json", rows)
    (found,) = questions.read_questions(file, corpus=corpus)
    assert found["golden_answers"] == ["no"] and found["metadata"]["term"] == "It"
    assert [c["text"] for c in found["contexts"]] == ["Part 2.", "Part 1."]
    out = capsys.readouterr().out
    assert "1 questions; left out 1 for no contexts" in out and "1 for no evidence paragraph in the corpus" in out
    assert "1 for no answer" in out
    with pytest.raises(UserError, match="set config.retrieve.corpus to their file"):
        questions.read_questions(file)
    assert len(questions.read_questions(file, contexts=False)) == 3  # a retriever fetches them


@pytest.mark.parametrize(
    ("rows", "options", "match"),
    [
        ([HOTPOT, {**HOTPOT, "_id": 2, "context": [["a"]]}], {}, r"row 2: not a row of hotpotqa .*config.data.format"),
        ([HOTPOT, HOTPOT], {}, r"row 2: duplicate id .h1. \(first on row 1\)"),
        ([HOTPOT], {"layout": "dpr"}, r"row 1: not a row of dpr \(no 'ctxs'\)"),
        ([{"prompt": "p", "chosen": "c", "rejected": "r"}], {}, r"row 1: these are pairs.*config.data.pairs"),
        ([{**HOTPOT, "answer": None}], {}, r"holds no questions that can be used; .*row 1 \(id 'h1'\): no answer"),
        ([1], {}, r"row 1: not a JSON object but a number"),
    ],
)
def test_errors_name_file_and_row(rows, options, match, tmp_path):
    with pytest.raises(UserError, match=rf"q\.json.*{match}"):
        questions.read_questions(write(tmp_path / "q.json", json.dumps(rows, indent=1)), **options)


def test_the_hub_is_read_through_datasets(monkeypatch):
    """Without a network the name is refused with what to do; with one, rows come as the library gives them."""
    with pytest.raises(UserError, match="cannot be downloaded: .* name the local file"):
        questions.read_questions("hf://hotpotqa/hotpot_qa/distractor:validation")
    with pytest.raises(UserError, match="is written hf://owner/name"):
        questions.read_questions("hf://hotpot_qa")
    import datasets as library

    asked = []
    monkeypatch.setattr(
        library, "load_dataset", lambda *a, **k: asked.append((a, k)) or library.Dataset.from_list([HUB])
    )
    (found,) = questions.read_questions("hf://hotpotqa/hotpot_qa@v1/distractor", split="validation")
    assert found["contexts"] == CONTEXTS
    assert asked == [(("hotpotqa/hotpot_qa", "distractor"), {"split": "validation", "revision": "v1"})]

    def refused(*_, **__):
        raise RuntimeError("Dataset scripts are no longer supported, but found hotpot_qa.py")

    monkeypatch.setattr(library, "load_dataset", refused)
    with pytest.raises(UserError, match="Dataset scripts are no longer supported.* name the local file"):
        questions.read_questions("hf://hotpotqa/hotpot_qa/distractor")


def test_gold_is_flagged_where_the_corpus_has_it(tmp_path, capsys):
    """Where nothing found is a gold passage word for word, the corpus is another one, and there is no telling."""
    config = options.defaults()
    config.data.eval = write(tmp_path / "q.jsonl", HOTPOT)
    config.retrieve.retriever, config.retrieve.k = "bm25", 2
    flags = {}
    for name, text in (("same", "It is old. Ada made it."), ("other", "It is old, and Ada made it.")):
        config.workdir = str(tmp_path / name)
        rows = [{"id": "1", "contents": f'"It"\n{text}'}, {"id": "2", "contents": '"Other"\nNot made.'}]
        config.retrieve.corpus = write(tmp_path / f"{name}.json", *rows)
        retrieve.make(config, Workdir(config.workdir), ("eval",))
        (row,) = Workdir(config.workdir).rows("retrieved_eval.jsonl")
        flags[name] = {c["title"]: c.get("is_supporting") for c in row["contexts"]}
    assert flags == {"same": {"It": True, "Other": False}, "other": {"It": None, "Other": None}}
    assert capsys.readouterr().out.count("none is flagged as gold") == 1


PROMPT = [{"role": "user", "content": "Colour of moss?"}]
SAYS = lambda text: [{"role": "assistant", "content": text}]


@pytest.mark.parametrize("implicit", [False, True, "beside"])
def test_pairs_are_trls(implicit, tmp_path, smollm_tokenizer):
    """Text and conversations, with and without a prompt of their own: the text that TRL would train on."""
    trl = pytest.importorskip("trl.data_utils")
    text = {"prompt": "Moss is", "chosen": " green.", "rejected": " red."}
    talk = {"prompt": PROMPT, "chosen": SAYS("Green."), "rejected": SAYS("Red.")}
    if implicit == "beside":  # a column of text that repeats what the conversations begin with
        talk = {"prompt": "Colour of moss?"} | {k: PROMPT + talk[k] for k in ("chosen", "rejected")}
    elif implicit:
        text, talk = ({k: row["prompt"] + row[k] for k in ("chosen", "rejected")} for row in (text, talk))
    file = write(tmp_path / "p.jsonl", text, talk, {**talk, "rejected": talk["chosen"]} if not implicit else "")
    found = pairs.read_pairs(file, smollm_tokenizer)
    assert [p["id"] for p in found] == ["1", "2"]
    for pair, row in zip(found, (text, talk), strict=True):
        row = trl.maybe_extract_prompt(row)
        expected = trl.maybe_apply_chat_template(row, smollm_tokenizer)
        assert pair["prompt"] == expected["prompt"]
        for side in ("chosen", "rejected"):  # the end of the turn comes with the tokens
            assert expected[side].removesuffix("<|im_end|>\n") == pair[side]


def test_bad_pairs_are_named(tmp_path, smollm_tokenizer, capsys):
    good = {"prompt": "p", "chosen": "a", "rejected": "b"}
    for bad in (
        {"prompt": "p", "chosen": "a"},
        {**good, "rejected": SAYS("b")},
        {**good, "prompt": ""},
        {"prompt": PROMPT, "chosen": SAYS("a") * 2, "rejected": SAYS("b")},
        {"prompt": PROMPT, "chosen": PROMPT, "rejected": SAYS("b")},
        {"prompt": PROMPT, "chosen": SAYS(None), "rejected": SAYS("b")},
    ):
        with pytest.raises(UserError, match=r"p\.jsonl, line 2: a pair is"):
            pairs.read_pairs(write(tmp_path / "p.jsonl", good, bad), smollm_tokenizer)
    refusing = copy.copy(smollm_tokenizer)
    refusing.chat_template = "{{ raise_exception('System role not supported') }}"
    with pytest.raises(UserError, match=r"line 1: .*System role not supported"):
        file = write(tmp_path / "p.jsonl", {"prompt": PROMPT, "chosen": SAYS("a"), "rejected": SAYS("b")})
        pairs.read_pairs(file, refusing)
    pairs.read_pairs(write(tmp_path / "p.jsonl", good, {**good, "chosen": "b"}, good), smollm_tokenizer)
    assert "2 pairs; left out 1 for two equal responses" in capsys.readouterr().out
    with pytest.raises(UserError, match="holds no pairs"):
        pairs.read_pairs(write(tmp_path / "p.jsonl", {**good, "chosen": " "}), smollm_tokenizer)


def test_read_pairs_with_passage_spans(tmp_path, smollm_tokenizer):
    """Pairs that `select` wrote can be read back and cut; spans that do not fit the prompt are named."""
    good = {"prompt": "Passage 1: moss\nWhy?", "chosen": "a", "rejected": "b", "passage_spans": [[11, 15]]}
    (pair,) = pairs.read_pairs(write(tmp_path / "p.jsonl", good), smollm_tokenizer)
    assert pair["passage_spans"] == [[11, 15]]
    for bad in ([[11, 99]], [[4, 2]], [[3, 6], [5, 8]], [["a", "b"]], [11, 15], "11", [[True, 4]]):
        with pytest.raises(UserError, match=r"line 2: passage_spans must be"):
            pairs.read_pairs(write(tmp_path / "p.jsonl", good, {**good, "passage_spans": bad}), smollm_tokenizer)


@pytest.mark.parametrize(
    ("folder", "original", "corpus"),
    [
        ("hotpotqa", "hotpot_fullwiki_sample.json", ""),
        ("2wikimultihopqa", "2wiki_sample.json", ""),
        ("strategyqa", "strategyqa_train_sample.json", "corpus.jsonl.gz"),
    ],
)
def test_originals_give_the_unified_rows(folder, original, corpus):
    """The releases' own files, against rows that others made of them."""
    home = DATA / folder
    if not home.exists():
        pytest.skip("no folder of real rows beside the checkout")
    unified = {}
    with gzip.open(home / "train.jsonl.gz", "rt") as lines:
        for row in map(json.loads, lines):
            unified[row["id"]] = row
    ours = questions.read_questions(str(home / original), corpus=str(home / corpus) if corpus else "")
    same = [row for row in ours if row["id"] in unified]
    assert len(same) > 180
    for row in same:
        theirs = unified[row["id"]]
        for name in ("question", "golden_answers"):
            assert row[name] == theirs[name]
        bare = [{k: c[k] for k in ("title", "text", "is_supporting")} for c in theirs["contexts"]]
        assert row["contexts"] == bare
        assert row["metadata"].get("type") == theirs["metadata"].get("type")


def test_ready_made_pairs_reach_training(tmp_path, smollm_path, capsys):
    """`select` publishes them without a question or a candidate in sight, again when the file changes."""
    from roserag_jax import select
    from roserag_jax.session import Session

    config = options.defaults()
    config.model, config.workdir = str(smollm_path), str(tmp_path / "work")
    talk = {"prompt": PROMPT, "chosen": SAYS("Green."), "rejected": SAYS("Red.")}
    config.data.pairs = write(tmp_path / "p.jsonl", talk)
    work = Workdir(config.workdir)
    select.make(Session(config), work)
    (pair,) = work.rows("pairs.jsonl")
    assert pair["chosen"] == "Green." and "<|im_start|>user\nColour of moss?<|im_end|>" in pair["prompt"]
    assert [f.name for f in work.path.iterdir() if "manifest" not in f.name] == ["pairs.jsonl"]
    write(tmp_path / "p.jsonl", talk, talk)
    select.make(Session(config), work)
    assert len(work.rows("pairs.jsonl")) == 2 and "config.data.pairs" in capsys.readouterr().out
