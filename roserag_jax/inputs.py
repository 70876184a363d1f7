"""Digests of the files that options name, for recipes."""

import os
from pathlib import Path

from etils import epath

from roserag_jax import options
from roserag_jax.hub import model_files
from roserag_jax.hub.encoder import encoder_fingerprint
from roserag_jax.rag import documents, files
from roserag_jax.rag.corpora import Chunking
from roserag_jax.retrieval.cache import cache_files
from roserag_jax.retrieval.index import Index
from roserag_jax.retrieval.indexing import chunk_tokenizer
from roserag_jax.retrieval.registry import ENCODERS
from roserag_jax.workdir import digest, digest_of_files


def input_digest(config, option: str) -> dict[str, str]:
    """The digest of the file or folder that an option names, if any; a Hub data set or an address goes by its name.

    Of a folder, the files that are read count, and no others.
    """
    value = options.get(config, option)
    if not isinstance(value, str):  # names of other options
        return {}
    if option.removeprefix("retrieve.") in ENCODERS:
        return {f"config.{option}": encoder_fingerprint(value, option)}
    # An empty path would be the current folder.
    is_file = value and not value.startswith((files.HUB, "http://", "https://"))
    path = epath.Path(value).expanduser() if is_file else None
    if path is None or not path.exists():
        return {}
    if path.is_dir():
        read = cache_files(path) if option == "retrieve.cache" else documents.find(Path(path)).files
        found = digest_of_files(
            {documents.name_below(Path(path), Path(file)): _digest_or_error(epath.Path(file)) for file in read}
        )
    else:
        found = digest(path)
    return {f"config.{option}": found}


def corpus_recipe(config) -> tuple[list[str], dict[str, str]]:
    """The options that name a corpus and say how it is cut, and its digest; of an index alone, that of its passages."""
    if config.retrieve.corpus:
        names = ["retrieve.corpus", *(f"retrieve.chunk_{field}" for field in Chunking._fields)]
        inputs = input_digest(config, "retrieve.corpus")
        if tokenizer := chunk_tokenizer(config):
            inputs["tokenizer of the passages"] = model_files.fingerprint(tokenizer, weights=False)
        return names, inputs
    return [], {"config.index": Index(Path(os.path.expanduser(config.index))).content} if config.index else {}


def _digest_or_error(file: epath.Path) -> str:
    """The digest of a file, or why it cannot be read, which does not keep the others from being read."""
    try:
        return digest(file)
    except OSError as error:
        return str(error.strerror)
