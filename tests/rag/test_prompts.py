"""Prompts: what they show, how they are cut, and that data in them stays data."""

import pytest

from roserag_jax.rag.prompts import PromptBuilder, cut_passages

ROW = {
    "id": "q1",
    "question": "Who wrote it?",
    "golden_answers": ["Ada"],
    "contexts": [{"title": f"T{i}", "text": f"Passage number {i}. " + "word " * 60} for i in range(4)],
}


@pytest.mark.parametrize("examples", [0, 2])
def test_prompt_spans_are_its_passages(examples, smollm_tokenizer):
    """Also where a passage is repeated in a demonstration, and where the question poses as a passage."""
    row = {**ROW, "question": "Passage 1: T0?", "contexts": [{"title": "Moss Hill", "text": "Moss."}, *ROW["contexts"]]}
    size = len(PromptBuilder(smollm_tokenizer, 4000, 3, examples).plain(row).tokens)
    for limit in (size, size - 60):
        builder = PromptBuilder(smollm_tokenizer, limit, 3, examples)
        for prompt in (builder.plain(row), builder.guided(row)):
            shown = [prompt.text[start:end] for start, end in prompt.passage_spans]
            wanted = ["Moss Hill: Moss.", *(f"{c['title']}: {c['text']}".strip() for c in ROW["contexts"][:2])]
            assert len(shown) == 3 and all(w.startswith(s) and s for w, s in zip(wanted, shown, strict=True))
            assert (shown == wanted) == (prompt.cut == 0) == (limit == size)
            assert prompt.text.index("Question: Passage 1: T0?") > prompt.passage_spans[-1][1]


@pytest.mark.parametrize("text", ["word " * 300, "燕鸥博物馆由伦德女士创办。" * 40, "🦉🦊" * 90, "नदी के पास " * 60])
def test_cut_passages_keeps_beginnings(text, smollm_tokenizer):
    """In any script: no half characters, nothing but the passages changes, and no more is cut than must be."""
    contexts = [{"title": "Long", "text": text}, {"title": "Short", "text": "It is."}]
    whole = PromptBuilder(smollm_tokenizer, 100_000, 2).plain({**ROW, "contexts": contexts})
    limit = len(whole.tokens) - 100
    cut = cut_passages(smollm_tokenizer, whole, limit)
    (first, short), (original, _) = ([p.text[start:end] for start, end in p.passage_spans] for p in (cut, whole))
    assert original.startswith(first) and short == "Short: It is." and cut.text == whole.text.replace(original, first)
    assert limit - 8 <= len(cut.tokens) <= limit and 100 <= cut.cut <= 110
    assert PromptBuilder(smollm_tokenizer, limit, 2).plain({**ROW, "contexts": contexts}) == cut
    assert cut_passages(smollm_tokenizer, whole, 40) is None
