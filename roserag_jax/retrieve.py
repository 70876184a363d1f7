"""Fetch the passages of every question.

    python -m roserag_jax.retrieve --config configs/quickstart.py
    python -m roserag_jax.retrieve --serve 8000 --config.retrieve.corpus=PATH

Writes `retrieved.jsonl` (training questions) and `retrieved_eval.jsonl` (held-out ones) in the workdir, rows of
`{id, question, golden_answers, contexts: [{title, text, score?, is_supporting?}], gold_count?}`; the last is how many
gold passages a question has, found or not. With `--serve` it offers the corpus to other runs instead
(`--config.retrieve.retriever=server --config.retrieve.server=http://HOST:8000`), with `--host 0.0.0.0` to other
machines.
"""

import collections
import itertools
from collections.abc import Iterable, Iterator

from absl import flags
from etils import epath

from roserag_jax import cli, options, signals
from roserag_jax import questions as written
from roserag_jax.distributed import processes
from roserag_jax.errors import UserError, first_line
from roserag_jax.inputs import corpus_recipe, input_digest
from roserag_jax.progress import Progress
from roserag_jax.rag import questions
from roserag_jax.retrieval.registry import RETRIEVERS, found_nothing, members, open_retriever, searches_corpus
from roserag_jax.retrieval.server import serve
from roserag_jax.session import Session
from roserag_jax.workdir import QUESTIONS, RETRIEVED, Recipe, Workdir, from_jsonl, to_jsonl, write_atomic

_BATCH = 1000  # questions searched at once, and what a stopped run searches again
_ARGUMENTS = flags.FlagValues()  # of this command alone
_SERVE = flags.DEFINE_integer(
    "serve", None, "port on which to offer the corpus; nothing is written then", 0, 65535, flag_values=_ARGUMENTS
)
_HOST = flags.DEFINE_string(
    "host", "127.0.0.1", "address on which --serve listens; 0.0.0.0 is open to other machines", flag_values=_ARGUMENTS
)


def recipe(config, workdir: Workdir, split: str) -> Recipe:
    """What the retrieved rows of a split are made from."""
    names = [f"data.{split}", f"data.{split}_rows"]
    names += ["select.labels"] * (split == "train" and config.select.labels != "gold")  # rows need no answer then
    inputs = {}
    if questions.source(config, split) == questions.DOCUMENTS:
        inputs[QUESTIONS[split]] = workdir.verify(QUESTIONS[split])
    elif config.data[split] == "synthetic":
        names += [name for name, _ in options.walk() if name.startswith("data.synthetic")]
    else:
        names.append("data.format")
        inputs |= input_digest(config, f"data.{split}")
    names.append("retrieve.retriever")
    if config.retrieve.retriever != "given":
        names.append("retrieve.k")
        for spec in members(config.retrieve):
            names += [f"retrieve.{option}" for option in spec.needs + spec.takes]
            for option in spec.needs:
                inputs |= input_digest(config, f"retrieve.{option}")
    corpus_names, corpus_inputs = corpus_recipe(config)  # to search, or to look StrategyQA's paragraphs up
    return Recipe(options.subset(config, *names, *corpus_names), inputs | corpus_inputs)


def make(config, workdir: Workdir, splits=("train", "eval")) -> None:
    """Bring the retrieved rows of the splits up to date.

    Raises:
      UserError: synthetic questions would take the place of user data.
    """
    index = None
    for split in splits:
        name = RETRIEVED[split]
        before = workdir.manifest(name)
        is_written = questions.source(config, split) == questions.DOCUMENTS
        if is_written:
            written.make(Session(config), workdir)
        elif before and config.data[split] == "synthetic" != before["options"][f"data.{split}"]:
            raise UserError(
                f"config.data.{split}='synthetic', but {workdir / name} is of {before['options'][f'data.{split}']}: "
                "give every command the same options (best in a file for --config), or this one another workdir."
            )
        wanted = recipe(config, workdir, split)
        if workdir.is_up_to_date(name, wanted):
            continue
        file = str(workdir / QUESTIONS[split]) if is_written else ""
        rows, batches = questions.questions(config, split, written=file), None
        if config.retrieve.retriever != "given":
            # Once before anything is searched, so that a row that cannot be used is named at once.
            count = sum(1 for _ in rows)
            rows = questions.questions(config, split, report=False, written=file)
            index = index or RETRIEVERS[config.retrieve.retriever].build(config)
            batches = _Batches(workdir, f"retrieve_{split}-{wanted.fingerprint()}")
            batches.search(index, rows, count, config.retrieve.k, split)
            rows = batches.rows()
        totals = collections.Counter()
        count = workdir.publish_rows(name, wanted, _counted(rows, totals))
        if batches:
            batches.clear()
        print(f"{name}: {count} questions, {totals['passages'] / count:.1f} passages each.")


