"""Answer questions from a corpus, and show why.

    python -m roserag_jax.answer --config configs/quickstart.py --config.retrieve.corpus=FOLDER --question "..."
    python -m roserag_jax.answer --config configs/quickstart.py --questions questions.jsonl
    python -m roserag_jax.answer --config configs/quickstart.py --config.retrieve.corpus=FOLDER --serve 8000

The corpus is a .jsonl of {id, contents} or a folder of documents, searched by `config.retrieve.retriever` (BM25 where
it names none); rows of `--questions` that bring their own contexts need none. Uses the workdir's adapter where there is
one. One question prints text, with the file and page of each passage; a file of questions prints one JSON object a
line: {id, question, answer, rationale, passages: [{title, text, score?, source?}]}.

`--serve` offers a page to ask questions on, and the base model and the adapter in OpenAI's protocol (docs/serving.md);
it needs the extra `serve`. An API key is taken from the environment variable ROSERAG_API_KEY.
"""

from absl import flags

from roserag_jax import cli, signals
from roserag_jax.ahead import in_order
from roserag_jax.errors import UserError, quote
from roserag_jax.inference.requests import DecoderCapacity
from roserag_jax.inference.respond import NumberedPrompt, respond
from roserag_jax.inference.scheduler import length_classes
from roserag_jax.options.option import not_utf8
from roserag_jax.rag import answers, documents, questions
from roserag_jax.rag.chat import opens_thoughts
from roserag_jax.rag.prompts import BUILDERS, PromptBuilder, estimate_lengths
from roserag_jax.retrieval.registry import found_nothing, open_retriever, searches_corpus
from roserag_jax.session import Session, find_adapter
from roserag_jax.workdir import Workdir

_ARGUMENTS = flags.FlagValues()  # of this command alone
_QUESTION = flags.DEFINE_string("question", None, "one question, answered from the corpus", flag_values=_ARGUMENTS)
_QUESTIONS = flags.DEFINE_string("questions", None, "a .jsonl of {id?, question, contexts?}", flag_values=_ARGUMENTS)
_SERVE = flags.DEFINE_integer(
    "serve", None, "port on which to offer the page and the models", 0, 65535, flag_values=_ARGUMENTS
)


def _questions(config) -> list[dict]:
    """The rows of `--question` or `--questions`, each with contexts where any are shown.

    Raises:
      UserError: neither or both are given, or there are neither contexts nor a corpus to search.
    """
    question, file = _QUESTION.value, _QUESTIONS.value
    if (question is None) == (file is None):
        raise UserError("Give either --question '...' or --questions FILE.")
    if question is not None and (not question.strip() or not_utf8(question)):
        raise UserError("--question is empty." if not question.strip() else "--question is not UTF-8 text.")
    rows = [{"id": "question", "question": question}]
    if file is not None:
        layout, corpus = config.data.format, config.retrieve.corpus
        rows = questions.read_questions(file, answers=False, contexts=False, layout=layout, corpus=corpus)
    without = [row for row in rows if not row.get("contexts")]
    if without and config.prompt.passages:
        if searches_corpus(config.retrieve) and not (config.retrieve.corpus or config.index):
            raise UserError(
                f"The question {quote(without[0]['question'])} has no contexts: name a corpus, "
                "--config.retrieve.corpus=PATH."
            )
        found = open_retriever(config).search([row["question"] for row in without], config.prompt.passages)
        if nothing := found_nothing(sum(not contexts for contexts in found), len(found)):
            print(nothing)
        for row, contexts in zip(without, found, strict=True):
            row["contexts"] = contexts
    return rows


def _as_text(result: dict) -> str:
    """An answer for people."""
    lines = [f"Answer: {result['answer']}", "", f"Rationale: {result['rationale']}", "", "Passages:"]
    for number, passage in enumerate(result["passages"], 1):
        score = f" (score {passage['score']:.2f})" if "score" in passage else ""
        place = f" [{documents.describe(passage['source'])}]" if "source" in passage else ""
        lines.append(f"  {number}. {passage['title']}{place}{score}: {passage['text']}")
    return "\n".join(lines) + "\n"


def _serve(config, port: int) -> None:
    """Serve the models until the command is stopped."""
    if _QUESTION.value is not None or _QUESTIONS.value is not None:
        raise UserError("--serve takes its questions from clients; leave --question and --questions out.")
    try:
        from roserag_jax.serving import server
        from roserag_jax.serving.models import Models
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in ("starlette", "uvicorn", "pydantic"):
            raise
        raise UserError(f"--serve needs the extra 'serve': pip install 'roserag_jax[serve]' ({error.name}).") from error
    signals.set_consequence(signals.SERVER_ENDED)
    with cli.messages_on_stderr() as stdout:
        key, listening = server.api_key(), server.listen(config.serve.host, port)
        has_passages = config.retrieve.corpus or config.index or not searches_corpus(config.retrieve)
        retriever = open_retriever(config) if config.prompt.passages and has_passages else None
        session, adapter = Session(config), find_adapter(config, Workdir(config.workdir))
        engines = {"base": session.engine()} | ({"adapter": session.engine(adapter)} if adapter else {})
        models = Models(config, session.tokenizer, engines, retriever)
        with server.Server(models, listening, names=tuple(config.serve.names), key=key) as running:
            models.warm_up()
            print(f"Serving {', '.join(models.by_name)} on {server.url_of(listening)}", file=stdout, flush=True)
            running.wait()


def run(config) -> None:
    """The command."""
    if _SERVE.value is not None:
        _serve(config, _SERVE.value)
        return
    with cli.messages_on_stderr() as stdout:
        rows = _questions(config)
        session, workdir = Session(config), Workdir(config.workdir)
        builder = PromptBuilder(session.tokenizer, **config.prompt)
        engine = session.engine(find_adapter(config, workdir))
        lengths = estimate_lengths(
            [*map(builder.size, rows)], lambda i: len(builder.plain(rows[i]).tokens), builder.max_tokens
        )
        limit = config.evaluate.max_tokens
        slots = session.slots(config.evaluate.batch, DecoderCapacity(1, 1, ((1, limit),)), max(lengths), on_cpu=16)
        thinking: dict[int, bool] = {}  # whether a response begins in a block of thoughts

        def build(number: int) -> NumberedPrompt:
            prompt = builder.plain(rows[number])
            thinking[number] = opens_thoughts(prompt.text)
            return NumberedPrompt(number, prompt.tokens)

        responses = respond(
            engine,
            session.tokenizer,
            in_order(build, range(len(rows)), threads=BUILDERS, ahead=slots),
            classes=length_classes(lengths, slots),
            shared_prefix=builder.common_tokens(),
            slots=slots,
            max_new_tokens=config.evaluate.max_tokens,
            stop_strings=builder.stop,
        )
        texts = {response.number: response.text for response in responses}
    for i, row in enumerate(rows):
        rationale, answer, _ = answers.parse(texts[i], thinking[i], builder.answer_line)
        result = {"id": row["id"], "question": row["question"], "answer": answer, "rationale": rationale}
        result["passages"] = builder.shown(row)  # numbered as the rationale numbers them
        stdout.write(_as_text(result) if _QUESTIONS.value is None else cli.json_line(result, stdout))


if __name__ == "__main__":
    cli.main(run, __doc__, _ARGUMENTS, alone=True, resumes=False)
