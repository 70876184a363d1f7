"""Write questions about documents, so that they are all that training needs.

    python -m roserag_jax.questions --config FILE --config.retrieve.corpus=DOCS [--config.questions.count=500]

The model writes questions with short answers about passages of the corpus, and keeps those whose answer stands in the
passage, that it answers right from the passage (`questions.right` of `questions.answers` samples) and not without it,
that repeat no other and do not point at "the passage". Writes `questions.jsonl` and `questions_eval.jsonl` in the
workdir, rows of `{id, question, golden_answers, contexts: [{title, text, is_supporting}], metadata}`; the two share no
document. What was not kept is in `questions_rejected.jsonl`: `{id, kind, why, question, answer, written_from}`.
`train --config.data.train=documents` does this first. Stopped, it resumes.
"""

import collections

import jax
import numpy as np

from roserag_jax import cli, options
from roserag_jax.errors import UserError
from roserag_jax.inference.scheduler import LengthClass, NumberedTask, run_tasks
from roserag_jax.inputs import corpus_recipe
from roserag_jax.partial_results import PartialResults
from roserag_jax.preference import candidates
from roserag_jax.preference.question_writer import QuestionWriter
from roserag_jax.progress import Progress
from roserag_jax.rag import answers, written_questions
from roserag_jax.rag.words import contains, words
from roserag_jax.rag.written_questions import UNANSWERABLE, Attempt, Split, Written
from roserag_jax.retrieval.bm25 import context
from roserag_jax.retrieval.indexing import open_index
from roserag_jax.session import Session
from roserag_jax.workdir import QUESTIONS, REJECTED, Recipe, Workdir, to_jsonl

_PASSAGES_PER_QUESTION = 20  # passages of a large corpus that are looked at
_WORDS_ALIKE = 64  # words of a passage by which others like it are found
_OF_THE_WHOLE = tuple(f"questions.{name}" for name in ("count", "held_out", "kinds", "rounds"))
_SEARCHED = 30  # passages found for a name or a question, of which those of the same part are kept


def recipe(session: Session) -> Recipe:
    """What the questions are made from."""
    config = session.config
    names, inputs = corpus_recipe(config)
    attempts = _attempts_recipe(session)
    found = options.subset(config, *names, "questions", "retrieve.k")
    return Recipe(found | attempts.options, inputs | attempts.inputs)


def _attempts_recipe(session: Session) -> Recipe:
    """What an attempt's result is made from beside what its id names; not how many questions are wanted, or of what."""
    names = [*Session.model_options, "seed", "questions", "prompt", "data.language", "evaluate.metric"]
    names += ["generate.answer_tokens", "generate.top_p"]
    return Recipe(options.subset(session.config, *names, without=_OF_THE_WHOLE), session.model_inputs)


def make(session: Session, workdir: Workdir) -> None:
    """Bring the questions up to date.

    Raises:
      UserError: none passes, or several processes would write them.
    """
    config, wanted = session.config, recipe(session)
    if all([workdir.is_up_to_date(QUESTIONS[split], wanted) for split in ("train", "eval")]):
        return
    if jax.process_count() > 1:
        raise UserError("Questions are written by one process: run roserag_jax.questions on the workdir first.")
    index = open_index(config)
    most = min(len(index), _PASSAGES_PER_QUESTION * config.questions.count)
    # The first of a drawn order of all: with more questions wanted, the same ones and more.
    places = np.random.default_rng(config.seed).permutation(len(index))[:most]
    read = {place: index.passages[place] for place in sorted(map(int, places))}
    passages = list({p["text"]: p for p in (read[int(place)] for place in places)}.values())
    documents = {written_questions.document_of(p) for p in passages}
    split = Split(documents, config.questions.held_out, config.seed)
    held = round(config.questions.count * config.questions.held_out)
    targets = {"train": config.questions.count - held, "eval": held}
    tried = {
        part: written_questions.attempts(
            [p for p in passages if split.part(p) == part],
            config.questions.kinds,
            config.questions.rounds,
            lambda name, part=part: _holding(index, split, part, name),
            lambda passage, part=part: _like(index, split, part, passage),
            config.seed,
        )
        for part in targets
    }
    ids = [attempt.id for part in tried.values() for attempt in part]
    partial = PartialResults(workdir, "questions", _attempts_recipe(session).fingerprint(), ids, note=lambda row: row)
    progress = Progress("questions", sum(targets.values()), "questions", workdir=workdir)
    writing = _Writing(session, partial, progress)
    known: list[set[str]] = []
    written = {part: writing.until(tried[part], targets[part], known) for part in targets if targets[part]}
    rejected = [row for found in written.values() for row in found.dropped]
    workdir.publish(REJECTED, wanted, to_jsonl(rejected), len(rejected))
    if not written["train"].rows:
        raise UserError(
            f"config.retrieve.corpus={config.retrieve.corpus}: none of the questions written about it passed "
            f"({_reasons(written['train'])}); they are in {workdir / REJECTED}. Use a larger model, more "
            "config.questions.rounds, or less strict config.questions.right."
        )
    for part, name in QUESTIONS.items():
        found = written.get(part, Written([], [], []))
        rows = [
            _question(row, index, split, part, max(config.retrieve.k, config.prompt.passages)) for row in found.rows
        ]
        workdir.publish(name, wanted, to_jsonl(rows), len(rows))
        print(f"{name}: {_summary(found, targets[part])}")
    partial.clear(keep=True)  # where more questions are wanted another time, what was tried is not tried again


