"""From questions and documents to pairs in languages whose words are not separated by spaces."""

from conftest import write_lines

from roserag_jax import generate, select
from roserag_jax.workdir import Workdir

# A document, a question, its answer, a rationale that reads the document, one that restates the hint, and a wrong one.
TEXTS = {
    "zh": (
        "燕鸥博物馆由伦德女士于1901年创办，位于下谷镇。\n\n长河流经北方的平原。\n\n这种面包由黑麦制成。",
        "燕鸥博物馆由谁创办？",
        "伦德女士",
        "燕鸥博物馆由伦德女士创办。\nAnswer：伦德女士。",
        "答案是伦德女士。\nAnswer：伦德女士。",
        "没有说明。\nAnswer：王先生。",
    ),
    "ja": (
        "カモメ博物館はランド夫人が設立した。\n\n長川は北部を流れる。\n\nこのパンはライ麦で作られる。",
        "カモメ博物館を設立したのは誰ですか？",
        "ランド夫人",
        "カモメ博物館はランド夫人が作った。\nAnswer: ランド夫人。",
        "答えはランド夫人です。\nAnswer: ランド夫人。",
        "わかりません。\nAnswer: 田中。",
    ),
}


def test_languages_reach_pairs(config_of, tmp_path, capsys):
    """The passage is found, the answer line is read, and the rationale that reads the passage is chosen."""
    (tmp_path / "docs").mkdir()
    rows = []
    for language, (document, question, answer, *_) in TEXTS.items():
        rows.append({"id": language, "question": question, "golden_answers": [answer]})
        for number, text in enumerate(document.split("\n\n")):
            (tmp_path / "docs" / f"{language}{number}.txt").write_text(text, encoding="utf-8")
    write_lines(tmp_path / "eval.jsonl", *rows)
    samples = [{"id": language, "samples": texts[3:]} for language, texts in TEXTS.items()]
    config = config_of(write_lines(tmp_path / "train.jsonl", *rows))
    config.retrieve.retriever, config.retrieve.corpus = "bm25", str(tmp_path / "docs")
    config.index, config.prompt.passages, config.prompt.max_tokens = str(tmp_path / "index"), 1, 900
    config.generate.plain_samples, config.generate.answer, config.generate.max_tokens = 0, "sampled", 240
    config.generate.samples = write_lines(tmp_path / "samples.jsonl", *samples)
    config.select.evidence, config.evaluate.metric, config.data.language = 1, "mlqa", "zh"
    generate.run(config)
    work = Workdir(config.workdir)
    for row in work.rows("retrieved.jsonl"):
        assert row["contexts"][0]["text"] == TEXTS[row["id"]][0].split("\n\n")[0]
    for row in work.rows("candidates.jsonl"):
        answer, wrong = TEXTS[row["id"]][2], {"zh": "王先生", "ja": "田中"}[row["id"]]
        found = [(c["answer"], c["correct"]) for c in row["candidates"]]
        assert found == [(answer, True), (answer, True), (wrong, False)]
    select.run(config)
    for pair in work.rows("pairs.jsonl"):
        *_, read, _, wrong = TEXTS[pair["id"]]
        assert [pair[side].split("\n")[0] for side in ("chosen", "rejected")] == [
            t.split("\n")[0] for t in (read, wrong)
        ]
    out = capsys.readouterr().out
    assert "2 pairs from 2 questions" in out and "Nothing was found" not in out
