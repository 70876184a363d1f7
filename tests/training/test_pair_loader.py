"""The stream of pairs: what a batch holds, its order, what is cut and what is held out."""

import jax
import numpy as np
from conftest import PAIRS

from roserag_jax.rag.prompts import PromptBuilder
from roserag_jax.training.pair_loader import Pair, Stream, epoch_order, hold_out, tokenize

RNG = np.random.default_rng(0)


def test_tokenize_cuts_passages_of_long_pairs_only(smollm_tokenizer):
    """Demonstrations, question, instruction and responses stay; short passages too; what cannot fit is counted."""
    contexts = [{"title": "Short", "text": "It is."}, *({"title": f"T{i}", "text": "Long words. " * 60} for i in "ab")]
    row = {"id": "a", "question": "Passage 1: what?", "golden_answers": ["x"], "contexts": contexts}
    whole = PromptBuilder(smollm_tokenizer, 4096, 3, 2).plain(row)
    said = {"chosen": "It is so.", "rejected": "It is not so at all."}
    spans = {"passage_spans": [list(span) for span in whole.passage_spans]}
    rows = [{"id": "a", "prompt": whole.text} | spans | said, {"id": "b", "prompt": "No passages here. " * 999} | said]
    rows += [{"id": "c", "prompt": "Short."} | said, {"id": "d", "prompt": "Short."} | said | {"chosen": "so " * 70}]
    limit = len(whole.tokens) - 150
    pairs, counts = tokenize(smollm_tokenizer, 2, rows, 64, limit)
    assert counts == {"cut": 1, "response too long": 1, "prompt too long": 1} and [p.id for p in pairs] == ["a", "c"]
    cut, responses = pairs[0], [smollm_tokenizer(said[s]).input_ids + [2] for s in ("chosen", "rejected")]
    assert [[*cut.chosen], [*cut.rejected]] == responses
    assert limit - 4 <= len(cut.prompt) + len(cut.rejected) <= limit
    text = smollm_tokenizer.decode([*cut.prompt])
    start, end = whole.text.rindex("Passage 2: "), whole.text.rindex("\n\nQuestion: ")
    assert text.startswith(whole.text[:start]) and text.endswith(whole.text[end:])  # first passage, question and all
    sizes = [len(line) for line in text[start : -len(whole.text[end:])].splitlines()]
    assert len(sizes) == 2 and abs(sizes[0] - sizes[1]) < 12
    assert tokenize(smollm_tokenizer, 2, rows[:1], 64, 40)[1]["prompt too long"] == 1


def test_hold_out_keeps_a_questions_pairs_together():
    """Whole questions, the same whatever the order, never all pairs on both sides."""
    pairs = [Pair(f"q{i // 2}", [1], [2], [3]) for i in range(40)]
    training, held = hold_out(pairs, 0.2, 0)
    names = [{p.id for p in side} for side in (training, held)]
    assert len(held) == 8 and len(training) == 32 and not names[0] & names[1]
    assert {p.id for p in hold_out(pairs[::-1], 0.2, 0)[1]} == names[1]
    assert len(hold_out(pairs[:6], 0.1, 0)[1]) == 2 and hold_out(pairs, 0.0, 0) == (pairs, [])


def test_stream_order_is_a_function_of_the_step():
    """Every pair once an epoch, epochs differ, and a stream that starts later gives the same batches."""
    lengths = RNG.integers(10, 100, 37).tolist()
    first, second = epoch_order(lengths, 4, 0, 0), epoch_order(lengths, 4, 0, 1)
    assert sorted(i for batch in first for i in batch) == list(range(37)) and first != second
    assert first == epoch_order(lengths, 4, 0, 0)
    stream = Stream(PAIRS, batch=2, pad_id=0, epochs=2)
    whole, late = list(stream.start(0)), list(stream.start(3))
    assert len(whole) == 8 and len(late) == 5  # so the number of steps is the loader's whole state
    for a, b in zip(whole[3:], late, strict=True):
        jax.tree.map(np.testing.assert_array_equal, a, b)


def test_collate_marks_filler_rows():
    """A pair's arrays: the prompt's last token opens both branches, and short epochs are filled with weight 0."""
    stream = Stream(PAIRS[:1], batch=2, pad_id=99)
    batch, pair = stream.collate(0), PAIRS[0]
    assert batch.weights.tolist() == [1.0, 0.0]
    assert batch.prompt[0, :19].tolist() == pair.prompt[:-1] and batch.prompt[0, 19:].tolist() == [99] * 13
    assert batch.branches[0, 1, :9].tolist() == [pair.prompt[-1], *pair.rejected[:-1]]
    assert batch.targets[0, 0, :5].tolist() == pair.chosen and batch.response_lengths[0].tolist() == [5, 9]
    assert stream.tokens(batch) == (19 + 5 + 9, batch.prompt.size + batch.targets.size)  # nothing of the filler row
