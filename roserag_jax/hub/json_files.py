"""Settings in JSON files that others wrote, read field by field with the type that is expected."""

from pathlib import Path
from typing import Any

from etils import epath

from roserag_jax.errors import UserError, quote
from roserag_jax.rag.files import read_json

_LARGEST = 64 << 20  # bytes; the index of a model of a million tensors is about this large


def read_json_object(file: Path | epath.Path) -> dict[str, Any]:
    """Read a JSON file that holds one object; keys that are null are left out.

    Raises:
      UserError: it cannot be read, is too large, is cut off or is something else.
    """
    file = epath.Path(file)
    try:
        if file.stat().length > _LARGEST:
            raise UserError(f"{file} is larger than {_LARGEST >> 20} MB, which no file of a model's settings is.")
        value = read_json(file)
    except OSError as error:
        raise UserError(f"{file} cannot be read ({error.strerror}).") from error
    if not isinstance(value, dict):
        raise UserError(f"{file} is not a JSON object; download or write it again.")
    return value


class Fields:
    """The fields of one JSON object, each read with its type; `None` and an absent field are the same."""

    def __init__(self, values: dict[str, Any], where: str):
        self.values, self.where = values, where

    def _read(self, name: str, default, what: str, fits) -> Any:
        value = self.values.get(name)
        if value is None:
            return default
        if not fits(value):
            raise UserError(f"{self.where}: {name}={quote(value)} is not {what}.")
        return value

    def integer(self, name: str, default: int | None, least: int = 0, most: int = 1 << 24) -> int | None:
        """Read a whole number from `least` to `most`."""
        fits = lambda v: isinstance(v, int) and not isinstance(v, bool) and least <= v <= most
        return self._read(name, default, f"a whole number from {least} to {most}", fits)

    def number(self, name: str, default: float | None, least: float, most: float) -> float | None:
        """Read a finite number from `least` to `most`."""
        number = lambda v: isinstance(v, int | float) and not isinstance(v, bool)
        fits = lambda v: number(v) and least <= v <= most
        return self._read(name, default, f"a number from {least:g} to {most:g}", fits)

    def flag(self, name: str, default: bool) -> bool:
        """Read true or false."""
        return self._read(name, default, "true or false", lambda v: isinstance(v, bool))

    def text(self, name: str, default: str | None) -> str | None:
        """Read a string."""
        return self._read(name, default, "a string", lambda v: isinstance(v, str))

    def integers(self, name: str) -> tuple[int, ...]:
        """Read a whole number of 31 bits or a list of them; () where there is none."""
        whole = lambda v: isinstance(v, int) and not isinstance(v, bool) and 0 <= v < 1 << 31
        fits = lambda v: whole(v) or (isinstance(v, list) and all(map(whole, v)))
        value = self._read(name, [], "a whole number from 0 on or a list of them", fits)
        return tuple(value) if isinstance(value, list) else (value,)
