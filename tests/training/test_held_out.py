"""Evaluation while training: the questions of held-out pairs, answered."""

from roserag_jax.inference.respond import respond_to_all
from roserag_jax.rag import answers
from roserag_jax.session import Session
from roserag_jax.training.held_out import QuestionAnswering


def test_question_answering_takes_no_answer_from_unfinished_thoughts(config_of):
    """As `evaluate`, where a prompt ends inside a block of thoughts that the response does not close."""
    session = Session(config_of())
    engine, limits = session.engine(), {"slots": 2, "max_new_tokens": 12, "stop_strings": ()}
    texts = [f"Who is {name}?{opened}" for name in "abcd" for opened in ("", "<think>\n")]
    prompts = [session.tokenizer(text).input_ids for text in texts]
    said = {each.number: each.text for each in respond_to_all(engine, session.tokenizer, prompts, **limits)}
    golden = {i: answers.parse(text)[1] for i, text in said.items()}  # what would be right outside of thoughts
    kept = [i for i in golden if answers.normalize(golden[i])]
    rows = [{"id": str(i), "prompt": texts[i], "golden_answers": [golden[i]]} for i in kept]
    answering = QuestionAnswering(
        lambda _: engine,
        session.tokenizer,
        rows,
        [prompts[i] for i in kept],
        metric="hotpotqa",
        language="",
        **limits,
    )
    right = [not texts[i].endswith("<think>\n") for i in kept]
    assert 0 < sum(right) < len(right)
    assert answering(None) == {"em": 100 * sum(right) / len(right), "f1": 100 * sum(right) / len(right)}