def _counted(rows: Iterable[dict], totals: collections.Counter) -> Iterator[dict]:
    """Yield rows, and count their passages."""
    for row in rows:
        totals["passages"] += len(row["contexts"])
        yield row


class _Batches:
    """Rows with the passages that were found for them, a file for each batch: a stopped run resumes behind them."""

    def __init__(self, workdir: Workdir, name: str):
        self.workdir, self.folder = workdir, workdir / ".parts" / name
        self.empty = self.flagged = self.gold = 0  # questions for which nothing, and passages of which some, is known

    def _file(self, number: int) -> epath.Path:
        return self.folder / f"{number:06d}.jsonl"

    def search(self, index, rows: Iterator[dict], count: int, k: int, split: str) -> None:
        """Search the passages of all rows; those of finished batches are there already."""
        done, progress = 0, None
        for number in range(-(-count // _BATCH)):
            batch, file = list(itertools.islice(rows, _BATCH)), self._file(number)
            if file.exists():
                found = from_jsonl(file.read_text())
            else:
                if progress is None:
                    progress = Progress(f"retrieve {split}", count, "questions", done, workdir=self.workdir)
                contexts = index.search([row["question"] for row in batch], k)
                found = [_flagged(row, own) for row, own in zip(batch, contexts, strict=True)]
                write_atomic(file, to_jsonl(found))
            done += len(batch)
            self.empty += sum(not row["contexts"] for row in found)
            self.gold += sum(row.get("gold_count", 0) for row in found)
            self.flagged += sum(c.get("is_supporting", False) for row in found for c in row["contexts"])
            if progress:
                progress.update(done)
        if nothing := found_nothing(self.empty, count):
            print(nothing)
        if self.gold and not self.flagged:
            print(
                "None of the passages found is a gold passage of its question, word for word: none is flagged as gold."
            )

    def rows(self) -> Iterator[dict]:
        """All rows in order.

        Where no passage that was found is a gold passage of any row, the corpus has other texts than the rows (another
        dump, or chunks of it), and the flags are left out.
        """
        for file in sorted(self.folder.glob("*.jsonl")):
            for row in from_jsonl(file.read_text()):
                if not self.flagged:
                    row.pop("gold_count", None)
                    for passage in row["contexts"]:
                        passage.pop("is_supporting", None)
                yield row

    def clear(self) -> None:
        """Drop the batches, those of other options too."""
        stem = self.folder.name.rpartition("-")[0]
        for folder in self.folder.parent.iterdir():
            if folder.name.rpartition("-")[0] == stem:
                folder.rmtree()


def _flagged(row: dict, found: list[dict]) -> dict:
    """Give a row the passages that were found for it, flagged as gold where they are gold passages of the row."""
    known = lambda c: (c["title"], c["text"])
    gold = {known(c) for c in row.get("contexts", []) if c.get("is_supporting")}
    if not gold:
        return {**row, "contexts": found}
    return {**row, "contexts": [{**c, "is_supporting": known(c) in gold} for c in found], "gold_count": len(gold)}


def _serve(config, port: int) -> None:
    """Offer the index of the corpus, or another retriever, until the command is stopped."""
    signals.set_consequence(signals.SERVER_ENDED)
    retrieve = config.retrieve
    if not _HOST.value.strip():
        raise UserError("--host is empty: name an address; an empty one would be every address of the machine.")
    if searches_corpus(retrieve) and not (retrieve.corpus or config.index):
        raise UserError("--serve: name a corpus, --config.retrieve.corpus=PATH, or an index.")
    retriever = RETRIEVERS["cache"].build(config) if retrieve.retriever == "cache" else open_retriever(config)
    try:
        server = serve(retriever.search, port, _HOST.value, topk=retrieve.k)
    except (OSError, UnicodeError) as error:
        why = getattr(error, "strerror", None) or first_line(error)
        raise UserError(f"--serve {port} on {_HOST.value}: {why}; name another.") from error
    with server:
        print(f"Serving POST /retrieve on {_HOST.value}:{server.server_address[1]}.", flush=True)
        server.serve_forever()


def run(config) -> None:
    """The command."""
    if _SERVE.value is not None:
        _serve(config, _SERVE.value)
        return
    # Only to write questions is there a need for a model.
    options.validate(config, model=questions.DOCUMENTS in (config.data.train, config.data.eval))
    workdir = Workdir(config.workdir)
    options.require_files(config, "data.train", "data.eval")
    with workdir.lock():
        with processes.main_first():
            make(config, workdir)
        print(f"Wrote {workdir / RETRIEVED['train']} and {workdir / RETRIEVED['eval']}. Next: roserag_jax.generate.")


if __name__ == "__main__":
    cli.main(run, __doc__, _ARGUMENTS, workdir=False, model=False)
