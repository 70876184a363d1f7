"""The stream of pairs: what a batch holds, its order, what is cut and what is held out."""

import jax
import numpy as np
import pytest
from conftest import PAIRS

from roserag_jax.errors import UserError
from roserag_jax.rag.prompts import PromptBuilder
from roserag_jax.training.pair_loader import Pair, Pairs, Stream, hold_out, padded_sizes

RNG = np.random.default_rng(0)


def test_pairs_cut_passages_of_long_prompts_only(smollm_tokenizer):
    """Demonstrations, question, instruction and responses stay; short passages too; what cannot fit is counted."""
    contexts = [{"title": "Short", "text": "It is."}, *({"title": f"T{i}", "text": "Long words. " * 60} for i in "ab")]
    row = {"id": "a", "question": "Passage 1: what?", "golden_answers": ["x"], "contexts": contexts}
    whole = PromptBuilder(smollm_tokenizer, 4096, 3, 2).plain(row)
    said = {"chosen": "It is so.", "rejected": "It is not so at all."}
    spans = {"passage_spans": [list(span) for span in whole.passage_spans]}
    rows = [{"id": "a", "prompt": whole.text} | spans | said, {"id": "b", "prompt": "No passages here. " * 999} | said]
    rows += [{"id": "c", "prompt": "Short."} | said, {"id": "d", "prompt": "Short."} | said | {"chosen": "so " * 70}]
    limit = len(whole.tokens) - 150
    read = Pairs(smollm_tokenizer, 2, rows, 64, limit)
    pairs = list(read)
    assert [p and p.id for p in pairs] == ["a", None, "c"] and read.ids == ["a", "b", "c"]
    assert (read.left_out, read.cut, read.lost) == (1, {0}, {1})
    cut, responses = pairs[0], [smollm_tokenizer(said[s]).input_ids + [2] for s in ("chosen", "rejected")]
    assert [[*cut.chosen], [*cut.rejected]] == responses
    assert limit - 4 <= len(cut.prompt) + len(cut.rejected) <= limit
    text = smollm_tokenizer.decode([*cut.prompt])
    start, end = whole.text.rindex("Passage 2: "), whole.text.rindex("\n\nQuestion: ")
    assert text.startswith(whole.text[:start]) and text.endswith(whole.text[end:])  # first passage, question and all
    sizes = [len(line) for line in text[start : -len(whole.text[end:])].splitlines()]
    assert len(sizes) == 2 and abs(sizes[0] - sizes[1]) < 12
    assert list(Pairs(smollm_tokenizer, 2, rows[:1], 64, 40)) == [None]


def test_hold_out_keeps_a_questions_pairs_together():
    """Whole questions, the same whatever the order, never all pairs on both sides."""
    ids = [f"q{i // 2}" for i in range(40)]
    training, held = hold_out(ids, 0.2, 0)
    names = [{ids[i] for i in side} for side in (training, held)]
    assert len(held) == 8 and len(training) == 32 and not names[0] & names[1]
    assert {ids[::-1][i] for i in hold_out(ids[::-1], 0.2, 0)[1]} == names[1]
    assert len(hold_out(ids[:6], 0.1, 0)[1]) == 2 and hold_out(ids, 0.0, 0) == ([*range(40)], [])


class Counted(list):
    """Pairs that count which of them were read."""

    def __init__(self, pairs):
        super().__init__(pairs)
        self.read = set()

    def __getitem__(self, i):
        self.read.add(i)
        return super().__getitem__(i)


def random_pairs(count, prefix=()):
    tokens = lambda most: RNG.integers(3, 99, RNG.integers(2, most)).tolist()
    return [Pair(str(i), [*prefix, *tokens(60)], tokens(9), tokens(9)) for i in range(count)]


def test_stream_order_is_a_function_of_the_step():
    """Every pair once an epoch, epochs differ, and a stream that starts later gives the same batches."""
    pairs = random_pairs(150)
    stream = Stream(pairs, batch=4, pad_id=0, epochs=2)
    epochs = [[p.id for step in range(k, k + 38) for p in stream.rows(step)] for k in (0, 38)]
    assert [sorted(ids) for ids in epochs] == [sorted(p.id for p in pairs)] * 2 and epochs[0] != epochs[1]
    whole, late = list(stream.start(0)), list(stream.start(43))
    assert len(whole) == len(stream) == 76 and len(late) == 33  # so the number of steps is the loader's whole state
    for step, (a, b) in enumerate(zip(whole[43:], late, strict=True), 43):
        jax.tree.map(np.testing.assert_array_equal, a, b)
        jax.tree.map(np.testing.assert_array_equal, a, stream.collate(step))


