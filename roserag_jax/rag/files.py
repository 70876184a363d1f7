"""Rows of JSON from local files, plain or gzipped, and from data sets of the Hugging Face Hub."""

import gzip
import json
import zlib
from collections.abc import Iterator

from etils import epath

from roserag_jax.errors import UserError, first_line

HUB = "hf://"


def _lines(path: epath.Path) -> Iterator[tuple[int, str]]:
    """Numbered non-empty lines of a plain or gzipped text file."""
    if not path.is_file():
        raise UserError(f"There is no file {path}.")
    try:
        with path.open("rb") as raw, gzip.open(raw) if path.suffix == ".gz" else raw as stream:
            for number, line in enumerate(stream, 1):
                if line.strip():
                    yield number, line.decode("utf-8")
    except (OSError, EOFError, UnicodeDecodeError, zlib.error) as error:
        raise UserError(f"{path} cannot be read: {error}.") from error


def read_json(path: epath.Path) -> list | dict:
    """A file, plain or gzipped, that is one JSON value.

    Raises:
      UserError: it is none.
    """
    try:
        return json.loads("".join(line for _, line in _lines(path)))
    except json.JSONDecodeError as error:
        raise UserError(f"{path}: no valid JSON ({error}).") from error


def read_rows(path: epath.Path) -> Iterator[tuple[str, dict]]:
    """JSON objects, one a line or all in one list, each with the place where it stands.

    Raises:
      UserError: a line is no JSON object; it is named.
    """

    def row(where, value):
        if not isinstance(value, dict):
            raise UserError(f"{where}: a JSON object is expected, this is a {type(value).__name__}.")
        return where, value

    for number, line in _lines(path):
        if number == 1 and line.lstrip().startswith("["):
            yield from (row(f"{path}, row {i}", value) for i, value in enumerate(read_json(path), 1))
            return
        where = f"{path}, line {number}"
        try:
            value = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(f"{where}: no valid JSON ({error.msg} at column {error.colno}).") from error
        yield row(where, value)


def hub_rows(name: str, split: str) -> Iterator[tuple[str, dict]]:
    """Rows of a Hub data set `hf://owner/name[@revision][/configuration][:split]`, through `datasets`."""
    from datasets import load_dataset
    from datasets.exceptions import DatasetsError

    path, _, wanted = name.removeprefix(HUB).partition(":")
    owner, _, rest = path.partition("/")
    dataset, *configuration = rest.split("/")
    dataset, _, revision = dataset.partition("@")
    if not owner or not dataset or len(configuration) > 1:
        raise UserError(f"{name}: a Hub data set is written hf://owner/name[@revision][/configuration][:split].")
    try:
        found = load_dataset(f"{owner}/{dataset}", *configuration, split=wanted or split, revision=revision or None)
    except (OSError, ValueError, RuntimeError, DatasetsError) as error:  # RuntimeError: it has a loading script
        why = first_line(error)
        raise UserError(f"{name} cannot be had from the Hub: {why} Download it and name the local file.") from error
    yield from ((f"{name}, row {i}", row) for i, row in enumerate(found, 1))
