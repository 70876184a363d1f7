"""Answer questions from a corpus, and show why.

    python -m roserag_jax.answer --config configs/quickstart.py --config.retrieve.corpus=FOLDER --question "..."
    python -m roserag_jax.answer --config configs/quickstart.py --questions questions.jsonl

The corpus is a .jsonl of {id, contents} or a folder of documents, searched with BM25; rows of `--questions` that bring
their own contexts need none. Uses the workdir's adapter where there is one. One question prints text, with the file and
page of each passage; a file of questions prints one JSON object a line: {id, question, answer, rationale, passages:
[{title, text, score?, source?}]}.
"""

import json
import sys

from absl import flags

from roserag_jax import cli
from roserag_jax.errors import UserError
from roserag_jax.evaluate import adapter_in_use
from roserag_jax.inference.respond import respond
from roserag_jax.rag import answers, corpora, documents, questions
from roserag_jax.rag.prompts import PromptBuilder, opens_thoughts
from roserag_jax.retrieval.bm25 import BM25
from roserag_jax.retrieval.registry import found_nothing
from roserag_jax.session import Session
from roserag_jax.workdir import Workdir

_QUESTION = flags.DEFINE_string("question", None, "one question, answered from the corpus")
_QUESTIONS = flags.DEFINE_string("questions", None, "a .jsonl of {id?, question, contexts?}")


def run(config) -> None:
    """The command."""
    question, file = _QUESTION.value, _QUESTIONS.value
    if (question is None) == (file is None):
        raise UserError("Give either --question '...' or --questions FILE.")
    if question is not None and not question.strip():
        raise UserError("--question is empty.")
    if file is None:
        rows = [{"id": "question", "question": question}]
    else:
        layout, corpus = config.data.format, config.retrieve.corpus
        rows = questions.read_questions(file, answers=False, contexts=False, layout=layout, corpus=corpus)
    without = [row for row in rows if not row.get("contexts")]
    if without and config.prompt.passages:
        if not config.retrieve.corpus:
            raise UserError(
                f"The question {without[0]['question']!r} has no contexts: name a corpus, "
                "--config.retrieve.corpus=PATH."
            )
        index = BM25(corpora.read_corpus(config.retrieve.corpus))
        found = index.search([row["question"] for row in without], config.prompt.passages)
        if nothing := found_nothing(found):
            print(nothing, file=sys.stderr)
        for row, contexts in zip(without, found, strict=True):
            row["contexts"] = contexts

    session, workdir = Session(config), Workdir(config.workdir)
    builder = PromptBuilder(session.tokenizer, **config.prompt)
    prompts = [builder.plain(row) for row in rows]
    engine = session.engine(adapter_in_use(config, workdir))
    responses = respond(
        engine,
        session.tokenizer,
        [p.tokens for p in prompts],
        slots=config.evaluate.batch,
        max_new_tokens=config.evaluate.max_tokens,
        stop_strings=builder.stop,
    )
    texts = {response.number: response.text for response in responses}
    for i, row in enumerate(rows):
        rationale, answer, _ = answers.parse(texts[i], opens_thoughts(prompts[i].text))
        shown = builder.shown(row)  # numbered as the rationale numbers them
        if file is not None:
            result = {"id": row["id"], "question": row["question"], "answer": answer, "rationale": rationale}
            print(json.dumps(result | {"passages": shown}, ensure_ascii=False))
            continue
        print(f"Answer: {answer}\n\nRationale: {rationale}\n\nPassages:")
        for number, passage in enumerate(shown, 1):
            score = f" (score {passage['score']:.2f})" if "score" in passage else ""
            place = f" [{documents.describe(passage['source'])}]" if "source" in passage else ""
            print(f"  {number}. {passage['title']}{place}{score}: {passage['text']}")


if __name__ == "__main__":
    cli.main(run, __doc__, alone=True)