def test_stream_reads_pairs_shortly_before_they_are_used():
    """Of 5,000 pairs, some for the shared prefix and some windows are read before the first step, or the 700th."""
    pairs = Counted(random_pairs(5000))
    stream = Stream(pairs, batch=2, pad_id=0, epochs=2)
    assert len(pairs.read) < 130
    for step in (0, 700, 2600):
        pairs.read.clear()
        batches = stream.start(step)
        next(batches)
        assert len(pairs.read) < 130
        batches.close()


def test_stream_without_pairs_that_do_not_fit():
    """As many steps as ever, with all other pairs, each in one of them; a batch may be of filler rows alone."""
    pairs = random_pairs(300, prefix=range(3, 43))
    stream = Stream(pairs, batch=2, pad_id=0)
    lost = {i for i in range(300) if i not in range(0, 300, 4)} - {5}
    few = Stream([None if i in lost else pair for i, pair in enumerate(pairs)], batch=2, pad_id=0)
    assert len(few) == len(stream) == 150
    batches = list(few.start(0))
    seen = sorted(int(p.id) for step in range(150) for p in few.rows(step))
    assert seen == sorted({*range(300)} - lost) and sum(b.weights.sum() for b in batches) == len(seen)
    assert min(b.weights.sum() for b in batches) == 0 and all(b.prompt.shape[0] == 2 for b in batches)
    with pytest.raises(UserError, match="none of 3 pairs fits"):
        Stream([None] * 3, batch=2, pad_id=0)


def test_batch_whose_prompts_begin_otherwise_has_no_shared_prefix():
    """Only some pairs are looked at for the prefix; one that lacks it is trained on all the same, with all tokens."""
    pairs = random_pairs(300, prefix=range(3, 43))
    pairs[1] = pairs[1]._replace(prompt=[7, *pairs[1].prompt])
    stream = Stream(pairs, batch=1, pad_id=0)
    for step in range(len(stream)):
        (pair,), batch = stream.rows(step), stream.collate(step)
        prefix = [*range(3, 43)] if pair.id != "1" else []
        assert batch.shared_prefix.tolist() == prefix
        assert prefix + batch.prompt[0, : batch.prompt_lengths[0]].tolist() == pair.prompt[:-1]


def test_batches_of_a_short_run_have_one_shape():
    """Each shape compiles a step: a run of few steps pads all batches alike, one of many has sizes that pay off."""
    tokens = lambda length: RNG.integers(3, 200, length).tolist()
    sizes = [(20 + 6 * i, 4 + i) for i in range(64)]
    pairs = [Pair(str(i), tokens(prompt), tokens(response), [4, 2]) for i, (prompt, response) in enumerate(sizes)]

    def shapes(epochs):
        stream = Stream(pairs, batch=1, pad_id=0, epochs=epochs)
        batches = [stream.collate(step) for step in range(64)]
        assert sorted(batch.prompt_lengths[0] + 1 for batch in batches) == [prompt for prompt, _ in sizes]
        return {(batch.prompt.shape[1], batch.targets.shape[2]) for batch in batches}

    assert shapes(epochs=1) == {(448, 80)}
    assert {prompt for prompt, _ in shapes(epochs=8)} == {112, 256, 384, 448}  # each for 128 of 512 steps
    assert len(shapes(epochs=1000)) > 8  # all that there are
    assert padded_sizes([20, 70, 300], minimum=2) == [80, 320]


def test_collate_marks_filler_rows():
    """A pair's arrays: the prompt's last token opens both branches, and short epochs are filled with weight 0."""
    stream = Stream(PAIRS[:1], batch=2, pad_id=99)
    batch, pair = stream.collate(0), PAIRS[0]
    assert batch.weights.tolist() == [1.0, 0.0]
    assert batch.prompt[0, :19].tolist() == pair.prompt[:-1] and batch.prompt[0, 19:].tolist() == [99] * 13
    assert batch.branches[0, 1, :9].tolist() == [pair.prompt[-1], *pair.rejected[:-1]]
    assert batch.targets[0, 0, :5].tolist() == pair.chosen and batch.response_lengths[0].tolist() == [5, 9]
    assert stream.tokens(batch) == (19 + 5 + 9, batch.prompt.size + batch.targets.size)  # nothing of the filler row
