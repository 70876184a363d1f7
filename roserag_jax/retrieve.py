"""Fetch the passages of every question.

    python -m roserag_jax.retrieve --config configs/quickstart.py

Writes `retrieved.jsonl` (training questions) and `retrieved_eval.jsonl` (held-out ones) in the workdir, rows of
`{id, question, golden_answers, contexts: [{title, text, score?, is_supporting?}]}`.
"""

import hashlib
import json
from pathlib import Path

from etils import epath

from roserag_jax import cli, options
from roserag_jax.distributed import processes
from roserag_jax.errors import UserError
from roserag_jax.rag import documents, files, questions
from roserag_jax.retrieval.cache import cache_files
from roserag_jax.retrieval.registry import RETRIEVERS, found_nothing
from roserag_jax.workdir import Recipe, Workdir, digest, to_jsonl

ARTIFACTS = {"train": "retrieved.jsonl", "eval": "retrieved_eval.jsonl"}


def recipe(config, split: str) -> Recipe:
    """What the retrieved rows of a split are made from."""
    names = [f"data.{split}", f"data.{split}_rows"]
    inputs = {}
    if config.data[split] == "synthetic":
        names += [name for name, _ in options.walk() if name.startswith("data.synthetic")]
    else:
        names.append("data.format")
        inputs |= file_digest(config, f"data.{split}")
    names.append("retrieve.retriever")
    if config.retrieve.retriever != "given":
        names.append("retrieve.k")
        for option in RETRIEVERS[config.retrieve.retriever].needs:
            names.append(f"retrieve.{option}")
            inputs |= file_digest(config, f"retrieve.{option}")
    if config.retrieve.corpus:  # to search, or to look StrategyQA's paragraphs up
        names.append("retrieve.corpus")
        inputs |= file_digest(config, "retrieve.corpus")
    return Recipe(options.subset(config, *names), inputs)


def file_digest(config, option: str) -> dict[str, str]:
    """The digest of the file or folder that an option names, if any; a Hub data set goes by its name.

    Of a folder, the files that are read count, and no others.
    """
    value = options.get(config, option)
    # An empty path would be the current folder.
    path = epath.Path(value).expanduser() if value and not value.startswith(files.HUB) else None
    if path is None or not path.exists():
        found = ""
    elif path.is_dir():
        read = cache_files(path) if option == "retrieve.cache" else documents.find(Path(path)).files
        names = {documents.name_below(Path(path), Path(file)): _digest_or_error(file) for file in read}
        found = hashlib.sha256(json.dumps(names).encode()).hexdigest()
    else:
        found = digest(path)
    return {f"config.{option}={value}": found}


def _digest_or_error(file) -> str:
    """The digest of a file, or why it cannot be read, which does not keep the others from being read."""
    try:
        return digest(epath.Path(file))
    except OSError as error:
        return str(error.strerror)


def make(config, workdir: Workdir, splits=("train", "eval")) -> None:
    """Bring the retrieved rows of the splits up to date.

    Raises:
      UserError: synthetic questions would take the place of user data.
    """
    index = None
    for split in splits:
        name = ARTIFACTS[split]
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
            index = index or RETRIEVERS[config.retrieve.retriever].build(config.retrieve)
            found = index.search([row["question"] for row in rows], config.retrieve.k)
            if nothing := found_nothing(found):
                print(nothing)
            rows = _flagged(rows, found)
        workdir.publish(name, wanted, to_jsonl(rows), len(rows))
        print(f"{name}: {len(rows)} questions, {sum(len(r['contexts']) for r in rows) / len(rows):.1f} passages each.")


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
    return [{**row, "contexts": [flag(c, own) for c in contexts]} for row, own, contexts in both]


def run(config) -> None:
    """The command."""
    workdir = Workdir(config.workdir)
    options.require_files(config, "data.train", "data.eval")
    with workdir.lock():
        with processes.main_first():
            make(config, workdir)
        print(f"Wrote {workdir / ARTIFACTS['train']} and {workdir / ARTIFACTS['eval']}. Next: roserag_jax.generate.")


if __name__ == "__main__":
    cli.main(run, __doc__)
