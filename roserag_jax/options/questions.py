"""Options of the questions that the model writes about documents."""

from roserag_jax.options.option import Faults, Option, together
from roserag_jax.rag.written_questions import KINDS


def _kinds(value) -> str | None:
    good = value and not set(value) - set(KINDS) and len(set(value)) == len(value)
    return None if good else f"a tuple of {', '.join(KINDS)}, each once"


QUESTIONS = {
    "count": Option(
        500, "number of questions that the model writes about retrieve.corpus, held-out ones included", at_least=1
    ),
    "held_out": Option(
        0.2, "fraction of the documents, and of the questions, that is held out for evaluation", at_least=0, below=1
    ),
    "kinds": Option(
        KINDS,
        "kinds of questions, in equal parts where the documents give them: about one passage (one_hop), about two that "
        "name the same thing (two_hop), yes/no questions (yes_no), and ones shown without their passage, whose answer "
        "is that it is not stated (unanswerable)",
        check=_kinds,
    ),
    "rounds": Option(4, "most attempts at a question about the same passage", at_least=1),
    "samples": Option(4, "questions sampled at each attempt; the first that passes all checks is kept", at_least=1),
    "temperature": Option(0.8, "sampling temperature of questions, and of the answers that check them", above=0),
    "max_tokens": Option(64, "most tokens of a question with its answer", at_least=1),
    "answers": Option(4, "answers sampled to check a question, with its passage and without", at_least=1),
    "right": Option(3, "how many of these must be right with the passage, and fewer without it", at_least=1),
}


@together
def _enough_answers_can_be_right(config) -> Faults:
    if config.questions.right > config.questions.answers:
        yield "questions.right", f"is more than config.questions.answers={config.questions.answers}"


@together
def _documents_are_named(config) -> Faults:
    for split in ("train", "eval"):
        if config.data[split] == "documents" and not (config.retrieve.corpus or config.index):
            yield f"data.{split}", "name the documents in config.retrieve.corpus"