class _Writing:
    """The attempts under way: partial results, and a decoder that is made when the first attempt needs it."""

    def __init__(self, session: Session, partial: PartialResults, progress: Progress):
        self.session, self.partial, self.progress = session, partial, progress
        self.before = 0  # kept of the parts before

    def until(self, tried: list[Attempt], target: int, known: list[set[str]]) -> Written:
        """Work on attempts in their order until enough questions are kept, and return those.

        Args:
          known: the words of questions that must not be repeated; those kept are added.
        """
        while True:
            words = list(known)
            found = written_questions.keep(tried, self.partial.done, target, self.session.config.questions.kinds, words)
            self._report(found)
            if not found.waiting:
                break
            self._run(found.waiting[: max(16, 2 * (target - len(found.rows)))])
        known[:] = words
        self.before += len(found.rows)
        return found

    def _report(self, found: Written) -> None:
        reasons = found.reasons.most_common(1)
        note = f"{len(self.partial.done)} attempts"
        self.progress.update(
            self.before + len(found.rows), note + (f", most dropped: {reasons[0][0]}" if reasons else "")
        )

    def _run(self, attempts: list[Attempt]) -> None:
        session, config = self.session, self.session.config
        if not hasattr(self, "engine"):
            self.progress.phase("loading the model")
            self.engine = session.engine()
            measure = answers.Measure(config.evaluate.metric, config.data.language)
            self.writer = QuestionWriter(session.tokenizer, config, measure)
            self.writer.prefill_examples(self.engine)
            self.newlines = candidates.newline_tokens(session.tokenizer)
        longest = self.writer.prompt_length
        slots = session.slots(config.generate.batch, self.writer.capacity(1), longest, on_cpu=8)
        tasks = (NumberedTask(i, longest, self.writer.task(attempt)) for i, attempt in enumerate(attempts))
        classes = [LengthClass(longest, slots)]  # however few attempts are left: in the same shapes
        results = run_tasks(self.engine, tasks, classes, self.writer.capacity(slots), self.newlines)
        for number, (_, row) in enumerate(results, 1):
            self.partial.add(row)
            if number % 16 == 0:
                self.progress.phase(f"{number} of {len(attempts)} attempts of this turn")


def _holding(index, split: Split, part: str, name: str) -> list[dict]:
    """Passages of a part of the documents that hold a name as complete words, best first."""
    found = [p for p in index.search([name], _SEARCHED)[0] if contains(f"{p['title']} {p['text']}", name)]
    return [p for p in found if split.part(p) == part]


def _like(index, split: Split, part: str, passage: dict) -> list[dict]:
    """Passages of a part of the documents that share most words with one, best first."""
    found = index.search([" ".join(words(passage["text"])[:_WORDS_ALIKE])], _SEARCHED)[0]
    return [p for p in found if p["text"] != passage["text"] and split.part(p) == part]


def _question(row: dict, index, split: Split, part: str, k: int) -> dict:
    """A question's row, with k passages of the same part of the documents: its own and the best that BM25 finds.

    An unanswerable question has none of its own, and none that holds its answer.
    """
    unanswerable = row["kind"] == "unanswerable"
    own = {p["text"] for p in row["passages"]}
    found = [p for p in index.search([row["question"]], k + _SEARCHED)[0] if split.part(p) == part]
    if unanswerable:
        found = [p for p in found if p["text"] not in own and not answers.is_answered_by(p, [row["answer"]])]
        shown = found[:k]
    else:
        shown = found[:k]
        missing = [p for p in row["passages"] if p["text"] not in {s["text"] for s in shown}]
        others = [p for p in reversed(shown) if p["text"] not in own][: max(0, len(shown) + len(missing) - k)]
        shown = [p for p in shown if p not in others] + missing
    return {
        "id": row["id"],
        "question": row["question"],
        "golden_answers": UNANSWERABLE if unanswerable else [row["answer"]],
        "contexts": [context(p) | {"is_supporting": not unanswerable and p["text"] in own} for p in shown],
        "metadata": {"type": row["kind"], "written_from": [p["title"] for p in row["passages"]]},
    }


def _reasons(found: Written) -> str:
    return ", ".join(f"{n} {reason}" for reason, n in found.reasons.most_common()) or "nothing was written"


def _summary(found: Written, target: int) -> str:
    kinds = collections.Counter(row["kind"] for row in found.rows)
    few = f" of {target} wanted" if len(found.rows) < target else ""
    lines = [f"{len(found.rows)} questions{few} ({', '.join(f'{n} {kind}' for kind, n in kinds.items())})"]
    if found.dropped:
        lines.append(f"  not kept: {_reasons(found)}")
    return "\n".join(lines)


def run(config) -> None:
    """The command."""
    if not (config.retrieve.corpus or config.index):
        raise UserError("config.retrieve.corpus: name the documents (a folder, or rows) to write questions about.")
    workdir = Workdir(config.workdir)
    options.require_files(config)
    with workdir.lock():
        make(Session(config), workdir)
        print(f"Wrote {workdir / QUESTIONS['train']} and {workdir / QUESTIONS['eval']}: read some of them.")
        print(f"What was not kept, and why: {workdir / REJECTED}.")
        print("Next: roserag_jax.train --config.data.train=documents with the same options.")


if __name__ == "__main__":
    cli.main(run, __doc__, alone=True)
