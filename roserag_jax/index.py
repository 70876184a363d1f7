"""Build the index of a corpus, or bring it up to date.

    python -m roserag_jax.index --config.retrieve.corpus=PATH [--config.index=FOLDER]

Reads the corpus (rows, a folder of documents, or hf://) once and writes its passages and their BM25 index to the folder
(by default one in the user's cache), which `retrieve`, `answer`, `evaluate` and `train` then open at once. With
`--config.retrieve.retriever=colbert` or `dense` (or `hybrid` of such), the passages' vectors too. Run again, it checks
the index against its digests, adds documents and rows that are new and removes those that are gone; stopped, it
resumes. Several processes share the encoding out. `--config.retrieve.chunk_size`, `chunk_overlap`, `chunk_unit`
and `chunk_title` say how documents are cut.
"""

import time
from pathlib import Path

from roserag_jax import cli
from roserag_jax.distributed import processes
from roserag_jax.errors import UserError
from roserag_jax.retrieval import indexing
from roserag_jax.retrieval.index import Index, disk_size
from roserag_jax.retrieval.registry import update_vectors, vectors_of


def run(config) -> None:
    """The command."""
    if not config.retrieve.corpus:
        raise UserError("config.retrieve.corpus: name the corpus to index.")
    corpus = indexing.open_corpus(config)
    folder = indexing.folder_of(config, corpus)
    with processes.main_first():
        if processes.is_main():
            indexing.update(folder, corpus, verify=True)
    start = time.monotonic()
    index = Index(folder)
    opened = time.monotonic() - start
    if processes.is_main():
        print(f"{folder}: {len(index):,} passages, {_megabytes(folder)}, opened in {opened:.2f} s.")
    for name in vectors_of(config.retrieve):
        vectors = update_vectors(config, name, index, together=True)
        if processes.is_main():
            print(f"{vectors}: {_megabytes(vectors)}.")


def _megabytes(folder: Path) -> str:
    """The size of the files of a folder."""
    return f"{disk_size(folder) / 1e6:,.1f} MB"


if __name__ == "__main__":
    cli.main(run, __doc__, workdir=False, model=False)
