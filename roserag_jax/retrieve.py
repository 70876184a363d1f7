"""Fetch the passages of every question.

    python -m roserag_jax.retrieve --config configs/quickstart.py
    python -m roserag_jax.retrieve --serve 8000 --config.retrieve.corpus=PATH

Writes `retrieved.jsonl` (training questions) and `retrieved_eval.jsonl` (held-out ones) in the workdir, rows of
`{id, question, golden_answers, contexts: [{title, text, score?, is_supporting?}], gold_count?}`; the last is how many
gold passages a question has, found or not. With `--serve` it offers the corpus to other runs instead
(`--config.retrieve.retriever=server --config.retrieve.server=http://HOST:8000`), with `--host 0.0.0.0` to other
machines.
"""

from absl import flags

from roserag_jax import cli, options
from roserag_jax.distributed import processes
from roserag_jax.errors import UserError
from roserag_jax.inputs import corpus_recipe, input_digest
from roserag_jax.progress import Progress
from roserag_jax.rag import questions
from roserag_jax.retrieval.registry import RETRIEVERS, found_nothing, members, open_retriever, searches_corpus
from roserag_jax.retrieval.server import serve
from roserag_jax.workdir import RETRIEVED, Recipe, Workdir, to_jsonl

_BATCH = 1000  # questions between two lines of progress
_SERVE = flags.DEFINE_integer("serve", None, "port on which to offer the corpus; nothing is written then", 0, 65535)
_HOST = flags.DEFINE_string("host", "127.0.0.1", "address on which --serve listens; 0.0.0.0 is open to other machines")


def recipe(config, split: str) -> Recipe:
    """What the retrieved rows of a split are made from."""
    names = [f"data.{split}", f"data.{split}_rows"]
    names += ["select.labels"] * (split == "train" and config.select.labels != "gold")  # rows need no answer then
    inputs = {}
    if config.data[split] == "synthetic":
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
        if before and config.data[split] == "synthetic" != before["options"][f"data.{split}"]:
            raise UserError(
                f"config.data.{split}='synthetic', but {workdir / name} is of {before['options'][f'data.{split}']}: "
                "give every command the same options (best in a file for --config), or this one another workdir."
            )
        wanted = recipe(config, split)
        if workdir.is_up_to_date(name, wanted):
            continue
        rows = questions.questions(config, split)
        if config.retrieve.retriever != "given":
            index = index or RETRIEVERS[config.retrieve.retriever].build(config)
            found = _search(index, [row["question"] for row in rows], config.retrieve.k, split)
            if nothing := found_nothing(found):
                print(nothing)
            rows = _flagged(rows, found)
        workdir.publish(name, wanted, to_jsonl(rows), len(rows))
        print(f"{name}: {len(rows)} questions, {sum(len(r['contexts']) for r in rows) / len(rows):.1f} passages each.")


def _search(index, queries: list[str], k: int, split: str) -> list[list[dict]]:
    """The passages found for each query, with progress."""
    progress, found = Progress(f"retrieve {split}", len(queries), "questions"), []
    for start in range(0, len(queries), _BATCH):
        found += index.search(queries[start : start + _BATCH], k)
        progress.update(len(found))
    return found


def _flagged(rows: list[dict], found: list[list[dict]]) -> list[dict]:
    """Give rows the passages that were found for them, flagged as gold where they are gold passages of the row.

    Where no passage that was found is a gold passage of any row, the corpus has other texts than the rows (another
    dump, or chunks of it), and none is flagged.
    """
    known = lambda c: (c["title"], c["text"])
    gold = [{known(c) for c in row.get("contexts", []) if c.get("is_supporting")} for row in rows]
    hits = any(known(c) in own for own, contexts in zip(gold, found, strict=True) for c in contexts)
    if any(gold) and not hits:
        print("None of the passages found is a gold passage of its question, word for word: none is flagged as gold.")
    flag = lambda c, own: {**c, "is_supporting": known(c) in own} if own and hits else c
    both = zip(rows, gold, found, strict=True)
    total = lambda own: {"gold_count": len(own)} if own and hits else {}
    return [{**row, "contexts": [flag(c, own) for c in contexts]} | total(own) for row, own, contexts in both]


def _serve(config, port: int) -> None:
    """Offer the index of the corpus, or another retriever, until the command is stopped."""
    retrieve = config.retrieve
    if searches_corpus(retrieve) and not (retrieve.corpus or config.index):
        raise UserError("--serve: name a corpus, --config.retrieve.corpus=PATH, or an index.")
    retriever = RETRIEVERS["cache"].build(config) if retrieve.retriever == "cache" else open_retriever(config)
    try:
        server = serve(retriever.search, port, _HOST.value, topk=retrieve.k)
    except OSError as error:
        raise UserError(f"--serve {port} on {_HOST.value}: {error.strerror or error}; name another.") from error
    with server:
        print(f"Serving POST /retrieve on {_HOST.value}:{server.server_address[1]}.", flush=True)
        server.serve_forever()


def run(config) -> None:
    """The command."""
    if _SERVE.value is not None:
        _serve(config, _SERVE.value)
        return
    options.validate(config)
    workdir = Workdir(config.workdir)
    options.require_files(config, "data.train", "data.eval")
    with workdir.lock():
        with processes.main_first():
            make(config, workdir)
        print(f"Wrote {workdir / RETRIEVED['train']} and {workdir / RETRIEVED['eval']}. Next: roserag_jax.generate.")


if __name__ == "__main__":
    cli.main(run, __doc__, workdir=False, model=False)
